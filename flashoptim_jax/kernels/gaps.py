"""Leaves without the gaps between their scales, for backends that know of none."""

from flashoptim_jax.kernels.base import Leaf, UpdatedLeaf
from flashoptim_jax.storage import scale_gaps


def without_gaps(leaf: Leaf, group_size: int) -> Leaf:
  """The leaf with one scale for each group."""
  if not leaf.quantized:
    return leaf
  moments = tuple(
    (codes, scale_gaps.remove(scale, leaf.param.shape, group_size))
    for codes, scale in leaf.moments
  )
  return leaf.replace(moments=moments)


def with_gaps(updated: UpdatedLeaf, leaf: Leaf, group_size: int) -> UpdatedLeaf:
  """What the update of a leaf gives, with the gaps that the leaf has.

  Args:
    updated: What the update of :func:`without_gaps` gave.
    leaf: The leaf.
    group_size: Elements of a group.
  """
  if not leaf.quantized:
    return updated
  moments = tuple(
    (codes, scale_gaps.insert(scale, leaf.param.shape, leaf.scale_shape, group_size))
    for codes, scale in updated.moments
  )
  return updated._replace(moments=moments)
