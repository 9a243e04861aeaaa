"""Flash optimizers keep Optax's contract, alone and inside its wrappers."""

import functools
import operator
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax import contrib
from optax._src import base

import flashoptim_jax as fo
from flashoptim_jax.storage.state import flash_states
from tests.support import cases
from tests.support.cases import every_case, every_optimizer, small, some_cases
from tests.support.tiers import slow_but

# Split along an axis that has no groups, along the groups' axis, and both.
SHARDED_SHAPES = {
  "rows": ((8, 256), jnp.bfloat16),
  "groups": ((3, 256), jnp.bfloat16),
  "both": ((4, 128), jnp.bfloat16),
  "norm": ((256,), jnp.float32),
}
SPECS = {
  "rows": P("x", None),
  "groups": P(None, ("x", "y")),
  "both": P("y", "x"),
  "norm": P("x"),
}


def float32(shapes=None):
  """Parameters and gradients that Optax's own optimizers share with ours."""
  return cases.tree(shapes or cases.SMALL_SHAPES, dtype=jnp.float32)


def assert_close_trees(actual, desired, rtol=1e-5):
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=rtol, atol=1e-7),
    actual,
    desired,
  )


# The transformation itself.


@every_case
def test_result_is_a_pair_with_extra_args(name, storage):
  tx = cases.make(name, storage)
  assert isinstance(tx, optax.GradientTransformationExtraArgs)
  init, update = tx
  assert (init, update) == (tx.init, tx.update)


@every_case
def test_updates_hold_what_gradients_and_parameters_hold(name, storage):
  tx = cases.make(name, storage)
  params = cases.tree()
  state = tx.init(params)
  for dtype in (jnp.bfloat16, jnp.float16, jnp.float32, None):
    grads = cases.grads_like(params, dtype=dtype)
    updates, new_state = jax.eval_shape(tx.update, grads, state, params)
    cases.assert_same_types(
      updates,
      jax.tree.map(
        lambda g, p: jax.ShapeDtypeStruct(p.shape, jnp.promote_types(g.dtype, p.dtype)),
        grads,
        params,
      ),
    )
    cases.assert_same_types(new_state, state)
    new_params, new_state = jax.eval_shape(
      functools.partial(fo.step, tx), grads, state, params
    )
    cases.assert_same_types(new_params, params)
    cases.assert_same_types(new_state, state)


@every_case
def test_missing_params_raise_optax_message(name, storage):
  tx = cases.make(name, storage)
  params = cases.tree()
  state = tx.init(params)
  for args in ((params, state), (params, state, None)):
    with pytest.raises(ValueError, match=re.escape(base.NO_PARAMS_MSG)):
      tx.update(*args)


def recorder(seen):
  """Notes down the extra arguments that reach it."""

  def update_fn(updates, state, params=None, **extra_args):
    del params
    seen.append(extra_args)
    return updates, state

  return optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(), update_fn
  )


@every_case
def test_extra_args_are_accepted_and_passed_on(name, storage):
  seen = []
  tx = optax.chain(recorder(seen), cases.make(name, storage))
  params = small()
  grads, state = cases.grads_like(params), tx.init(params)
  for function in (tx.update, functools.partial(fo.step, tx)):
    jax.eval_shape(
      functools.partial(function, value=3.0, note="text"),
      grads,
      state,
      params,
    )
    assert (seen[-1]["value"], seen[-1]["note"]) == (3.0, "text")


@pytest.mark.slow
@some_cases
def test_extra_args_change_nothing(name, storage):
  tx = cases.make(name, storage)
  params = small()
  grads, state = cases.grads_like(params), tx.init(params)
  for function in (cases.step, cases.update):
    cases.assert_same(
      function(tx, grads, state, params, loss=1.0, note="text"),
      function(tx, grads, state, params),
    )


