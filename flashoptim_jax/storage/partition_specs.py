"""Partition specs and the groups of a leaf's moments."""

from typing import Any

from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flashoptim_jax.storage import codec


def divisible(mesh: Any, spec: PartitionSpec, shape: tuple[int, ...]) -> PartitionSpec:
  """A spec, less the mesh axes that don't divide a shape's dimensions.

  Args:
    mesh: The mesh, concrete or abstract.
    spec: The parameter's spec.
    shape: Shape of an array that belongs to it.
  """

  def keep(axes, length):
    if axes is None or axes is PartitionSpec.UNCONSTRAINED:
      return axes
    names = axes if isinstance(axes, tuple) else (axes,)
    ways = 1
    for name in names:
      ways *= mesh.shape[name]
    return axes if length % ways == 0 else None

  return PartitionSpec(*(keep(a, n) for a, n in zip(spec, shape, strict=False)))


def cut_groups(
  shape: tuple[int, ...],
  scale_shape: tuple[int, ...],
  shard_shape: tuple[int, ...],
  group_size: int,
) -> str | None:
  """How shards cut the groups of a leaf's moments; None if they don't.

  Args:
    shape: Shape of the leaf.
    scale_shape: Shape of its scales, gaps included.
    shard_shape: Shape of its shards.
    group_size: Elements of a group.
  """
  axis = codec.group_axis(shape, group_size)
  if axis is None or 0 in shape:
    return None
  length, whole = shard_shape[axis], shape[axis]
  if length != whole and length % group_size:
    return (
      f"{length} of {whole} elements of axis {axis}, not a multiple of {group_size}"
    )
  slots, shards = scale_shape[axis], whole // length
  if slots % shards:
    return f"{slots} scales for {shards} shards of axis {axis}"
  if codec.group_axis(shard_shape, group_size) != axis:
    return f"groups of shape {shape} lie along another axis than those of {shard_shape}"
  return None


def is_explicit(sharding: NamedSharding) -> bool:
  """Whether it is part of an array's type."""
  return AxisType.Explicit in sharding.mesh.axis_types


def uncut(
  sharding: NamedSharding,
  shape: tuple[int, ...],
  scale_shape: tuple[int, ...],
  group_size: int,
) -> NamedSharding:
  """The sharding, with the axis of the groups whole if it cuts them.

  See :func:`cut_groups`.
  """
  shard_shape = sharding.shard_shape(shape)
  if cut_groups(shape, scale_shape, shard_shape, group_size) is None:
    return sharding
  axis = codec.group_axis(shape, group_size)
  entries = [None if i == axis else entry for i, entry in enumerate(sharding.spec)]
  return sharding.update(spec=PartitionSpec(*entries))
