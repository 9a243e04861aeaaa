"""The fused update as a Pallas kernel for TPUs, compiled by Mosaic.

The vector unit is the limit there, not memory, so the kernel is built to do few
vector operations on each element.

*Words.* Arrays of 8- and 16-bit numbers are never converted as a whole. They are
read as 32-bit words, each of which holds four (or two) neighbouring rows of one
column, and a row of the block is taken out by a shift. Row ``4 w + k`` is byte
``k`` of word ``w`` of an 8-bit array and half ``k % 2`` of word ``2 w + k // 2``
of a 16-bit one, so the second kind is read with a stride of two.

*Transposed units.* A unit is 128 words by 128 columns of a block. The transpose
unit, idle otherwise, turns it around: columns, and with them the groups, then lie
along sublanes. A group's maximum is a maximum of whole registers, but for its
last step, and its scale reaches its elements by a load that repeats a sublane.

*Dense scales.* What is computed once for a group is computed for 1024 groups at
a time.

Where a block has few rows, a unit holds several of its tiles of 128 columns.

*Order of axes.* A leaf is taken in the order of axes in which XLA keeps it
(:mod:`flashoptim_jax.kernels.mosaic_layout`). Where that makes rows of the axis of
the groups, nothing is transposed: a group is 8 rows of words, and scales lie in
memory as they are computed.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from flashoptim_jax.kernels.base import Leaf, Unavailable, UpdatedLeaf, UpdateSpec
from flashoptim_jax.kernels.by_platform import Place
from flashoptim_jax.kernels.mosaic_layout import axis_order
from flashoptim_jax.kernels.mosaic_math import (
    Known,
    evaluate,
    inverse_root,
    multiples,
    reads_old_moments,
    roots_of_square,
)
from flashoptim_jax.rules import LEAST_ROOT, Rule, Scalars
from flashoptim_jax.storage import codec
from flashoptim_jax.storage.options import Storage

GROUP_SIZE = 32
_LANES = 128
_ROWS = 4  # rows of an 8-bit array that share a word
_GROUPS = _LANES // GROUP_SIZE  # groups in a tile of 128 columns
_GROUP_WORDS = GROUP_SIZE // _ROWS  # rows of words of a group that lies along rows
_SCALE_COLUMNS = _LANES * GROUP_SIZE  # columns whose scales fill 128 lanes
_DTYPES = ("bfloat16", "float32")
UNIT = _ROWS * _LANES * _LANES  # elements
_SCRATCH_BYTES = 5 << 20  # at most
_SMALLEST = 1 << 16
_HIGH_HALF = -0x10000
_NAN = 0x7FC00000
# Added to a number below 2^22 it leaves its nearest integer in the low bits.
_ROUND = 1.5 * 2.0**23
_EVERY_SIGN = 0x80808080 - 2**32
_ODD_BYTES = 0xFF00FF00 - 2**32
_SIGN_AND_EXPONENT = 0xFF800000 - 2**32
_LARGEST = float(jnp.finfo(jnp.float32).max)
_LEAST_GAIN = 2.0**-60
_TILE_WORDS = 4  # rows of words in XLA's tiles of 16-bit arrays
_CHUNK = 32
_LEAST_ROWS = 8 * GROUP_SIZE  # whose scales fill a tile, where groups lie along rows


class _Field(NamedTuple):
  """An array that the kernel reads, and where it finds it.

  Attributes:
    name: ``"grad"``, ``"param"``, ``"correction"`` or a moment's name.
    dtype: Its dtype.
  """

  name: str
  dtype: Any

  @property
  def itemsize(self) -> int:
    return jnp.dtype(self.dtype).itemsize


class Cut(NamedTuple):
  """How a leaf is cut into blocks.

  Attributes:
    order: The order in which its axes are passed.
    leading: Leading axes that the grid runs over.
    rows: Rows of the leaf.
    columns: Columns of the leaf.
    block_rows: Rows of a block, a multiple of 32.
    block_columns: Columns of a block, a multiple of 128.
    along_rows: Whether groups lie along the rows, not the columns.
  """

  order: tuple[int, ...]
  leading: tuple[int, ...]
  rows: int
  columns: int
  block_rows: int
  block_columns: int
  along_rows: bool


class _Plan(NamedTuple):
  """How a leaf is updated. All static.

  Attributes:
    rule: The optimizer's arithmetic.
    storage: The state's storage.
    compressed: Whether moments are codes and scales.
    decay: Whether weight decay applies.
    new_params: Whether parameters or updates are written.
    hyperparameters: Names of the scalars, in the order in which they are passed.
    zeros: Names of the scalars that are known to be 0.
    cut: How the leaf is cut into blocks.
    has_fast_roots: Whether the TPU has accurate square roots.
    interpret: Whether to run in interpret mode.
  """

  rule: Rule
  storage: Storage
  compressed: bool
  decay: bool
  new_params: bool
  hyperparameters: tuple[str, ...]
  zeros: tuple[str, ...]
  cut: Cut
  has_fast_roots: bool
  interpret: bool

  @property
  def words(self) -> int:
    """Words of 8-bit numbers in a column of a block."""
    return self.cut.block_rows // _ROWS

  @property
  def tiles(self) -> int:
    """Tiles of 128 columns in a unit."""
    return _LANES // self.words

  @property
  def steps(self) -> int:
    """Blocks along the columns."""
    return pl.cdiv(self.cut.columns, self.cut.block_columns)

  @property
  def steps_per_scale_block(self) -> int:
    return _SCALE_COLUMNS // self.cut.block_columns

  @property
  def ragged(self) -> bool:
    """Whether the last group of moments is a partial one."""
    axis = self.cut.rows if self.cut.along_rows else self.cut.columns
    return self.compressed and axis % GROUP_SIZE != 0

  @property
  def units_of_gain(self) -> bool:
    """Whether moments are computed in units of their gain, see `_Unit.unit`."""
    names = (*self.hyperparameters, *self.zeros)
    return self.compressed and not reads_old_moments(self.rule, names)

  @property
  def turned(self) -> bool:
    """Whether units are transposed."""
    return self.compressed and not self.cut.along_rows


def _as_float(bits: jax.Array) -> jax.Array:
  return lax.bitcast_convert_type(bits, jnp.float32)


def _as_bits(x: jax.Array) -> jax.Array:
  return lax.bitcast_convert_type(x, jnp.int32)


def _logical_shift(bits: jax.Array, by: int) -> jax.Array:
  return lax.shift_right_logical(bits, jnp.full_like(bits, by)) if by else bits


def _take(word: jax.Array, k: int, itemsize: int, signed: bool = True) -> jax.Array:
  """Number ``k`` of a word, as an int32."""
  bits = 8 * itemsize
  k %= _ROWS // itemsize
  if not signed:
    word = _logical_shift(word, bits * k)
    return word & (2**bits - 1) if bits * (k + 1) < 32 else word
  above = 32 - bits * (k + 1)
  word = word << above if above else word
  return word >> (32 - bits)


def _take_high(word: jax.Array, k: int, itemsize: int) -> jax.Array:
  """Number ``k`` of a word of 16- or 32-bit numbers, in the highest bits."""
  if itemsize == 4:
    return word
  return word & _HIGH_HALF if k % 2 else word << 16


def _pack(numbers: Sequence[jax.Array], itemsize: int, interpret: bool) -> jax.Array:
  """A word of numbers that each lie in the lowest bits, below others."""
  if itemsize == 4:
    return numbers[0]
  if interpret:  # It has no rule for pack_elementwise.
    bits = 8 * itemsize
    parts = [(number & (2**bits - 1)) << bits * k for k, number in enumerate(numbers)]
    return functools.reduce(jnp.bitwise_or, parts)
  dtype = jnp.int8 if itemsize == 1 else jnp.int16
  packed = pltpu.pack_elementwise(numbers, packed_dtype=dtype)
  return lax.bitcast_convert_type(packed, jnp.int32)


def _pack_second_bytes(numbers: Sequence[jax.Array], interpret: bool) -> jax.Array:
  """A word of the second lowest bytes of four numbers."""
  if interpret:
    return _pack([_logical_shift(number, 8) for number in numbers], 1, interpret)
  # Pairs are packed first, which saves half the shifts.
  pairs = [
      pltpu.bitcast(_logical_shift(_pack(numbers[i::2], 2, interpret), 8), jnp.int16)
      for i in range(2)
  ]
  return pltpu.bitcast(pltpu.pack_elementwise(pairs, packed_dtype=jnp.int8), jnp.int32)


def _round_bfloat16(bits: jax.Array) -> jax.Array:
  """Bits of a float32, rounded to bfloat16 in their high half; no NaNs."""
  return bits + 0x7FFF + (_logical_shift(bits, 16) & 1)


def _quiet(x: jax.Array) -> jax.Array:
  """The bits of a float32, with one bit pattern for every NaN.

  Rounding could carry the others over into the sign.
  """
  return jnp.where(jnp.isnan(x), _NAN, _as_bits(x))


def _merge(param: jax.Array, correction: jax.Array | None) -> jax.Array:
  """As ``codec.merge``, for a parameter in float32 and a correction of its bits."""
  if correction is None:
    return param
  master = _as_float(_as_bits(param) + correction)
  return jnp.where(param == 0, param, master)


def _take_correction(word: jax.Array, k: int, itemsize: int) -> jax.Array:
  """Correction ``k`` of a word, as what is added to a parameter's bits."""
  if itemsize == 2:
    return _take(word, k, itemsize)
  if k % 2:  # Rows 1 and 3 share the operation that masks the others.
    word &= _ODD_BYTES
    return (word << 16 if k == 1 else word) >> 16
  shifted = word << 24 - 8 * k >> 16
  return shifted & -0x100 if k else shifted


