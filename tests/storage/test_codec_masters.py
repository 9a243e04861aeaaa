"""Master weights: parameters and corrections, and their steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from flashoptim_jax.storage import codec
from tests.support.codec_reference import bits, f64, merge, residual, seeds, split
from tests.support.tiers import slow_but

# Master weights of bfloat16 parameters.


def float_patterns(seed, count=4096):
  """Random bit patterns: uniform, subnormal, and near powers of two."""
  rng = np.random.default_rng(seed)
  b = rng.integers(0, 2**32, count, dtype=np.uint32)
  subnormal = rng.integers(0, 2**23, count, dtype=np.uint32)
  near = rng.integers(0, 512, count, dtype=np.uint32) << 23
  near += rng.integers(-300, 300, count).astype(np.uint32)
  special = np.array(
    [
      0,
      0x7F7FFFFF,
      0x7F7F8000,
      0x7F7F7FFF,
      0x7F7FFF80,
      0x7F7FFF7F,
      0x7F800000,
      0x7F800001,
      0x7FBFFFFF,
      0x7FC00000,
      0x7FFFFFFF,
      1,
      0x7F,
      0x80,
      0x8000,
    ],
    np.uint32,
  )
  subnormal |= rng.integers(0, 2, count, dtype=np.uint32) << 31
  b = np.concatenate([b, subnormal, near, special, special | 0x80000000])
  return b.astype(np.uint32)


def reference_split(b, bits):
  """In Python's integers' sense: no wrap-around, NaN apart."""
  b = b.astype(np.int64)
  dropped = 32 - bits
  top = (b + (1 << dropped >> 1)) >> dropped
  below = bits - 16
  p = (top + (1 << (below - 1))) >> below
  rho = top - (p << below)
  nan = b & 0x7FFFFFFF > 0x7F800000
  return np.where(nan, b >> 16 | 0x40, p), np.where(nan, 0, rho), nan


@bits
@given(seed=seeds)
def test_split_is_the_integer_split(seed, bits):
  b = float_patterns(seed)
  p, rho, nan = reference_split(b, bits)
  param, correction = split(b.view(np.float32), bits)
  assert param.dtype == jnp.bfloat16
  assert correction.dtype == (np.int8 if bits == 24 else np.int16)
  np.testing.assert_array_equal(param.view(np.uint16), p)
  np.testing.assert_array_equal(correction, rho)
  assert np.isnan(f64(param[nan])).all()
  assert not np.isnan(f64(param[~nan])).any()


@given(seed=seeds)
def test_24_bits_keep_a_relative_error_of_two_to_the_minus_16(seed):
  b = float_patterns(seed)
  x = b.view(np.float32)
  back = np.asarray(merge(*split(x, 24)))
  np.testing.assert_array_equal(np.isnan(back), np.isnan(x))
  np.testing.assert_array_equal(np.signbit(back), np.signbit(x))
  largest = np.uint32(0x7F7FFF7F).view(np.float32)  # The rest rounds to inf.
  beyond = np.abs(x) > largest
  np.testing.assert_array_equal(np.isinf(back), beyond)
  finite = np.isfinite(x) & ~beyond
  normal = finite & (np.abs(x) >= 2.0**-126)
  with np.errstate(invalid="ignore"):
    error = np.abs(f64(back) - f64(x))
  assert (error[normal] <= 2.0**-16 * np.abs(f64(x[normal]))).all()
  # Below, spacing no longer shrinks: half a unit of 2⁻¹⁴¹.
  assert (error[finite & ~normal] <= 2.0**-142).all()
  # The parameter alone is within half its unit of the master weight.
  p = f64(split(x, 24)[0])
  with np.errstate(invalid="ignore"):
    gap = np.abs(p - f64(back))
  ok = normal & np.isfinite(p)
  assert (gap[ok] <= 2.0**-8 * np.abs(f64(back[ok]))).all()


@given(seed=seeds)
def test_32_bits_lose_nothing(seed):
  b = float_patterns(seed)
  x = b.view(np.float32)
  back = np.asarray(merge(*split(x, 32)))
  nan = np.isnan(x)
  np.testing.assert_array_equal(back.view(np.uint32)[~nan], b[~nan])
  assert np.isnan(back[nan]).all()
  np.testing.assert_array_equal(np.signbit(back), np.signbit(x))


def reachable(p, correction):
  """The pairs that split makes: no NaN, nothing past inf or across zero."""
  magnitude = p & 0x7FFF
  return np.where(
    magnitude > 0x7F80,
    (correction == 0) & (p & 0x40 != 0),  # A quiet NaN.
    ~((magnitude == 0x7F80) & (correction > 0))
    & ~((magnitude == 0) & (correction < 0)),
  )


def test_every_pair_of_24_bits_is_a_fixed_point():
  """All 65,536 × 256 pairs, but for those that split never makes."""
  c = np.arange(-128, 128, dtype=np.int8)
  roundtrip = jax.jit(
    lambda p, c: (m := codec.merge(p, c), *codec.split(m, jnp.bfloat16, 24))
  )
  for start in range(0, 2**16, 2**14):
    p = np.repeat(np.arange(start, start + 2**14, dtype=np.uint16), 256)
    corrections = np.tile(c, 2**14)
    master, param, again = map(np.asarray, roundtrip(p.view(jnp.bfloat16), corrections))
    ok = reachable(p, corrections)
    np.testing.assert_array_equal(param.view(np.uint16)[ok], p[ok])
    np.testing.assert_array_equal(again[ok], corrections[ok])
    # A zero with a correction for the other side of zero is that zero.
    zero = (p & 0x7FFF == 0) & (corrections < 0)
    np.testing.assert_array_equal(
      master[zero].view(np.uint32), p[zero].astype(np.uint32) << 16
    )
    # An infinity with a correction beyond it, and a NaN with any, are NaN.
    lost = ~ok & ~zero
    assert np.isnan(master[lost]).all()
    assert (p[lost] & 0x7FFF >= 0x7F80).all()


@given(seed=seeds)
def test_sampled_pairs_of_32_bits_are_fixed_points(seed):
  rng = np.random.default_rng(seed)
  p = rng.integers(0, 2**16, 4096, dtype=np.uint16)
  p[:64] = rng.choice(
    np.array([0, 0x8000, 0x7F80, 0xFF80, 1, 0x7F, 0x80, 0x7F7F], np.uint16), 64
  )
  c = rng.integers(-(2**15), 2**15, 4096).astype(np.int16)
  c[::7] = rng.choice(np.array([-(2**15), -1, 0, 1, 2**15 - 1], np.int16), 586)
  master = np.asarray(merge(p.view(jnp.bfloat16), c))
  param, again = split(master, 32)
  ok = reachable(p, c)
  np.testing.assert_array_equal(param.view(np.uint16)[ok], p[ok])
  np.testing.assert_array_equal(again[ok], c[ok])


@bits
def test_zeroed_parameters_are_zero_whatever_their_correction_says(bits):
  """Pruning writes zeros and knows nothing of corrections.

  A stale correction that points away from zero is worth at most the largest
  number that rounds to zero in bfloat16.
  """
  info = np.iinfo(np.int8 if bits == 24 else np.int16)
  c = np.arange(info.min, info.max + 1).astype(info.dtype)
  for zero in (0.0, -0.0):
    back = np.asarray(merge(np.full(c.shape, zero, jnp.bfloat16), c))
    assert (back[c <= 0] == 0).all()
    assert (f64(np.abs(back)) <= 2.0**-134).all()  # Half of bfloat16's 2⁻¹³³.
    assert (np.signbit(back) == np.signbit(zero)).all()


@bits
@given(seed=seeds)
def test_residual_is_splits_correction(seed, bits):
  x = float_patterns(seed).view(np.float32)
  param, correction = split(x, bits)
  np.testing.assert_array_equal(residual(x, param, bits), correction)


@bits
@given(seed=seeds)
def test_residual_is_the_nearest_correction_that_can_be_reached(seed, bits):
  """For parameters beside the master weight, far away, of the other sign."""
  rng = np.random.default_rng(seed)
  b = float_patterns(seed, 32)
  b = b[np.isfinite(b.view(np.float32))]
  x = b.view(np.float32)
  near = (b >> 16).astype(np.int64) + rng.integers(-3, 4, b.shape)
  far = rng.integers(0, 2**16, b.shape)
  other = near ^ 0x8000
  choice = rng.integers(0, 3, b.shape)
  p = np.choose(choice, [near, far, other]).astype(np.uint16)
  p[p & 0x7FFF >= 0x7F80] = 0x3F80
  p[:4] = [0, 0x8000, 0, 0x8000]
  param = p.view(jnp.bfloat16)
  found = np.asarray(residual(x, param, bits))
  info = np.iinfo(found.dtype)
  # At 32 bits all corrections are too many: those around the one found.
  candidates = np.arange(-128, 128)
  if bits == 32:
    candidates = np.clip(found.astype(int)[:, None] + candidates, info.min, info.max)
    ends = np.broadcast_to([info.min, 0, info.max], (len(b), 3))
    candidates = np.concatenate([candidates, ends], 1)
  else:
    candidates = np.broadcast_to(candidates, (len(b), 256))
  shape = candidates.shape
  merged = np.asarray(
    merge(np.broadcast_to(param[:, None], shape), candidates.astype(info.dtype))
  )
  distance = np.abs(f64(merged) - f64(x)[:, None])
  mine = np.abs(f64(merge(param, found)) - f64(x))
  np.testing.assert_array_equal(mine, np.nanmin(distance, 1))


@bits
def test_residual_of_nan_and_infinity(bits):
  x = np.float32([np.nan, 1.0, np.nan, np.inf, np.inf, 1.0, -np.inf])
  p = np.float32([1.0, np.nan, np.nan, np.inf, 1.0, np.inf, 1.0])
  found = np.asarray(residual(x, p.astype(jnp.bfloat16), bits))
  info = np.iinfo(found.dtype)
  np.testing.assert_array_equal(found, [0, 0, 0, 0, info.max, info.min, info.min])


# Master weights of other parameters.


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@bits
def test_no_correction_where_none_is_needed(dtype, bits):
  x = jnp.float32([1.0, -2.5, 3e-8])
  if dtype == "float32":
    param, correction = codec.split(x, jnp.dtype(dtype), bits)
    assert correction is None
    np.testing.assert_array_equal(param, x)
    assert codec.merge(param, None) is param
  param, correction = codec.split(x, jnp.dtype(dtype), None)
  assert correction is None
  np.testing.assert_array_equal(codec.merge(param, None), x.astype(dtype))


def half_patterns(seed):
  """float32 numbers over and beyond float16's range."""
  rng = np.random.default_rng(seed)
  x = rng.standard_normal(4096) * 2.0 ** rng.uniform(-30, 17, 4096)
  edges = [0.0, -0.0, 2.0**-24, 2.0**-25, 2.0**-26, 2.0**-14, 65504.0, 65519.0]
  return np.float32([*x, *edges, *np.negative(edges)])