@every_case
def test_map_params_visits_every_mirror(name, storage):
  tx = cases.make(name, storage)
  params = small()
  state = tx.init(params)
  mapped = optax.tree.map_params(
    tx,
    lambda leaf: ("param", leaf.dtype.name),
    state,
    transform_non_params=lambda leaf: ("other", leaf.dtype.name),
  )
  assert mapped.count == ("other", "int32")
  kept = cases.OPTIMIZERS[name].moments
  for field in ("mu", "mu_scale", "nu", "nu_scale", "correction"):
    tree = getattr(mapped, field)
    if getattr(state, field) == optax.MaskedNode():
      assert tree == optax.MaskedNode()
      continue
    assert field == "correction" or field.removesuffix("_scale") in kept
    assert {kind for kind, _ in tree.values()} == {"param"}


def map_specs(tx, state):
  """The parameters' specs, on the state; float32 leaves have no correction."""
  return optax.tree.map_params(
    tx,
    lambda leaf, spec: leaf if isinstance(leaf, optax.MaskedNode) else spec,
    state,
    SPECS,
    transform_non_params=lambda leaf: P(),
    is_leaf=lambda node: isinstance(node, optax.MaskedNode),
  )


@pytest.mark.parametrize(
  "chained", slow_but([False, True], True), ids=["alone", "chain"]
)
@every_case
def test_map_params_gives_every_array_a_usable_spec(name, storage, chained):
  mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
  params = cases.tree(SHARDED_SHAPES)
  tx = cases.make(name, storage)
  if chained:
    tx = optax.chain(optax.clip_by_global_norm(1.0), tx)
  state = tx.init(params)
  mapped = map_specs(tx, state)
  assert jax.tree.structure(mapped) == jax.tree.structure(state)
  shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), mapped)
  # Refuses a spec that doesn't fit.
  placed = jax.device_put(state, shardings)
  for path, leaf in jax.tree.leaves_with_path(placed):
    spec = SPECS.get(getattr(path[-1], "key", None), P())
    assert leaf.sharding == NamedSharding(mesh, spec), path


@every_case
def test_map_params_without_is_leaf_serves_16_bit_trees(name, storage):
  tx = cases.make(name, storage)
  params = small()
  specs = {"matrix": P("x", "y"), "bias": P(None)}
  mapped = optax.tree.map_params(
    tx,
    lambda leaf, spec: spec,
    tx.init(params),
    specs,
    transform_non_params=lambda leaf: P(),
  )
  for field in mapped[1:-1]:
    assert field in (specs, optax.MaskedNode())
  assert mapped.count == P()


@every_case
def test_tree_get(name, storage):
  tx = optax.chain(optax.clip(1.0), cases.make(name, storage))
  params = small()
  state = tx.init(params)
  (flash,) = flash_states(state)
  assert optax.tree.get(state, "count") is flash.count
  for field in cases.OPTIMIZERS[name].moments:
    found = optax.tree.get(state, field)
    cases.assert_same(found, getattr(flash, field))
    assert found.keys() == params.keys()
  assert optax.tree.get(state, "correction") == flash.correction


# Inside Optax's combinators and wrappers.


@some_cases
def test_chain(name, storage):
  tx = cases.make(name, storage)
  chained = optax.chain(optax.scale(0.5), optax.identity(), tx)
  named = optax.named_chain(("scale", optax.scale(0.5)), ("flash", tx))
  params = cases.tree()
  grads = cases.grads_like(params)
  half = jax.tree.map(lambda g: g / 2, grads)
  for function in (cases.step, cases.update):
    desired = function(tx, half, tx.init(params), params)
    for each in (chained, named):
      actual = function(each, grads, each.init(params), params)
      cases.assert_equal(actual, desired, steps=1)


@some_cases
def test_partition(name, storage):
  tx = cases.make(name, storage)
  fast = cases.make("momentum", learning_rate=0.1)
  labels = {"matrix": "a", "bias": "b", "conv": "a", "norm": "b", "scale": "c"}
  both = optax.partition({"a": tx, "b": fast, "c": optax.sgd(0.5)}, labels)
  params = cases.tree()
  grads = cases.grads_like(params)

  def part(tree, label):
    return {key: tree[key] for key in tree if labels[key] == label}

  for function in (cases.step, cases.update):
    new_params, state = function(both, grads, both.init(params), params)
    for label, each in (("a", tx), ("b", fast)):
      own = part(params, label)
      desired = function(each, part(grads, label), each.init(own), own)
      (flash,) = flash_states(state.inner_states[label])
      own_state = jax.tree.map(
        lambda tree, label=label: (
          part(tree, label)
          if isinstance(tree, dict) and tree.keys() == params.keys()
          else tree
        ),
        flash,
        is_leaf=lambda node: isinstance(node, dict | optax.MaskedNode),
      )
      actual = part(new_params, label), own_state
      cases.assert_equal(actual, desired, steps=1)
    # A leaf that no flash optimizer holds gets what Optax would give it.
    plain = optax.apply_updates(
      params["scale"], -0.5 * grads["scale"].astype(jnp.bfloat16)
    )
    np.testing.assert_array_equal(new_params["scale"], plain)


