"""Masters of 16 bits: what has no correction is rounded by its element's threshold."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flashoptim_jax.storage import codec
from tests.support.tiers import slow_but

DTYPES = pytest.mark.parametrize("dtype", slow_but(["bfloat16", "float16"]))
UPDATES = 10_000


def f64(x):
  return np.asarray(x).astype(np.float64)


def place(x, dtype):
  """Distance to the next larger magnitude."""
  info = jnp.finfo(dtype)
  smallest = float(info.tiny)
  binade = 2.0 ** np.floor(np.log2(np.maximum(np.abs(f64(x)), smallest)))
  return binade * 2.0**-info.nmant


def advanced(param, step, count, **where):
  """Parameters after a step."""
  rounding = codec.rounding_of(count, 16).master
  threshold = codec.master_threshold(rounding, param, 16, **where)
  master = codec.advance(param, None, step, threshold)
  assert codec.split_correction(master, param.dtype, 16) is None
  return codec.split(master, param.dtype, 16)[0]


@functools.partial(jax.jit, static_argnames="updates")
def walk(param, step, updates=UPDATES):
  def body(count, param):
    return advanced(param, step, count)

  return jax.lax.fori_loop(0, updates, body, param)


@DTYPES
@pytest.mark.parametrize("direction", slow_but([1, -1]))
def test_steps_of_a_small_part_of_a_place_add_up(direction, dtype):
  """Within a place at every element, or within two where the places change."""
  rng = np.random.default_rng(0)
  shape = (8, 64)
  # A hundred places from the next binade, but for the first rows.
  start = rng.uniform(1.0, 1.19, shape) + 0.797 * (direction < 0)
  start = start * 2.0 ** rng.integers(-8, 3, shape)
  start[0] = 2.0
  start[1] = 2.0 - direction * 50 * 2.0 ** -jnp.finfo(dtype).nmant
  start *= rng.choice([-1, 1], shape)
  param = jnp.asarray(start, dtype)
  unit = place(np.abs(f64(param)) * (1 + direction * 1e-6), dtype)
  step = 0.01 * unit * direction * np.sign(start)
  end = f64(walk(param, np.float32(step)))
  moved = (np.abs(end) - np.abs(f64(param))) * direction / unit
  np.testing.assert_allclose(moved[2:], np.full_like(moved[2:], 100), atol=1)
  np.testing.assert_allclose(moved[:2], np.full_like(moved[:2], 100), atol=4)
  assert (np.sign(end) == np.sign(start)).all()


@DTYPES
def test_every_number_is_right_on_average(dtype):
  """Over all thresholds; subnormal numbers of float16 included."""
  bits = 23 - jnp.finfo(dtype).nmant
  rng = np.random.default_rng(0)
  exponents = rng.integers(-30 if dtype == "float16" else -60, 14, (40, 1))
  x = np.float32(rng.choice([-1, 1], (40, 1)) * rng.uniform(1, 2, (40, 1)))
  x = np.float32(x * 2.0**exponents)
  thresholds = np.arange(2**bits, dtype=np.uint32) << (32 - bits)
  found = codec._dithered(
    jnp.broadcast_to(x, (40, 2**bits)), jnp.dtype(dtype), jnp.asarray(thresholds)
  )
  stored = f64(codec.split(found, jnp.dtype(dtype), 16)[0])
  np.testing.assert_array_equal(stored, f64(found))
  unit = place(x, dtype)
  assert (np.abs(stored - x) < unit).all()
  np.testing.assert_allclose(stored.mean(1), x[:, 0], atol=unit.max() * 2.0**-12)
  error = (stored.mean(1) - x[:, 0]) / unit[:, 0]
  assert (np.abs(error) <= 2.0**-bits).all()


@DTYPES
def test_no_step_keeps_every_number(dtype):
  """At any threshold. What is subnormal may be flushed, as by any sum in float32."""
  param = jax.lax.bitcast_convert_type(jnp.arange(2**16, dtype=jnp.uint16), dtype)
  value = np.asarray(param.astype(jnp.float32))
  kept = ~(np.abs(value) < 2.0**-126) | (value == 0)
  advance = jax.jit(codec.advance)
  for threshold in (0, 1 << 31, 2**32 - 1):
    for zero in np.float32([0.0, -0.0]):
      master = advance(
        param, None, np.full(2**16, zero), jnp.full(2**16, threshold, jnp.uint32)
      )
      after = np.asarray(codec.split(master, param.dtype, 16)[0].astype(jnp.float32))
      np.testing.assert_array_equal(after[kept], value[kept])


@DTYPES
def test_ends_of_the_range(dtype):
  """What is not finite stays so, and what passes the largest number is infinite."""
  info = jnp.finfo(dtype)
  largest = float(info.max)
  unit = place(largest, dtype)
  # NVIDIA's arithmetic gives the last of these.
  nans = np.uint32([0x7FC00000, 0xFFC00001, 0x7FFFFFFF]).view(np.float32)
  x = np.float32([np.inf, -np.inf, *nans, largest, -largest, largest + 0.75 * unit])
  expected = {
    0: [np.inf, -np.inf, *[np.nan] * 3, largest, -largest, largest],
    1 << 31: [np.inf, -np.inf, *[np.nan] * 3, largest, -largest, np.inf],
    2**32 - 1: [np.inf, -np.inf, *[np.nan] * 3, largest, -largest, np.inf],
  }
  for threshold, values in expected.items():
    words = jnp.full(x.shape, threshold, jnp.uint32)
    found = codec._dithered(jnp.asarray(x), jnp.dtype(dtype), words)
    stored = codec.split(found, jnp.dtype(dtype), 16)[0]
    np.testing.assert_array_equal(f64(stored), values)


def spread(words):
  """By how much shares of thresholds in 64 parts of the unit interval differ."""
  parts = np.bincount(np.asarray(words).reshape(-1) >> 26, minlength=64)
  return np.abs(parts / parts.mean() - 1).max()


def words_at(count, shape):
  return np.asarray(codec.dither(codec.rounding_of(count, 16).master, shape))


def test_thresholds_are_spread_evenly():
  """Over elements in a step, along rows and columns; over steps for an element."""
  leaf = words_at(5, (512, 1024))
  assert spread(leaf) < 1e-3
  for row in (0, 17):
    assert spread(leaf[row]) < 0.2
  for column in (0, 5, 1023):
    assert spread(leaf[:, column]) < 0.4
  counts = jnp.arange(4096)
  words = jax.vmap(lambda n: codec.dither(codec.rounding_of(n, 16).master, (3, 5)))(
    counts
  )
  for element in np.asarray(words).reshape(len(counts), -1).T:
    assert spread(element) < 0.1


def test_thresholds_go_with_no_other():
  counts = jnp.arange(4096)
  rounding = jax.vmap(lambda n: codec.rounding_of(n, 16))(counts)
  ours = f64(rounding.master)  # Of an element it is that, and a constant.
  for moment in (rounding.first, rounding.second):
    for other in (moment.scale, moment.code):
      assert abs(np.corrcoef(ours, f64(other))[0, 1]) < 0.02


def test_parts_have_the_thresholds_of_the_whole():
  shape = (4, 6, 10)
  whole = words_at(3, shape)
  rounding = codec.rounding_of(3, 16).master
  strides = codec.row_major(shape)
  for index in ((2,), (1, 4)):
    origin = codec.place_of(index, strides[: len(index)])
    rest = shape[len(index) :]
    np.testing.assert_array_equal(codec.dither(rounding, rest, origin), whole[index])
  origin = codec.place_of((1, 2, 5), strides)
  part = codec.dither(rounding, (2, 3, 5), origin, strides)
  np.testing.assert_array_equal(part, whole[1:3, 2:5, 5:])


@DTYPES
def test_derivative_is_that_of_the_sum(dtype):
  param = jnp.asarray([1.0, -2.0, 0.3], dtype)

  def loss(rate):
    return jnp.sum(advanced(param, -rate * jnp.float32([1.0, 2.0, 3.0]), 0))

  assert jax.grad(loss)(jnp.float32(1e-3)) == -6