def half_unit(param):
  """Half the distance of float16 numbers from the next larger one."""
  exponent = np.maximum(param.view(np.uint16) >> 10 & 0x1F, 1).astype(int)
  return 2.0 ** (exponent - 26)


@bits
@given(seed=seeds)
def test_float16_correction(seed, bits):
  x = half_patterns(seed)
  param, correction = split(x, bits, "float16")
  levels = 127 if bits == 24 else 32767
  with np.errstate(over="ignore"):
    np.testing.assert_array_equal(param, x.astype(np.float16))
  assert np.abs(correction.astype(int)).max() <= levels
  finite = np.isfinite(param)
  back = np.asarray(merge(param, correction))
  # Half a step of the correction, and float32's rounding where that is more.
  bound = half_unit(param) / levels / 2 + 2.0**-24 * np.abs(f64(x))
  error = np.abs(f64(back) - f64(x))
  assert (error[finite] <= bound[finite] * 1.001).all()
  # Values are fixed points, but for ties that round into the next binade.
  param_again, correction_again = split(back, bits, "float16")
  again = np.asarray(merge(param_again, correction_again))
  tied = finite & (param_again != param)
  np.testing.assert_array_equal(again[finite & ~tied], back[finite & ~tied])
  assert (np.abs(correction.astype(int)[tied]) == levels).all()
  assert np.isposinf(back[~finite & (x > 0)]).all()
  assert np.isneginf(back[~finite & (x < 0)]).all()
  np.testing.assert_array_equal(residual(x, param, bits), correction)