@pytest.mark.slow
@some_cases
def test_masked_leaves_the_rest_to_others(name, storage):
  params = cases.tree()
  grads = cases.grads_like(params)
  mask = {key: key in ("matrix", "norm") for key in params}
  other = jax.tree.map(operator.not_, mask)
  tx = cases.make(name, storage)
  alone = optax.masked(tx, mask)
  updates, _ = jax.jit(alone.update)(grads, alone.init(params), params)
  for key, inside in mask.items():
    same = np.array_equal(updates[key], grads[key])
    assert same == (not inside)

  # Two flash optimizers in one chain share the leaves out.
  split = optax.chain(alone, optax.masked(tx, other))
  for function in (cases.step, cases.update):
    desired_params, desired_state = function(tx, grads, tx.init(params), params)
    new_params, state = function(split, grads, split.init(params), params)
    cases.assert_masters_close(
      fo.to_fp32(new_params, state),
      fo.to_fp32(desired_params, desired_state),
      params,
      cases.STORAGES[storage].master_bits,
      steps=1,
    )
    cases.assert_same(fo.moments(state), fo.moments(desired_state))


@some_cases
def test_multi_steps(name, storage):
  tx = cases.make(name, storage)
  multi = optax.MultiSteps(tx, every_k_schedule=2)
  params = cases.tree(cases.TINY_SHAPES)
  first, second = cases.grads_like(params, 1), cases.grads_like(params, 2)
  mean = jax.tree.map(
    lambda a, b: (a + (b.astype(jnp.float32) - a) / 2).astype(a.dtype),
    first,
    second,
  )
  state = multi.init(params)
  waiting, state = cases.jitted_step(multi, first, state, params)
  cases.assert_same(waiting, params)
  cases.assert_same(state.inner_opt_state, tx.init(params))
  actual, state = cases.jitted_step(multi, second, state, params)
  desired = cases.jitted_update(tx, mean, tx.init(params), params)
  cases.assert_equal((actual, state.inner_opt_state), desired, steps=1)


@some_cases
def test_apply_if_finite_leaves_all_untouched(name, storage):
  tx = optax.apply_if_finite(cases.make(name, storage), 5)
  params = cases.tree(cases.TINY_SHAPES)
  params, state = cases.train(tx, params, 2, cases.jitted_step)
  for bad in (np.nan, np.inf):
    grads = cases.grads_like(params)
    grads["matrix"] = grads["matrix"].at[0, 0].set(bad)
    new_params, new_state = cases.jitted_step(tx, grads, state, params)
    cases.assert_same(new_params, params)
    cases.assert_same(new_state.inner_state, state.inner_state)
    assert int(new_state.notfinite_count) == 1
  grads = cases.grads_like(params)
  moved, _ = cases.jitted_step(tx, grads, new_state, params)
  desired, _ = cases.jitted_step(tx, grads, state, params)
  cases.assert_same(moved, desired)
  assert not np.array_equal(moved["matrix"], params["matrix"])


def hyperparams(name):
  """Each optimizer's numbers, as inject_hyperparams' float32 arrays."""
  flash, _, kwargs, _ = cases.OPTIMIZERS[name]
  given = {"learning_rate": cases.LEARNING_RATE, **kwargs}
  defaults = {
    key: value
    for key, value in (flash.__kwdefaults__ | defaults_of(flash)).items()
    if isinstance(value, float)
  }
  return {
    key: jnp.float32(value) if isinstance(value, float) else value
    for key, value in (defaults | given).items()
  }


