"""The fused update of a leaf, one module per backend, and the choice of one.

A backend takes leaves and returns :class:`UpdatedLeaf` objects; to add one, write a
module with such a function, and say in :func:`update_leaves` when it is used.
"""

import functools
import importlib
import itertools
import logging
from collections.abc import Mapping, Sequence
from operator import not_
from typing import Any, NamedTuple

import jax

# Not used here. Importing it changes JAX's configuration, by which compiled programs
# are told apart: in the middle of a step, it would have the step compiled again.
import jax.experimental.pallas.tpu
import jax.numpy as jnp
from jax.sharding import NamedSharding

from flashoptim_jax.kernels import by_platform
from flashoptim_jax.kernels.by_platform import Place
from flashoptim_jax.rules import Rule, Scalars
from flashoptim_jax.storage.options import Storage

NAMES = ("xla", "mosaic_tpu", "triton")
_FUSED = {"gpu": "triton", "tpu": "mosaic_tpu"}  # by platform


class Leaf(NamedTuple):
  """What the update of one parameter reads.

  Attributes:
    path: The leaf's name, for error messages.
    grad: Gradient, of the parameter's shape, in any float dtype.
    param: The parameter.
    correction: Its correction, or None.
    moments: Pairs of codes and scale, in the rule's order; the scale is None
      where the moment is float32.
    decay: Whether weight decay applies.
  """

  path: str
  grad: jax.Array
  param: jax.Array
  correction: jax.Array | None
  moments: tuple[tuple[jax.Array, jax.Array | None], ...]
  decay: bool

  @property
  def quantized(self) -> bool:
    """Whether its moments are codes and scales."""
    return any(scale is not None for _, scale in self.moments)


class UpdatedLeaf(NamedTuple):
  """What the update of one parameter writes.

  Attributes:
    result: The new parameter, or the update that ``optax.apply_updates`` turns
      the old parameter into the new one with, in the gradient's dtype.
    correction: As in :class:`Leaf`.
    moments: As in :class:`Leaf`.
  """

  result: jax.Array
  correction: jax.Array | None
  moments: tuple[tuple[jax.Array, jax.Array | None], ...]


class Unavailable(NamedTuple):
  """Why a kernel can't run somewhere.

  Attributes:
    reason: Part of a sentence.
    remedy: What the user can do about it, in whole sentences.
  """

  reason: str
  remedy: str = ""


def check_implementation(implementation: str | None) -> None:
  """Raises a ValueError for a name that is not an implementation's."""
  if implementation is not None and implementation not in NAMES:
    raise ValueError(
        f"implementation is {implementation!r}; expected None (the best that is"
        f" available) or one of {', '.join(map(repr, NAMES))}."
    )


def update_leaves(
    rule: Rule,
    storage: Storage,
    leaves: Sequence[Leaf],
    scalars: Scalars,
    *,
    implementation: str | None,
    new_params: bool,
    shardings: Mapping[str, NamedSharding],
) -> list[UpdatedLeaf]:
  """Updates every leaf.

  Args:
    rule: The optimizer's arithmetic.
    storage: The state's storage.
    leaves: The leaves.
    scalars: The rule's hyperparameters, with ``learning_rate`` and
      ``weight_decay``, and :func:`flashoptim_jax.storage.codec.rounding_scalars`;
      numbers or arrays of shape ().
    implementation: One of ``NAMES`` or None.
    new_params: Whether ``result`` is the new parameter or the update.
    shardings: Shardings of parameters by path, as far as the user gave them.

  Raises:
    ValueError: If the implementation asked for cannot update a leaf.
  """
  from flashoptim_jax.kernels import hosted

  options = _Options(rule, storage, implementation, new_params)
  update = functools.partial(_update_resident, options, shardings, scalars=scalars)
  on_host = [hosted.is_hosted(leaf) for leaf in leaves]
  resident = iter(update(list(itertools.compress(leaves, map(not_, on_host)))))
  streamed = iter(
      hosted.update(update, list(itertools.compress(leaves, on_host)))
  )
  return [next(streamed if host else resident) for host in on_host]


class _Options(NamedTuple):
  """What :func:`update_leaves` is told, but for leaves and scalars."""

  rule: Rule
  storage: Storage
  implementation: str | None
  new_params: bool


def _update_resident(
    options: _Options,
    shardings: Mapping[str, NamedSharding],
    leaves: Sequence[Leaf],
    scalars: Scalars,
) -> list[UpdatedLeaf]:
  """Updates leaves whose state is on the device."""
  if not leaves:
    return []
  for leaf in leaves:
    _check_forced(leaf, options)
  place = _known_place(leaves, shardings)
  if place is not None:
    return _update_at(place, options, shardings, leaves, scalars)
  return _update_anywhere(options, leaves, scalars)


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

  options: _Options
  paths: tuple[str, ...]
  decay: tuple[bool, ...]
  numbers: tuple[tuple[str, float], ...]
  treedef: Any

  def __call__(self, place: Place, *arrays: Any) -> list[jax.Array]:
    by_leaf, scalars = self.treedef.unflatten(arrays)
    leaves = [
        Leaf(path, grad, param, correction, moments, decay)
        for path, (grad, param, correction, moments), decay in zip(
            self.paths, by_leaf, self.decay, strict=True
        )
    ]
    scalars |= dict(self.numbers)
    return jax.tree.leaves(_update_at(place, self.options, {}, leaves, scalars))