@bits
def test_float16_overflow_nan_and_subnormals(bits):
  x = np.float32([65520.0, -1e30, np.inf, np.nan, 65519.996, 1.5 * 2.0**-24, 1e-9])
  param, correction = split(x, bits, "float16")
  back = np.asarray(merge(param, correction))
  np.testing.assert_array_equal(back[:4], [np.inf, -np.inf, np.inf, np.nan])
  assert not correction[:4].any()
  assert param[4] == 65504
  np.testing.assert_allclose(back[4], x[4], rtol=2.0**-17)
  # Subnormals have float16's smallest unit, 2⁻²⁴, and corrections in it.
  step = 2.0**-25 / (127 if bits == 24 else 32767)
  assert (np.abs(f64(back[5:]) - f64(x[5:])) <= step / 2 * 1.001).all()


@given(seed=seeds)
def test_float16_pairs_are_fixed_points(seed):
  """As long as the parameter stays; a tie may round to the next one."""
  rng = np.random.default_rng(seed)
  p = rng.integers(0, 2**16, 64, dtype=np.uint16).view(np.float16)
  p = np.where(np.isfinite(p), p, np.float16(1))
  p = np.repeat(p, 255)
  c = np.tile(np.arange(-127, 128, dtype=np.int8), 64)
  master = np.asarray(merge(p, c))
  param, correction = split(master, 24, "float16")
  same = param == p
  np.testing.assert_array_equal(correction[same], c[same])
  # The rest are ties, or below a power of two, where the unit halves.
  power = p.view(np.uint16) & 0x3FF == 0
  assert (same | (np.abs(c) == 127) | power).all()