def defaults_of(function):
  names = function.__code__.co_varnames[: function.__code__.co_argcount]
  defaults = function.__defaults__
  return dict(zip(names[-len(defaults) :], defaults, strict=True))


@pytest.mark.parametrize("dtype", slow_but([jnp.bfloat16, jnp.float32]))
@pytest.mark.parametrize("wide", [True, False], ids=["float32", "params_dtype"])
@every_optimizer
def test_inject_hyperparams_with_defaults(name, wide, dtype):
  flash, _, kwargs, _ = cases.OPTIMIZERS[name]
  if "weight_decay" in kwargs:
    kwargs = kwargs | {"weight_decay": 0.125}  # Exact in bfloat16.
  inject = optax.inject_hyperparams(
    flash, hyperparam_dtype=jnp.float32 if wide else None
  )
  injected = inject(cases.LEARNING_RATE, **kwargs)
  params = cases.tree(cases.SMALL_SHAPES, dtype=dtype)
  # In bfloat16 too: 0.999 and the like must not arrive rounded.
  arrays = hyperparams(name) | kwargs
  tx = flash(
    **{
      key: jnp.float32(value) if isinstance(value, float) else value
      for key, value in arrays.items()
    }
  )
  desired = cases.train(tx, params)
  actual_params, state = cases.train(injected, params)
  assert jnp.result_type(state.hyperparams["learning_rate"]) == (
    jnp.float32 if wide else dtype
  )
  cases.assert_equal((actual_params, state.inner_state), desired, steps=3)
  # And through update.
  desired = cases.train(tx, params, function=cases.update)
  actual_params, state = cases.train(injected, params, function=cases.update)
  cases.assert_equal((actual_params, state.inner_state), desired, steps=3)


@every_optimizer
def test_injected_hyperparams_change_without_recompiling(name):
  flash, _, kwargs, _ = cases.OPTIMIZERS[name]
  tx = optax.inject_hyperparams(flash)(0.5, **kwargs)
  params = small()
  grads, state = cases.grads_like(params), tx.init(params)
  traces = []

  @jax.jit
  def step(grads, state, params):
    traces.append(None)
    return fo.step(tx, grads, state, params)

  moved, state = step(grads, state, params)
  assert not np.array_equal(moved["matrix"], params["matrix"])
  state.hyperparams["learning_rate"] = jnp.asarray(0.0, jnp.bfloat16)
  still, state = step(grads, state, moved)
  cases.assert_same(still, moved)
  assert len(traces) == step._cache_size() == 1


@every_optimizer
def test_injected_schedule(name):
  schedule = optax.linear_schedule(0.1, 0.0, 4)
  flash, _, kwargs, _ = cases.OPTIMIZERS[name]
  inject = optax.inject_hyperparams(flash, hyperparam_dtype=jnp.float32)
  tx = inject(schedule, **kwargs)
  arrays = hyperparams(name) | {"learning_rate": schedule}
  params = small()
  desired = cases.train(flash(**arrays), params)
  actual_params, state = cases.train(tx, params)
  cases.assert_equal((actual_params, state.inner_state), desired, steps=3)
  np.testing.assert_allclose(state.hyperparams["learning_rate"], 0.05)


@some_cases
def test_schedules(name, storage):
  """A schedule's step equals a step with its value at that count."""
  rate = optax.linear_schedule(0.1, 0.0, 4)
  decay = optax.linear_schedule(0.0, 0.4, 4)
  decays = "weight_decay" in cases.OPTIMIZERS[name].kwargs
  extra = {"weight_decay": decay} if decays else {}
  scheduled = cases.make(name, storage, learning_rate=rate, **extra)
  params = small()
  actual = desired = params, scheduled.init(params)
  for count in range(3):
    grads = cases.grads_like(params, count)
    extra = {"weight_decay": decay(count)} if decays else {}
    fixed = cases.make(name, storage, learning_rate=rate(count), **extra)
    actual = cases.step(scheduled, grads, actual[1], actual[0])
    desired = cases.step(fixed, grads, desired[1], desired[0])
  cases.assert_equal(actual, desired, steps=3)
  assert int(optax.tree.get(actual[1], "count")) == 3


