"""The body of the TPU kernel.

The vector unit is the limit there, not memory, so the kernel is built to do few
vector operations on each element.

*Words.* Arrays of 8- and 16-bit numbers are never converted as a whole. They are
read as 32-bit words, each of which holds four (or two) neighbouring rows of one
column, and a row of the block is taken out by a shift
(:mod:`flashoptim_jax.kernels.mosaic_words`).

*Transposed units.* A unit is 128 words by 128 columns of a block. The transpose
unit, idle otherwise, turns it around: columns, and with them the groups, then lie
along sublanes. A group's maximum is a maximum of whole registers, but for its
last step, and its scale reaches its elements by a load that repeats a sublane.

*Dense scales.* What is computed once for a group is computed for 1024 groups at
a time (:mod:`flashoptim_jax.kernels.mosaic_scales`).

Where a block has few rows, a unit holds several of its tiles of 128 columns.

*Order of axes.* A leaf is taken in the order of axes in which XLA keeps it
(:mod:`flashoptim_jax.kernels.mosaic_layout`). Where that makes rows of the axis of
the groups, nothing is transposed: a group is 8 rows of words, and scales lie in
memory as they are computed.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from flashoptim_jax.kernels.base import GROUP_SIZE
from flashoptim_jax.kernels.mosaic_block import Block
from flashoptim_jax.kernels.mosaic_dither import Words
from flashoptim_jax.kernels.mosaic_layout import GROUPS, LANES
from flashoptim_jax.kernels.mosaic_math import (
  Known,
  evaluate,
  inverse_root,
  roots_of_square,
)
from flashoptim_jax.kernels.mosaic_plan import Field, Plan, is_scale, scratch_shapes
from flashoptim_jax.kernels.mosaic_scales import ROUND, Scales
from flashoptim_jax.kernels.mosaic_words import (
  EVERY_SIGN,
  HIGH_HALF,
  NAN,
  WORD_ROWS,
  as_bits,
  as_float,
  logical_shift,
  merge,
  pack,
  pack_second_bytes,
  quiet,
  round_bfloat16,
  take,
  take_correction,
)
from flashoptim_jax.rules import LEAST_ROOT
from flashoptim_jax.storage import codec

_SIGN_AND_EXPONENT = 0xFF800000 - 2**32
_LARGEST = float(jnp.finfo(jnp.float32).max)


def kernel(plan: Plan, scalars: Any, *refs: Any) -> None:
  """One grid step: updates a block.

  Args:
    plan: How the leaf is updated.
    scalars: The hyperparameters.
    *refs: What is read, what is written, and scratch memory.
  """
  first_result = len(plan.dtypes)
  first_scratch = first_result + len(plan.written)
  inputs = dict(zip(plan.dtypes, refs[:first_result], strict=True))
  results = dict(zip(plan.written, refs[first_result:first_scratch], strict=True))
  scratch = dict(zip(scratch_shapes(plan), refs[first_scratch:], strict=True))
  fields, outputs = (
    {name: Field(name, plan.dtype(name)) for name in names if not is_scale(name)}
    for names in (plan.dtypes, plan.written)
  )
  moments = plan.spec.rule.moments if plan.compressed else ()
  averages = {moment.name for moment in plan.spec.rule.moments}
  computed = {n: field for n, field in outputs.items() if n not in averages}
  h = {name: scalars[0, i] for i, name in enumerate(plan.hyperparameters)}
  h |= dict.fromkeys(plan.zeros, 0.0)
  block = Block(plan, fields, inputs, results, scratch)
  scales = Scales(block, h)
  elements = _Elements(scales, computed)
  step = pl.program_id(len(plan.blocks.leading) + 1)
  per = plan.steps_per_scale_block

  if plan.turned:

    @pl.when(step % per == 0)
    def _():
      for moment in moments:
        scales.read(moment)

  def each_group(f):
    # One after the other in interpret mode, which compiles slowly.
    lax.fori_loop(0, GROUPS, lambda group, _: f(group), None, unroll=not plan.interpret)

  unit_columns = plan.tiles * LANES
  block_columns = plan.blocks.block_columns
  left = plan.blocks.columns - step * block_columns
  units = jnp.minimum(block_columns // unit_columns, pl.cdiv(left, unit_columns))
  codes = [outputs[moment.name] for moment in moments]
  others = [field for field in outputs.values() if field not in codes]

  def encode(u):
    for moment in moments:
      each_group(functools.partial(elements.encode, moment))
    for field in [*codes, *(others if plan.writes_late else [])]:
      block.write(field, u)
    for field in others:
      block.flush(field, u)

  # A unit's codes have to wait for its scales, and everything for the transpose
  # unit; so this encodes and flushes the unit before and reads the one after. Scales
  # come first: they are found in memory by an index, so the compiler has their loads
  # wait for what was stored before. Where nothing is transposed, the unit itself is
  # read at this place.
  def unit(u, carry):
    for moment in moments:
      scales.decoders(moment, step, u)
    encode(jnp.maximum(u - 1, 0))
    for field in fields.values():
      block.read(field, jnp.minimum(u + 1, units - 1) if plan.turned else u)
    each_group(lambda group: elements.update(step, u, group))
    if not plan.writes_late:
      for field in others:
        block.write(field, u)
    for moment in moments:
      scales.encoders(moment, step, u)
    block.take_next()
    return carry

  if plan.turned:
    for field in fields.values():
      block.read(field, 0)
  block.take_next()
  lax.fori_loop(0, units, unit, None)
  encode(units - 1)

  if plan.turned:

    @pl.when((step % per == per - 1) | (step == plan.steps - 1))
    def _():
      for moment in moments:
        scales.write(moment)


class _Elements:
  """Updates the elements of a block's units and makes their codes."""

  def __init__(self, scales: Scales, outputs: dict[str, Field]):
    self.scales = scales
    self.block = scales.block
    self.plan = scales.plan
    self.h = scales.h
    self.multiples = scales.multiples
    self.outputs = outputs
    self.fields = self.block.fields
    self.scratch = self.block.scratch
    self.first_row = (
      pl.program_id(len(self.plan.blocks.leading)) * self.plan.blocks.block_rows
    )
    if self.plan.dithers:
      self.word = Words(self.plan, self.h, self.scratch["dither"], self.first_row)

  def update(self, step, unit, group) -> None:
    """Updates everything but the codes of 32 rows of a unit."""
    plan = self.plan
    row = pl.multiple_of(group * GROUP_SIZE, GROUP_SIZE)
    rows = pl.ds(row, GROUP_SIZE)
    largest: dict[tuple[str, int], jax.Array] = {}  # by name and which group
    written: dict[str, list[jax.Array]] = {name: [] for name in self.outputs}
    inside = self._inside(step, unit, row) if plan.ragged else None
    for k in range(WORD_ROWS):
      grad = self.block.floats("grad", k, rows)
      old, new, roots = [], [], {}
      for moment in plan.spec.rule.moments:
        old.append(self._old_moment(moment, k, rows, group))
        new.append(self._new_moment(moment, grad, old[-1]))
        if not plan.compressed:
          field = self.fields[moment.name]
          self.block.put_word(field, k, rows, as_bits(new[-1]))
          continue
        magnitude, root, code_root = self._roots(moment, new[-1])
        if root is not None:
          roots[moment.name] = root
        if inside is not None:
          magnitude = jnp.where(inside[k], magnitude, 0.0)
        for i in range(GROUP_SIZE // 8):
          key = moment.name, i if plan.blocks.along_rows else k
          part = magnitude[8 * i : 8 * (i + 1)]
          largest[key] = jnp.maximum(largest[key], part) if key in largest else part
        self._keep_for_codes(moment, k, row, code_root, new[-1])
      master = self._master(k, rows, grad, old, new, roots)
      word = self.word(step, unit, k, rows) if plan.dithers else None
      for name, bits in self._split(k, rows, master, word).items():
        written[name].append(bits)
    for name, numbers in written.items():
      self._put(name, rows, numbers)
    for (name, which), parts in largest.items():
      start = pl.multiple_of(self.scales.index(group, which) * 8, 8)
      self.scratch[f"{name}_max"][pl.ds(start, 8), :] = parts

  def _old_moment(self, moment, k: int, rows, group) -> jax.Array:
    if not self.plan.compressed:
      return self.block.floats(moment.name, k, rows)
    word, itemsize = self.block.word(moment.name, k, rows)
    if self.scales.stays_in_place(moment, k):
      code = word & (0xFF << 8 * k)
    else:
      code = take(word, k, itemsize, moment.kind == "first")
    factor = self.scales.factor(moment, "decoder", k, group)
    return codec.decode_element(
      code.astype(jnp.float32), factor, moment.kind, self.plan.spec.storage
    )

  def _new_moment(self, moment, grad, old) -> jax.Array:
    if not self.plan.units_of_gain:
      return moment.update(grad, old, self.h)
    return (grad if moment.kind == "first" else grad * grad) + old

  def _keep_for_codes(self, moment, k: int, row, root, value) -> None:
    rows = pl.ds(pl.multiple_of(k * LANES + row, 8), GROUP_SIZE)
    self.scratch[f"{moment.name}_root"][rows, :] = root
    if moment.kind == "first":
      self.scratch[f"{moment.name}_value"][rows, :] = value

  def _inside(self, step, unit, row) -> list[jax.Array]:
    """Whether elements lie inside the leaf, for each row of four."""
    plan = self.plan
    shape = (GROUP_SIZE, LANES)
    number = lax.broadcasted_iota(jnp.int32, shape, 0) + row
    if plan.blocks.along_rows:
      first = self.first_row + WORD_ROWS * (number & (plan.words - 1))
      return [first < plan.blocks.rows - k for k in range(WORD_ROWS)]
    tile = lax.broadcasted_iota(jnp.int32, shape, 1) // plan.words
    column = number + (unit * plan.tiles + tile) * LANES
    column += step * plan.blocks.block_columns
    return [column < plan.blocks.columns] * WORD_ROWS

  def _roots(self, moment, value):
    """A moment's magnitude, its square root, and what its codes are made of."""
    fast = self.plan.has_fast_roots
    is_root = self.plan.spec.storage.companding == "root"
    if moment.kind == "first":
      magnitude = jnp.abs(value)
      return magnitude, None, inverse_root(magnitude, fast) if is_root else value
    if not fast:  # An infinity would make a NaN of its root.
      value = jnp.minimum(value, _LARGEST)
    root, fourth_root = roots_of_square(value, fast)
    return value, root, fourth_root if is_root else root

  def encode(self, moment, group) -> None:
    """Writes the codes of 32 rows of a unit."""
    row = pl.multiple_of(group * GROUP_SIZE, GROUP_SIZE)
    rounding = codec.moment_rounding(self.h, moment.kind).code - 0.5
    if moment.kind == "second":
      rounding = rounding - 128.0
    numbers = []
    for k in range(WORD_ROWS):
      rows = pl.ds(pl.multiple_of(k * LANES + row, 8), GROUP_SIZE)
      level, place = self._level(moment, k, group, rows)
      last: Any = ROUND * place
      if moment.kind == "second":
        # From 1 to 255, and 0 where the scale is 0. Around 0, clamping is one
        # operation; what is added last makes up for the 128, in groups of scale 0
        # for 127.
        last = self.scales.factor(moment, "last", k, group)
      level = jnp.clip(level + rounding * place, -127.0 * place, 127.0 * place)
      # A NaN's low bits are zero.
      numbers.append(as_bits(level + last))
    word = pack(numbers, 1, self.plan.interpret)
    field = self.block.fields[moment.name]
    self.block.put_word(field, 0, pl.ds(row, GROUP_SIZE), word)

  def _level(self, moment, k, group, rows) -> tuple[jax.Array, float]:
    """What is rounded to codes, and what one code is of it."""
    root = self.scratch[f"{moment.name}_root"][rows, :]
    factor = self.scales.factor(moment, "encoder", k, group)
    levels = codec.LEVELS[moment.kind]
    if self.plan.spec.storage.companding == "paper":
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
      word, itemsize = self.block.word("correction", k, rows)
      correction = take_correction(word, k, itemsize)
    master = merge(self.block.floats("param", k, rows), correction)
    rate, decay = -h["learning_rate"], h["weight_decay"]
    if not plan.compressed:
      h = {name: value for name, value in h.items() if name != LEAST_ROOT}
    if not self._is_coarse:
      if plan.units_of_gain:
        pairs = zip(new, plan.spec.rule.moments, strict=True)
        new = [value * self.scales.units[moment.name].gain for value, moment in pairs]
      direction = plan.spec.rule.direction(grad, old, new, h)
      return master + rate * (direction + decay * master if plan.decay else direction)
    scalars = {name: value for name, value in h.items() if name not in plan.zeros}
    zeros = dict.fromkeys(plan.zeros, 0.0)
    known = [
      Known(
        value,
        self.scales.units[moment.name].gain,
        roots.get(moment.name),
        1.0 / self.multiples.root,
      )
      for moment, value in zip(plan.spec.rule.moments, new, strict=True)
    ]
    direction, factor = evaluate(
      lambda *args: plan.spec.rule.direction(*args[:-1], args[-1] | zeros),
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
    binade = as_float(as_bits(master + step) & _SIGN_AND_EXPONENT)
    threshold = (h["master_rounding"] - codec.HALF_OF_FLOAT32) * 2.0**-15
    return master + (step + binade * threshold)

  @property
  def _is_coarse(self) -> bool:
    """Whether master weights have at most 24 bits."""
    is_wide = "correction" in self.fields and self.plan.spec.storage.master_bits == 32
    return self.fields["param"].itemsize == 2 and not is_wide

  def _split(self, k, rows, master, word) -> dict[str, jax.Array]:
    """What is written for a row; ``_put`` knows in which of the bits it lies."""
    bits = quiet(master)
    rounded = self._rounded(bits, word)
    corrected = "correction" in self.fields
    if self.plan.spec.new_params:
      written = {"param": rounded}
      if corrected:
        # At 24 bits it is the second byte, but for the sign, which `_put` flips.
        is_24 = self.plan.spec.storage.master_bits == 24
        written["correction"] = rounded if is_24 else bits
      return written
    if self.fields["param"].itemsize == 2:
      rounded &= HIGH_HALF
    old = self.block.floats("param", k, rows)
    update = quiet(as_float(rounded) - old)
    if self.fields["grad"].itemsize == 2:
      update = round_bfloat16(update) & HIGH_HALF
    written = {"update": update}
    if corrected:
      produced = round_bfloat16(quiet(old + as_float(update)))
      written["correction"] = self._residual(bits, produced)
    return written

  def _rounded(self, bits, word) -> jax.Array:
    """Bits of the new parameter; the high half of them if it has 16."""
    if self.fields["param"].itemsize == 4:
      return bits
    if word is not None:
      return bits + logical_shift(word, 16)
    if "correction" not in self.fields:
      return round_bfloat16(bits)
    return bits + 0x8000

  def _residual(self, bits, produced) -> jax.Array:
    """As ``codec.residual``, from the bits of float32 numbers."""
    discarded = 8 if self.plan.spec.storage.master_bits == 24 else 0
    top = logical_shift(bits, discarded)
    produced = logical_shift(produced & HIGH_HALF, discarded)
    magnitude = 2 ** (31 - discarded) - 1
    lowest = -(2 ** (15 - discarded))
    distance = (top & magnitude) - (produced & magnitude)
    same_sign = ((top ^ produced) & ~magnitude) == 0
    distance = jnp.where(same_sign, distance, lowest)
    is_nan = (bits == NAN) | ((produced & magnitude) > (0x7F800000 >> discarded))
    distance = jnp.where(is_nan, 0, distance)
    return jnp.clip(distance, lowest, -lowest - 1)

  def _put(self, name: str, rows, numbers: list[jax.Array]) -> None:
    """Writes four rows of numbers."""
    itemsize = self.outputs[name].itemsize
    if name == "correction":
      at = 8 if itemsize == 1 and self.plan.spec.new_params else 0
    else:
      at = 0 if itemsize == 4 else 16
    per_word = WORD_ROWS // itemsize
    for i in range(itemsize):
      part = numbers[i * per_word : (i + 1) * per_word]
      if at == 8:
        word = pack_second_bytes(part, self.plan.interpret) ^ EVERY_SIGN
      else:
        part = [logical_shift(number, at) for number in part]
        word = pack(part, itemsize, self.plan.interpret)
      self.block.put_word(self.outputs[name], i, rows, word)