# Steps of master weights.


@functools.cache
def walker(dtype, updates):
  """Takes steps, over and over, from counts 0 on."""

  @jax.jit
  def walk(master, steps):
    def step(count, pair):
      threshold = codec.rounding_of(count).master
      moved = codec.advance(*pair, steps[count % len(steps)], threshold)
      return codec.split(moved, jnp.dtype(dtype), 24)

    start = codec.split(master, jnp.dtype(dtype), 24)
    return start, jax.lax.fori_loop(0, updates, step, start)

  return walk


def exact_master(param, correction):
  """In float64, which holds corrections of float16 as well."""
  param, correction = np.asarray(param), np.asarray(correction)
  if param.dtype == np.float16:
    return f64(param) + f64(correction) * half_unit(param) / 127
  return f64(merge(param, correction))


def kept_place(master, dtype):
  """The last place that 24 bits keep of a weight."""
  binade = 2.0 ** np.floor(np.log2(np.abs(f64(master))))
  return binade * (2.0**-15 if dtype == "bfloat16" else 2.0**-11 / 127)


@pytest.mark.parametrize("dtype", slow_but(["bfloat16", "float16"]))
@pytest.mark.parametrize("direction", slow_but([1, -1]))
def test_steps_of_a_small_part_of_a_place_add_up(direction, dtype):
  rng = np.random.default_rng(0)
  master = rng.uniform(1.1, 1.9, 510) * 2.0 ** rng.integers(-8, 3, 510)
  master = np.float32([*master * rng.choice([-1, 1], 510), 1.0, -1.0])
  place = kept_place(master, dtype)
  step = np.float32(0.01 * direction * place)
  start, end = walker(dtype, 10_000)(master, step[None])
  moved = (exact_master(*end) - exact_master(*start)) / place
  np.testing.assert_allclose(moved, np.full_like(moved, 100 * direction), atol=1)


@pytest.mark.parametrize("dtype", slow_but(["bfloat16", "float16"]))
def test_noisy_steps_add_up_on_average(dtype):
  rng = np.random.default_rng(0)
  size, updates, drawn = 4096, 5000, 1000
  master = np.float32(rng.uniform(1.1, 1.9, size) * rng.choice([-1, 1], size))
  direction = rng.choice([-1, 1], size)
  place = kept_place(master, dtype)
  steps = rng.normal(0.01 * direction, 0.3, (drawn, size)) * place
  steps = np.float32(steps)
  start, end = walker(dtype, updates)(master, steps)
  moved = exact_master(*end) - exact_master(*start)
  error = (moved - f64(steps).sum(0) * (updates // drawn)) / place
  for part in (direction > 0, direction < 0, master > 0, master < 0):
    assert np.abs(error[part].mean()) < 3


def test_no_step_keeps_every_bit():
  """At any threshold. What is subnormal may be flushed, as by any sum in float32."""
  c = np.int8([-128, -127, -100, -64, -33, -2, -1, 0, 1, 2, 3, 50, 64, 100, 126, 127])
  p = np.repeat(np.arange(2**16, dtype=np.uint16), len(c))
  c = np.tile(c, 2**16)
  kept = reachable(p, c)
  p, c = p[kept].view(jnp.bfloat16), c[kept]
  before = np.asarray(merge(p, c))
  normal = ~(np.abs(before) < 2.0**-126)
  advance, add = jax.jit(codec.advance), jax.jit(jnp.add)
  thresholds = np.asarray(codec.rounding_of(jnp.arange(2**16)).master)
  for threshold in (thresholds.min(), thresholds.max(), *thresholds[:3]):
    for zero in np.float32([0.0, -0.0]):
      step = np.full(p.shape, zero)
      after = np.asarray(advance(p, c, step, threshold))
      np.testing.assert_array_equal(
        after.view(np.uint32)[normal], before.view(np.uint32)[normal]
      )
      expected = np.asarray(add(before, step))
      np.testing.assert_array_equal(
        after.view(np.uint32)[~normal], expected.view(np.uint32)[~normal]
      )


def test_no_step_keeps_every_correction_of_float16():
  p = np.arange(2**16, dtype=np.uint16).view(np.float16)
  p = np.repeat(p[np.isfinite(p)], 5)
  c = np.resize(np.int8([-127, -1, 0, 5, 127]), p.shape)
  param, correction = split(np.asarray(merge(p, c)), 24, "float16")
  before = np.asarray(merge(param, correction))
  advance = jax.jit(codec.advance)
  for count in range(3):
    threshold = codec.rounding_of(count).master
    after = advance(param, correction, np.zeros(param.shape, np.float32), threshold)
    np.testing.assert_array_equal(after, before)
