"""Diagnostics: leaves that are not finite, and those that a step can't move."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flashoptim_jax as fo
from tests.support.tiers import slow_but

SPACING = {  # Below half of it, at 1, a step is lost.
  ("bfloat16", 24): 2.0**-23,
  ("bfloat16", 32): 2.0**-23,
  ("bfloat16", None): 2.0**-7,
  ("float16", 24): 2.0**-11 / 127 / 256,
  ("float16", 32): 2.0**-23,
  ("float16", None): 2.0**-10,
  ("float32", 24): 2.0**-23,
}
STEPS = 2048


@functools.partial(jax.jit, static_argnames="bits")
def run(rate, sign, params, state, bits):
  """Many steps of Lion, which moves every weight by exactly the learning rate."""
  tx = fo.lion(rate, weight_decay=0.0, storage=fo.Storage(master_bits=bits))
  grads = jax.tree.map(lambda p: jnp.full_like(p, sign), params)

  def step(carry, _):
    return fo.step(tx, grads, carry[1], carry[0]), None

  return jax.lax.scan(step, (params, state), length=STEPS)[0]


@pytest.mark.parametrize(("dtype", "bits"), slow_but(SPACING))
@pytest.mark.parametrize("sign", slow_but([-1.0, 1.0]))
def test_finds_the_leaves_that_stay_where_they_are(dtype, bits, sign):
  tx = fo.lion(1.0, storage=fo.Storage(master_bits=bits))
  exponents = np.arange(-4, 5)
  # The largest of a leaf is alone: others lie closer, and move.
  masters = {f"leaf{e}": jnp.float32([1.5]) * 2.0**e for e in exponents}
  verdicts = set()
  for fraction in (0.45, 0.7):
    rate = SPACING[dtype, bits] * fraction  # Of the leaf with exponent 0.
    params, state = fo.from_fp32(tx, masters, jnp.dtype(dtype))
    report = fo.check_numerics(params, state, rate)
    before = fo.to_fp32(params, state)
    after = fo.to_fp32(*run(rate, sign, params, state, bits))
    stuck = {name for name in masters if (after[name] == before[name]).all()}
    assert {leaf.path for leaf in report} == stuck
    assert bool(report) == bool(stuck)
    verdicts.add("leaf0" in stuck)
    for leaf in report:
      assert leaf.largest == float(before[leaf.path][0])
      assert rate < leaf.smallest_learning_rate == leaf.spacing / 2
      assert leaf.path in str(report)
  assert verdicts == {True, False}


@pytest.mark.parametrize("name", slow_but(["adamw", "sgd", "compress"]))
@pytest.mark.parametrize("dtype", slow_but([jnp.bfloat16, jnp.float16]))
def test_what_is_dithered_moves_by_any_step_that_float32_has_room_for(name, dtype):
  def make(bits):
    storage = fo.Storage(master_bits=bits)
    if name == "compress":
      return fo.compress(optax.adamw(1e-3), storage)
    return getattr(fo, name)(1e-3, storage=storage)

  masters = {"w": jnp.full((4, 64), 1.5)}
  for bits, rate, stalls in (
    (None, 1e-5, True),
    (16, 1e-5, False),
    (16, 0.7 * 2.0**-23, False),
    (16, 0.4 * 2.0**-23, True),
  ):
    params, state = fo.from_fp32(make(bits), masters, dtype)
    assert bool(fo.check_numerics(params, state, rate)) == stalls


def test_raises_when_asked():
  masters = {"a": jnp.ones(3), "b": 1e-3 * jnp.ones(3)}
  params, state = fo.from_fp32(fo.lion(1e-8), masters)
  with pytest.raises(fo.NumericsError, match="a: largest weight 1") as error:
    fo.check_numerics(params, state, 1e-8, raise_error=True)
  assert isinstance(error.value, ValueError)
  assert not fo.check_numerics(params, state, 1e-6, raise_error=True)


def test_takes_schedules_at_the_count_of_updates():
  schedule = optax.piecewise_constant_schedule(1e-3, {2: 1e-6})
  tx = fo.adamw(schedule)
  params, state = fo.from_fp32(tx, {"w": jnp.ones(8)})
  assert not fo.check_numerics(params, state, schedule)
  grads = jax.tree.map(jnp.ones_like, params)
  for _ in range(3):
    params, state = fo.step(tx, grads, state, params)
  (leaf,) = fo.check_numerics(params, state, schedule)
  assert leaf.path == "w"
  assert not fo.check_numerics(params, state, jnp.float32(1e-3))
  for bad in ("1e-3", None, jnp.ones(2)):
    with pytest.raises(ValueError, match="expected a number or a schedule"):
      fo.check_numerics(params, state, bad)


def test_of_leaves_without_a_largest_weight():
  """Zero-size, zero and integer leaves."""
  tx = optax.partition(
    {"flash": fo.adamw(1e-3), "none": optax.set_to_zero()},
    {"empty": "flash", "zero": "flash", "ids": "none"},
  )
  params = {
    "empty": jnp.zeros((0, 4), jnp.bfloat16),
    "zero": jnp.zeros((4,), jnp.bfloat16),
    "ids": jnp.arange(3),
  }
  assert not fo.check_numerics(params, tx.init(params), 1e-8)


@pytest.mark.parametrize("size", slow_but([3, 8192]))
def test_finds_what_is_not_finite(size):
  tx = optax.chain(optax.clip_by_global_norm(1.0), fo.adamw(1e-3))
  params = {"w": jnp.ones(size, jnp.bfloat16), "ids": jnp.arange(3), "b": jnp.ones(2)}
  tx = optax.masked(tx, {"w": True, "ids": False, "b": True})
  state = tx.init(params)
  assert fo.nonfinite_leaves(params, state) == ()
  bad = params | {"w": params["w"].at[:2].set(jnp.array([jnp.nan, -jnp.inf]))}
  (leaf,) = fo.nonfinite_leaves(bad, state)
  assert leaf == ("params/w", 2, size)
  (leaf,) = fo.check_numerics(bad, state, 1e-3)
  assert "2 of" in str(leaf)
  with pytest.raises(fo.NumericsError, match="params/w"):
    fo.check_numerics(bad, state, 1e-3, raise_error=True)
  # A gradient that is not finite gets into parameters and state.
  grads = jax.tree.map(jnp.zeros_like, params) | {"w": bad["w"]}
  after = jax.jit(fo.step, static_argnums=0)(
    fo.adamw(1e-3),
    *({"w": tree["w"]} for tree in (grads,)),
    fo.adamw(1e-3).init({"w": params["w"]}),
    {"w": params["w"]},
  )
  moments = "mu/w" if size == 3 else "mu_scale/w"
  found = {leaf.path for leaf in fo.nonfinite_leaves(*after)}
  assert {"params/w", f"opt_state/{moments}"} <= found


def test_of_a_bare_array_and_other_transformations():
  assert fo.nonfinite_leaves(jnp.float32([1.0, jnp.nan])) == (("params", 1, 2),)
  params = {"w": jnp.full((4,), jnp.inf)}
  state = optax.adam(1e-3).init(params)
  assert [leaf.path for leaf in fo.nonfinite_leaves(params, state)] == ["params/w"]
