"""The contract between an optimizer and the backends that update its leaves.

A backend is a module with the functions of :class:`Backend`. To add one, write it and
put a line into the table of :mod:`flashoptim_jax.kernels.dispatch`.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from flashoptim_jax.kernels.by_platform import Place
from flashoptim_jax.rules import Rule, Scalars
from flashoptim_jax.storage import codec
from flashoptim_jax.storage.options import Storage

GROUP_SIZE = 32  # of all kernels
# Stands for a gain of 0: beside it, a gradient counts for nothing.
LEAST_GAIN = 2.0**-60

# Pairs of values and scale, in the rule's order; the scale is None, and the values are
# no codes, where the moment is float32.
Moments = tuple[tuple[Any, Any], ...]


class UpdateSpec(NamedTuple):
  """What the updates of all leaves of an optimizer have in common.

  Attributes:
    rule: The optimizer's arithmetic.
    storage: The state's storage.
    implementation: The backend's name; None for the best that is available.
    new_params: Whether the result is the new parameter, or the update that
      ``optax.apply_updates`` adds to the old one.
  """

  rule: Rule
  storage: Storage
  implementation: str | None
  new_params: bool

  def written(self, names: Iterable[str]) -> tuple[str, ...]:
    """Which of a leaf's arrays, by :meth:`Leaf.named_arrays`, are updated in place."""
    kept = {"grad"} if self.new_params else {"grad", "param"}
    return tuple(name for name in names if name not in kept)

  def dithers(self, param: Any) -> bool:
    """Whether a parameter's elements are rounded by thresholds of their own."""
    return codec.dithers(param.dtype, self.storage.master_bits)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Leaf:
  """What the update of one parameter reads.

  A pytree of its arrays, or of one thing for each of them, such as its sharding.

  Attributes:
    grad: Gradient, of the parameter's shape, in any float dtype.
    param: The parameter.
    correction: Its correction, or None.
    moments: Its moments.
    path: Static. The parameter's name, for error messages.
    decay: Static. Whether weight decay applies.
    origin: Of a part of a leaf whose elements have thresholds of their own
      (:func:`flashoptim_jax.storage.codec.dither`): the place of its first element in
      the whole leaf, uint32 of shape (). None for whole leaves.
    strides: Static. Beside an origin, how far apart elements are in the whole leaf, by
      axis; None for parts in which they are as in a leaf of their own.
    joined: Static. The sizes of the leaves of which this is made, one after another.
  """

  grad: Any
  param: Any
  correction: Any
  moments: Moments
  path: str = dataclasses.field(metadata={"static": True})
  decay: bool = dataclasses.field(metadata={"static": True})
  origin: Any = None
  strides: tuple[int, ...] | None = dataclasses.field(
    default=None, metadata={"static": True}
  )
  joined: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})

  @property
  def quantized(self) -> bool:
    """Whether its moments are codes and scales."""
    return any(scale is not None for _, scale in self.moments)

  @property
  def stored(self) -> Any:
    """What decides where it is updated: the first of its state, else the parameter."""
    values = [values for values, _ in self.moments]
    found = (x for x in (self.correction, *values) if x is not None)
    return next(found, self.param)

  @property
  def scale_shape(self) -> tuple[int, ...]:
    """Shape of its scales, which all moments have in common."""
    _, scale = self.moments[0]
    return scale.shape

  def named_arrays(self, rule: Rule) -> dict[str, Any]:
    """Its arrays by name, moments by the rule's: ``mu`` and ``mu_scale``."""
    arrays = {"grad": self.grad, "param": self.param}
    if self.correction is not None:
      arrays["correction"] = self.correction
    for moment, (values, scale) in zip(rule.moments, self.moments, strict=True):
      arrays[moment.name] = values
      if scale is not None:
        arrays[f"{moment.name}_scale"] = scale
    return arrays

  def replace(self, **changes: Any) -> "Leaf":
    """The leaf with other values of some attributes."""
    return dataclasses.replace(self, **changes)

  def map_arrays(self, own: Any, scale: Any) -> "Leaf":
    """One thing for each array of the leaf's shape, another for each scale."""
    return self.replace(
      origin=None,
      grad=own,
      param=own,
      correction=None if self.correction is None else own,
      moments=tuple(
        (own, None if stored is None else scale) for _, stored in self.moments
      ),
    )


class UpdatedLeaf(NamedTuple):
  """What the update of one parameter writes.

  Attributes:
    result: The new parameter, or the update, in the gradient's dtype.
    correction: As in :class:`Leaf`.
    moments: As in :class:`Leaf`.
  """

  result: Any
  correction: Any
  moments: Moments

  @classmethod
  def from_named(cls, spec: UpdateSpec, arrays: Mapping[str, Any]) -> "UpdatedLeaf":
    """Of arrays named as in :meth:`Leaf.named_arrays`, or ``"update"``."""
    names = [moment.name for moment in spec.rule.moments]
    return cls(
      arrays["param" if spec.new_params else "update"],
      arrays.get("correction"),
      tuple((arrays[name], arrays.get(f"{name}_scale")) for name in names),
    )


def result_types(leaf: Leaf, spec: UpdateSpec) -> UpdatedLeaf:
  """Types of what the update of a leaf gives, for a leaf of types."""
  leaf = jax.tree.map(lambda aval: aval.update(weak_type=False), leaf)
  result = leaf.param
  if not spec.new_params:
    result = result.update(dtype=leaf.grad.dtype)
  return UpdatedLeaf(result, leaf.correction, leaf.moments)


def split_scalars(
  scalars: Scalars,
) -> tuple[tuple[tuple[str, float], ...], dict[str, jax.Array]]:
  """Scalars that are Python numbers, which are static, and those that are arrays."""
  numbers = {n: v for n, v in scalars.items() if isinstance(v, int | float)}
  arrays = {n: jnp.asarray(v) for n, v in scalars.items() if n not in numbers}
  return tuple(numbers.items()), arrays


class Unavailable(NamedTuple):
  """Why a backend can't run somewhere.

  Attributes:
    reason: Part of a sentence.
    remedy: What the user can do about it, in whole sentences.
  """

  reason: str
  remedy: str = ""


class Backend(Protocol):
  """What a module that updates leaves has to offer."""

  def unavailable(self, place: Place) -> Unavailable | None:
    """Why it can't run in a place; None if it can."""

  def unsupported(self, leaf: Leaf, spec: UpdateSpec) -> str | None:
    """Why it can't update a leaf, as part of a sentence; None if it can."""

  def is_faster(self, leaf: Leaf) -> bool:
    """Whether it is the faster choice for a leaf, compared with XLA."""

  def update(
    self,
    spec: UpdateSpec,
    leaves: Sequence[Leaf],
    scalars: Scalars,
    place: Place,
  ) -> list[UpdatedLeaf]:
    """Updates leaves that lie whole on one device of a place.

    Args:
      spec: What they have in common.
      leaves: The leaves; it supports them all.
      scalars: The rule's hyperparameters, ``learning_rate``, ``weight_decay`` and
        :func:`flashoptim_jax.storage.codec.rounding_scalars`: numbers, or arrays of
        shape ().
      place: Where; it is available there.
    """
