"""Kernels on parts of a leaf, beside the same kernel on the whole one."""

import jax
import jax.numpy as jnp

import flashoptim_jax as fo
from flashoptim_jax import rules
from flashoptim_jax.kernels.base import UpdateSpec
from flashoptim_jax.storage import codec
from flashoptim_jax.update import transform
from tests.support import cases

SHAPE = (4, 6, 128)
# Slices, and whether they are in one piece in the leaf.
PARTS = {
  "rows": ((slice(1, 3),), True),
  "slice": ((2,), True),
  "middle": ((slice(0, 4), slice(3, 6)), False),
  "block": ((slice(1, 2), slice(2, 4), slice(64, 128)), False),
}


def assert_parts_equal_whole(update, dtype, moment_bits: int = 8):
  """Parameters of parts of a leaf are those of the whole leaf, bit for bit.

  Args:
    update: Of a backend, for a spec, leaves and scalars.
    dtype: The parameter's.
    moment_bits: The storage's.
  """
  storage = fo.Storage(16, moment_bits, min_quantized_size=0)
  params = cases.tree({"w": (SHAPE, dtype)})
  state = fo.lion(1e-3, storage=storage).init(params)._replace(count=jnp.int32(3))
  (leaf,) = transform._leaves(cases.grads_like(params), state, params, state.format)
  spec = UpdateSpec(rules.LION, storage, None, new_params=True)
  betas = {"b1": 0.9, "one_minus_b1": 0.1, "b2": 0.99, "one_minus_b2": 0.01}
  rates = {"learning_rate": 1e-3, "weight_decay": 0.1}
  scalars = betas | rates | codec.rounding_scalars(state.count, 16)
  (whole,) = update(spec, [leaf], scalars)
  places = jnp.arange(leaf.param.size, dtype=jnp.uint32).reshape(SHAPE)
  for index, in_one_piece in PARTS.values():
    part = jax.tree.map(lambda x, index=index: _part(x, index), leaf).replace(
      origin=places[index].reshape(-1)[0],
      strides=None if in_one_piece else codec.row_major(SHAPE),
    )
    (updated,) = update(spec, [part], scalars)
    cases.assert_same(updated.result, whole.result[index])


def _part(x, index):
  """A part of one of the leaf's arrays."""
  if x.shape != SHAPE and len(index) == len(SHAPE):  # A scale is for 32 elements.
    groups = slice(index[-1].start // 32, index[-1].stop // 32)
    index = (*index[:-1], groups)
  return x[index]
