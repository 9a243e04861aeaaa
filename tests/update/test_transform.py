"""Updates under transformations of JAX, with bad gradients, of odd trees."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flashoptim_jax as fo
from tests.support import cases
from tests.support.cases import every_case, every_optimizer, some_cases
from tests.support.tiers import slow_but

# Under jit, cond, scan, donation.


@every_case
def test_types_are_stable(name, storage):
  tx = cases.make(name, storage)
  params = cases.tree(cases.TINY_SHAPES)
  state = tx.init(params)
  for function in (cases.step, cases.update):
    for dtype in (None, jnp.float32):
      grads = cases.grads_like(params, dtype=dtype)
      call = functools.partial(function, tx, grads)

      # Both refuse branches or carries whose types differ.
      def cond(pred, state, params, call=call):
        return jax.lax.cond(pred, call, lambda s, p: (p, s), state, params)

      def scan(state, params, call=call):
        def body(carry, _):
          params, state = call(*carry)
          return (state, params), None

        return jax.lax.scan(body, (state, params), None, length=2)[0]

      new_params, new_state = jax.eval_shape(cond, True, state, params)
      cases.assert_same_types((new_params, new_state), (params, state))
      new_state, new_params = jax.eval_shape(scan, state, params)
      cases.assert_same_types((new_params, new_state), (params, state))


@some_cases
def test_scan_equals_calls(name, storage):
  tx = cases.make(name, storage)
  params = cases.tree(cases.TINY_SHAPES)
  grads = [cases.grads_like(params, seed) for seed in range(1, 5)]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *grads)

  @jax.jit
  def scan(state, params):
    def body(carry, grads):
      params, state = carry
      return fo.step(tx, grads, state, params), None

    return jax.lax.scan(body, (params, state), stacked)[0]

  actual = scan(tx.init(params), params)
  desired = cases.train(tx, params, 4, cases.jitted_step)
  cases.assert_equal(actual, desired, steps=4)


@some_cases
def test_compiles_once(name, storage):
  params = cases.tree(cases.TINY_SHAPES)
  state = cases.make(name, storage).init(params)
  traces = []

  @jax.jit
  def step(rate, grads, state, params):
    traces.append(None)
    tx = cases.make(name, storage, learning_rate=rate)
    return fo.step(tx, grads, state, params)

  results = []
  for i in range(3):
    rate = jnp.asarray(0.1 * i)
    result, state = step(rate, cases.grads_like(params), state, params)
    results.append(result)
  assert len(traces) == step._cache_size() == 1
  cases.assert_same(results[0], params)
  assert not np.array_equal(results[1]["matrix"], results[2]["matrix"])


@pytest.mark.parametrize("through", slow_but(["step", "update"]))
@some_cases
def test_donated_buffers_are_all_reused(name, storage, through):
  tx = cases.make(name, storage)
  params = cases.tree()
  state = tx.init(params)
  function = {"step": cases.step, "update": cases.update}[through]
  jitted = jax.jit(functools.partial(function, tx), donate_argnums=(1, 2))
  nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves((params, state)))
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    lowered = jitted.lower(cases.grads_like(params), state, params)
    compiled = lowered.compile()
  assert compiled.memory_analysis().alias_size_in_bytes == nbytes


# Gradients that are not finite.


@pytest.mark.parametrize("bad", slow_but([np.nan, np.inf, -np.inf]))
@some_cases
def test_bad_gradients_show_and_stay_in_their_group(name, storage, bad):
  tx, plain = cases.make(name, storage), cases.make_plain(name)
  params = {"w": jnp.ones((4, 64), jnp.bfloat16)}
  grads = {"w": jnp.full((4, 64), 0.5, jnp.bfloat16)}
  bad_grads = {"w": grads["w"].at[1, 40].set(bad)}
  for function in (cases.step, cases.update):
    with jax.debug_nans(False):
      new, state = params, tx.init(params)
      wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
      wide_state = plain.init(wide)
      for each in (bad_grads, grads, grads):
        new, state = function(tx, each, state, new)
        wide, wide_state = cases.update(
          plain, jax.tree.map(jnp.float32, each), wide_state, wide
        )
    finite = np.isfinite(np.asarray(new["w"], np.float32))
    desired = np.isfinite(np.asarray(wide["w"]))
    if "lion" not in name or np.isnan(bad):
      assert not desired[1, 40]
    kept = cases.OPTIMIZERS[name].moments
    if kept and cases.STORAGES[storage].moment_bits == 8:
      # The group of 32 that the bad gradient went into is lost.
      desired = desired.copy()
      desired[1, 32:64] = False
    np.testing.assert_array_equal(finite, desired)
    for tree in fo.moments(state).values():
      others = np.ones((4, 64), bool)
      others[1, 32:64] = False
      assert np.all(np.isfinite(tree["w"])[others])


# Trees and leaves at the edge.


@pytest.mark.slow
@some_cases
def test_trees_at_the_edge(name, storage):
  tx = cases.make(name, storage)
  shapes = ((), (0,), (1,), (0, 32), (32, 0), (2, 0, 3))
  params = {
    "empty": {},
    "none": None,
    "list": [jnp.ones(shape, jnp.bfloat16) for shape in shapes],
    "tuple": (None, jnp.ones((), jnp.float32)),
  }
  for tree in (params, {}, (), jnp.ones((), jnp.bfloat16)):
    grads = jax.tree.map(jnp.ones_like, tree)
    state = tx.init(tree)
    for function in (cases.jitted_step, cases.jitted_update):
      new_params, new_state = function(tx, grads, state, tree)
      cases.assert_same_types(new_params, tree)
      cases.assert_same_types(new_state, state)
      assert all(np.all(leaf < 1) for leaf in jax.tree.leaves(new_params))


@every_optimizer
def test_float64_params_keep_their_master(name):
  with jax.enable_x64(True):
    params = {"w": jnp.linspace(1, 2, 40, dtype=jnp.float64)}
    tx = cases.make(name, learning_rate=1e-12)
    state = tx.init(params)
    grads = {"w": jnp.ones(40, jnp.float64)}
    new, new_state = cases.jitted_step(tx, grads, state, params)
    cases.assert_same_types((new, new_state), (params, state))
    assert state.correction == {"w": optax.MaskedNode()}
    # A step far below float32's resolution.
    moved = np.asarray(params["w"] - new["w"])
    assert np.all((moved > 0.5e-12) & (moved < 2.5e-12))
