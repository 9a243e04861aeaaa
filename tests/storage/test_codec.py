"""The storage format, against references in numpy's bits and float64."""

import warnings

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from flashoptim_jax import Storage
from flashoptim_jax.storage import codec
from tests.support.codec_reference import (
  LARGEST_EXPONENT,
  LEVELS,
  SMALLEST_EXPONENT,
  companding,
  counts,
  decode,
  encode,
  exact_scales,
  expanded,
  f64,
  grouped,
  halves,
  kinds,
  levels_of,
  random_moment,
  rounding_for,
  seeds,
  storages,
  values,
)
from tests.support.tiers import slow_but

# Shapes.


@pytest.mark.parametrize(
  ("shape", "axis", "scale_shape"),
  [
    ((), None, ()),
    ((1,), 0, (1,)),
    ((31,), 0, (1,)),
    ((32,), 0, (1,)),
    ((33,), 0, (2,)),
    ((7, 50), 1, (7, 2)),
    ((64, 96), 1, (64, 3)),
    ((1000, 32), 1, (1000, 1)),
    ((1000, 31), 0, (32, 31)),
    ((3, 3, 16, 40), 3, (3, 3, 16, 2)),
    ((3, 3, 64, 16), 2, (3, 3, 2, 16)),
    ((8, 5, 8), 2, (8, 5, 1)),  # The last of equally large axes.
    ((8, 8, 5), 1, (8, 1, 5)),
    ((0,), 0, (0,)),
    ((0, 40), 1, (0, 2)),
    ((40, 0), 0, (2, 0)),
    ((0, 0), 1, (0, 0)),
  ],
)
def test_group_axis_and_scale_shape(shape, axis, scale_shape):
  assert codec.group_axis(shape, 32) == axis
  assert codec.scale_shape(shape, 32) == scale_shape


@kinds
@pytest.mark.parametrize(
  "shape",
  [
    (),
    (1,),
    (33,),
    (7, 50),
    (40, 6),
    (3, 3, 64, 16),
    (2, 5, 1),
    (0,),
    (40, 0),
    (0, 40),
  ],
)
def test_any_shape_encodes_as_its_groups_do(shape, kind):
  """A leaf's codes are those of its groups, moved to the last axis, alone."""
  storage = Storage()
  x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
  x = x if kind == "first" else x * x
  codes, scale = encode(x, kind, storage)
  assert codes.shape == shape
  assert codes.dtype == codec.CODE_DTYPE[kind]
  assert scale.shape == codec.scale_shape(shape, storage.group_size)
  assert scale.dtype == jnp.bfloat16
  back = decode(codes, scale, kind, storage)
  assert back.shape == shape
  assert back.dtype == np.float32
  if not x.size:
    return
  axis = codec.group_axis(shape, storage.group_size)
  if axis is None:
    x, codes, scale, axis = x[None], codes[None], scale[None], 0
  size = storage.group_size
  flat = [
    grouped(np.moveaxis(a, axis, -1), size).reshape(-1, size)
    for a in (x, codes, np.ones(x.shape, bool))
  ]
  alone, alone_scale = encode(flat[0], kind, storage)
  of_zero = 0 if kind == "first" else 1  # In groups that are not all zero.
  np.testing.assert_array_equal(alone, np.where(flat[2], flat[1], of_zero))
  np.testing.assert_array_equal(
    f64(alone_scale).ravel(), f64(np.moveaxis(scale, axis, -1)).ravel()
  )


# Companding.


@kinds
@storages
@given(seed=seeds, count=counts, spread=st.sampled_from([2.0, 6.0]))
def test_codes_and_scales_match_the_formulas(seed, count, spread, kind, storage):
  """Signed levels are cut off downwards after the threshold was added."""
  x = random_moment(seed, kind, spread=spread)
  exact = exact_scales(x, kind, storage.group_size)
  level = levels_of(x, kind, storage)
  for rounding in (codec.TO_NEAREST, rounding_for(count, kind)):
    codes, scale = encode(x, kind, storage, rounding)
    bits = exact.view(np.int32) + np.asarray(rounding.scale, np.int32)
    np.testing.assert_array_equal(
      scale.astype(np.float32).view(np.int32), bits & -0x10000
    )
    # Float32's own error beside a whole number.
    error = 1e-3
    lowest, highest = (
      np.floor(level + float(rounding.code) + e) for e in (-error, error)
    )
    top, least = LEVELS[kind], 1 if kind == "second" else -LEVELS[kind]
    assert (np.clip(lowest, least, top) <= codes).all()
    assert (np.clip(highest, least, top) >= codes).all()