def _update_anywhere(
    options: _Options, leaves: Sequence[Leaf], scalars: Scalars
) -> list[UpdatedLeaf]:
  """Updates leaves that are on no mesh, wherever they turn out to be."""
  numbers = {n: v for n, v in scalars.items() if isinstance(v, int | float)}
  by_leaf = [(x.grad, x.param, x.correction, x.moments) for x in leaves]
  traced = {n: jnp.asarray(v) for n, v in scalars.items() if n not in numbers}
  arrays, treedef = jax.tree.flatten((by_leaf, traced))
  update = _Update(
      options,
      tuple(leaf.path for leaf in leaves),
      tuple(leaf.decay for leaf in leaves),
      tuple(numbers.items()),
      treedef,
  )
  results_treedef: Any
  types, results_treedef = jax.tree.flatten(
      [_result_types(leaf, options.new_params) for leaf in leaves]
  )

  @jax.custom_jvp
  def call(*arrays):
    return by_platform.call(update, arrays, types)

  @call.defjvp
  def jvp(primals, tangents):
    # Kernels have no derivatives.
    plain = update._replace(options=options._replace(implementation="xla"))
    anywhere = Place(None, jax.device_count(), None)
    return jax.jvp(lambda *arrays: plain(anywhere, *arrays), primals, tangents)

  del jvp
  return results_treedef.unflatten(call(*arrays))


def _result_types(leaf: Leaf, new_params: bool) -> UpdatedLeaf:
  """Types of what the update of a leaf gives."""

  def strong(array, **changes):
    return jax.typeof(array).update(weak_type=False, **changes)

  result = {} if new_params else {"dtype": leaf.grad.dtype}
  return UpdatedLeaf(
      strong(leaf.param, **result),
      *jax.tree.map(strong, (leaf.correction, leaf.moments)),
  )


def _update_at(
    place: Place,
    options: _Options,
    shardings: Mapping[str, NamedSharding],
    leaves: Sequence[Leaf],
    scalars: Scalars,
) -> list[UpdatedLeaf]:
  """Updates leaves in a place that is known."""
  from flashoptim_jax.kernels import shards, xla

  rule, storage, _, new_params = options

  def with_triton(leaves, scalars):
    from flashoptim_jax.kernels import triton

    return triton.update(rule, storage, leaves, scalars, new_params)

  def with_mosaic_tpu(leaves, scalars):
    from flashoptim_jax.kernels import mosaic_tpu

    return mosaic_tpu.update(rule, storage, leaves, scalars, new_params, place)

  def with_xla(leaves, scalars):
    return xla.update(rule, storage, leaves, scalars, new_params, place)

  on_shards = {"triton": with_triton, "mosaic_tpu": with_mosaic_tpu, "xla": with_xla}
  members: dict[str, list[int]] = {name: [] for name in on_shards}
  updated: dict[int, UpdatedLeaf] = {}
  for i, leaf in enumerate(leaves):
    partitioned = shards.is_partitioned(leaf, shardings, place.devices)
    name = _choose(leaf, options, place, partitioned)
    if name == "xla" and shards.xla_can_partition(
        leaf, shardings, storage.group_size, place.devices
    ):
      (updated[i],) = with_xla([leaf], scalars)
    else:
      members[name].append(i)
  for name, indices in members.items():
    if indices:
      results = shards.update(
          on_shards[name],
          [leaves[i] for i in indices],
          scalars,
          shardings,
          storage.group_size,
          place.devices,
      )
      updated.update(zip(indices, results, strict=True))
  return [updated[i] for i in range(len(leaves))]


def _check_forced(leaf: Leaf, options: _Options) -> None:
  """Raises a ValueError for a leaf that the implementation asked for can't update.

  Where it is to run may not be known yet, but what is raised while tracing shows the
  user from where it came.
  """
  rule, storage, name, _ = options
  if name is None or name == "xla":
    return
  reason = _backend(name).unsupported(leaf, rule, storage)
  if reason is not None:
    raise _refusal(leaf, name, reason)


def _backend(name: str) -> Any:
  return importlib.import_module(f"{__name__}.{name}")


def _refusal(leaf: Leaf, implementation: str, reason: str) -> ValueError:
  return ValueError(
      f"Leaf {leaf.path!r} can't be updated by"
      f" implementation={implementation!r}: {reason}."
  )


def _choose(leaf: Leaf, options: _Options, place: Place, partitioned: bool) -> str:
  """The implementation that updates a leaf.

  Args:
    leaf: The leaf.
    options: The options.
    place: Where it is updated.
    partitioned: Whether a kernel needs XLA to say how the leaf is sharded.
  """
  rule, storage, implementation, _ = options
  name = implementation or _FUSED.get(place.platform or "", "xla")
  if name == "xla":
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
  reason = reason or backend.unsupported(leaf, rule, storage)
  if implementation is not None:
    if reason is not None:
      raise _refusal(leaf, name, reason)
    return name
  if reason is not None or not backend.pays(leaf):
    _log_once(name, unavailable)
    return "xla"
  return name


@functools.cache
def _log_once(name: str, unavailable: Unavailable | None) -> None:
  if unavailable is None:
    return
  logging.getLogger("flashoptim_jax").log(
      logging.WARNING if unavailable.remedy else logging.INFO,
      "The kernel %r is not used: %s. XLA updates the parameters, which takes longer."
      " %s",
      name,
      *unavailable,
  )
