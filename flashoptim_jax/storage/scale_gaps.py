"""Gaps between the scales of a leaf, with which its ``PartitionSpec`` fits them.

Scales have the leaf's shape, but for the axis of its groups, where a group of 32 has
one. A spec that divides 64 elements by 4 does not divide their 2 scales. In a state,
that axis of the scales is therefore filled up until the mesh axes that divide the
leaf's divide it as well.

What fills it up are gaps: zeros that no one reads. They come at equal distances: of
``gcd(groups, slots)`` runs of scales, each ends in its share of the gaps. A shard then
has the scales of its own groups, wherever its edges cut no group.
"""

import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax

from flashoptim_jax.storage import codec

# Mesh axes of up to so many devices, if a power of two that divides a leaf's axis,
# divide that of its scales; larger ones where it costs at most a part of the scales.
_WAYS = 8
_MOST_GAPS = 1 / 32


def stored_shape(shape: tuple[int, ...], group_size: int) -> tuple[int, ...]:
  """Shape of the scales of a leaf of ``shape`` in a state, gaps included."""
  axis = codec.group_axis(shape, group_size)
  if axis is None or not shape[axis]:
    return codec.scale_shape(shape, group_size)
  slots = _slots(shape[axis], group_size)
  return (*shape[:axis], slots, *shape[axis + 1 :])


def _slots(length: int, group_size: int) -> int:
  """Scales and gaps along the axis of a leaf's groups, of a length."""
  groups = math.ceil(length / group_size)

  def filled(ways):
    return math.ceil(groups / ways) * ways

  ways = length & -length  # The largest power of two that divides it.
  while ways > _WAYS and filled(ways) > (1 + _MOST_GAPS) * groups:
    ways //= 2
  return filled(ways)


def is_stored_shape(
  found: tuple[int, ...], shape: tuple[int, ...], group_size: int
) -> bool:
  """Whether the scales of a leaf of ``shape`` may have a shape.

  In a shard, and in states that were made before there were gaps, there may be fewer
  gaps than in :func:`stored_shape`.
  """
  most = stored_shape(shape, group_size)
  least = codec.scale_shape(shape, group_size)
  return len(found) == len(shape) and all(
    low <= length <= high for low, length, high in zip(least, found, most, strict=True)
  )


class Runs(NamedTuple):
  """How scales lie along their axis.

  Attributes:
    number: How many runs there are.
    scales: Scales in a run.
    gaps: Gaps after them.
  """

  number: int
  scales: int
  gaps: int


def runs(shape: tuple[int, ...], scale_shape: tuple[int, ...], group_size: int) -> Runs:
  """How the scales of a leaf lie.

  Args:
    shape: The leaf's shape.
    scale_shape: That of its scales.
    group_size: Elements of a group.
  """
  axis = codec.group_axis(shape, group_size)
  if axis is None or not shape[axis]:
    return Runs(1, 1, 0)
  groups, slots = math.ceil(shape[axis] / group_size), scale_shape[axis]
  number = math.gcd(groups, slots)
  return Runs(number, groups // number, (slots - groups) // number)


def remove(scale: jax.Array, shape: tuple[int, ...], group_size: int) -> jax.Array:
  """Scales as :mod:`flashoptim_jax.storage.codec` has them, one for each group.

  Args:
    scale: The scales of a leaf, as a state has them.
    shape: The leaf's shape.
    group_size: Elements of a group.
  """
  number, scales, gaps = runs(shape, scale.shape, group_size)
  if not gaps:
    return scale
  axis: Any = codec.group_axis(shape, group_size)
  before, after = scale.shape[:axis], scale.shape[axis + 1 :]
  parted = scale.reshape(*before, number, scales + gaps, *after)
  kept = lax.slice_in_dim(parted, 0, scales, axis=axis + 1)
  return kept.reshape(*before, number * scales, *after)


def insert(
  scale: jax.Array,
  shape: tuple[int, ...],
  stored: tuple[int, ...],
  group_size: int,
) -> jax.Array:
  """The inverse of :func:`remove`, to scales of shape ``stored``."""
  number, scales, gaps = runs(shape, stored, group_size)
  if not gaps:
    return scale
  axis: Any = codec.group_axis(shape, group_size)
  before, after = scale.shape[:axis], scale.shape[axis + 1 :]
  parted = scale.reshape(*before, number, scales, *after)
  padding = [(0, 0, 0)] * parted.ndim
  padding[axis + 1] = (0, gaps, 0)
  return lax.pad(parted, np.zeros((), scale.dtype), padding).reshape(stored)
