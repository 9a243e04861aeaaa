"""The order of axes in which XLA keeps an array in a TPU's memory, and blocks of it.

XLA keeps the last two axes in tiles of up to 8 rows by 128 columns, and takes the
axes that leave the least of the tiles empty. A kernel that takes a view of an array
with its axes in that order has it with no copy. Whatever order a kernel takes, its
results are the same.
"""

import itertools
import math
from typing import NamedTuple

from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from flashoptim_jax.kernels.base import GROUP_SIZE
from flashoptim_jax.kernels.mosaic_words import WORD_ROWS

LANES = 128
_SUBLANES = 8
GROUPS = LANES // GROUP_SIZE  # groups in a tile of 128 columns
GROUP_WORDS = GROUP_SIZE // WORD_ROWS  # rows of words of a group that lies along rows
SCALE_COLUMNS = LANES * GROUP_SIZE  # columns whose scales fill 128 lanes
UNIT = WORD_ROWS * LANES * LANES  # elements
_SCRATCH_BYTES = 5 << 20  # at most
_LEAST_ROWS = 8 * GROUP_SIZE  # whose scales fill a tile, where groups lie along rows


def axis_order(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
  """Axes from the slowest to the fastest in memory, as XLA:TPU has them by default.

  Args:
    shape: The array's shape, of two axes or more.
    itemsize: Bytes of a number, 4 at most.
  """

  def order(last_two):
    rest = (axis for axis in range(len(shape)) if axis not in last_two)
    return (*rest, *last_two)

  # XLA takes the first of several that are equally small.
  orders = sorted(map(order, itertools.permutations(range(len(shape)), 2)))
  return min(
    orders, key=lambda axes: _padded_size([shape[axis] for axis in axes], itemsize)
  )


def _padded_size(shape: list[int], itemsize: int) -> int:
  """Elements of whole tiles."""
  *leading, rows, columns = shape
  # Where rows are few, the tiles have the next power of two, and numbers of less
  # than 32 bits share a word with those below them.
  fewest = 1 << (rows - 1).bit_length() if rows else 1
  tile_rows = max(min(fewest, _SUBLANES), 4 // itemsize)
  return (
    math.prod(leading)
    * math.ceil(rows / tile_rows)
    * tile_rows
    * math.ceil(columns / LANES)
    * LANES
  )


class Blocks(NamedTuple):
  """How a leaf is cut into blocks.

  Attributes:
    order: The order in which its axes are passed.
    leading: Leading axes that the grid runs over.
    rows: Rows of the leaf.
    columns: Columns of the leaf.
    block_rows: Rows of a block, a multiple of 32.
    block_columns: Columns of a block, a multiple of 128.
    along_rows: Whether groups lie along the rows, not the columns.
    strides: How far apart elements are in the whole leaf, along the leading axes, the
      rows and the columns; None if it doesn't matter.
  """

  order: tuple[int, ...]
  leading: tuple[int, ...]
  rows: int
  columns: int
  block_rows: int
  block_columns: int
  along_rows: bool
  strides: tuple[int, ...] | None = None


def cut_into_blocks(
  shape: tuple[int, ...],
  itemsize: int,
  element_bytes: float,
  grouped: bool,
  strides: tuple[int, ...] | None = None,
) -> Blocks:
  """Cuts a leaf into blocks.

  Args:
    shape: The leaf's shape.
    itemsize: Bytes of one of its numbers.
    element_bytes: Bytes of all arrays, in and out, that an element takes.
    grouped: Whether it has groups.
    strides: How far apart elements are in the whole leaf, by axis, if it matters.
  """
  order, last = axis_order(shape, itemsize), len(shape) - 1
  if grouped and last not in order[-2:]:
    order = tuple(range(len(shape)))
  along_rows = grouped and order[-1] != last
  # Tiles have up to 32 rows, and those of scales up to 8.
  filling = _LEAST_ROWS if along_rows else 32
  if strides is not None:
    strides = tuple(strides[axis] for axis in order)
  shape, strides = _view(tuple(shape[axis] for axis in order), filling, strides)
  *leading, rows, columns = shape
  block = _block(rows, columns, element_bytes, along_rows)
  return Blocks(order, tuple(leading), rows, columns, *block, along_rows, strides)


def _view(
  shape: tuple[int, ...], filling: int, strides: tuple[int, ...] | None
) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
  """The shape in which a leaf is passed: as few leading axes as cost nothing.

  In memory the last two axes are cut into tiles. Where the rows fill them,
  leading axes continue the rows.

  Args:
    shape: The leaf's shape, its axes in order.
    filling: Rows that fill the tiles of all arrays.
    strides: How far apart elements are in the whole leaf, by axis, if it matters. Rows
      are as far from each other as from those that continue them.
  """
  while len(shape) > 2 and shape[-2] % filling == 0:
    if strides is not None:
      if strides[-3] != shape[-2] * strides[-2]:
        break
      strides = (*strides[:-3], *strides[-2:])
    shape = (*shape[:-3], shape[-3] * shape[-2], shape[-1])
  return shape, strides


def _block(
  rows: int, columns: int, element_bytes: float, along_rows: bool
) -> tuple[int, int]:
  """Rows and columns of a block: the fewest units, then the most rows."""
  tiles = pl.cdiv(columns, LANES)

  def units(block_rows):
    return pl.cdiv(rows, block_rows) * pl.cdiv(tiles * block_rows, 4 * LANES)

  choices = [4 * LANES >> i for i in range(5)]
  if along_rows:
    # A block of scales has 8 rows or more, or all there are.
    choices = [r for r in choices if r >= min(rows, _LEAST_ROWS)]
  block_rows = min(choices, key=lambda r: (units(r), -r))
  block_columns = 4 * LANES * LANES // block_rows
  # A block is in memory twice while the next one arrives.
  most = (chip()[1] - _SCRATCH_BYTES) / (2 * element_bytes * block_rows)
  most = min(most, columns if along_rows else min(columns, SCALE_COLUMNS))
  while 2 * block_columns <= most:
    block_columns *= 2
  return block_rows, block_columns


def chip() -> tuple[int, int]:
  """Generation and bytes of VMEM of the TPU that is traced for.

  Where that is unknown (interpret mode, or a mesh without devices), the least of
  those that Pallas supports.
  """
  try:
    info = pltpu.get_tpu_info()
  except ValueError:
    return 4, 16 << 20
  return info.generation, info.vmem_capacity_bytes
