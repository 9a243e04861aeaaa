"""The choice of a backend for each leaf."""

import functools
import importlib
import itertools
import logging
from collections.abc import Mapping, Sequence
from operator import not_
from typing import Any, NamedTuple, cast

import jax

# Not used here. Importing it changes JAX's configuration, by which compiled programs
# are told apart: in the middle of a step, it would have the step compiled again.
import jax.experimental.pallas.tpu
from jax.sharding import NamedSharding

from flashoptim_jax.kernels import by_platform, offload, partitioning, resharding
from flashoptim_jax.kernels.base import (
  Backend,
  Leaf,
  Unavailable,
  UpdatedLeaf,
  UpdateSpec,
  result_types,
  split_scalars,
)
from flashoptim_jax.kernels.by_platform import Place
from flashoptim_jax.rules import Scalars


class _Entry(NamedTuple):
  """A backend in the table.

  Attributes:
    module: Imported on first use: some have optional dependencies.
    platform: Where it is the first choice; None if nowhere.
  """

  module: str
  platform: str | None


_FALLBACK = "xla"
_BACKENDS = {
  _FALLBACK: _Entry("flashoptim_jax.kernels.xla", None),
  "mosaic_tpu": _Entry("flashoptim_jax.kernels.mosaic_tpu", "tpu"),
  "triton": _Entry("flashoptim_jax.kernels.triton", "gpu"),
}
NAMES = tuple(_BACKENDS)
_FIRST_CHOICE = {entry.platform: name for name, entry in _BACKENDS.items()}


def _backend(name: str) -> Backend:
  return cast(Backend, importlib.import_module(_BACKENDS[name].module))


def check_implementation(implementation: str | None) -> None:
  """Raises a ValueError for a name that is not an implementation's."""
  if implementation is not None and implementation not in NAMES:
    raise ValueError(
      f"implementation is {implementation!r}; expected None (the best that is"
      f" available) or one of {', '.join(map(repr, NAMES))}."
    )


def update_leaves(
  spec: UpdateSpec,
  leaves: Sequence[Leaf],
  scalars: Scalars,
  shardings: Mapping[str, resharding.Shardings],
) -> list[UpdatedLeaf]:
  """Updates every leaf, where its state is.

  Args:
    spec: What the updates have in common.
    leaves: The leaves.
    scalars: The rule's hyperparameters, with ``learning_rate`` and
      ``weight_decay``, and :func:`flashoptim_jax.storage.codec.rounding_scalars`;
      numbers or arrays of shape ().
    shardings: Shardings of leaves by path, as far as the user gave them.

  Raises:
    ValueError: If the implementation asked for cannot update a leaf.
  """
  known = [
    resharding.known(leaf.param, leaf.stored, shardings.get(leaf.path))
    for leaf in leaves
  ]
  leaves = list(map(resharding.to_state, leaves, known))
  of_state = {name: sharding.state for name, sharding in shardings.items()}
  update = functools.partial(_update_resident, spec, of_state, scalars=scalars)
  on_host = [offload.is_hosted(leaf) for leaf in leaves]
  resident = iter(update(list(itertools.compress(leaves, map(not_, on_host)))))
  streamed = iter(offload.update(update, list(itertools.compress(leaves, on_host))))
  updated = [next(streamed if host else resident) for host in on_host]
  return list(map(resharding.from_state, updated, known))


def _update_resident(
  spec: UpdateSpec,
  shardings: Mapping[str, NamedSharding],
  leaves: Sequence[Leaf],
  scalars: Scalars,
) -> list[UpdatedLeaf]:
  """Updates leaves whose state is on the device."""
  if not leaves:
    return []
  for leaf in leaves:
    _check_forced(leaf, spec)
  place = _known_place(leaves, shardings)
  if place is not None:
    return _update_at(place, spec, shardings, leaves, scalars)
  return _update_anywhere(spec, leaves, scalars)


def _known_place(
  leaves: Sequence[Leaf], shardings: Mapping[str, NamedSharding]
) -> Place | None:
  """Where leaves on a mesh are; None where there is none."""
  meshes = [jax.sharding.get_abstract_mesh()]
  for leaf in leaves:
    if leaf.path in shardings:
      meshes.append(shardings[leaf.path].mesh.abstract_mesh)
    meshes += [jax.typeof(array).sharding.mesh for array in (leaf.param, leaf.grad)]
  mesh = next((mesh for mesh in meshes if not mesh.empty), None)
  return None if mesh is None else by_platform.place_of_mesh(mesh)


