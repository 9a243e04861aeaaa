"""The storage format, against references in numpy's bits and float64."""

import functools
import warnings
from typing import NamedTuple

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from flashoptim_jax import Storage
from flashoptim_jax.storage import codec

LEVELS = {"first": 127, "second": 255}
# The smallest scale at which the value of code 1 is a normal float32. Below it
# the small codes decode to zero, since XLA flushes subnormals on the CPU.
SMALLEST_EXPONENT = {
    ("root", "first"): -112,
    ("root", "second"): -47,
    ("paper", "first"): -118,
    ("paper", "second"): -55,
}
# Above, v = s² or the inverse of a scale leaves float32's range.
LARGEST_EXPONENT = {
    ("root", "first"): 127,
    ("root", "second"): 63,
    ("paper", "first"): 125,
    ("paper", "second"): 63,
}

companding = pytest.mark.parametrize("storage", [
    pytest.param(Storage(companding=name, group_size=size), id=f"{name}-{size}")
    for name, size in (("root", 32), ("paper", 32))
])
storages = pytest.mark.parametrize("storage", [
    pytest.param(Storage(companding=name, group_size=size), id=f"{name}-{size}")
    for name, size in (("root", 32), ("root", 8), ("paper", 32))
])
kinds = pytest.mark.parametrize("kind", ["first", "second"])
bits = pytest.mark.parametrize("bits", [24, 32])
seeds = st.integers(0, 2**32 - 1)
counts = st.integers(0, 2**31 - 1)


@functools.cache
def encoder(kind, storage):
  """As after the first update, whose outliers are limited."""

  def encode(x, rounding):
    no_scale = jnp.zeros(codec.scale_shape(x.shape, storage.group_size))
    return codec.encode(x, kind, storage, rounding, no_scale)

  return jax.jit(encode)


@functools.cache
def decoder(kind, storage):
  return jax.jit(lambda codes, scale: codec.decode(codes, scale, kind, storage))


@functools.cache
def splitter(dtype, bits):
  return jax.jit(lambda x: codec.split(x, jnp.dtype(dtype), bits))


merge = jax.jit(codec.merge)
residual = jax.jit(codec.residual, static_argnums=2)


def encode(x, kind, storage, rounding=codec.TO_NEAREST):
  return tuple(map(np.asarray, encoder(kind, storage)(x, rounding)))


def decode(codes, scale, kind, storage):
  return np.asarray(decoder(kind, storage)(codes, scale))


def split(x, bits, dtype="bfloat16"):
  return tuple(map(np.asarray, splitter(dtype, bits)(x)))


def f64(x):
  with np.errstate(invalid="ignore"):  # ml_dtypes warns of signalling NaN.
    return np.asarray(x).astype(np.float64)


def random_moment(seed, kind, shape=(8, 96), spread=2.0, center=(-30, 20)):
  """Normal elements with scales that differ by group, and in a group."""
  rng = np.random.default_rng(seed)
  rows = 2.0 ** rng.uniform(*center, (*shape[:-1], 1))
  scales = rows * np.exp(spread * rng.standard_normal(shape))
  x = (scales * rng.standard_normal(shape)).astype(np.float32)
  return x if kind == "first" else x * x


def grouped(x, size):
  """Cut along the last axis, padded with zeros."""
  missing = -x.shape[-1] % size
  x = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
  return x.reshape(*x.shape[:-1], -1, size)


def expanded(scale, length, size):
  return np.repeat(f64(scale), size, -1)[..., :length]


def halves(x, kind, size):
  """The largest magnitudes in a group's halves, float32: runs of four, in turn."""
  magnitude = grouped(np.abs(x) if kind == "first" else x, size)
  runs = magnitude.reshape(*magnitude.shape[:-1], -1, 2, 4).max((-3, -1))
  return runs.max(-1), runs.min(-1)


def exact_scales(x, kind, size):
  """The largest |x|, or sqrt(x), of each group, an outlier's limited; float32."""
  largest, other = halves(x, kind, size)
  limit = np.float32(2.0**12 if kind == "first" else 2.0**24) * other
  largest = np.where((other > 0) & (largest > limit), limit, largest)
  return largest if kind == "first" else np.sqrt(largest)


