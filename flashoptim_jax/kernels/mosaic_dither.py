"""Thresholds of elements for the TPU kernel, see ``codec.dither``."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from flashoptim_jax.kernels.mosaic_layout import LANES
from flashoptim_jax.kernels.mosaic_plan import Plan
from flashoptim_jax.kernels.mosaic_words import WORD_ROWS
from flashoptim_jax.storage import codec


class Words:
  """Thresholds of a block's elements, in units of 2⁻³² places.

  They grow by the same from each row, column and leading index to the next. So those of
  a unit are a table, made once in a grid step, and a number that is added to all of it.
  """

  def __init__(self, plan: Plan, h: dict[str, Any], table: Any, first_row: Any):
    self.plan = plan
    self.table = table
    *leading, self.of_row, self.of_column = map(_times_place, plan.blocks.strides or ())
    halves = (h[name].astype(jnp.int32) for name in _HALVES)
    high, low = halves
    self.first = (high << 16) + low + first_row * self.of_row
    for axis, of_index in enumerate(leading):
      self.first += pl.program_id(axis) * of_index
    table[...] = self._of_unit()

  def _of_unit(self) -> jax.Array:
    """Those of the first of four rows, counted from the unit's first element."""
    across, along = (
      lax.broadcasted_iota(jnp.int32, (LANES, LANES), axis) for axis in (0, 1)
    )
    words, columns = (along, across) if self.plan.turned else (across, along)
    tile = words // self.plan.words
    row = WORD_ROWS * (words & (self.plan.words - 1))
    return row * self.of_row + (tile * LANES + columns) * self.of_column

  def __call__(self, step, unit, k: int, rows) -> jax.Array:
    """Those of row ``k`` of four, for some of a unit's rows of words."""
    plan = self.plan
    column = step * plan.blocks.block_columns + unit * (plan.tiles * LANES)
    word = self.first + column * self.of_column
    return self.table[rows, :] + (word + _signed(k * self.of_row))


_HALVES = ("master_rounding", "master_rounding_low")


def _times_place(stride: int) -> int:
  return _signed(stride * codec.PLACE)


def _signed(number: int) -> int:
  """As an int32, which wraps around."""
  return (number + 2**31) % 2**32 - 2**31
