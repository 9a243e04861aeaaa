"""Scales in the kernel: of groups' maxima, for 1024 groups at a time.

Factors and maxima have a row of scratch memory for each group of a lane.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from flashoptim_jax.kernels.base import GROUP_SIZE, LEAST_GAIN
from flashoptim_jax.kernels.mosaic_block import Block
from flashoptim_jax.kernels.mosaic_layout import GROUP_WORDS, GROUPS, LANES
from flashoptim_jax.kernels.mosaic_math import multiples
from flashoptim_jax.kernels.mosaic_words import (
  WORD_ROWS,
  as_bits,
  as_float,
  as_words,
  from_words,
  logical_shift,
  stack,
  take_high,
)
from flashoptim_jax.storage import codec

# Added to a number below 2^22 it leaves its nearest integer in the low bits.
ROUND = 1.5 * 2.0**23


class Unit(NamedTuple):
  """What a moment is computed in multiples of, see :meth:`Scales._unit_of`.

  Attributes:
    gain: The unit.
    decoder: What old codes' factors are multiplied by.
    encoder: What new codes' factors are multiplied by.
  """

  gain: Any
  decoder: Any
  encoder: Any


class Scales:
  """Reads, makes and writes a block's scales, and the factors of its codes.

  Attributes:
    units: Units of moments, by name.
  """

  def __init__(self, block: Block, h: dict[str, Any]):
    self.plan = block.plan
    self.block = block
    self.scratch = block.scratch
    self.h = h
    self.multiples = multiples(self.plan.has_fast_roots)
    moments = self.plan.spec.rule.moments
    self.units = {moment.name: self._unit_of(moment) for moment in moments}

  def _unit_of(self, moment) -> Unit:
    """What a moment is computed in multiples of: its gain.

    An average is computed as power + (decay / gain) · average. Its group's factor is
    multiplied by decay / gain, which saves two products an element.
    """
    fold = self.plan.units_of_gain
    gain = self.h[moment.gain] if fold else 1.0
    if fold:  # At 0, a number beside which a gradient counts for nothing.
      gain = jnp.where(jnp.abs(gain) < LEAST_GAIN, LEAST_GAIN, gain)
    decay = self.h[moment.decay] / gain if fold else 1.0
    is_root = self.plan.spec.storage.companding == "root"
    if moment.kind == "first":
      encoder = jnp.sign(gain) * jnp.sqrt(jnp.abs(gain)) if is_root else gain
      # Of what `_level` takes the smaller of it and a multiple.
      multiple = 1.0 / self.multiples.inverse_root if is_root else 1.0
    else:
      decay, encoder = jnp.sqrt(decay), jnp.sqrt(gain)
      encoder = jnp.sqrt(encoder) if is_root else encoder
      multiple = self.multiples.fourth_root if is_root else self.multiples.root
    return Unit(gain, decay, encoder * (1.0 / multiple))

  def index(self, group, which: int):
    """The row of one of the four groups that a lane has in 32 rows of words."""
    if self.plan.blocks.along_rows:
      return group * GROUPS + which
    return which * GROUPS + group

  def read(self, moment) -> None:
    """Turns a block of scales around, once for the blocks that share it."""
    plan = self.plan
    words, stage = plan.words, self.scratch["stage"]
    scales = self.block.inputs[f"{moment.name}_scale"]
    lanes = scales.shape[-1]
    stage[pl.ds(0, 2 * words), 0:lanes] = as_words(scales[...])
    kept = self.scratch[f"{moment.name}_scale"]
    for half in range(2):
      turned = stage[pl.ds(half, words, stride=2), :].T
      kept[half, :, :, 0:words] = turned.reshape(-1, GROUPS, words)

  def write(self, moment) -> None:
    """The inverse of ``read``."""
    plan = self.plan
    words, stage = plan.words, self.scratch["stage"]
    scales = self.block.results[f"{moment.name}_scale"]
    lanes = scales.shape[-1]
    kept = self.scratch[f"{moment.name}_scale"]
    for half in range(2):
      turned = kept[half].reshape(LANES, LANES).T
      stage[pl.ds(half, words, stride=2), :] = turned[0:words]
    scales[...] = from_words(stage[pl.ds(0, 2 * words), 0:lanes], scales.dtype)

  def _tile(self, step, unit, tile):
    """Index of a tile among those of its block of scales."""
    plan = self.plan
    first = (step % plan.steps_per_scale_block) * (plan.blocks.block_columns // LANES)
    return first + unit * plan.tiles + tile

  def _scales_of_rows(self, ref, unit):
    """For each tile, its scales' place, and their rows among a unit's groups."""
    per_tile = self.plan.words // GROUP_WORDS
    # A leaf of few rows has fewer groups than a block.
    groups = ref.shape[0]
    return [
      ((slice(None), self.block.columns(unit, tile)), slice(start, start + groups))
      for tile, start in enumerate(range(0, WORD_ROWS * GROUPS, per_tile))
    ]

  def decoders(self, moment, step, unit) -> None:
    """Computes the factors by which a unit's codes are decoded.

    Leaves the scales for ``encoders``, which limits new ones by them.
    """
    plan = self.plan
    old_scale = self.scratch[f"{moment.name}_old_scale"]
    if plan.blocks.along_rows:
      ref = self.block.inputs[f"{moment.name}_scale"]
      decoder = self.scratch[f"{moment.name}_decoder"]
      for place, rows in self._scales_of_rows(ref, unit):
        old_scale[rows, :] = ref[place].astype(jnp.float32)
      factor = codec.decode_factor(old_scale[...], moment.kind, plan.spec.storage)
      decoder[...] = factor * self.units[moment.name].decoder
      return
    kept = self.scratch[f"{moment.name}_scale"]
    for half in range(2):
      tiles = [
        kept[half, self._tile(step, unit, tile), :, 0 : plan.words]
        for tile in range(plan.tiles)
      ]
      word = tiles[0] if len(tiles) == 1 else jnp.concatenate(tiles, axis=1)
      for odd in range(2):
        s = as_float(take_high(word, odd, 2))
        factor = codec.decode_factor(s, moment.kind, plan.spec.storage)
        rows = pl.ds((2 * half + odd) * GROUPS, GROUPS)
        old_scale[rows, :] = s
        multiple = self.units[moment.name].decoder
        if self.stays_in_place(moment, 2 * half + odd):
          power = 2 if plan.spec.storage.companding == "root" else 1  # of the code
          multiple *= 2.0 ** (-8 * (2 * half + odd) * power)
        self.scratch[f"{moment.name}_decoder"][rows, :] = factor * multiple

  def encoders(self, moment, step, unit) -> None:
    """Makes scales of the groups' maxima, and factors by which to encode."""
    plan = self.plan
    parts = self.scratch[f"{moment.name}_max"]
    rounding = codec.moment_rounding(self.h, moment.kind)
    halves = [
      functools.reduce(
        jnp.maximum,
        [parts[pl.ds(s, WORD_ROWS * GROUPS, stride=8), :] for s in sublanes],
      )
      for sublanes in self._halves
    ]
    multiple = jnp.abs(self.units[moment.name].gain)
    halves = [half * multiple for half in halves]
    encoder = self.scratch[f"{moment.name}_encoder"]
    old_scale = self.scratch[f"{moment.name}_old_scale"][...]
    largest = codec.limited_largest(halves, old_scale, moment.kind)
    s = codec.scale_of_largest(largest, moment.kind)
    factor = codec.encode_factor(s, moment.kind, plan.spec.storage, rounding.slack)
    factor *= self.units[moment.name].encoder
    encoder[...] = factor
    if moment.kind == "second":
      last = jnp.where(factor > 0, ROUND + 128.0, ROUND + 127.0)
      self.scratch[f"{moment.name}_last"][...] = last
    rounded = codec.round_scale(s, rounding.scale.astype(jnp.int32))
    if plan.blocks.along_rows:
      ref = self.block.results[f"{moment.name}_scale"]
      for place, rows in self._scales_of_rows(ref, unit):
        ref[place] = rounded[rows].astype(ref.dtype)
      return
    bits = as_bits(rounded)
    kept = self.scratch[f"{moment.name}_scale"]
    for half in range(2):
      rows = [
        bits[(2 * half + odd) * GROUPS : (2 * half + odd + 1) * GROUPS]
        for odd in range(2)
      ]
      word = logical_shift(rows[0], 16) | rows[1]
      for tile in range(plan.tiles):
        lanes = slice(tile * plan.words, (tile + 1) * plan.words)
        index = self._tile(step, unit, tile)
        kept[half, index, :, 0 : plan.words] = word[:, lanes]

  def stays_in_place(self, moment, k: int) -> bool:
    """Whether codes of row ``k`` of four are not shifted down in their word.

    They are multiples of a power of two then, which their factor makes up for: where
    units are transposed, each of the four rows has groups of its own.
    """
    return self.plan.turned and moment.kind == "second" and k < WORD_ROWS - 1

  def factor(self, moment, use: str, k: int, group) -> jax.Array:
    """What row ``k`` of four is multiplied by, for 32 rows of words."""
    ref = self.scratch[f"{moment.name}_{use}"]
    if self.plan.blocks.along_rows:
      rows = [ref[pl.ds(self.index(group, i), 1), :] for i in range(GROUPS)]
      shape = (GROUP_WORDS, LANES)
      return stack([jnp.broadcast_to(row, shape) for row in rows])
    return jnp.broadcast_to(ref[pl.ds(self.index(group, k), 1), :], (GROUP_SIZE, LANES))

  @property
  def _halves(self) -> tuple[Sequence[int], Sequence[int]]:
    """Sublanes that hold the largest elements of the halves of a group."""
    # A sublane has four rows of a group, or columns that are 8 apart.
    if self.plan.blocks.along_rows:
      return range(0, 8, 2), range(1, 8, 2)
    return range(4), range(4, 8)