def levels_of(x, kind, storage):
  """The numbers that become codes when they are rounded, in float64."""
  s = exact_scales(x, kind, storage.group_size)
  s = expanded(s, x.shape[-1], storage.group_size)
  ratio = (np.abs(f64(x)) if kind == "first" else np.sqrt(f64(x))) / s
  if storage.companding == "root":
    level = np.sqrt(ratio)
  else:
    level = 2 * ratio / (1 + ratio) if kind == "first" else ratio
  level = np.minimum(level, 1) * LEVELS[kind]
  if kind == "second":
    return level
  if storage.companding == "root":
    level = level * np.minimum(level, 1)
  return np.sign(x) * level


def rounding_for(count, kind):
  return getattr(codec.rounding_of(count), kind)


def values(kind, name, codes, s):
  """What codes mean, in float64."""
  y = np.abs(f64(codes)) / LEVELS[kind]
  if name == "root":
    y = y * y
  elif kind == "first":
    y = y / (2 - y)
  return np.sign(f64(codes)) * y * s if kind == "first" else (y * s) ** 2


# Shapes.


@pytest.mark.parametrize(("shape", "axis", "scale_shape"), [
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
])
def test_group_axis_and_scale_shape(shape, axis, scale_shape):
  assert codec.group_axis(shape, 32) == axis
  assert codec.scale_shape(shape, 32) == scale_shape


@kinds
@pytest.mark.parametrize("shape", [
    (), (1,), (33,), (7, 50), (40, 6), (3, 3, 64, 16), (2, 5, 1), (0,), (40, 0),
    (0, 40),
])
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
def test_decode_matches_the_formulas_and_stays_within_half_a_code(
    seed, kind, storage
):
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


@given(first=st.integers(0, 2**31 - 1001))
def test_roundings_are_even_over_updates(first):
  """Of any thousand in a row, as many lie below a bound as should, within 6.

  And the thresholds of any two do not go together.
  """
  count = jnp.arange(1000, dtype=jnp.int32) + first
  rounding = codec.rounding_of(count)
  expected = (np.arange(1000) + 0.5) / 1000
  parts = [rounding.master]
  for moment in rounding[:2]:
    parts += [moment.scale / 2**16, moment.code]
  for part in parts:
    found = np.sort(np.asarray(part))
    assert found.min() > 0
    assert found.max() < 1
    assert np.abs(found - expected).max() < 6e-3
  correlation = np.corrcoef(np.stack(parts)) - np.eye(len(parts))
  assert np.abs(correlation).max() < 0.1


@kinds
@storages
def test_a_group_decays_as_its_float32_moment_does(kind, storage):
  """Steps that take less than half of a scale's last place add up."""
  x = random_moment(3, kind, center=(-2, 2))
  codes, scale = encode(x, kind, storage)
  decay, steps = 0.999, 3000

  def step(moment, count):
    rounding = rounding_for(count, kind)
    moment = decay * codec.decode(*moment, kind, storage)
    return codec.encode(moment, kind, storage, rounding), None

  (last, last_scale), _ = jax.jit(
      lambda moment: jax.lax.scan(step, moment, jnp.arange(steps))
  )((codes, scale))
  np.testing.assert_array_equal(last, codes)
  rate = np.log(f64(last_scale) / f64(scale)) / steps
  true = np.log(decay) / (1 if kind == "first" else 2)
  np.testing.assert_allclose(rate, np.full_like(rate, true), rtol=2.5e-2)


class Decay(NamedTuple):
  """What :func:`decaying` finds, of each element. Sums are over updates.

  Attributes:
    start: Codes at the start.
    free: Whether the element decays.
    value: Sum of what its codes mean.
    exact: Sum of the values that float32's moment has.
    code: Sum of codes.
    level: Sum of the numbers that would be rounded to codes in float32's moment.
    early: After how many updates it is zero when float32's is not, nor nearly.
    differs: After how many it is not zero and has another code than at the start.
    apart: The largest difference of a code from that number.
    last: Codes at the end.
  """

  start: np.ndarray
  free: np.ndarray
  value: np.ndarray
  exact: np.ndarray
  code: np.ndarray
  level: np.ndarray
  early: np.ndarray
  differs: np.ndarray
  apart: np.ndarray
  last: np.ndarray


