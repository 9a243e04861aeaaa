"""The kernel's units, brought from a block into scratch memory and back."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from flashoptim_jax.kernels.base import GROUP_SIZE
from flashoptim_jax.kernels.mosaic_layout import GROUPS, LANES
from flashoptim_jax.kernels.mosaic_plan import Field, Plan
from flashoptim_jax.kernels.mosaic_words import (
  WORD_ROWS,
  as_float,
  as_words,
  from_words,
  stack,
  take_high,
)

_TILE_WORDS = 4  # rows of words in XLA's tiles of 16-bit arrays


class Block:
  """One grid step's view of its block: reads and writes units.

  Attributes:
    plan: How the leaf is updated.
    fields: The arrays that are read, by name.
    inputs: Their blocks, and those of scales.
    results: Blocks of the arrays that are written.
    scratch: Scratch memory by name.
  """

  def __init__(
    self,
    plan: Plan,
    fields: dict[str, Field],
    inputs: dict[str, Any],
    results: dict[str, Any],
    scratch: dict[str, Any],
  ):
    self.plan = plan
    self.fields = fields
    self.inputs = inputs
    self.results = results
    self.scratch = scratch

  def columns(self, unit, tile):
    """The columns of a unit's tile."""
    start = (unit * self.plan.tiles + tile) * LANES
    return pl.ds(pl.multiple_of(start, LANES), LANES)

  def _turn(self, words):
    return words.T if self.plan.turned else words

  def _next(self, field: Field):
    """Where ``read`` brings words to: units that are not turned need not wait."""
    return self.scratch[f"{field.name}_next" if self.plan.turned else field.name]

  def _stays_in_stage(self, field: Field) -> bool:
    """Whether words are read and written where they are brought to, with a stride."""
    return field.itemsize > 1 and not self.plan.turned

  def _new(self, name: str) -> Any:
    """Scratch memory of what an array becomes."""
    return self.scratch.get(f"{name}_new", self.scratch[name])

  def take_next(self) -> None:
    """Makes the unit that ``read`` brought in the current one."""
    if not self.plan.turned:
      return
    for group in range(GROUPS):
      rows = pl.ds(group * GROUP_SIZE, GROUP_SIZE)
      for field in self.fields.values():
        self.scratch[field.name][:, rows, :] = self._next(field)[:, rows, :]

  def read(self, field: Field, unit) -> None:
    """Brings a unit of an array into scratch memory, as transposed words."""
    plan, ref = self.plan, self.inputs[field.name]
    per_tile = plan.words * field.itemsize
    columns = [self.columns(unit, tile) for tile in range(plan.tiles)]
    if field.itemsize == 1:
      words = stack([as_words(ref[:, c]) for c in columns])
      self._next(field)[0] = self._turn(words)
      return
    stage = self.scratch[f"{field.name}_stage"]
    for tile, c in enumerate(columns):
      if self._has_words(field):
        # A tile of XLA's at a time. Registers would take two, which the compiler puts
        # together in memory, and has everything after it wait for that.
        for row in range(0, per_tile, _TILE_WORDS):
          rows = pl.ds(tile * per_tile + row, _TILE_WORDS)
          stage[rows, :] = ref.bitcast(jnp.int32)[row : row + _TILE_WORDS, c]
      else:
        stage[pl.ds(tile * per_tile, per_tile), :] = as_words(ref[:, c])
    if self._stays_in_stage(field):
      return
    out = self._next(field)
    for i in range(field.itemsize):
      out[i] = self._turn(stage[pl.ds(i, LANES, stride=field.itemsize), :])

  def write(self, field: Field, unit) -> None:
    """The inverse of ``read``, but for what is left to ``flush``."""
    if self._stays_in_stage(field):
      return
    plan, ref = self.plan, self.results[field.name]
    words = self._new(field.name)
    per_tile = plan.words * field.itemsize
    if field.itemsize == 1:
      turned = self._turn(words[0])
      for tile in range(plan.tiles):
        part = turned[tile * per_tile : (tile + 1) * per_tile]
        ref[:, self.columns(unit, tile)] = from_words(part, field.dtype)
      return
    stage = self.scratch[f"{field.name}_written"]
    for i in range(field.itemsize):
      stage[pl.ds(i, LANES, stride=field.itemsize), :] = self._turn(words[i])

  def flush(self, field: Field, unit) -> None:
    """Brings what ``write`` left in scratch memory to its place."""
    if field.itemsize == 1:
      return
    plan, ref = self.plan, self.results[field.name]
    per_tile = plan.words * field.itemsize
    stage = self.scratch[f"{field.name}_written"]
    for tile in range(plan.tiles):
      columns = self.columns(unit, tile)
      if self._has_words(field):
        # As words: the compiler would unpack and pack numbers to store them.
        for row in range(0, per_tile, _TILE_WORDS):
          rows = pl.ds(tile * per_tile + row, _TILE_WORDS)
          ref.bitcast(jnp.int32)[row : row + _TILE_WORDS, columns] = stage[rows, :]
      else:
        part = stage[pl.ds(tile * per_tile, per_tile), :]
        ref[:, columns] = from_words(part, field.dtype)

  def _has_words(self, field: Field) -> bool:
    """Whether the block of a 16-bit array can be read and written as words.

    Interpret mode has no rule for this before JAX 0.12, and Pallas can't do it to a
    block without its leading axes.
    """
    return field.itemsize == 2 and not (self.plan.interpret or self.plan.blocks.leading)

  def word(self, name: str, k: int, rows) -> tuple[jax.Array, int]:
    """The words that hold row ``k`` of four, and their numbers' size."""
    field = self.fields[name]
    i = k * field.itemsize // WORD_ROWS
    if self._stays_in_stage(field):
      stage = self.scratch[f"{name}_stage"]
      return stage[self._with_stride(field, i, rows), :], field.itemsize
    return self.scratch[name][i, rows, :], field.itemsize

  def put_word(self, field: Field, i: int, rows, word: jax.Array) -> None:
    """Sets words ``i`` of those of four rows."""
    if self._stays_in_stage(field):
      stage = self.scratch[f"{field.name}_written"]
      stage[self._with_stride(field, i, rows), :] = word
    else:
      self._new(field.name)[i, rows, :] = word

  def _with_stride(self, field: Field, i: int, rows):
    size = field.itemsize
    return pl.ds(rows.start * size + i, rows.size, stride=size)

  def floats(self, name: str, k: int, rows) -> jax.Array:
    """Row ``k`` of four of an array of floats, as float32."""
    word, itemsize = self.word(name, k, rows)
    return as_float(take_high(word, k, itemsize))
