"""Diagnostics: leaves that a learning rate is too small for."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from flashoptim_jax import codec, paths, precision
from flashoptim_jax import state as state_lib


class NumericsError(ValueError):
  """Updates of some leaves round to nothing."""


class StalledLeaf(NamedTuple):
  """A leaf whose largest weight a step of the learning rate can't move.

  Attributes:
    path: The leaf's path, its keys joined by slashes.
    largest: Its largest finite magnitude.
    spacing: Distance of neighbouring master weights at that magnitude.
    smallest_learning_rate: A step of this size moves it: half the spacing, or at 24
      bits, where smaller steps add up, half of float32's.
  """

  path: str
  largest: float
  spacing: float
  smallest_learning_rate: float

  def __str__(self):
    return (
        f"{self.path}: largest weight {self.largest:.3g}, spacing of its master"
        f" weights {self.spacing:.3g}; steps below"
        f" {self.smallest_learning_rate:.3g} round to nothing"
    )


class NumericsReport(tuple[StalledLeaf, ...]):
  """The stalled leaves, a tuple: empty, and false, if there are none."""

  def __str__(self):
    if not self:
      return "Every leaf can be moved by the learning rate."
    return "\n".join(map(str, self))


def check_numerics(
    params: optax.Params,
    opt_state: optax.OptState,
    learning_rate: float,
    *,
    raise_error: bool = False,
) -> NumericsReport:
  """Lists the leaves whose updates round to nothing.

  An update of Adam or Lion moves a weight by about the learning rate. Where that
  is less than half the distance between neighbouring master weights (at 24 bits,
  where smaller steps add up, between neighbouring float32 numbers), at the leaf's
  largest weight, the weight stays where it is. Master bits (``Storage.master_bits``),
  if there are none, or a larger learning rate help.

  Args:
    params: The parameters: concrete arrays.
    opt_state: The state of the transformation that trains them.
    learning_rate: The learning rate.
    raise_error: Whether to raise instead of returning a report with leaves.

  Returns:
    One :class:`StalledLeaf` for each such leaf.

  Raises:
    NumericsError: If asked to, and there are such leaves.
    ValueError: If there is no flash state, or it does not match ``params``.
  """
  bits = {}
  for state in state_lib.flash_states(opt_state):
    for leaf in state_lib.by_path(state.correction):
      bits[leaf] = state.format.storage.master_bits
  masters = precision.to_fp32(params, opt_state)
  originals = state_lib.by_path(params)
  stalled = []
  for path, master in jax.tree.leaves_with_path(masters):
    leaf = paths.name(path)
    dtype = originals[leaf].dtype
    if not jnp.issubdtype(dtype, jnp.floating) or not master.size:
      continue
    magnitude = jnp.where(jnp.isfinite(master), jnp.abs(master), 0)
    largest = float(jnp.max(magnitude))
    spacing = _spacing(largest, dtype, bits.get(leaf))
    adds_up = bits.get(leaf) == 24
    smallest = spacing * (codec.HALF_OF_FLOAT32 if adds_up else 0.5)
    if learning_rate < smallest:
      stalled.append(StalledLeaf(leaf, largest, spacing, smallest))
  report = NumericsReport(stalled)
  if report and raise_error:
    raise NumericsError(
        f"A learning rate of {learning_rate:.3g} can't move the largest weights"
        f" of {len(report)} leaves:\n{report}"
    )
  return report


def _spacing(magnitude: float, dtype, master_bits: int | None) -> float:
  """Distance from a magnitude to the next larger master weight."""
  info = jnp.finfo(dtype)
  mantissa = info.nmant
  if master_bits is not None:
    # A float16 correction divides half a unit in the last place by 127 or 32767.
    extra = {24: 8, 32: 16}[master_bits]
    mantissa = min(mantissa + extra, jnp.finfo(jnp.float32).nmant)
  exponent = jnp.frexp(jnp.float32(max(magnitude, float(info.tiny))))[1] - 1
  return 2.0 ** (int(exponent) - mantissa)
