"""Diagnostics: values that are not finite, and steps that are too small."""

import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flashoptim_jax import paths
from flashoptim_jax.storage import codec, precision
from flashoptim_jax.storage import state as state_lib


class NumericsError(ValueError):
  """Some leaves are not finite, or can't be moved."""


class NonFiniteLeaf(NamedTuple):
  """An array that holds NaN or infinity.

  Attributes:
    path: ``params`` or ``opt_state`` and the array's path there, its keys joined by
      slashes.
    non_finite: How many of its elements are not finite. A scale of 8-bit moments that
      is NaN stands for its whole group.
    size: How many it has.
  """

  path: str
  non_finite: int
  size: int

  def __str__(self):
    return f"{self.path}: {self.non_finite} of {self.size} elements are not finite"


class StalledLeaf(NamedTuple):
  """A leaf whose largest weight a step of the learning rate can't move.

  Attributes:
    path: The leaf's path, its keys joined by slashes.
    largest: Its largest finite magnitude.
    spacing: Distance of neighbouring numbers at that magnitude, in the precision in
      which a step is added.
    smallest_learning_rate: A step of this size moves it: half the spacing.
  """

  path: str
  largest: float
  spacing: float
  smallest_learning_rate: float

  def __str__(self):
    return (
      f"{self.path}: largest weight {self.largest:.3g}; steps below"
      f" {self.smallest_learning_rate:.3g} are rounded away"
    )


class NumericsReport(tuple[NonFiniteLeaf | StalledLeaf, ...]):
  """What was found, a tuple: empty, and false, if there is nothing."""

  def __str__(self):
    if not self:
      return "Every value is finite, and the learning rate can move every leaf."
    return "\n".join(map(str, self))


def nonfinite_leaves(
  params: optax.Params, opt_state: optax.OptState = None
) -> tuple[NonFiniteLeaf, ...]:
  """Lists the arrays of parameters and state that hold NaN or infinity.

  Args:
    params: The parameters, or any tree: concrete arrays.
    opt_state: The optimizer's state, of any transformation, or None.

  Returns:
    One :class:`NonFiniteLeaf` for each such array. Arrays that are not floating point
    are passed over.
  """
  found = []
  for root, tree in (("params", params), ("opt_state", opt_state)):
    for path, leaf in jax.tree.leaves_with_path(tree):
      if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
        continue
      count = int(jnp.sum(~jnp.isfinite(leaf)))
      if count:
        where = f"{root}/{paths.name(path)}" if path else root
        found.append(NonFiniteLeaf(where, count, jnp.size(leaf)))
  return tuple(found)


def check_numerics(
  params: optax.Params,
  opt_state: optax.OptState,
  learning_rate: float | jax.Array | Callable[[Any], Any],
  *,
  raise_error: bool = False,
) -> NumericsReport:
  """Lists arrays that are not finite, and leaves whose steps are rounded away.

  A step of Lion moves a weight by the learning rate, a step of Adam by about that,
  and by a tenth to a third of it where gradients are mostly noise. It is added in
  float32. Where it is less than half the distance between neighbouring float32
  numbers, at the leaf's largest weight, the weight stays where it is, as with Optax on
  float32 weights. What 24-bit master weights cut off below float32 is dithered: it
  adds up over steps and is not lost, nor is what 16-bit ones do. Without master weights
  (``Storage(master_bits=None)``) a step must be half of the parameter's own spacing.

  Args:
    params: The parameters: concrete arrays.
    opt_state: The state of the transformation that trains them.
    learning_rate: The learning rate, or a schedule, which is taken at the state's
      count of updates.
    raise_error: Whether to raise instead of returning a report of something.

  Returns:
    One :class:`NonFiniteLeaf` for each array of parameters or state that is not
    finite, then one :class:`StalledLeaf` for each leaf that can't be moved.

  Raises:
    NumericsError: If asked to, and something was found.
    ValueError: If there is no flash state, or it does not match ``params``, or the
      learning rate is no number.
  """
  paths.require_arrays(params)
  states = state_lib.flash_states(opt_state)
  bits = _master_bits(params, states)
  rate = _at(learning_rate, max(int(state.count) for state in states))
  masters = precision.to_fp32(params, opt_state)
  originals = state_lib.by_path(params)
  stalled = []
  for path, master in jax.tree.leaves_with_path(masters):
    dtype = originals[path].dtype
    if not jnp.issubdtype(dtype, jnp.floating) or not master.size:
      continue
    magnitude = jnp.where(jnp.isfinite(master), jnp.abs(master), 0)
    largest = float(jnp.max(magnitude))
    spacing = _spacing(largest, dtype, bits.get(path))
    if rate < spacing / 2:
      stalled.append(StalledLeaf(paths.name(path), largest, spacing, spacing / 2))
  report = NumericsReport([*nonfinite_leaves(params, opt_state), *stalled])
  if report and raise_error:
    raise NumericsError(
      f"With a learning rate of {rate:.3g}, {len(report)} leaves need attention:"
      f"\n{report}"
    )
  return report


def _master_bits(
  params: optax.Params, states: Sequence[state_lib.AnyState]
) -> dict[jax.tree_util.KeyPath, int | None]:
  """Bits of parameters' master weights, by path, where their state says so."""
  bits: dict[jax.tree_util.KeyPath, int | None] = {}
  for state in states:
    storage, owned = state.format.storage, [state.correction]
    if storage.master_bits == 16:
      # Nothing but its moments says what it updates; without any, it may be all.
      stored = state_lib.stored_moments(state)
      owned = [moment.values for moment in stored] or [params]
    for tree in owned:
      bits |= dict.fromkeys(state_lib.by_path(tree), storage.master_bits)
  return bits


def _at(learning_rate: Any, count: int) -> float:
  """The learning rate as a number."""
  rate = learning_rate(count) if callable(learning_rate) else learning_rate
  if not (isinstance(rate, numbers.Real) or getattr(rate, "shape", None) == ()):
    raise ValueError(f"learning_rate is {rate!r}; expected a number or a schedule.")
  return float(rate)


def _spacing(magnitude: float, dtype: Any, master_bits: int | None) -> float:
  """Distance of neighbours at a magnitude, where half of it is lost in a sum."""
  info = jnp.finfo(dtype)
  exponent = int(jnp.frexp(jnp.float32(max(magnitude, float(info.tiny))))[1]) - 1
  if master_bits is None or info.bits != 16:
    return 2.0 ** (exponent - info.nmant)
  if master_bits == 24 and dtype == jnp.float16:
    # A correction counts units of float16's half place. Sums are rounded to what
    # float32 keeps of a unit.
    unit = 2.0 ** (exponent - info.nmant - 1) / codec.levels_float16(jnp.int8)
    return unit * 2 * codec.HALF_OF_FLOAT32
  return 2.0 ** (exponent - jnp.finfo(jnp.float32).nmant)
