"""The fused update in plain jnp: runs on every backend, and is the reference."""

import jax
import jax.numpy as jnp
from jax import lax

from flashoptim_jax import codec
from flashoptim_jax.kernels import Leaf, UpdatedLeaf
from flashoptim_jax.rules import Rule, Scalars
from flashoptim_jax.storage import Storage


def update(
    rule: Rule,
    storage: Storage,
    leaf: Leaf,
    scalars: Scalars,
    new_params: bool,
) -> UpdatedLeaf:
  """Updates one leaf; see :func:`flashoptim_jax.kernels.update_leaves`."""
  h = {name: _as_float32(value) for name, value in scalars.items()}
  kinds = [kind for _, kind in rule.moments]
  old_moments = tuple(
      values if scale is None else codec.decode(values, scale, kind, storage)
      for kind, (values, scale) in zip(kinds, leaf.moments, strict=True)
  )
  grad = leaf.grad.astype(jnp.float32)
  direction, moments = rule.direction(grad, old_moments, h)

  master = codec.merge(leaf.param, leaf.correction)
  direction = direction.astype(master.dtype)
  if leaf.decay:
    direction = direction + _like(scalars["weight_decay"], master) * master
  master = master + -_like(scalars["learning_rate"], master) * direction

  param, correction = codec.split(master, leaf.param.dtype, storage.master_bits)
  result = param
  if not new_params:
    result = _round(param - leaf.param.astype(master.dtype), leaf.grad.dtype)
    produced = _applied(leaf.param, result)
    correction = codec.residual(master, produced, storage.master_bits)
  return UpdatedLeaf(
      result,
      correction,
      tuple(
          (moment, None)
          if scale is None
          else codec.encode(moment, kind, storage)
          for moment, kind, (_, scale) in zip(
              moments, kinds, leaf.moments, strict=True
          )
      ),
  )


def _as_float32(value):
  # Python numbers stay weakly typed, for the sake of float64 masters.
  return value.astype(jnp.float32) if hasattr(value, "astype") else value


def _like(value, master: jax.Array):
  return value.astype(master.dtype) if hasattr(value, "astype") else value


def _round(x: jax.Array, dtype) -> jax.Array:
  """Rounds to ``dtype`` in a way that XLA does not optimise away.

  Inside one program XLA may skip the rounding of an intermediate 16-bit value.
  The correction must be taken for the value that the caller really gets.
  """
  if jnp.finfo(dtype).bits < jnp.finfo(x.dtype).bits:
    info = jnp.finfo(dtype)
    x = lax.reduce_precision(x, info.nexp, info.nmant)
  return x.astype(dtype)


def _applied(param: jax.Array, update: jax.Array) -> jax.Array:
  """The parameter that ``optax.apply_updates`` makes of an update."""
  dtype = jnp.promote_types(param.dtype, update.dtype)
  wide = jnp.promote_types(dtype, jnp.float32)
  total = _round(param.astype(wide) + update.astype(wide), dtype)
  return _round(total.astype(wide), param.dtype)