@kinds
@companding
@given(seed=seeds)
def test_decode_matches_the_formulas_and_stays_within_half_a_code(seed, kind, storage):
  x = random_moment(seed, kind)
  codes, scale = encode(x, kind, storage)
  back = decode(codes, scale, kind, storage)
  stored = expanded(scale, x.shape[-1], storage.group_size)
  np.testing.assert_allclose(
    back, values(kind, storage.companding, codes, stored), rtol=1e-6
  )
  r = np.abs(f64(x)) if kind == "first" else np.sqrt(f64(x))
  s = exact_scales(x, kind, storage.group_size)
  s = expanded(s, x.shape[-1], storage.group_size)
  found = np.abs(f64(back)) if kind == "first" else np.sqrt(f64(back))
  half = 0.5 / LEVELS[kind]
  if storage.companding == "root":
    bound = half * (2 * np.sqrt(r * s) + half * s)
  elif kind == "first":
    y = np.minimum(2 * r / (s + r) + half, 1)
    bound = y / (2 - y) * s - r
  else:
    bound = half * s
  if kind == "second":  # Whose codes are at least 1.
    least = np.sqrt(values(kind, storage.companding, 1, s))
    bound = np.where(codes == 1, np.maximum(bound, least - r), bound)
  # The rounding of the scale moves the whole group.
  error = np.abs(found * s / stored - r)
  assert (error <= bound * 1.002 + 1e-5 * s).all()
  assert (np.abs(stored / s - 1) <= 2.0**-8).all()


