"""Shardings of the optimizer state, derived from those of the parameters."""

from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from flashoptim_jax import codec


def scale_spec(
    mesh, spec: PartitionSpec, shape: tuple[int, ...]
) -> PartitionSpec:
  """The parameter's spec, less the axes that don't divide a scale's dimension.

  Args:
    mesh: The mesh, concrete or abstract.
    spec: The parameter's spec.
    shape: Shape of the scale.
  """

  def ways(axes) -> int:
    names = axes if isinstance(axes, tuple) else (axes,)
    size = 1
    for axis in names:
      size *= mesh.shape[axis]
    return size

  def keep(axes, length):
    if axes is None or axes is PartitionSpec.UNCONSTRAINED:
      return axes
    return axes if length % ways(axes) == 0 else None

  return PartitionSpec(*(keep(a, n) for a, n in zip(spec, shape, strict=False)))


def zero_scale(param: Any, group_size: int) -> jax.Array:
  """Scales of a leaf that has seen no update, sharded as the leaf is."""
  shape = codec.scale_shape(jax.numpy.shape(param), group_size)
  sharding = getattr(
      jax.typeof(param) if isinstance(param, jax.core.Tracer) else param,
      "sharding",
      None,
  )
  if isinstance(sharding, NamedSharding) and any(sharding.spec):
    spec = scale_spec(sharding.mesh, sharding.spec, shape)
    sharding = sharding.update(spec=spec)
  else:
    sharding = None
  return lax.full_like(
      param, 0, dtype=codec.SCALE_DTYPE, shape=shape, sharding=sharding
  )