def decaying(kind, storage, decay, updates, scale=1.0, held=False):
  """What every code means while it decays.

  Groups hold the top code beside others. Two elements, one of each half, keep it
  where ``held``; elsewhere all of a group decays.
  """
  top = LEVELS[kind]
  free = ~np.isin(np.arange(32), [0, 4])
  codes = np.full((10, 32), top, codec.CODE_DTYPE[kind])
  every = np.arange(-top if kind == "first" else 1, top + 1)
  codes[:, free] = np.resize(every, (10, 30))
  scales = np.full((10, 1), scale, jnp.bfloat16)
  start = decode(codes, scales, kind, storage)
  kept = held & ~free
  factor = np.where(kept, 1, np.float32(decay)).astype(np.float32)

  @jax.jit
  def run():
    def update(count, carry):
      moment, exact, sums, largest = carry
      x = jnp.where(kept, start, factor * codec.decode(*moment, kind, storage))
      moment = codec.encode(x, kind, storage, rounding_for(count, kind))
      exact = factor * exact
      value = codec.decode(*moment, kind, storage)
      ratio = jnp.abs(exact) / scale if kind == "first" else jnp.sqrt(exact) / scale
      if storage.companding == "root":
        level = jnp.sqrt(ratio)
      else:
        level = 2 * ratio / (1 + ratio) if kind == "first" else ratio
      level = jnp.sign(exact) * level * top
      code = moment[0].astype(jnp.float32)
      early = (value == 0) & (exact >= 1.5 * 2.0**-126)
      differs = (value != 0) & (moment[0] != codes)
      new = (value, exact, code, level, early, differs)
      sums = [a + b for a, b in zip(sums, new, strict=True)]
      return moment, exact, sums, jnp.maximum(largest, jnp.abs(code - level))

    zero = jnp.zeros(codes.shape, jnp.float32)
    moment = jnp.asarray(codes), jnp.asarray(scales)
    carry = moment, jnp.asarray(start), [zero] * 6, zero
    moment, _, sums, largest = jax.lax.fori_loop(0, updates, update, carry)
    return (*sums, largest, moment[0])

  free = np.broadcast_to(free, codes.shape)
  return Decay(codes, free, *map(np.asarray, run()))


@companding
@pytest.mark.parametrize("decay", [0.95, 0.99, 0.999, 0.9999])
def test_a_second_moment_decays_as_float32s_does(decay, storage):
  """On time average, from every code; and to zero not long before it does.

  The smallest codes underflow here.
  """
  updates = min(round(4 / (1 - decay)), 8000)
  of = decaying("second", storage, decay, updates, scale=1.25 * 2.0**-47)
  assert not of.early.any()
  assert not of.differs.any()
  ratio = of.value / of.exact
  # Code 1 is near the end from the start.
  np.testing.assert_allclose(ratio[of.start > 1], 1, rtol=0.03)


@companding
@pytest.mark.parametrize("decay", [0.95, 0.99, 0.999, 0.9999])
def test_a_second_moment_decays_beside_a_constant_one(decay, storage):
  """Its code steps down as it should on average, and to 1."""
  updates = min(round(3 / (1 - decay)), 8000)
  of = decaying("second", storage, decay, updates, held=True)
  assert not of.early.any()
  assert (of.last > 0).all()
  assert (of.last <= of.start).all()
  ratio = of.value / of.exact
  np.testing.assert_allclose(ratio[of.free & (of.start >= 64)], 1, rtol=0.1)
  np.testing.assert_allclose(ratio[of.free & (of.start >= 16)].mean(), 1, rtol=0.03)


