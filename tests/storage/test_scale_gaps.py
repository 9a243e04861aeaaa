"""Scales in a state: where they lie, and that a parameter's specs divide them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flashoptim_jax as fo
from benchmarks.support import leaf_sets
from flashoptim_jax.storage import codec, scale_gaps

lengths = st.integers(1, 20_000) | st.integers(1, 6_000).map(lambda n: 32 * n)


@pytest.mark.parametrize(
  ("length", "slots"),
  [
    (64, 8),
    (96, 8),
    (192, 8),
    (256, 8),
    (320, 16),
    (1000, 32),
    (4096, 128),
    (14336, 448),
    (50257, 1571),
    (128256, 4096),
  ],
)
def test_stored_shape(length, slots):
  assert scale_gaps.stored_shape((7, length), 32) == (7, slots)
  assert scale_gaps.stored_shape((length, 7), 32) == (slots, 7)


@given(lengths, st.sampled_from([8, 32]))
def test_what_divides_a_leaf_divides_its_scales(length, group_size):
  groups = math.ceil(length / group_size)
  (slots,) = scale_gaps.stored_shape((length,), group_size)
  assert groups <= slots < groups + 8 or slots <= groups * 33 / 32
  assert all(slots % ways == 0 for ways in (2, 4, 8) if length % ways == 0)


@pytest.mark.parametrize("shape", [(96,), (3, 320), (3, 320, 5), (2, 1000), (16, 2, 8)])
def test_gaps_come_and_go(shape):
  stored = scale_gaps.stored_shape(shape, 32)
  scale = jnp.arange(1.0, 1 + math.prod(codec.scale_shape(shape, 32)))
  scale = scale.reshape(codec.scale_shape(shape, 32))
  with_gaps = scale_gaps.insert(scale, shape, stored, 32)
  assert with_gaps.shape == stored
  assert int(jnp.count_nonzero(with_gaps)) == scale.size
  np.testing.assert_array_equal(scale_gaps.remove(with_gaps, shape, 32), scale)
  # Those of older states have no gaps.
  assert scale_gaps.is_stored_shape(scale.shape, shape, 32)
  assert scale_gaps.remove(scale, shape, 32) is scale


@given(st.integers(1, 600), st.sampled_from([2, 3, 4, 5, 8, 16]))
def test_shards_have_the_scales_of_their_own_groups(groups, shards):
  length = 32 * groups
  (slots,) = scale_gaps.stored_shape((length,), 32)
  if groups % shards or slots % shards:
    return
  scale = np.arange(1.0, 1 + groups)
  whole = scale_gaps.insert(scale, (length,), (slots,), 32)
  part = (length // shards,)
  assert scale_gaps.is_stored_shape((slots // shards,), part, 32)
  for stored, own in zip(np.split(whole, shards), np.split(scale, shards), strict=True):
    np.testing.assert_array_equal(scale_gaps.remove(stored, part, 32), own)


@pytest.mark.parametrize(
  ("found", "fits"),
  [
    ((4, 8), True),  # as it is stored
    ((4, 3), True),  # without gaps
    ((4, 4), True),  # of a shard
    ((4, 2), False),
    ((4, 9), False),
    ((3, 8), False),
    ((4,), False),
  ],
)
def test_is_stored_shape(found, fits):
  assert scale_gaps.is_stored_shape(found, (4, 96), 32) is fits


@pytest.mark.parametrize(
  ("shapes", "most"),
  [
    (leaf_sets.llama3_8b, 0.0002),
    (leaf_sets.gpt2, 0),
    (leaf_sets.resnet50, 0.0064),
  ],
)
def test_bytes_that_gaps_take(shapes, most):
  """Bytes a parameter, beside those of the scales alone."""
  params = {
    name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in shapes().items()
  }
  state = jax.eval_shape(fo.lion(1e-3).init, params)
  gaps = sum(
    scale.size - math.prod(codec.scale_shape(params[name].shape, 32))
    for name, scale in state.mu_scale.items()
  )
  both_moments = 2 * 2 * gaps
  assert 0 <= both_moments <= most * sum(p.size for p in params.values())