class _Update(NamedTuple):
  """An update of leaves that are on no mesh, as a function of their arrays."""

  spec: UpdateSpec
  numbers: tuple[tuple[str, float], ...]
  treedef: Any

  def __call__(self, place: Place, *arrays: Any) -> list[jax.Array]:
    leaves, scalars = self.treedef.unflatten(arrays)
    scalars |= dict(self.numbers)
    return jax.tree.leaves(_update_at(place, self.spec, {}, leaves, scalars))


def _update_anywhere(
  spec: UpdateSpec, leaves: Sequence[Leaf], scalars: Scalars
) -> list[UpdatedLeaf]:
  """Updates leaves that are on no mesh, wherever they turn out to be."""
  numbers, traced = split_scalars(scalars)
  arrays, treedef = jax.tree.flatten((list(leaves), traced))
  update = _Update(spec, numbers, treedef)
  results_treedef: Any
  types, results_treedef = jax.tree.flatten(
    [result_types(jax.tree.map(jax.typeof, leaf), spec) for leaf in leaves]
  )

  @jax.custom_jvp
  def call(*arrays):
    return by_platform.call(update, arrays, types)

  @call.defjvp
  def jvp(primals, tangents):
    # Kernels have no derivatives.
    plain = update._replace(spec=spec._replace(implementation=_FALLBACK))
    anywhere = Place(None, jax.device_count(), None)
    return jax.jvp(lambda *arrays: plain(anywhere, *arrays), primals, tangents)

  del jvp
  return results_treedef.unflatten(call(*arrays))


def _update_at(
  place: Place,
  spec: UpdateSpec,
  shardings: Mapping[str, NamedSharding],
  leaves: Sequence[Leaf],
  scalars: Scalars,
) -> list[UpdatedLeaf]:
  """Updates leaves in a place that is known."""

  def with_backend(name):
    return functools.partial(_backend(name).update, spec, place=place)

  group_size = spec.storage.group_size
  members: dict[str, list[int]] = {}
  updated: dict[int, UpdatedLeaf] = {}
  for i, leaf in enumerate(leaves):
    partitioned = partitioning.is_partitioned(leaf, shardings, place.devices)
    name = _choose(leaf, spec, place, partitioned)
    if name == _FALLBACK and partitioning.xla_can_partition(
      leaf, shardings, group_size, place.devices
    ):
      (updated[i],) = with_backend(name)([leaf], scalars)
    else:
      members.setdefault(name, []).append(i)
  for name, indices in members.items():
    results = partitioning.update(
      with_backend(name),
      [leaves[i] for i in indices],
      scalars,
      shardings,
      spec.storage,
      place.devices,
    )
    updated.update(zip(indices, results, strict=True))
  return [updated[i] for i in range(len(leaves))]


def _check_forced(leaf: Leaf, spec: UpdateSpec) -> None:
  """Raises a ValueError for a leaf that the implementation asked for can't update.

  Where it is to run may not be known yet, but what is raised while tracing shows the
  user from where it came.
  """
  name = spec.implementation
  if name is None:
    return
  reason = _backend(name).unsupported(leaf, spec)
  if reason is not None:
    raise _refusal(leaf, name, reason)


def _refusal(leaf: Leaf, implementation: str, reason: str) -> ValueError:
  return ValueError(
    f"Leaf {leaf.path!r} can't be updated by"
    f" implementation={implementation!r}: {reason}."
  )


def _choose(leaf: Leaf, spec: UpdateSpec, place: Place, partitioned: bool) -> str:
  """The implementation that updates a leaf.

  Args:
    leaf: The leaf.
    spec: What to do with it.
    place: Where it is updated.
    partitioned: Whether a kernel needs XLA to say how the leaf is sharded.
  """
  forced = spec.implementation
  name = forced or _FIRST_CHOICE.get(place.platform, _FALLBACK)
  if name == _FALLBACK:
    return name
  backend = _backend(name)
  unavailable = backend.unavailable(place)
  if unavailable is None and partitioned and not place.is_here():
    unavailable = Unavailable(
      "XLA has no partitioner for kernels where it compiles for devices that are not"
      " there",
      "Say how parameters are sharded with flashoptim_jax.with_shardings, or use"
      " explicit mesh axes.",
    )
  reason = unavailable and unavailable.reason
  reason = reason or backend.unsupported(leaf, spec)
  if forced is not None:
    if reason is not None:
      raise _refusal(leaf, name, reason)
    return name
  if reason is not None or not backend.is_faster(leaf):
    _log_once(name, unavailable)
    return _FALLBACK
  return name


@functools.cache
def _log_once(name: str, unavailable: Unavailable | None) -> None:
  if unavailable is None:
    return
  logging.getLogger("flashoptim_jax").log(
    logging.WARNING if unavailable.remedy else logging.INFO,
    "The kernel %r is not used: %s. XLA updates the parameters, which takes longer. %s",
    name,
    *unavailable,
  )