def code_groups(kind, size):
  """Every code of a group that is not all zero, each beside the top code."""
  top = LEVELS[kind]
  codes = np.arange(-top if kind == "first" else 1, top + 1)
  rows = -(-len(codes) // (size - 1))
  rest = np.resize(codes, (rows, size - 1))
  groups = np.concatenate([np.full((rows, 1), top), rest], 1)
  assert set(groups.ravel()) == set(codes)
  return groups.astype(codec.CODE_DTYPE[kind])


@kinds
@companding
@given(data=st.data())
def test_every_code_is_a_fixed_point(data, kind, storage):
  """All codes, at scales from the whole range where no value is subnormal."""
  groups = code_groups(kind, storage.group_size)
  key = storage.companding, kind
  exponents = st.integers(SMALLEST_EXPONENT[key], LARGEST_EXPONENT[key])
  exponent = np.array(data.draw(st.lists(exponents, min_size=8, max_size=8)))
  fraction = data.draw(st.lists(st.integers(0, 127), min_size=8, max_size=8))
  s = np.ldexp(1 + np.array(fraction) / 128, exponent).astype(jnp.bfloat16)
  codes = np.broadcast_to(groups, (8, *groups.shape))
  scale = np.broadcast_to(s[:, None, None], (8, groups.shape[0], 1))
  back = decode(codes, scale, kind, storage)
  assert np.isfinite(back).all()
  rounding = rounding_for(data.draw(counts), kind)
  again, again_scale = encode(back, kind, storage, rounding)
  np.testing.assert_array_equal(again, codes)
  np.testing.assert_array_equal(f64(again_scale), f64(scale))


@kinds
@companding
def test_codes_below_the_smallest_normal_number_decode_to_zero(kind, storage):
  """Under scales near the end of the range, small codes go; the rest stay.

  What is zero in a second moment has code 1 again.

  First moments in "root" multiply by s/127², which goes first, with its group.
  """
  groups = code_groups(kind, storage.group_size)
  lowest = -126 if kind == "first" else -63
  end = SMALLEST_EXPONENT[storage.companding, kind]
  s = (2.0 ** np.arange(lowest, end)).astype(jnp.bfloat16)
  codes = np.broadcast_to(groups, (len(s), *groups.shape))
  scale = np.broadcast_to(s[:, None, None], (len(s), groups.shape[0], 1))
  back = decode(codes, scale, kind, storage)
  again, again_scale = encode(back, kind, storage)
  of_zero = 0 if kind == "first" else f64(again_scale) > 0
  np.testing.assert_array_equal(again, np.where(back == 0, of_zero, codes))
  if (storage.companding, kind) == ("root", "first"):
    assert not back.any()
    assert not f64(again_scale).any()
    return
  np.testing.assert_array_equal(f64(again_scale), f64(scale))
  true = np.abs(values(kind, storage.companding, codes, f64(scale)))
  gone = (back == 0) & (codes != 0)
  assert gone.any()
  assert (true[gone] < 2.0**-126 * (1 + 1e-6)).all()


@kinds
@storages
@given(seed=seeds, spread=st.sampled_from([0.0, 1.0, 4.0]), count=counts)
def test_encoding_is_idempotent(seed, spread, count, kind, storage):
  """The largest element has the top code, whichever way its scale rounded.

  An outlier may come to lie beyond its limit when its neighbours' codes are rounded:
  then it is limited once more.
  """
  x = random_moment(seed, kind, spread=spread)
  size = storage.group_size
  codes, scale = encode(x, kind, storage, rounding_for(count, kind))
  largest = np.abs(grouped(codes.astype(int), size)).max(-1)
  assert (largest == LEVELS[kind]).all()
  back = decode(codes, scale, kind, storage)
  again = encode(back, kind, storage, rounding_for(count ^ 1, kind))
  kept = exact_scales(back, kind, size)
  kept = kept >= halves(back if kind == "first" else np.sqrt(back), "first", size)[0]
  assert kept.mean() > 0.9
  elements = np.repeat(kept, size, -1)
  np.testing.assert_array_equal(again[0][elements], codes[elements])
  np.testing.assert_array_equal(f64(again[1])[kept], f64(scale)[kept])


@kinds
@pytest.mark.parametrize("spike", slow_but([1e6, 1e10, 1e20, np.inf]))
def test_neighbours_of_an_outlier_keep_what_they_mean(spike, kind):
  """Within a factor of two on average over updates, at rest or with gradients."""
  if kind == "first":
    spike = min(spike, 1e37)  # An infinite m is seen.
  rng = np.random.default_rng(0)
  storage, updates = Storage(), 200
  x = rng.uniform(0.5, 2, (64, 32)) * rng.choice([-1, 1], (64, 32))
  outlier = np.arange(32) == rng.integers(0, 32, (64, 1))
  power = 1 if kind == "first" else 2
  x = np.float32(x) ** power
  with np.errstate(over="ignore"):
    spiked = np.where(outlier, np.float32(spike) ** power, x)
  decay = np.float32(0.9 if kind == "first" else 0.99)

  @jax.jit
  def run():
    def step(moment, count):
      rounding = rounding_for(count, kind)
      at_rest = codec.encode(spiked, kind, storage, rounding, no_scale)
      at_rest = codec.decode(*at_rest, kind, storage)
      new = jnp.where(count == 0, spiked, x)
      value = decay * codec.decode(*moment, kind, storage) + (1 - decay) * new
      moment = codec.encode(value, kind, storage, rounding, moment[1])
      return moment, (at_rest, codec.decode(*moment, kind, storage))

    no_scale = jnp.zeros((len(x), 1))
    start = codec.encode(x, kind, storage)
    return jax.lax.scan(step, start, jnp.arange(updates))[1]

  for found in map(f64, run()):
    assert np.isfinite(found).all()
    # Updates divide by the root.
    mean = (found if kind == "first" else np.sqrt(found)).mean(0)
    ratio = mean / (x if kind == "first" else np.sqrt(x))
    assert ratio[~outlier].min() > 0.5
    assert ratio[~outlier].max() < 2
    assert (np.abs(ratio[outlier]) > 2).all()


def test_encoding_keeps_the_top_code_for_every_largest_element():
  """All 2¹⁶ leading significand bits of a group's largest element."""
  x = (np.uint32(0x3F800000) + (np.arange(2**16, dtype=np.uint32) << 7)).view(
    np.float32
  )[:, None]
  for kind, levels in LEVELS.items():
    codes, _ = encode(x if kind == "first" else x * x, kind, Storage())
    assert (codes == levels).all()


@kinds
@companding
def test_a_program_of_its_own_or_a_part_of_one_gives_the_same_bits(kind, storage):
  """Rounding to bfloat16 isn't skipped where XLA could fuse across it."""
  x = random_moment(0, kind)
  codes, scale = encode(x, kind, storage)
  eager = codec.encode(jnp.asarray(x), kind, storage)
  np.testing.assert_array_equal(eager[0], codes)
  np.testing.assert_array_equal(f64(eager[1]), f64(scale))
  alone = jax.jit(lambda x: codec.encode(x, kind, storage)[0])(x)
  np.testing.assert_array_equal(alone, codes)

  @jax.jit
  def both(x):
    return codec.decode(*codec.encode(x, kind, storage), kind, storage)

  np.testing.assert_array_equal(both(x), decode(codes, scale, kind, storage))


@kinds
@companding
def test_zero_and_tiny_groups(kind, storage):
  """A group below 2⁻¹²⁶ stores scale 0; its neighbours are not touched."""
  size = storage.group_size
  x = random_moment(1, kind, (4, 3 * size), center=(-2, 2))
  alone = encode(x, kind, storage)
  x[0, :size] = 0
  x[1, size : 2 * size] = np.float32(2.0**-126) * 0.75
  x[2, 2 * size :] = 1e-45
  x[3, :size] = 2.0**-126  # Exactly at the limit: it has a scale.
  if kind == "first":
    x[1, size] *= -1
  codes, scale = encode(x, kind, storage)
  back = decode(codes, scale, kind, storage)
  where = np.zeros((4, 3), bool)
  where[0, 0] = where[1, 1] = where[2, 2] = True
  assert (f64(scale)[where] == 0).all()
  elements = np.repeat(where, size, 1)
  assert not codes[elements].any()
  assert not back[elements].any()
  np.testing.assert_array_equal(
    f64(scale)[3, 0], 2.0**-126 if kind == "first" else 2.0**-63
  )
  assert (codes[3, :size] == LEVELS[kind]).all()
  # In "root" the first moment's s/127² is subnormal, and flushed.
  flushed = storage.companding == "root" and kind == "first"
  np.testing.assert_array_equal(back[3, :size], 0 if flushed else 2.0**-126)
  elements[3, :size] = True
  np.testing.assert_array_equal(codes[~elements], alone[0][~elements])


@companding
@given(count=counts)
def test_second_moments_have_code_0_in_groups_of_scale_0_alone(count, storage):
  """States of older versions may have it elsewhere; it means zero."""
  codes = np.zeros((3, 32), np.uint8)
  codes[0, 5] = codes[1, :20] = 255
  scale = np.float32([[1.0], [2.0**-20], [0.0]]).astype(jnp.bfloat16)
  back = decode(codes, scale, "second", storage)
  np.testing.assert_array_equal(back == 0, codes == 0)
  again, _ = encode(back, "second", storage, rounding_for(count, "second"))
  np.testing.assert_array_equal(again[:2], np.where(codes[:2] == 0, 1, 255))
  np.testing.assert_array_equal(again[2], 0)


@companding
@given(count=counts)
def test_outliers_are_limited(count, storage):
  """To 4096 times the other half's largest m or sqrt(v), unless that is zero."""
  size = storage.group_size
  for kind, largest in (("first", 1e20), ("second", np.inf)):
    rounding = rounding_for(count, kind)
    ratio = 2.0**12 if kind == "first" else 2.0**24
    x = np.ones((6, size + 4), np.float32)
    x[0, 3] = x[1, 4] = x[2, -1] = largest  # One half, the other, a partial group.
    x[3, 9] = ratio  # Stands out by no more than it may.
    x[4, :4] = x[4, 8:12] = largest  # All in one half.
    x[5, 3:5] = largest  # In both.
    if kind == "first":
      x[::2] *= -1
    codes, scale = encode(x, kind, storage, rounding)
    exact = np.float32([4096, 4096, 1, 4096, 4096, largest])[:, None]
    finite = (2.0**12, np.sqrt(codec.LARGEST_SECOND))
    exact = np.minimum(exact, np.float32(1e20 if kind == "first" else finite[1]))
    # The last group has only four elements: all of one half.
    rest = np.float32([1, 1, np.inf, 1, 1, 1])[:, None]
    rest = np.minimum(rest, np.float32(1e20 if kind == "first" else finite[1]))
    bits = np.concatenate([exact, rest], 1).view(np.int32) + np.int32(rounding.scale)
    np.testing.assert_array_equal(
      scale.astype(np.float32).view(np.int32), np.minimum(bits, 0x7F7FFFFF) & -0x10000
    )
    outliers = np.abs(x) > 1
    assert (np.abs(codes[outliers].astype(int)) == LEVELS[kind]).all()
    assert np.isfinite(decode(codes, scale, kind, storage)).all()


@kinds
@companding
@pytest.mark.parametrize("bad", slow_but([np.nan, np.inf, -np.inf]))
def test_nan_and_inf_stay_in_their_group(bad, kind, storage):
  """But for second moments that overflow, which are limited."""
  if kind == "second":
    bad = np.nan
  size = storage.group_size
  x = random_moment(2, kind, (5, 2 * size + 3), center=(-2, 2))
  clean = encode(x, kind, storage)
  x[1, 4] = bad
  x[3, -1] = bad
  x[4, size - 1 : size + 1] = bad
  where = np.zeros(clean[1].shape, bool)
  where[1, 0] = where[3, 2] = where[4, 0] = where[4, 1] = True
  with warnings.catch_warnings(), np.errstate(all="raise"):
    warnings.simplefilter("error")
    codes, scale = encode(x, kind, storage)
    back = decode(codes, scale, kind, storage)
  np.testing.assert_array_equal(np.isnan(f64(scale)), where)
  elements = np.repeat(where, size, 1)[:, : x.shape[1]]
  np.testing.assert_array_equal(np.isnan(back), elements)
  np.testing.assert_array_equal(codes[~elements], clean[0][~elements])
  np.testing.assert_array_equal(f64(scale)[~where], f64(clean[1])[~where])
  assert (codes[elements & ~np.isfinite(x)] == 0).all()
  # And it stays NaN.
  again, again_scale = encode(back, kind, storage)
  np.testing.assert_array_equal(np.isnan(f64(again_scale)), where)
  assert not again[elements].any()


@companding
def test_the_largest_first_moments(storage):
  """A magnitude that would round to an infinite bfloat16 gets the largest one."""
  finite = np.uint32(0x7F7F7FFF).view(np.float32)  # Rounds to the largest.
  beyond = np.uint32(0x7F7F8000).view(np.float32)
  codes, scale = encode(np.float32([-finite]), "first", storage)
  if storage.companding == "root":
    assert codes[0] == -127
    back = decode(codes, scale, "first", storage)
    np.testing.assert_allclose(back, [-finite], rtol=2**-8)
  else:
    assert codes[0] == 0  # The inverse of its scale is subnormal.
  _, scale = encode(np.float32([beyond, 1.0]), "first", storage)
  np.testing.assert_array_equal(f64(scale), f64(jnp.finfo(jnp.bfloat16).max))


@companding
def test_the_largest_second_moments(storage):
  """What overflows is the largest square of a bfloat16."""
  codes, scale = encode(np.float32([2.0**127]), "second", storage)
  back = decode(codes, scale, "second", storage)
  np.testing.assert_allclose(back, 2.0**127, rtol=2**-7)
  for largest in (np.finfo(np.float32).max, np.inf):
    codes, scale = encode(np.float32([largest]), "second", storage)
    assert codes[0] == 255
    assert f64(scale)[0] == np.sqrt(codec.LARGEST_SECOND)
    back = decode(codes, scale, "second", storage)
    np.testing.assert_allclose(back, codec.LARGEST_SECOND, rtol=1e-6)
