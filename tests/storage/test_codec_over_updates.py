"""Codes over many updates: moments decay as in float32."""

from typing import NamedTuple

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from flashoptim_jax.storage import codec
from tests.support.codec_reference import (
  LEVELS,
  companding,
  decode,
  encode,
  f64,
  kinds,
  random_moment,
  rounding_for,
  storages,
)
from tests.support.tiers import slow_but


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
@pytest.mark.parametrize("decay", slow_but([0.95, 0.99, 0.999, 0.9999]))
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
@pytest.mark.parametrize("decay", slow_but([0.95, 0.99, 0.999, 0.9999]))
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
@pytest.mark.parametrize("decay", slow_but([0.9, 0.99]))
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
