"""Shardings, and the groups of a leaf's moments."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
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
    if axes is PartitionSpec.UNCONSTRAINED:
      return axes
    return axes if length % _ways(mesh, _names(axes)) == 0 else None

  return PartitionSpec(*(keep(a, n) for a, n in zip(spec, shape, strict=False)))


def _names(entry: Any) -> tuple[str, ...]:
  """The mesh axes of an entry of a spec."""
  if entry is None or entry is PartitionSpec.UNCONSTRAINED:
    return ()
  return entry if isinstance(entry, tuple) else (entry,)


def _ways(mesh: Any, names: Sequence[str]) -> int:
  return math.prod(mesh.shape[name] for name in names)


def spread(
  sharding: NamedSharding,
  shape: tuple[int, ...],
  scale_shape: tuple[int, ...],
  group_size: int,
  over: Sequence[str],
) -> NamedSharding:
  """The sharding of a leaf's state that is sharded over more mesh axes than the leaf.

  All of them divide one dimension, after the axes that divide it already: one where
  they cut no groups, not that of the groups if there is another, and of those the
  longest. Without any, the state is sharded as the leaf. It depends on the arguments
  alone, so that an update finds the sharding that the state was given.

  Args:
    sharding: The leaf's sharding.
    shape: The leaf's shape.
    scale_shape: Shape of its scales, gaps included.
    group_size: Elements of a group of the moments.
    over: The mesh axes; those that the leaf is sharded over already count for nothing.
  """
  mesh, spec = sharding.mesh, divisible(sharding.mesh, sharding.spec, shape)
  sharding = sharding.update(spec=spec)
  entries = [*spec, *[None] * (len(shape) - len(spec))]
  used = {name for entry in entries for name in _names(entry)}
  added = tuple(name for name in over if name not in used)
  ways = _ways(mesh, added)
  if ways == 1:
    return sharding
  shards = sharding.shard_shape(shape)
  axis = codec.group_axis(shape, group_size)
  cut = functools.partial(cut_groups, shape, scale_shape, group_size=group_size)
  was_cut = cut(shards) is not None

  def fits(dim):
    if entries[dim] is PartitionSpec.UNCONSTRAINED or shards[dim] % ways:
      return False
    parts = [n // ways if i == dim else n for i, n in enumerate(shards)]
    # Groups that are cut already are put together for the update.
    return (was_cut and dim != axis) or not cut(tuple(parts))

  # Of equals the first: parts of it lie together in memory.
  best = max(
    (dim for dim, n in enumerate(shards) if n and fits(dim)),
    key=lambda dim: (dim != axis, shards[dim]),
    default=None,
  )
  if best is None:
    return sharding
  names = (*_names(entries[best]), *added)
  entries[best] = names if len(names) > 1 else names[0]
  return sharding.update(spec=PartitionSpec(*entries))


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


def is_manual() -> bool:
  """Whether all mesh axes are manual, so that arrays are shards."""
  mesh = jax.sharding.get_abstract_mesh()
  return not mesh.empty and all(t == AxisType.Manual for t in mesh.axis_types)


def move(x: jax.Array, sharding: NamedSharding) -> jax.Array:
  """The array with another sharding, on explicit or auto mesh axes."""
  if is_explicit(sharding):
    return jax.sharding.reshard(x, sharding)
  return lax.with_sharding_constraint(x, sharding)


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