class _Unit:
  """One grid step's view of its block: reads, updates and writes units."""

  def __init__(self, plan: _Plan, fields, outputs, scalars, inputs, results, scratch):
    self.plan = plan
    self.multiples = multiples(plan.has_fast_roots)
    self.fields = fields
    self.outputs = outputs
    self.h = {name: scalars[i] for i, name in enumerate(plan.hyperparameters)}
    self.h |= dict.fromkeys(plan.zeros, 0.0)
    self.units = {moment.name: self._unit_of(moment) for moment in plan.rule.moments}
    self.first_row = pl.program_id(len(plan.cut.leading)) * plan.cut.block_rows
    self.inputs = inputs
    self.results = results
    self.scratch = scratch

  def _unit_of(self, moment) -> tuple[Any, Any, Any]:
    """What a moment is computed in multiples of: its gain.

    An average is computed as power + (decay / gain) · average. Its group's factor is
    multiplied by decay / gain, which saves two products an element.

    Returns:
      The unit, what old codes' factors are multiplied by, and new codes' factors.
    """
    fold = self.plan.units_of_gain
    gain = self.h[moment.gain] if fold else 1.0
    if fold:  # At 0, a number beside which a gradient counts for nothing.
      gain = jnp.where(jnp.abs(gain) < _LEAST_GAIN, _LEAST_GAIN, gain)
    decay = self.h[moment.decay] / gain if fold else 1.0
    is_root = self.plan.storage.companding == "root"
    if moment.kind == "first":
      encoder = jnp.sign(gain) * jnp.sqrt(jnp.abs(gain)) if is_root else gain
      # Of what `_level` takes the smaller of it and a multiple.
      multiple = 1.0 / self.multiples.inverse_root if is_root else 1.0
    else:
      decay, encoder = jnp.sqrt(decay), jnp.sqrt(gain)
      encoder = jnp.sqrt(encoder) if is_root else encoder
      multiple = self.multiples.fourth_root if is_root else self.multiples.root
    return gain, decay, encoder * (1.0 / multiple)

  def _columns(self, unit, tile):
    start = (unit * self.plan.tiles + tile) * _LANES
    return pl.ds(pl.multiple_of(start, _LANES), _LANES)

  def _turn(self, words):
    return words.T if self.plan.turned else words

  def _next(self, field: _Field):
    return self.scratch[f"{field.name}_next"]

  def _written(self, name: str) -> str:
    codes = f"{name}_codes"
    return codes if codes in self.scratch else name

  def take_next(self, group: int) -> None:
    """Makes a group of the unit that ``read`` brought in the current one."""
    rows = pl.ds(group * GROUP_SIZE, GROUP_SIZE)
    for field in self.fields.values():
      self.scratch[field.name][:, rows, :] = self._next(field)[:, rows, :]

  def read(self, field: _Field, unit) -> None:
    """Brings a unit of an array into scratch memory, as transposed words."""
    plan, ref, out = self.plan, self.inputs[field.name], self._next(field)
    per_tile = plan.words * field.itemsize
    columns = [self._columns(unit, tile) for tile in range(plan.tiles)]
    if field.itemsize == 1:
      out[0] = self._turn(_stack([_words(ref[:, c]) for c in columns]))
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
        stage[pl.ds(tile * per_tile, per_tile), :] = _words(ref[:, c])
    for i in range(field.itemsize):
      out[i] = self._turn(stage[pl.ds(i, _LANES, stride=field.itemsize), :])

  def write(self, field: _Field, unit) -> None:
    """The inverse of ``read``, but for what is left to ``flush``."""
    plan, ref = self.plan, self.results[field.name]
    words = self.scratch[self._written(field.name)]
    per_tile = plan.words * field.itemsize
    if field.itemsize == 1:
      turned = self._turn(words[0])
      for tile in range(plan.tiles):
        part = turned[tile * per_tile : (tile + 1) * per_tile]
        ref[:, self._columns(unit, tile)] = _unwords(part, field.dtype)
      return
    stage = self.scratch[f"{field.name}_written"]
    for i in range(field.itemsize):
      stage[pl.ds(i, _LANES, stride=field.itemsize), :] = self._turn(words[i])

  def flush(self, field: _Field, unit) -> None:
    """Brings what ``write`` left in scratch memory to its place."""
    if field.itemsize == 1:
      return
    plan, ref = self.plan, self.results[field.name]
    per_tile = plan.words * field.itemsize
    stage = self.scratch[f"{field.name}_written"]
    for tile in range(plan.tiles):
      columns = self._columns(unit, tile)
      if self._has_words(field):
        # As words: the compiler would unpack and pack numbers to store them.
        for row in range(0, per_tile, _TILE_WORDS):
          rows = pl.ds(tile * per_tile + row, _TILE_WORDS)
          ref.bitcast(jnp.int32)[row : row + _TILE_WORDS, columns] = stage[rows, :]
      else:
        part = stage[pl.ds(tile * per_tile, per_tile), :]
        ref[:, columns] = _unwords(part, field.dtype)

  def _has_words(self, field: _Field) -> bool:
    """Whether the block of a 16-bit array can be read and written as words.

    Interpret mode has no rule for this before JAX 0.12, and Pallas can't do it to a
    block without its leading axes.
    """
    return field.itemsize == 2 and not (self.plan.interpret or self.plan.cut.leading)

  def word(self, name: str, k: int, rows) -> tuple[jax.Array, int]:
    """The words that hold row ``k`` of four, and their numbers' size."""
    itemsize = self.fields[name].itemsize
    return self.scratch[name][k * itemsize // 4, rows, :], itemsize

  def floats(self, name: str, k: int, rows) -> jax.Array:
    return _as_float(_take_high(*_swap(self.word(name, k, rows), k)))

  # Scales. Factors and maxima have a row of scratch memory for each group of a lane.

  def _index(self, group, which: int):
    """The row of one of the four groups that a lane has in 32 rows of words."""
    if self.plan.cut.along_rows:
      return group * _GROUPS + which
    return which * _GROUPS + group

  def read_scales(self, moment) -> None:
    """Turns a block of scales around, once for the blocks that share it."""
    plan = self.plan
    words, stage = plan.words, self.scratch["stage"]
    scales = self.inputs[f"{moment.name}_scale"]
    lanes = scales.shape[-1]
    stage[pl.ds(0, 2 * words), 0:lanes] = _words(scales[...])
    kept = self.scratch[f"{moment.name}_scale"]
    for half in range(2):
      turned = stage[pl.ds(half, words, stride=2), :].T
      kept[half, :, :, 0:words] = turned.reshape(-1, _GROUPS, words)

  def write_scales(self, moment) -> None:
    """The inverse of ``read_scales``."""
    plan = self.plan
    words, stage = plan.words, self.scratch["stage"]
    scales = self.results[f"{moment.name}_scale"]
    lanes = scales.shape[-1]
    kept = self.scratch[f"{moment.name}_scale"]
    for half in range(2):
      turned = kept[half].reshape(_LANES, _LANES).T
      stage[pl.ds(half, words, stride=2), :] = turned[0:words]
    scales[...] = _unwords(stage[pl.ds(0, 2 * words), 0:lanes], scales.dtype)

  def _tile(self, step, unit, tile):
    """Index of a tile among those of its block of scales."""
    plan = self.plan
    first = (step % plan.steps_per_scale_block) * (plan.cut.block_columns // _LANES)
    return first + unit * plan.tiles + tile

  def _scales_of_rows(self, ref, unit):
    """For each tile, its scales' place, and their rows among a unit's groups."""
    per_tile = self.plan.words // _GROUP_WORDS
    # A leaf of few rows has fewer groups than a block.
    groups = ref.shape[0]
    return [
        ((slice(None), self._columns(unit, tile)), slice(start, start + groups))
        for tile, start in enumerate(range(0, _ROWS * _GROUPS, per_tile))
    ]

  def old_scales(self, moment, step, unit) -> None:
    """Computes the factors by which a unit's codes are decoded.

    Leaves the scales for ``new_scales``, which limits new ones by them.
    """
    plan = self.plan
    old_scale = self.scratch[f"{moment.name}_old_scale"]
    if plan.cut.along_rows:
      ref = self.inputs[f"{moment.name}_scale"]
      decoder = self.scratch[f"{moment.name}_decoder"]
      for place, rows in self._scales_of_rows(ref, unit):
        old_scale[rows, :] = ref[place].astype(jnp.float32)
      factor = codec.decode_factor(old_scale[...], moment.kind, plan.storage)
      decoder[...] = factor * self.units[moment.name][1]
      return
    kept = self.scratch[f"{moment.name}_scale"]
    for half in range(2):
      tiles = [
          kept[half, self._tile(step, unit, tile), :, 0 : plan.words]
          for tile in range(plan.tiles)
      ]
      word = tiles[0] if len(tiles) == 1 else jnp.concatenate(tiles, axis=1)
      for odd in range(2):
        s = _as_float(_take_high(word, odd, 2))
        factor = codec.decode_factor(s, moment.kind, plan.storage)
        rows = pl.ds((2 * half + odd) * _GROUPS, _GROUPS)
        old_scale[rows, :] = s
        multiple = self.units[moment.name][1]
        if self._stays_in_place(moment, 2 * half + odd):
          power = 2 if plan.storage.companding == "root" else 1  # of the code
          multiple *= 2.0 ** (-8 * (2 * half + odd) * power)
        self.scratch[f"{moment.name}_decoder"][rows, :] = factor * multiple

  def new_scales(self, moment, step, unit) -> None:
    """Makes scales of the groups' maxima, and factors by which to encode."""
    plan = self.plan
    parts = self.scratch[f"{moment.name}_max"]
    rounding = codec.moment_rounding(self.h, moment.kind)
    halves = [
        functools.reduce(
            jnp.maximum,
            [parts[pl.ds(s, _ROWS * _GROUPS, stride=8), :] for s in sublanes],
        )
        for sublanes in self._halves
    ]
    multiple = jnp.abs(self.units[moment.name][0])
    halves = [half * multiple for half in halves]
    encoder = self.scratch[f"{moment.name}_encoder"]
    old_scale = self.scratch[f"{moment.name}_old_scale"][...]
    largest = codec.limited_largest(halves, old_scale, moment.kind)
    s = codec.scale_of_largest(largest, moment.kind)
    factor = codec.encode_factor(s, moment.kind, plan.storage, rounding.slack)
    factor *= self.units[moment.name][2]
    encoder[...] = factor
    if moment.kind == "second":
      last = jnp.where(factor > 0, _ROUND + 128.0, _ROUND + 127.0)
      self.scratch[f"{moment.name}_last"][...] = last
    rounded = codec.round_scale(s, rounding.scale.astype(jnp.int32))
    if plan.cut.along_rows:
      ref = self.results[f"{moment.name}_scale"]
      for place, rows in self._scales_of_rows(ref, unit):
        ref[place] = rounded[rows].astype(ref.dtype)
      return
    bits = _as_bits(rounded)
    kept = self.scratch[f"{moment.name}_scale"]
    for half in range(2):
      rows = [
          bits[(2 * half + odd) * _GROUPS : (2 * half + odd + 1) * _GROUPS]
          for odd in range(2)
      ]
      word = _logical_shift(rows[0], 16) | rows[1]
      for tile in range(plan.tiles):
        lanes = slice(tile * plan.words, (tile + 1) * plan.words)
        index = self._tile(step, unit, tile)
        kept[half, index, :, 0 : plan.words] = word[:, lanes]

  def _stays_in_place(self, moment, k: int) -> bool:
    """Whether codes of row ``k`` of four are not shifted down in their word.

    They are multiples of a power of two then, which their factor makes up for: where
    units are transposed, each of the four rows has groups of its own.
    """
    return self.plan.turned and moment.kind == "second" and k < _ROWS - 1

  def factor(self, moment, use: str, k: int, group) -> jax.Array:
    """What row ``k`` of four is multiplied by, for 32 rows of words."""
    ref = self.scratch[f"{moment.name}_{use}"]
    if self.plan.cut.along_rows:
      rows = [ref[pl.ds(self._index(group, i), 1), :] for i in range(_GROUPS)]
      shape = (_GROUP_WORDS, _LANES)
      return _stack([jnp.broadcast_to(row, shape) for row in rows])
    return jnp.broadcast_to(ref[pl.ds(self._index(group, k), 1), :], (_CHUNK, _LANES))

  # The elements of one group.

  def update(self, step, unit, group) -> None:
    """Updates everything but the codes of 32 rows of a unit."""
    largest: dict[tuple[str, int], jax.Array] = {}  # by name and which group
    for chunk in range(GROUP_SIZE // _CHUNK):
      row = pl.multiple_of(group * GROUP_SIZE + chunk * _CHUNK, _CHUNK)
      self._update_rows(step, unit, group, row, largest)
    for (name, which), parts in largest.items():
      start = pl.multiple_of(self._index(group, which) * 8, 8)
      self.scratch[f"{name}_max"][pl.ds(start, 8), :] = parts

  def _update_rows(self, step, unit, group, row, largest) -> None:
    plan, h = self.plan, self.h
    rows = pl.ds(row, _CHUNK)
    written: dict[str, list[jax.Array]] = {name: [] for name in self.outputs}
    inside = self._inside(step, unit, row) if plan.ragged else None
    for k in range(_ROWS):
      grad = self.floats("grad", k, rows)
      old, new, roots = [], [], {}
      for moment in plan.rule.moments:
        if plan.compressed:
          old.append(self._decoded(moment, k, rows, group))
        else:
          old.append(self.floats(moment.name, k, rows))
        if plan.units_of_gain:
          new.append((grad if moment.kind == "first" else grad * grad) + old[-1])
        else:
          new.append(moment.update(grad, old[-1], h))
        if not plan.compressed:
          self.scratch[moment.name][k, rows, :] = _as_bits(new[-1])
          continue
        magnitude, root, code_root = self._roots(moment, new[-1])
        if root is not None:
          roots[moment.name] = root
        if inside is not None:
          magnitude = jnp.where(inside[k], magnitude, 0.0)
        for i in range(_CHUNK // 8):
          key = moment.name, i if plan.cut.along_rows else k
          part = magnitude[8 * i : 8 * (i + 1)]
          largest[key] = jnp.maximum(largest[key], part) if key in largest else part
        self._keep_for_codes(moment, k, row, code_root, new[-1])
      master = self._master(k, rows, grad, old, new, roots)
      for name, bits in self._split(k, rows, master).items():
        written[name].append(bits)
    for name, numbers in written.items():
      self._put(name, rows, numbers)

  def _decoded(self, moment, k: int, rows, group) -> jax.Array:
    word, itemsize = self.word(moment.name, k, rows)
    if self._stays_in_place(moment, k):
      code = word & (0xFF << 8 * k)
    else:
      code = _take(word, k, itemsize, moment.kind == "first")
    factor = self.factor(moment, "decoder", k, group)
    return codec.decode_element(
        code.astype(jnp.float32), factor, moment.kind, self.plan.storage
    )

  def _keep_for_codes(self, moment, k: int, row, root, value) -> None:
    rows = pl.ds(pl.multiple_of(k * _LANES + row, 8), _CHUNK)
    self.scratch[f"{moment.name}_root"][rows, :] = root
    if moment.kind == "first":
      self.scratch[f"{moment.name}_value"][rows, :] = value

  def _inside(self, step, unit, row) -> list[jax.Array]:
    """Whether elements lie inside the leaf, for each row of four."""
    plan = self.plan
    shape = (_CHUNK, _LANES)
    number = lax.broadcasted_iota(jnp.int32, shape, 0) + row
    if plan.cut.along_rows:
      first = self.first_row + _ROWS * (number & (plan.words - 1))
      return [first < plan.cut.rows - k for k in range(_ROWS)]
    tile = lax.broadcasted_iota(jnp.int32, shape, 1) // plan.words
    column = number + (unit * plan.tiles + tile) * _LANES
    column += step * plan.cut.block_columns
    return [column < plan.cut.columns] * _ROWS

  def _roots(self, moment, value):
    """A moment's magnitude, its square root, and what its codes are made of."""
    fast = self.plan.has_fast_roots
    is_root = self.plan.storage.companding == "root"
    if moment.kind == "first":
      magnitude = jnp.abs(value)
      return magnitude, None, inverse_root(magnitude, fast) if is_root else value
    if not fast:  # An infinity would make a NaN of its root.
      value = jnp.minimum(value, _LARGEST)
    root, fourth_root = roots_of_square(value, fast)
    return value, root, fourth_root if is_root else root

  @property
  def _halves(self) -> tuple[Sequence[int], Sequence[int]]:
    """Sublanes that hold the largest elements of the halves of a group."""
    # A sublane has four rows of a group, or columns that are 8 apart.
    if self.plan.cut.along_rows:
      return range(0, 8, 2), range(1, 8, 2)
    return range(4), range(4, 8)

  def encode(self, moment, group) -> None:
    """Writes a group's codes."""
    for chunk in range(GROUP_SIZE // _CHUNK):
      row = pl.multiple_of(group * GROUP_SIZE + chunk * _CHUNK, _CHUNK)
      self._encode_rows(moment, group, row)

  def _encode_rows(self, moment, group, row) -> None:
    rounding = codec.moment_rounding(self.h, moment.kind).code - 0.5
    if moment.kind == "second":
      rounding = rounding - 128.0
    numbers = []
    for k in range(_ROWS):
      rows = pl.ds(pl.multiple_of(k * _LANES + row, 8), _CHUNK)
      level, place = self._level(moment, k, group, rows)
      last: Any = _ROUND * place
      if moment.kind == "second":
        # From 1 to 255, and 0 where the scale is 0. Around 0, clamping is one
        # operation; what is added last makes up for the 128, in groups of scale 0
        # for 127.
        last = self.factor(moment, "last", k, group)
      level = jnp.clip(level + rounding * place, -127.0 * place, 127.0 * place)
      # A NaN's low bits are zero.
      numbers.append(_as_bits(level + last))
    word = _pack(numbers, 1, self.plan.interpret)
    self.scratch[f"{moment.name}_codes"][0, pl.ds(row, _CHUNK), :] = word

  def _level(self, moment, k, group, rows) -> tuple[jax.Array, float]:
    """What is rounded to codes, and what one code is of it."""
    root = self.scratch[f"{moment.name}_root"][rows, :]
    factor = self.factor(moment, "encoder", k, group)
    levels = codec.LEVELS[moment.kind]
    if self.plan.storage.companding == "paper":
      level = root * factor
      if moment.kind == "first":
        return levels * (2.0 * level / (1.0 + jnp.abs(level))), 1.0
      return levels * level, 1.0
    if moment.kind == "second":
      return root * factor, 1.0
    # The level is value / sqrt(|value|) · factor and, where that is below 1, its
    # square, value · factor · factor: it takes the smaller of the two.
    value = self.scratch[f"{moment.name}_value"][rows, :]
    level = value * jnp.minimum(root, jnp.abs(factor)) * factor
    return level, self.multiples.inverse_root**2

  def _master(self, k, rows, grad, old, new, roots) -> jax.Array:
    plan, h = self.plan, self.h
    correction = None
    if "correction" in self.fields:
      word, itemsize = self.word("correction", k, rows)
      correction = _take_correction(word, k, itemsize)
    master = _merge(self.floats("param", k, rows), correction)
    rate, decay = -h["learning_rate"], h["weight_decay"]
    if not plan.compressed:
      h = {name: value for name, value in h.items() if name != LEAST_ROOT}
    if not self._is_coarse:
      if plan.units_of_gain:
        pairs = zip(new, plan.rule.moments, strict=True)
        new = [value * self.units[moment.name][0] for value, moment in pairs]
      direction = plan.rule.direction(grad, old, new, h)
      return master + rate * (direction + decay * master if plan.decay else direction)
    scalars = {name: value for name, value in h.items() if name not in plan.zeros}
    zeros = dict.fromkeys(plan.zeros, 0.0)
    known = [
        Known(
            value,
            self.units[moment.name][0],
            roots.get(moment.name),
            1.0 / self.multiples.root,
        )
        for moment, value in zip(plan.rule.moments, new, strict=True)
    ]
    direction, factor = evaluate(
        lambda *args: plan.rule.direction(*args[:-1], args[-1] | zeros),
        (grad, old, new, scalars),
        known,
        functools.partial(pl.reciprocal, approx=not plan.interpret),
    )
    step = (rate * factor) * direction
    if plan.decay:
      step = step + (rate * decay) * master
    if correction is None:
      return master + step
    # As `codec.advance`; `_split` cuts it off.
    binade = _as_float(_as_bits(master + step) & _SIGN_AND_EXPONENT)
    threshold = (h["master_rounding"] - codec.HALF_OF_FLOAT32) * 2.0**-15
    return master + (step + binade * threshold)

  @property
  def _is_coarse(self) -> bool:
    """Whether master weights have at most 24 bits."""
    is_wide = "correction" in self.fields and self.plan.storage.master_bits == 32
    return self.fields["param"].itemsize == 2 and not is_wide

  def _split(self, k, rows, master) -> dict[str, jax.Array]:
    """What is written for a row; ``_put`` knows in which of the bits it lies."""
    bits = _quiet(master)
    rounded = self._rounded(bits)
    corrected = "correction" in self.fields
    if self.plan.new_params:
      written = {"param": rounded}
      if corrected:
        # At 24 bits it is the second byte, but for the sign, which `_put` flips.
        is_24 = self.plan.storage.master_bits == 24
        written["correction"] = rounded if is_24 else bits
      return written
    if self.fields["param"].itemsize == 2:
      rounded &= _HIGH_HALF
    old = self.floats("param", k, rows)
    update = _quiet(_as_float(rounded) - old)
    if self.fields["grad"].itemsize == 2:
      update = _round_bfloat16(update) & _HIGH_HALF
    written = {"update": update}
    if corrected:
      produced = _round_bfloat16(_quiet(old + _as_float(update)))
      written["correction"] = self._residual(bits, produced)
    return written

  def _rounded(self, bits) -> jax.Array:
    """Bits of the new parameter; the high half of them if it has 16."""
    if self.fields["param"].itemsize == 4:
      return bits
    if "correction" not in self.fields:
      return _round_bfloat16(bits)
    return bits + 0x8000

  def _residual(self, bits, produced) -> jax.Array:
    """As ``codec.residual``, from the bits of float32 numbers."""
    discarded = 8 if self.plan.storage.master_bits == 24 else 0
    top = _logical_shift(bits, discarded)
    produced = _logical_shift(produced & _HIGH_HALF, discarded)
    magnitude = 2 ** (31 - discarded) - 1
    lowest = -(2 ** (15 - discarded))
    distance = (top & magnitude) - (produced & magnitude)
    same_sign = ((top ^ produced) & ~magnitude) == 0
    distance = jnp.where(same_sign, distance, lowest)
    is_nan = (bits == _NAN) | ((produced & magnitude) > (0x7F800000 >> discarded))
    distance = jnp.where(is_nan, 0, distance)
    return jnp.clip(distance, lowest, -lowest - 1)

  def _put(self, name: str, rows, numbers: list[jax.Array]) -> None:
    """Writes four rows of numbers."""
    itemsize = self.outputs[name].itemsize
    if name == "correction":
      at = 8 if itemsize == 1 and self.plan.new_params else 0
    else:
      at = 0 if itemsize == 4 else 16
    per_word = _ROWS // itemsize
    for i in range(itemsize):
      part = numbers[i * per_word : (i + 1) * per_word]
      if at == 8:
        word = _pack_second_bytes(part, self.plan.interpret) ^ _EVERY_SIGN
      else:
        part = [_logical_shift(number, at) for number in part]
        word = _pack(part, itemsize, self.plan.interpret)
      self.scratch[name][i, rows, :] = word


def _stack(tiles: list[jax.Array]) -> jax.Array:
  return tiles[0] if len(tiles) == 1 else jnp.concatenate(tiles, axis=0)


def _swap(word_and_size, k):
  word, itemsize = word_and_size
  return word, k, itemsize


def _words(x: jax.Array) -> jax.Array:
  if x.dtype.itemsize == 4:
    return _as_bits(x)
  return pltpu.bitcast(x, jnp.int32)


def _unwords(words: jax.Array, dtype) -> jax.Array:
  if jnp.dtype(dtype).itemsize == 4:
    return lax.bitcast_convert_type(words, dtype)
  return pltpu.bitcast(words, dtype)


def _fields(rule: Rule, leaf: Leaf) -> dict[str, jax.Array]:
  """The arrays of a leaf by name."""
  arrays = {"grad": leaf.grad, "param": leaf.param}
  if leaf.correction is not None:
    arrays["correction"] = leaf.correction
  for moment, (values, scale) in zip(rule.moments, leaf.moments, strict=True):
    arrays[moment.name] = values
    if scale is not None:
      arrays[f"{moment.name}_scale"] = scale
  return arrays


def _kernel(plan: _Plan, names, written, dtypes, *refs) -> None:
  scalars, refs = refs[0], refs[1:]
  first_result, first_scratch = len(names), len(names) + len(written)
  inputs = dict(zip(names, refs[:first_result], strict=True))
  results = dict(zip(written, refs[first_result:first_scratch], strict=True))
  kept = _scratch(plan, dtypes, written)
  scratch = dict(zip(kept, refs[first_scratch:], strict=True))
  fields = {n: _Field(n, dtypes[n]) for n in names if not n.endswith("_scale")}
  source = {"update": "grad"}
  outputs = {
      n: _Field(n, dtypes[source.get(n, n)])
      for n in written
      if not n.endswith("_scale")
  }
  moments = plan.rule.moments if plan.compressed else ()
  averages = {moment.name for moment in plan.rule.moments}
  computed = {n: field for n, field in outputs.items() if n not in averages}
  block = _Unit(plan, fields, computed, scalars.at[0], inputs, results, scratch)
  step = pl.program_id(len(plan.cut.leading) + 1)
  per = plan.steps_per_scale_block

  if plan.turned:
    @pl.when(step % per == 0)
    def _():
      for moment in moments:
        block.read_scales(moment)

  def each_group(f):
    # One after the other in interpret mode, which compiles slowly.
    lax.fori_loop(
        0, _GROUPS, lambda group, _: f(group), None, unroll=not plan.interpret
    )

  unit_columns = plan.tiles * _LANES
  block_columns = plan.cut.block_columns
  left = plan.cut.columns - step * block_columns
  units = jnp.minimum(block_columns // unit_columns, pl.cdiv(left, unit_columns))
  codes = [outputs[moment.name] for moment in moments]
  others = [field for field in outputs.values() if field not in codes]

  def encode(u):
    for moment in moments:
      each_group(functools.partial(block.encode, moment))
    for field in codes:
      block.write(field, u)
    for field in others:
      block.flush(field, u)

  # A unit's codes have to wait for its scales, and everything for the transpose
  # unit; so this encodes and flushes the unit before and reads the one after. Scales
  # come first: they are found in memory by an index, so the compiler has their loads
  # wait for what was stored before.
  def unit(u, carry):
    for moment in moments:
      block.old_scales(moment, step, u)
    encode(jnp.maximum(u - 1, 0))
    for field in fields.values():
      block.read(field, jnp.minimum(u + 1, units - 1))
    each_group(lambda group: block.update(step, u, group))
    for field in others:
      block.write(field, u)
    for moment in moments:
      block.new_scales(moment, step, u)
    for group in range(_GROUPS):
      block.take_next(group)
    return carry

  for field in fields.values():
    block.read(field, 0)
  for group in range(_GROUPS):
    block.take_next(group)
  lax.fori_loop(0, units, unit, None)
  encode(units - 1)

  if plan.turned:
    @pl.when((step % per == per - 1) | (step == plan.steps - 1))
    def _():
      for moment in moments:
        block.write_scales(moment)


def _scratch(plan: _Plan, dtypes, written) -> dict[str, Any]:
  """Scratch memory by name."""
  names = [n for n in dtypes if not n.endswith("_scale")]
  shapes: dict[str, Any] = {}
  for name in names:
    size = jnp.dtype(dtypes[name]).itemsize
    shapes[name] = shapes[f"{name}_next"] = ((size, _LANES, _LANES), jnp.int32)
    if size > 1:
      shapes[f"{name}_stage"] = ((size * _LANES, _LANES), jnp.int32)
      shapes[f"{name}_written"] = shapes[f"{name}_stage"]
  if "update" in written:
    shapes["update"] = shapes["grad"]
    shapes["update_written"] = shapes["grad_stage"]
  shapes["stage"] = ((4 * _LANES, _LANES), jnp.int32)
  if plan.compressed:
    for moment in plan.rule.moments:
      if plan.turned:
        kept = (2, _LANES // _GROUPS, _GROUPS, _LANES)
        shapes[f"{moment.name}_scale"] = (kept, jnp.int32)
      shapes |= {
          f"{moment.name}_decoder": ((_ROWS * _GROUPS, _LANES), jnp.float32),
          f"{moment.name}_encoder": ((_ROWS * _GROUPS, _LANES), jnp.float32),
          f"{moment.name}_old_scale": ((_ROWS * _GROUPS, _LANES), jnp.float32),
          f"{moment.name}_max": ((8 * _ROWS * _GROUPS, _LANES), jnp.float32),
          f"{moment.name}_codes": ((1, _LANES, _LANES), jnp.int32),
          f"{moment.name}_root": ((_ROWS * _LANES, _LANES), jnp.float32),
      }
      # What only one kind has.
      if moment.kind == "first":
        shapes[f"{moment.name}_value"] = shapes[f"{moment.name}_root"]
      else:
        shapes[f"{moment.name}_last"] = shapes[f"{moment.name}_encoder"]
  return shapes


def unavailable(place: Place) -> Unavailable | None:
  """Why the kernel can't run in a place; None if it can.

  On a CPU it runs in interpret mode.
  """
  if place.platform not in ("tpu", "cpu"):
    return Unavailable(f"it runs on {place.platform!r}, not 'tpu' or 'cpu'")
  if place.platform == "tpu" and place.mesh is None and not place.is_here():
    return Unavailable("the kind of TPU is not known")
  return None


def is_faster(leaf: Leaf) -> bool:
  """Whether a leaf is large enough for the kernel to be the faster choice."""
  return leaf.param.size >= _SMALLEST


def unsupported(leaf: Leaf, spec: UpdateSpec) -> str | None:
  """Why the kernel can't update a leaf; None if it can."""
  shape = leaf.param.shape
  if leaf.quantized and spec.storage.group_size != GROUP_SIZE:
    return f"its group size is {spec.storage.group_size}, not {GROUP_SIZE}"
  for what, array in (("it", leaf.param), ("its gradient", leaf.grad)):
    if array.dtype.name not in _DTYPES:
      return f"{what} has dtype {array.dtype.name}"
  if not leaf.param.size:
    return "it is empty"
  if len(shape) < 2:
    return f"it has {len(shape)} dimensions, fewer than 2"
  if leaf.quantized and codec.group_axis(shape, GROUP_SIZE) != len(shape) - 1:
    return f"its groups lie along another axis than the last of {shape}"
  return None


def cut(
    shape: tuple[int, ...], itemsize: int, element_bytes: float, grouped: bool
) -> Cut:
  """Cuts a leaf into blocks.

  Args:
    shape: The leaf's shape.
    itemsize: Bytes of one of its numbers.
    element_bytes: Bytes of all arrays, in and out, that an element takes.
    grouped: Whether it has groups.
  """
  order, last = axis_order(shape, itemsize), len(shape) - 1
  if grouped and last not in order[-2:]:
    order = tuple(range(len(shape)))
  along_rows = grouped and order[-1] != last
  # Tiles have up to 32 rows, and those of scales up to 8.
  filling = _LEAST_ROWS if along_rows else 32
  *leading, rows, columns = _view(tuple(shape[axis] for axis in order), filling)
  block = _block(rows, columns, element_bytes, along_rows)
  return Cut(order, tuple(leading), rows, columns, *block, along_rows)


def _view(shape: tuple[int, ...], filling: int) -> tuple[int, ...]:
  """The shape in which a leaf is passed: as few leading axes as cost nothing.

  In memory the last two axes are cut into tiles. Where the rows fill them,
  leading axes continue the rows.

  Args:
    shape: The leaf's shape, its axes in order.
    filling: Rows that fill the tiles of all arrays.
  """
  while len(shape) > 2 and shape[-2] % filling == 0:
    shape = (*shape[:-3], shape[-3] * shape[-2], shape[-1])
  return shape


def update(
    spec: UpdateSpec, leaves: Sequence[Leaf], scalars: Scalars, place: Place
) -> list[UpdatedLeaf]:
  """Updates leaves; see :class:`flashoptim_jax.kernels.base.Backend`."""
  # Pallas asks the mesh around it which TPU it compiles for.
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty and place.mesh is not None and place.devices == 1:
    mesh = place.mesh
  with jax.sharding.use_abstract_mesh(mesh):
    interpret = place.platform != "tpu"
    return [_update(spec, leaf, scalars, interpret) for leaf in leaves]


def _update(
    spec: UpdateSpec, leaf: Leaf, scalars: Scalars, interpret: bool
) -> UpdatedLeaf:
  zeros = tuple(
      name for name, value in scalars.items() if isinstance(value, float) and not value
  )
  hyper = tuple(name for name in scalars if name not in zeros)
  packed = jnp.stack([jnp.asarray(scalars[n], jnp.float32) for n in hyper])[None]
  arrays = _fields(spec.rule, leaf)
  new = _call(spec, leaf.decay, hyper, zeros, interpret, packed, arrays)
  return UpdatedLeaf(
      new["param" if spec.new_params else "update"],
      new.get("correction"),
      tuple((new[m.name], new.get(f"{m.name}_scale")) for m in spec.rule.moments),
  )


def _call(
    spec: UpdateSpec,
    decay: bool,
    hyper: tuple[str, ...],
    zeros: tuple[str, ...],
    interpret: bool,
    packed: jax.Array,
    arrays: dict[str, jax.Array],
) -> dict[str, jax.Array]:
  """Calls the kernel; takes and gives a leaf's arrays by name."""
  rule, storage, _, new_params = spec
  names = tuple(arrays)
  written = [n for n in names if n != "grad" and (n != "param" or new_params)]
  if not new_params:
    written.append("update")
  generation, vmem = _chip()
  source = {"update": "grad"}
  moved = [*arrays.values(), *(arrays[source.get(n, n)] for n in written)]
  param = arrays["param"]
  element_bytes = sum(a.size * a.dtype.itemsize for a in moved) / param.size
  compressed = any(name.endswith("_scale") for name in names)
  plan = _Plan(
      rule, storage, compressed, decay, new_params, hyper, zeros,
      cut(param.shape, param.dtype.itemsize, element_bytes, compressed),
      generation >= 6, interpret,
  )
  leading, rows = plan.cut.leading, plan.cut.rows
  block_rows, block_columns = plan.cut.block_rows, plan.cut.block_columns
  dtypes = {n: a.dtype for n, a in arrays.items()}
  ordered = {n: a.transpose(plan.cut.order) for n, a in arrays.items()}
  viewed = {n: a.reshape((*leading, -1, a.shape[-1])) for n, a in ordered.items()}
  # Where they share blocks of scales, a row's blocks come one after the other.
  columns_are = "arbitrary" if plan.turned else "parallel"
  semantics: Any = (*("parallel",) * (len(leading) + 1), columns_are)
  per = plan.steps_per_scale_block

  def block_spec(name):
    lead = (None,) * len(leading)
    if name.endswith("_scale") and plan.cut.along_rows:
      groups = min(block_rows // GROUP_SIZE, viewed[name].shape[-2])
      return pl.BlockSpec((*lead, groups, block_columns), lambda *i: i)
    if name.endswith("_scale"):
      lanes = min(_LANES, viewed[name].shape[-1])
      return pl.BlockSpec(
          (*lead, block_rows, lanes), lambda *i: (*i[:-1], i[-1] // per)
      )
    return pl.BlockSpec((*lead, block_rows, block_columns), lambda *i: i)

  results = pl.pallas_call(
      functools.partial(_kernel, plan, names, tuple(written), dtypes),
      grid=(*leading, pl.cdiv(rows, block_rows), plan.steps),
      in_specs=[
          pl.BlockSpec(memory_space=pltpu.SMEM), *(block_spec(n) for n in names)
      ],
      out_specs=[block_spec(source.get(n, n)) for n in written],
      out_shape=[
          jax.ShapeDtypeStruct(viewed[source.get(n, n)].shape, dtypes[source.get(n, n)])
          for n in written
      ],
      input_output_aliases={
          1 + names.index(source.get(n, n)): i for i, n in enumerate(written)
      },
      scratch_shapes=[
          pltpu.VMEM(shape, dtype)
          for shape, dtype in _scratch(plan, dtypes, written).values()
      ],
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=semantics,
          vmem_limit_bytes=vmem - (1 << 20),
      ),
      interpret=interpret,
      name="flashoptim_update",
  )(packed, *(viewed[n] for n in names))
  back = sorted(range(param.ndim), key=plan.cut.order.__getitem__)
  return {
      n: a.reshape(ordered[source.get(n, n)].shape).transpose(back)
      for n, a in zip(written, results, strict=True)
  }


def _chip() -> tuple[int, int]:
  """Generation and bytes of VMEM of the TPU that is traced for.

  Where that is unknown (interpret mode, or a mesh without devices), the least of
  those that Pallas supports.
  """
  try:
    info = pltpu.get_tpu_info()
  except ValueError:
    return 4, 16 << 20
  return info.generation, info.vmem_capacity_bytes


def _block(
    rows: int, columns: int, element_bytes: float, along_rows: bool
) -> tuple[int, int]:
  """Rows and columns of a block: the fewest units, then the most rows."""
  tiles = pl.cdiv(columns, _LANES)

  def units(block_rows):
    return pl.cdiv(rows, block_rows) * pl.cdiv(tiles * block_rows, 4 * _LANES)

  choices = [4 * _LANES >> i for i in range(5)]
  if along_rows:
    # A block of scales has 8 rows or more, or all there are.
    choices = [r for r in choices if r >= min(rows, _LEAST_ROWS)]
  block_rows = min(choices, key=lambda r: (units(r), -r))
  block_columns = 4 * _LANES * _LANES // block_rows
  # A block is in memory twice while the next one arrives.
  most = (_chip()[1] - _SCRATCH_BYTES) / (2 * element_bytes * block_rows)
  most = min(most, columns if along_rows else min(columns, _SCALE_COLUMNS))
  while 2 * block_columns <= most:
    block_columns *= 2
  return block_rows, block_columns
