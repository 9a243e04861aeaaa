"""The fused update of a leaf, one module per backend, and the choice of one.

A backend takes a :class:`Leaf` and returns an :class:`UpdatedLeaf`; to add one,
write a module with such a function and name it in ``_IMPLEMENTATIONS``.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

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
  return [
      _choose(leaf, implementation)(rule, storage, leaf, scalars, new_params)
      for leaf in leaves
  ]


def _choose(leaf: Leaf, implementation: str | None) -> Any:
  from flashoptim_jax.kernels import xla

  implementations = {"xla": xla.update}
  if implementation is None:
    return xla.update
  if implementation not in implementations:
    raise ValueError(
        f"Leaf {leaf.path!r} can't be updated by implementation="
        f"{implementation!r}: this version has"
        f" {', '.join(map(repr, implementations))} alone."
    )
  return implementations[implementation]