@every_optimizer
def test_schedule_free_follows_optax(name):
  kwargs = {"b1": 0.0} if "adam" in name else {}
  storage = cases.STORAGES["32/32"]
  flash = cases.make(name, **kwargs).init  # Default storage, for its state.
  params = float32()
  rate = cases.LEARNING_RATE
  ours = contrib.schedule_free(
    cases.OPTIMIZERS[name].flash(
      rate, **cases.OPTIMIZERS[name].kwargs | kwargs, storage=storage
    ),
    rate,
  )
  plain = contrib.schedule_free(cases.make_plain(name, **kwargs), rate)
  desired, desired_state = cases.train(plain, params, 4, cases.update)
  for function in (cases.step, cases.update):
    actual, state = cases.train(ours, params, 4, function)
    assert_close_trees(actual, desired)
    assert_close_trees(state.z, desired_state.z)
  assert flash(params).count == 0


@some_cases
def test_schedule_free_trains_16_bit_params(name, storage):
  kwargs = {"b1": 0.0} if "adam" in name else {}
  rate = 0.05
  tx = contrib.schedule_free(cases.make(name, storage, rate, **kwargs), rate)
  params = cases.tree(cases.TINY_SHAPES)
  start = sum(float(jnp.sum(jnp.square(p))) for p in params.values())

  @jax.jit
  def train(state, params):
    def body(carry, _):
      state, params = carry
      grads = jax.tree.map(lambda p: 2 * p, params)
      params, state = fo.step(tx, grads, state, params)
      return (state, params), None

    return jax.lax.scan(body, (state, params), None, length=40)[0]

  state, params = train(tx.init(params), params)
  end = contrib.schedule_free_eval_params(state, params)
  assert sum(float(jnp.sum(jnp.square(p))) for p in end.values()) < 0.8 * start


@every_optimizer
def test_lookahead_follows_optax(name):
  params = optax.LookaheadParams.init_synced(float32())
  storage = cases.STORAGES["32/32"]
  kwargs = cases.OPTIMIZERS[name].kwargs
  ours = cases.OPTIMIZERS[name].flash(cases.LEARNING_RATE, **kwargs, storage=storage)
  txs = [
    optax.lookahead(tx, sync_period=2, slow_step_size=0.5)
    for tx in (ours, cases.make_plain(name))
  ]
  results = [(params, tx.init(params)) for tx in txs]
  for i in range(4):
    grads = cases.grads_like(params.fast, i)
    results = [
      cases.update(tx, grads, state, params)
      for tx, (params, state) in zip(txs, results, strict=True)
    ]
  assert_close_trees(results[0][0], results[1][0])
  stepped, _ = cases.step(txs[0], grads, txs[0].init(params), params)
  updated, _ = cases.update(txs[0], grads, txs[0].init(params), params)
  assert_close_trees(stepped, updated)


@some_cases
def test_lookahead_of_16_bit_params(name, storage):
  tx = optax.lookahead(cases.make(name, storage), 2, 0.5)
  params = optax.LookaheadParams.init_synced(cases.tree(cases.TINY_SHAPES))
  state = tx.init(params)
  before = cases.types(state)
  for i in range(2):
    new, state = cases.update(tx, cases.grads_like(params.fast, i), state, params)
    cases.assert_same_types(new, params)
    params = new
  assert cases.types(state) == before
  cases.assert_same(params.fast, params.slow)  # Synchronised.


@some_cases
def test_vmap_equals_a_loop(name, storage):
  tx = cases.make(name, storage)
  batch = [cases.tree(cases.TINY_SHAPES, seed) for seed in range(3)]
  grads = [cases.grads_like(params, seed) for seed, params in enumerate(batch)]
  stack = functools.partial(jax.tree.map, lambda *leaves: jnp.stack(leaves))
  states = jax.vmap(tx.init)(stack(*batch))
  step = jax.jit(jax.vmap(functools.partial(fo.step, tx)))
  params, states = step(stack(*grads), states, stack(*batch))
  for i, (own, own_grads) in enumerate(zip(batch, grads, strict=True)):
    desired = cases.jitted_step(tx, own_grads, tx.init(own), own)
    actual = jax.tree.map(lambda leaf, i=i: leaf[i], (params, states))
    cases.assert_equal(actual, desired, steps=1)
