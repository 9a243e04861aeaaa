"""Moments on explicit mesh axes, whose shards may cut groups.

JAX does not guess how the parts of a cut group lie, so that such moments are
gathered along the axis of their groups first.
"""

import jax

from flashoptim_jax.storage import codec, partition_specs
from flashoptim_jax.storage.options import Storage


def encode(
    x: jax.Array,
    kind: codec.Kind,
    storage: Storage,
    rounding: codec.MomentRounding,
    old_scale: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """:func:`flashoptim_jax.storage.codec.encode`; codes are sharded as x is."""
  own = jax.typeof(x).sharding
  if not partition_specs.is_explicit(own):
    return codec.encode(x, kind, storage, rounding, old_scale)
  whole = partition_specs.uncut(own, x.shape, storage.group_size)
  if old_scale is not None:
    _, old_scale = _placed(whole, x, old_scale)
  encoded = codec.encode(
      jax.sharding.reshard(x, whole), kind, storage, rounding, old_scale
  )
  return _placed(own, *encoded)


def decode(
    codes: jax.Array, scale: jax.Array, kind: codec.Kind, storage: Storage
) -> jax.Array:
  """:func:`flashoptim_jax.storage.codec.decode`; moments are sharded as their codes."""
  own = jax.typeof(codes).sharding
  if not partition_specs.is_explicit(own):
    return codec.decode(codes, scale, kind, storage)
  whole = partition_specs.uncut(own, codes.shape, storage.group_size)
  x = codec.decode(*_placed(whole, codes, scale), kind, storage)
  return jax.sharding.reshard(x, own)


def _placed(
    sharding: jax.sharding.NamedSharding, codes: jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Codes with that sharding, and scales as far as it divides them."""
  spec = partition_specs.divisible(sharding.mesh, sharding.spec, scale.shape)
  return (
      jax.sharding.reshard(codes, sharding),
      jax.sharding.reshard(scale, sharding.update(spec=spec)),
  )
