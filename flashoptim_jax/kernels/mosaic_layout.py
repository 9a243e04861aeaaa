"""The order of axes in which XLA keeps an array in a TPU's memory.

It keeps the last two axes in tiles of up to 8 rows by 128 columns, and takes the
axes that leave the least of the tiles empty. A kernel that takes a view of an array
with its axes in that order has it with no copy. Whatever order a kernel takes, its
results are the same.
"""

import itertools
import math

_LANES = 128
_SUBLANES = 8


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
      * math.ceil(rows / tile_rows) * tile_rows
      * math.ceil(columns / _LANES) * _LANES
  )