@companding
@pytest.mark.parametrize("decay", [0.9, 0.99])
@pytest.mark.parametrize("held", [False, True])
def test_a_first_moment_decays_as_float32s_does(held, decay, storage):
  """Within a code or so on time average, from every code of either sign, to zero.

  Where all of a group decays, codes stay as they are.
  """
  updates = round(12 / (1 - decay))
  of = decaying("first", storage, decay, updates, held=held)
  if not held:
    assert not of.differs.any()
    np.testing.assert_allclose(of.value, of.exact, rtol=0.02)
    return
  off = (np.abs(of.code - of.level) / updates)[of.free]
  assert off.mean() < 0.5
  assert off.max() < 1.25
  assert of.apart[of.free].max() < 5
  assert np.abs(of.last[of.free].astype(int)).max() <= 2


@kinds
@pytest.mark.parametrize("spike", [1e6, 1e10, 1e20, np.inf])
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
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
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


# Master weights of bfloat16 parameters.


def float_patterns(seed, count=4096):
  """Random bit patterns: uniform, subnormal, and near powers of two."""
  rng = np.random.default_rng(seed)
  b = rng.integers(0, 2**32, count, dtype=np.uint32)
  subnormal = rng.integers(0, 2**23, count, dtype=np.uint32)
  near = rng.integers(0, 512, count, dtype=np.uint32) << 23
  near += rng.integers(-300, 300, count).astype(np.uint32)
  special = np.array(
      [0, 0x7F7FFFFF, 0x7F7F8000, 0x7F7F7FFF, 0x7F7FFF80, 0x7F7FFF7F, 0x7F800000,
       0x7F800001, 0x7FBFFFFF, 0x7FC00000, 0x7FFFFFFF, 1, 0x7F, 0x80, 0x8000],
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
  roundtrip = jax.jit(lambda p, c: (m := codec.merge(p, c), *codec.split(
      m, jnp.bfloat16, 24
  )))
  for start in range(0, 2**16, 2**14):
    p = np.repeat(np.arange(start, start + 2**14, dtype=np.uint16), 256)
    corrections = np.tile(c, 2**14)
    master, param, again = map(
        np.asarray, roundtrip(p.view(jnp.bfloat16), corrections)
    )
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
  merged = np.asarray(merge(
      np.broadcast_to(param[:, None], shape), candidates.astype(info.dtype)
  ))
  distance = np.abs(f64(merged) - f64(x)[:, None])
  mine = np.abs(f64(merge(param, found)) - f64(x))
  np.testing.assert_array_equal(mine, np.nanmin(distance, 1))


@bits
def test_residual_of_nan_and_infinity(bits):
  x = np.float32([np.nan, 1.0, np.nan, np.inf, np.inf, 1.0, -np.inf])
  p = np.float32([1.0, np.nan, np.nan, np.inf, 1.0, np.inf, 1.0])
  found = np.asarray(residual(x, p.astype(jnp.bfloat16), bits))
  info = np.iinfo(found.dtype)
  np.testing.assert_array_equal(
      found, [0, 0, 0, 0, info.max, info.min, info.min]
  )


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


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("direction", [1, -1])
def test_steps_of_a_small_part_of_a_place_add_up(direction, dtype):
  rng = np.random.default_rng(0)
  master = rng.uniform(1.1, 1.9, 510) * 2.0 ** rng.integers(-8, 3, 510)
  master = np.float32([*master * rng.choice([-1, 1], 510), 1.0, -1.0])
  place = kept_place(master, dtype)
  step = np.float32(0.01 * direction * place)
  start, end = walker(dtype, 10_000)(master, step[None])
  moved = (exact_master(*end) - exact_master(*start)) / place
  np.testing.assert_allclose(moved, np.full_like(moved, 100 * direction), atol=1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
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


# How leaves are stored.


@pytest.mark.parametrize(("storage", "shape", "quantized"), [
    (Storage(), (4096,), True),
    (Storage(), (4095,), False),
    (Storage(), (64, 64), True),
    (Storage(), (), False),
    (Storage(min_quantized_size=0), (), True),
    (Storage(min_quantized_size=0), (0,), True),
    (Storage(min_quantized_size=10), (3, 3), False),
    (Storage(min_quantized_size=10), (2, 5), True),
    (Storage(moment_bits=32), (64, 64), False),
    (Storage(moment_bits=32, min_quantized_size=0), (64, 64), False),
])
def test_small_leaves_are_not_quantized(storage, shape, quantized):
  assert storage.quantizes(shape) is quantized
