"""The fused update of a leaf, one module per backend, and the choice of one.

A backend takes leaves and returns :class:`UpdatedLeaf` objects; to add one, write a
module with such a function, and say in :func:`update_leaves` when it is used.
"""

import functools
import logging
from collections.abc import Sequence
from typing import NamedTuple

import jax

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
) -> list[UpdatedLeaf]:
  """Updates every leaf.

  Args:
    rule: The optimizer's arithmetic.
    storage: The state's storage.
    leaves: The leaves.
    scalars: The rule's hyperparameters, with ``learning_rate`` and
      ``weight_decay``; numbers or arrays of shape ().
    implementation: One of ``NAMES`` or None.
    new_params: Whether ``result`` is the new parameter or the update.

  Raises:
    ValueError: If the implementation asked for cannot update a leaf.
  """
  from flashoptim_jax.kernels import mosaic_tpu, triton, xla

  chosen = [_choose(leaf, storage, implementation) for leaf in leaves]
  pairs = list(zip(leaves, chosen, strict=True))
  launched = [leaf for leaf, name in pairs if name == "triton"]
  results = iter(
      triton.update(rule, storage, launched, scalars, new_params)
      if launched
      else ()
  )
  one_by_one = {"xla": xla.update, "mosaic_tpu": mosaic_tpu.update}
  return [
      next(results)
      if name == "triton"
      else one_by_one[name](rule, storage, leaf, scalars, new_params)
      for leaf, name in pairs
  ]


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
  is_fit = _is_local() and fused[name].unsupported(leaf, storage) is None
  if not is_fit or (name == "mosaic_tpu" and not mosaic_tpu.pays(leaf)):
    return "xla"
  return name


def _is_local() -> bool:
  """Whether arrays are certain to lie whole on one device.

  A custom call on a sharded array would have XLA gather it.
  """
  if jax.device_count() == 1:
    return True
  mesh = jax.sharding.get_abstract_mesh()
  manual = jax.sharding.AxisType.Manual
  return not mesh.empty and all(kind == manual for kind in mesh.axis_types)


@functools.cache
def _log_once(name: str, reason: str) -> None:
  logging.getLogger("flashoptim_jax").info(
      "The kernel %r is not used (%s); XLA updates the parameters.", name, reason
  )
