"""The fused update of a leaf, one module per backend, and the choice of one.

A backend takes leaves and returns :class:`UpdatedLeaf` objects; to add one, write a
module with such a function, and say in :func:`update_leaves` when it is used.
"""

import functools
import itertools
import logging
from collections.abc import Mapping, Sequence
from operator import not_
from typing import NamedTuple

import jax
from jax.sharding import NamedSharding

from flashoptim_jax.rules import Rule, Scalars
from flashoptim_jax.storage import Storage

NAMES = ("xla", "mosaic_tpu", "triton")


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
      ``weight_decay``, and :func:`flashoptim_jax.codec.rounding_scalars`; numbers or
      arrays of shape ().
    implementation: One of ``NAMES`` or None.
    new_params: Whether ``result`` is the new parameter or the update.
    shardings: Shardings of parameters by path, as far as the user gave them.

  Raises:
    ValueError: If the implementation asked for cannot update a leaf.
  """
  from flashoptim_jax.kernels import hosted

  update = functools.partial(
      _update_resident,
      rule,
      storage,
      scalars=scalars,
      implementation=implementation,
      new_params=new_params,
      shardings=shardings,
  )
  on_host = [hosted.is_hosted(leaf) for leaf in leaves]
  resident = iter(update(list(itertools.compress(leaves, map(not_, on_host)))))
  streamed = iter(
      hosted.update(update, list(itertools.compress(leaves, on_host)))
  )
  return [next(streamed if host else resident) for host in on_host]


def _update_resident(
    rule: Rule,
    storage: Storage,
    leaves: Sequence[Leaf],
    scalars: Scalars,
    *,
    implementation: str | None,
    new_params: bool,
    shardings: Mapping[str, NamedSharding],
) -> list[UpdatedLeaf]:
  """The same, for leaves whose state is on the device."""
  from flashoptim_jax.kernels import mosaic_tpu, shards, triton, xla

  def with_triton(leaves, scalars):
    return triton.update(rule, storage, leaves, scalars, new_params)

  def with_mosaic_tpu(leaves, scalars):
    return [
        mosaic_tpu.update(rule, storage, leaf, scalars, new_params)
        for leaf in leaves
    ]

  def with_xla(leaves, scalars):
    return xla.update(rule, storage, leaves, scalars, new_params)

  on_shards = {"triton": with_triton, "mosaic_tpu": with_mosaic_tpu, "xla": with_xla}
  members: dict[str, list[int]] = {name: [] for name in on_shards}
  updated: dict[int, UpdatedLeaf] = {}
  for i, leaf in enumerate(leaves):
    name = _choose(leaf, storage, implementation)
    if name == "xla" and shards.xla_can_partition(
        leaf, shardings, storage.group_size
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
      )
      updated.update(zip(indices, results, strict=True))
  return [updated[i] for i in range(len(leaves))]


def _choose(leaf: Leaf, storage: Storage, implementation: str | None) -> str:
  """The implementation that updates a leaf."""
  from flashoptim_jax.kernels import mosaic_tpu, triton

  fused = {"triton": triton, "mosaic_tpu": mosaic_tpu}
  if implementation == "xla":
    return "xla"
  if implementation is not None:
    backend = fused[implementation]
    reason = backend.unavailable() or backend.unsupported(leaf, storage)
    if reason is not None:
      raise ValueError(
          f"Leaf {leaf.path!r} can't be updated by"
          f" implementation={implementation!r}: {reason}."
      )
    return implementation
  name = {"gpu": "triton", "tpu": "mosaic_tpu"}.get(jax.default_backend())
  if name is None:
    return "xla"
  reason = fused[name].unavailable()
  if reason is not None:
    _log_once(name, reason)
    return "xla"
  small = name == "mosaic_tpu" and not mosaic_tpu.pays(leaf)
  return "xla" if small or fused[name].unsupported(leaf, storage) else name


@functools.cache
def _log_once(name: str, reason: str) -> None:
  logging.getLogger("flashoptim_jax").info(
      "The kernel %r is not used (%s); XLA updates the parameters.", name, reason
  )
