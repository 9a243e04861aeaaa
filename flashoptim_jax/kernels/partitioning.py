"""Kernels on sharded leaves: each shard is updated where it lies.

XLA partitions plain jnp by itself, but can't look into a kernel. So a kernel is
called

* directly, where arrays are whole: on one device, and where all mesh axes are
  manual (inside ``jax.shard_map``), since there a shard is an array;
* inside a ``jax.shard_map``, where a leaf's sharding is known while tracing: its
  mesh axes are explicit, or it came through ``with_shardings``;
* through ``custom_partitioning``, where it isn't (auto axes): XLA says how the
  leaf is sharded once it knows.

A leaf whose shards cut groups is gathered along the axis of its groups first.

A shard whose elements are rounded by thresholds of their own is told where in the
whole leaf it lies, so that they have the same ones there. In a ``shard_map`` of the
caller's, where arrays are shards, there is no telling: each is a leaf of its own.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import (
  ArrayMapping,
  CompoundFactor,
  SdyShardingRule,
  custom_partitioning,
)
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flashoptim_jax.kernels.base import Leaf, UpdatedLeaf
from flashoptim_jax.rules import Scalars
from flashoptim_jax.storage import codec, partition_specs, scale_gaps
from flashoptim_jax.storage.options import Storage

# Updates leaves that lie whole on one device.
Update = Callable[[Sequence[Leaf], Scalars], list[UpdatedLeaf]]


def update(
  update_whole: Update,
  leaves: Sequence[Leaf],
  scalars: Scalars,
  shardings: Mapping[str, NamedSharding],
  storage: Storage,
  devices: int,
) -> list[UpdatedLeaf]:
  """Updates leaves, sharded in any way, with a function for whole ones.

  Args:
    update_whole: The function; it is given leaves of the shards' shapes.
    leaves: The leaves.
    scalars: Numbers and arrays of shape ().
    shardings: Shardings of leaves by path, as far as they are known.
    storage: How leaves are stored.
    devices: How many devices leaves may be sharded over.
  """
  unknown: list[int] = []
  by_mesh: dict[Any, dict[int, NamedSharding]] = {}
  manual = partition_specs.is_manual()
  for i, leaf in enumerate(leaves):
    sharding = None if manual else _known_sharding(leaf, shardings)
    if sharding is None:
      unknown.append(i)
    else:
      by_mesh.setdefault(sharding.mesh, {})[i] = sharding
  updated: dict[int, UpdatedLeaf] = {}
  arguments = scalars, storage
  if unknown:
    chosen = [leaves[i] for i in unknown]
    results = (
      update_whole(chosen, scalars)
      if manual or devices == 1
      else _update_auto(update_whole, chosen, *arguments)
    )
    updated.update(zip(unknown, results, strict=True))
  for known in by_mesh.values():
    results = _update_known(
      update_whole, [leaves[i] for i in known], *arguments, list(known.values())
    )
    updated.update(zip(known, results, strict=True))
  return [updated[i] for i in range(len(leaves))]


def xla_can_partition(
  leaf: Leaf,
  shardings: Mapping[str, NamedSharding],
  group_size: int,
  devices: int,
) -> bool:
  """Whether to leave the partitioning of a leaf's plain jnp update to XLA.

  Not where there is nothing to partition. And where groups are cut, it refuses to
  guess how their parts lie with explicit axes, and with others returns scales that
  are sharded in another way.
  """
  if partition_specs.is_manual():
    return False
  sharding = _known_sharding(leaf, shardings)
  if sharding is None:
    return devices > 1
  return _uncut(leaf, sharding, group_size) == sharding


def is_partitioned(
  leaf: Leaf, shardings: Mapping[str, NamedSharding], devices: int
) -> bool:
  """Whether only XLA knows how a leaf is sharded."""
  return (
    devices > 1
    and not partition_specs.is_manual()
    and _known_sharding(leaf, shardings) is None
  )


def _known_sharding(
  leaf: Leaf, shardings: Mapping[str, NamedSharding]
) -> NamedSharding | None:
  """How a leaf is sharded, if that is known while tracing."""
  sharding = jax.typeof(leaf.param).sharding
  if partition_specs.is_explicit(sharding):
    return sharding
  return shardings.get(leaf.path)


def _update_known(
  update_whole: Update,
  leaves: Sequence[Leaf],
  scalars: Scalars,
  storage: Storage,
  shardings: Sequence[NamedSharding],
) -> list[UpdatedLeaf]:
  mesh, group_size = shardings[0].mesh, storage.group_size
  origins, leaves = _without_origins(leaves)
  original = [
    _of_arrays(leaf, sharding) for leaf, sharding in zip(leaves, shardings, strict=True)
  ]
  uncut = [
    _of_arrays(leaf, _uncut(leaf, sharding, group_size))
    for leaf, sharding in zip(leaves, shardings, strict=True)
  ]
  moved = [
    jax.tree.map(partition_specs.move, leaf, there) if there != here else leaf
    for leaf, here, there in zip(leaves, original, uncut, strict=True)
  ]
  in_specs = jax.tree.map(lambda sharding: sharding.spec, uncut)

  def update_shards(shards, origins, scalars):
    placed = []
    for shard, leaf, origin, own in zip(shards, leaves, origins, in_specs, strict=True):
      starts = [
        0 if name is None else lax.axis_index(name) * size
        for name, size in zip(own.param, shard.param.shape, strict=False)
      ]
      placed.append(_placed(shard, leaf, origin, starts, storage))
    return update_whole(placed, scalars)

  updated = jax.shard_map(
    update_shards,
    mesh=mesh,
    in_specs=(in_specs, PartitionSpec(), PartitionSpec()),
    out_specs=[_outputs(each) for each in in_specs],
    axis_names={
      name
      for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
      if kind != AxisType.Manual
    },
    check_vma=False,
  )(moved, origins, dict(scalars))
  return [
    jax.tree.map(partition_specs.move, leaf, _outputs(here)) if there != here else leaf
    for leaf, here, there in zip(updated, original, uncut, strict=True)
  ]


def _update_auto(
  update_whole: Update,
  leaves: Sequence[Leaf],
  scalars: Scalars,
  storage: Storage,
) -> list[UpdatedLeaf]:
  group_size = storage.group_size
  origins, leaves = _without_origins(leaves)
  # Indices along the axes of leaves, sharded as these are, tell a shard its place.
  indices = [
    [lax.iota(jnp.uint32, size) for size in leaf.param.shape]
    if codec.dithers(leaf.param.dtype, storage.master_bits)
    else []
    for leaf in leaves
  ]

  # A jitted function keeps its constants, such as a kernel's tables, to itself;
  # custom_partitioning refuses them.
  @custom_partitioning
  @jax.jit
  def call(shards, indices, origins, scalars):
    placed = [
      _placed(shard, leaf, origin, [index[0] for index in along], storage)
      for shard, leaf, origin, along in zip(
        shards, leaves, origins, indices, strict=True
      )
    ]
    return update_whole(placed, scalars)

  def partition(mesh, arguments, results):
    del results
    placements, along, origins, scalars = arguments
    placed = [
      _of_arrays(leaf, _uncut(leaf, own.stored.sharding, group_size))
      for leaf, own in zip(leaves, placements, strict=True)
    ]
    outputs = [_outputs(each) for each in placed]
    along = [
      [leaf.param.update(spec=PartitionSpec(*leaf.param.spec[i : i + 1])) for i in axes]
      for leaf, axes in zip(placed, map(range, map(len, along)), strict=True)
    ]
    origins, scalars = jax.tree.map(lambda each: each.sharding, (origins, scalars))
    return mesh, call.fun, outputs, (placed, along, origins, scalars)

  others = len(jax.tree.leaves(origins)) + len(scalars)
  rule = _sharding_rule(leaves, [bool(along) for along in indices], others, group_size)
  call.def_partition(partition, sharding_rule=rule)
  # It has no batching rule of its own.
  mapped = jax.custom_batching.sequential_vmap(call)
  return mapped(leaves, indices, origins, dict(scalars))


def _without_origins(leaves: Sequence[Leaf]) -> tuple[list[Any], list[Leaf]]:
  """Origins, or None, and leaves of nothing but arrays that are sharded alike."""
  origins = [leaf.origin for leaf in leaves]
  return origins, [leaf.replace(origin=None) for leaf in leaves]


def _placed(
  shard: Leaf, leaf: Leaf, origin: Any, starts: Sequence[Any], storage: Storage
) -> Leaf:
  """A shard that knows its place, if it has to.

  Args:
    shard: The shard.
    leaf: What it is a shard of.
    origin: That leaf's own origin, or None.
    starts: The index of its first element, along the axes that may be sharded.
    storage: How it is stored.
  """
  whole = leaf.param.shape
  dithers = codec.dithers(leaf.param.dtype, storage.master_bits)
  if not dithers or shard.param.shape == whole:
    return shard.replace(origin=origin)
  strides = codec.row_major(whole)
  origin = codec.place_of(starts, strides[: len(starts)], origin)
  # What is sharded along its first axis alone is a part of the whole in one piece.
  in_one_piece = codec.row_major(shard.param.shape) == strides
  return shard.replace(origin=origin, strides=None if in_one_piece else strides)


def _sharding_rule(
  leaves: Sequence[Leaf], indexed: Sequence[bool], scalars: int, group_size: int
) -> SdyShardingRule:
  """Says that a leaf's arrays are sharded alike, and groups stay whole."""
  mappings: list[Leaf] = []
  indices: list[ArrayMapping] = []
  sizes: dict[str, Any] = {}
  whole: list[str] = []
  for i, leaf in enumerate(leaves):
    factors: list[Any] = [f"l{i}d{axis}" for axis in range(leaf.param.ndim)]
    scale = list(factors)
    axis = _cuttable_axis(leaf, group_size)
    if axis is not None:
      length, slots = leaf.param.shape[axis], leaf.scale_shape[axis]
      runs = scale_gaps.runs(leaf.param.shape, leaf.scale_shape, group_size).number
      if runs > 1 and not length % group_size:
        whole.append(f"l{i}e")
        sizes[whole[-1]] = length // runs
        factors[axis] = CompoundFactor(factors[axis], whole[-1])
        if slots > runs:
          whole.append(f"l{i}s")
          sizes |= {scale[axis]: runs, whole[-1]: slots // runs}
          scale[axis] = CompoundFactor(scale[axis], whole[-1])
      else:
        scale[axis] = f"l{i}s"
        whole += [factors[axis], scale[axis]]
    mappings.append(leaf.map_arrays(ArrayMapping(*factors), ArrayMapping(*scale)))
    if indexed[i]:
      indices += map(ArrayMapping, factors)
  flatten = functools.partial(
    jax.tree.leaves, is_leaf=lambda node: isinstance(node, ArrayMapping)
  )
  return SdyShardingRule(
    (*flatten(mappings), *indices, *[ArrayMapping()] * scalars),
    tuple(flatten([_outputs(each) for each in mappings])),
    need_replication_factors=tuple(whole),
    **sizes,
  )


def _outputs(leaf: Leaf) -> UpdatedLeaf:
  """What belongs to the arrays that an update writes."""
  return UpdatedLeaf(leaf.param, leaf.correction, leaf.moments)


def _of_arrays(leaf: Leaf, sharding: NamedSharding) -> Leaf:
  """Shardings of a leaf's arrays, given its parameter's."""
  if not leaf.quantized:
    return leaf.map_arrays(sharding, None)
  spec = partition_specs.divisible(sharding.mesh, sharding.spec, leaf.scale_shape)
  return leaf.map_arrays(sharding, sharding.update(spec=spec))


def _cuttable_axis(leaf: Leaf, group_size: int) -> int | None:
  """The axis of a leaf's groups; None if it has no groups."""
  if not leaf.quantized:
    return None
  return codec.group_axis(leaf.param.shape, group_size)


def _uncut(leaf: Leaf, sharding: NamedSharding, group_size: int) -> NamedSharding:
  """The sharding, with the axis of the groups whole if there are any."""
  if _cuttable_axis(leaf, group_size) is None:
    return sharding
  return partition_specs.uncut(sharding, leaf.param.shape, leaf.scale_shape, group_size)
