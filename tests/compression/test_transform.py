"""``compress``: the storage around any Optax transformation."""

import dataclasses
import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType
from optax import contrib

import flashoptim_jax as fo
from benchmarks.support import optax_optimizers
from benchmarks.support.optax_optimizers import OPTIMIZERS
from tests.checks import compress_lossless
from tests.support import cases
from tests.support.meshes import (
  COLLECTIVE,
  CUT_SHAPES,
  CUT_SPECS,
  KINDS,
  SHAPES,
  SPECS,
  make_mesh,
  shardings_on,
  with_manual_axes,
)
from tests.support.tiers import slow_but

LOSSLESS = fo.Storage(master_bits=32, moment_bits=32)


def test_every_export_is_listed():
  assert optax_optimizers.exported() == {name.partition(",")[0] for name in OPTIMIZERS}


# Storage that loses nothing.


# The others: tests/checks/compress_lossless.py.
@pytest.mark.parametrize("name", slow_but(["dpsgd", "momo", "muon"], "momo"))
def test_lossless_storage_is_the_optimizer_itself(name):
  actual, desired, state, plain_state = compress_lossless.follow(name)
  cases.assert_same_types(state.inner, plain_state)
  for key, leaf in desired.items():
    assert np.isfinite(leaf).all()
    cases.assert_within_units(actual[key], leaf, 50, jnp.float32, None)


@pytest.mark.slow
def test_lossless_state_starts_from_the_masters():
  masters = cases.tree(cases.TINY_SHAPES, dtype=jnp.float32)
  for tx, field in ((contrib.prodigy(), "params0"), (contrib.dog(), "init_params")):
    _, state = fo.from_fp32(fo.compress(tx, cases.QUANTIZED), masters)
    cases.assert_same(optax.tree.get(state, field), masters)


# The storage of flash optimizers.


@pytest.mark.parametrize(
  ("plain", "flash"),
  slow_but(
    [
      (
        optax.adamw(1e-2, weight_decay=0.1),
        fo.adamw(
          1e-2,
          weight_decay=0.1,
          implementation="xla",
          storage=cases.QUANTIZED,
        ),
      ),
      (
        optax.lion(1e-3),
        fo.lion(1e-3, implementation="xla", storage=cases.QUANTIZED),
      ),
    ]
  ),
  ids=["adamw", "lion"],
)
@pytest.mark.parametrize("function", slow_but([cases.jitted_step, cases.jitted_update]))
def test_agrees_with_the_flash_optimizer(plain, flash, function):
  params = cases.tree(cases.SMALL_SHAPES)
  compressed = cases.train(fo.compress(plain, cases.QUANTIZED), params, 3, function)
  desired = cases.train(flash, params, 3, function)
  masters, others = fo.to_fp32(*compressed), fo.to_fp32(*desired)
  cases.assert_masters_close(masters, others, params, 24, 3)
  actual, wanted = fo.moments(compressed[1]), fo.moments(desired[1])
  cases.assert_same(actual, wanted)


def test_memory_report():
  params = cases.tree({"w": ((64, 64), jnp.bfloat16)})
  report = fo.memory_report(fo.compress(optax.adamw(1e-3), cases.QUANTIZED), params)
  desired = fo.memory_report(fo.adamw(1e-3, storage=cases.QUANTIZED), params)
  # Its count beside Adam's own.
  assert report == dataclasses.replace(desired, other=desired.other + 4)
  report = fo.memory_report(fo.compress(contrib.prodigy(), cases.QUANTIZED), params)
  kept = 2 * 4 * 64 * 64  # grad_sum and params0
  assert (report.moments, report.other - kept) == (2 * 64 * 64, 16)


WRAPPED = {
  "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
  "partition": lambda: optax.partition(
    {True: optax.adam(1e-2), False: optax.sgd(0.1, 0.9)},
    lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
  ),
  "masked": lambda: optax.masked(
    optax.adam(1e-2), {key: key != "bias" for key in cases.SMALL_SHAPES}
  ),
  "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(1e-2),
  "MultiSteps": lambda: optax.MultiSteps(optax.adam(1e-2), 2),
  "mu_dtype": lambda: optax.adam(1e-2, mu_dtype=jnp.bfloat16),
  "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(1e-2), 3),
}


@pytest.mark.parametrize("name", slow_but(WRAPPED))
def test_inside_of_compress(name):
  """Every moment under a wrapper is found, and the types of a state are stable."""
  tx = fo.compress(WRAPPED[name](), cases.QUANTIZED)
  params = cases.tree(cases.SMALL_SHAPES)
  state = tx.init(params)
  cases.assert_same(state, jax.jit(tx.init)(params))
  optax.tree.map_params(tx, lambda leaf: leaf, state)
  grads = cases.grads_like(params)
  for function in (tx.update, functools.partial(fo.step, tx)):
    results, new_state = jax.eval_shape(function, grads, state, params)
    assert cases.types(new_state) == cases.types(state)
    cases.assert_same_types(results, params)
  codes = {
    leaf.dtype.name
    for tree in fo.moments(state).values()
    for leaf in jax.tree.leaves(tree)
  }
  assert codes == {"float32"}
  kept = [
    leaf
    for leaf in jax.tree.leaves(state)
    if leaf.dtype in (jnp.float32, jnp.bfloat16) and leaf.shape == (4, 64)
  ]
  assert len(kept) == (1 if name == "MultiSteps" else 0)  # acc_grads


@pytest.mark.slow
@pytest.mark.parametrize(
  "wrap",
  [
    lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    lambda tx: optax.partition(
      {True: tx, False: fo.adamw(1e-2, storage=cases.QUANTIZED)},
      lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
    ),
    lambda tx: optax.masked(tx, {"matrix": True, "bias": False}),
    lambda tx: optax.MultiSteps(tx, 1),
  ],
  ids=["chain", "partition", "masked", "MultiSteps"],
)
def test_inside_of_wrappers(wrap):
  """``step`` and ``update`` land on the same parameters."""
  tx = wrap(fo.compress(optax.adamw(1e-2), cases.QUANTIZED))
  params, state = fo.from_fp32(tx, cases.tree(cases.SMALL_SHAPES, dtype=jnp.float32))
  grads = cases.grads_like(params)
  stepped = cases.step(tx, grads, state, params)
  updated = cases.update(tx, grads, state, params)
  cases.assert_same(stepped[0], updated[0])


NUMBERS = {"matrix": contrib.MuonDimensionNumbers(), "bias": None}


def needs_a_dict(params):
  """Labels by name, as a function of real parameters alone."""
  return {name: name for name in params.keys()}  # noqa: SIM118


def raveled(tx):
  """Like ``optax.flatten``, with arrays of no elements for a tree of no leaves."""

  def ravel(tree):
    return jax.flatten_util.ravel_pytree(tree)[0]

  def update(grads, state, params=None):
    _, unravel = jax.flatten_util.ravel_pytree(grads)
    updates, state = tx.update(ravel(grads), state, ravel(params))
    return unravel(updates), state

  return optax.GradientTransformation(lambda params: tx.init(ravel(params)), update)


@pytest.mark.parametrize(
  ("tx", "same"),
  slow_but(
    [
      (contrib.muon(1e-2, muon_weight_dimension_numbers=NUMBERS), contrib.muon(1e-2)),
      (
        contrib.muon(1e-2, muon_weight_dimension_numbers=lambda _: NUMBERS),
        contrib.muon(1e-2),
      ),
      (
        optax.partition(
          {"matrix": optax.adam(1e-2), "bias": optax.sgd(1e-2, 0.9)}, needs_a_dict
        ),
        optax.partition(
          {"matrix": optax.adam(1e-2), "bias": optax.sgd(1e-2, 0.9)},
          {"matrix": "matrix", "bias": "bias"},
        ),
      ),
      (
        optax.chain(optax.clip(1.0), optax.flatten(optax.adamw(1e-2))),
        optax.chain(optax.clip(1.0), optax.adamw(1e-2)),
      ),
      (raveled(optax.adamw(1e-2)), optax.adamw(1e-2)),
    ]
  ),
  ids=["muon", "muon, function", "partition", "flatten", "ravel"],
)
@pytest.mark.filterwarnings("error")
def test_init_that_needs_real_parameters(tx, same):
  """What the placeholder can't show is seen with the parameters: as much, by name."""
  params = cases.tree(cases.SMALL_SHAPES)
  compressed = fo.compress(tx)
  state = jax.jit(compressed.init)(params)
  expected = fo.compress(same).init(params)
  assert state.format == expected.format
  moments = [fo.memory_report(fo.compress(each), params).moments for each in (tx, same)]
  assert moments[0] == moments[1]
  grads = cases.grads_like(params)
  new, new_state = cases.jitted_step(compressed, grads, state, params)
  assert cases.types(new_state) == cases.types(state)
  assert all((new[name] != params[name]).any() for name in params)
  # At storage that loses nothing, it is the transformation itself.
  lossless = fo.compress(tx, LOSSLESS)
  masters = fo.cast_params(params, jnp.float32)
  desired, _ = cases.jitted_update(
    tx, fo.cast_params(grads, jnp.float32), tx.init(masters), masters
  )
  state = lossless.init(params)
  actual = fo.to_fp32(*cases.jitted_step(lossless, grads, state, params))
  for name, leaf in desired.items():
    cases.assert_within_units(actual[name], leaf, 2, jnp.float32, None)


def test_errors():
  params = cases.tree(cases.SMALL_SHAPES)
  with pytest.raises(ValueError, match=r"codecs\['nu'\] is 'second'; expected one"):
    fo.compress(optax.adam(1e-2), codecs={"nu": "second"})
  with pytest.raises(ValueError, match="'typo', which is not in the state"):
    fo.compress(optax.adam(1e-2), codecs={"typo": "float32"}).init(params)
  with pytest.raises(ValueError, match="without flash optimizers"):
    fo.compress(fo.adam(1e-2, storage=cases.QUANTIZED), cases.QUANTIZED).init(params)
  named = optax.named_chain(
    ("a", optax.chain(optax.scale_by_adam())), ("a.0", optax.scale_by_adam())
  )
  with pytest.raises(ValueError, match=r"path 'a\.0\.mu'.*\['a\.0'\]\.mu"):
    fo.compress(named).init(params)
  tx = fo.compress(optax.adam(1e-2), cases.QUANTIZED)
  state, grads = tx.init(params), cases.grads_like(params)
  with pytest.raises(ValueError, match="is a tuple; expected a CompressedState"):
    tx.update(grads, optax.adam(1e-2).init(params), params)
  with pytest.raises(ValueError, match=r"made by .*moment_bits=8.* is .*bits=32"):
    fo.compress(optax.adam(1e-2), LOSSLESS).update(grads, state, params)
  other = cases.tree({**cases.SMALL_SHAPES, "bias": ((34,), jnp.bfloat16)})
  with pytest.raises(ValueError, match=r"bias'.*\(33,\).*\(34,\)"):
    tx.update(cases.grads_like(other), state, other)
  with pytest.raises(ValueError, match="gradient of 'bias' has shape"):
    tx.update({**grads, "bias": jnp.ones(32)}, state, params)
  with pytest.raises(ValueError, match="'n' has dtype int32"):
    tx.init({"n": jnp.arange(3)})
  with pytest.raises(ValueError, match="must be the last"):
    chained = optax.chain(tx, optax.scale(0.5))
    fo.step(chained, grads, chained.init(params), params)


@pytest.mark.parametrize(
  "shape",
  [(0,), *(pytest.param(x, marks=pytest.mark.slow) for x in ((), (3, 0), (1,)))],
  ids=str,
)
def test_odd_leaves(shape):
  tx = fo.compress(optax.adamw(1e-2), cases.QUANTIZED)
  params = {"x": jnp.ones(shape, jnp.bfloat16), "none": {}}
  params, state = fo.step(tx, params, tx.init(params), params)
  assert params["x"].shape == fo.moments(state)["mu"]["x"].shape == shape


# Sharded.


def sharded_step(tx, mesh, params, grads, state):
  """The compiled step on shards, and its result."""
  shardings = shardings_on(mesh)
  placed = fo.state_shardings(tx, params, shardings)
  args = jax.device_put((grads, state, params), (shardings, placed, shardings))
  compiled = jax.jit(functools.partial(fo.step, tx)).lower(*args).compile()
  return jax.device_get(compiled(*args)), compiled.as_text()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_sharded(kind):
  tx = fo.compress(optax.adamw(1e-2), cases.QUANTIZED)
  params = cases.tree(SHAPES)
  grads, state = cases.grads_like(params), tx.init(params)
  mesh = make_mesh("4x2", KINDS[kind])
  (new, new_state), text = sharded_step(tx, mesh, params, grads, state)
  assert not COLLECTIVE.search(text)
  desired, desired_state = cases.jitted_step(tx, grads, state, params)
  cases.assert_same(new_state.inner, jax.device_get(desired_state.inner))
  cases.assert_same(new_state.scales, jax.device_get(desired_state.scales))
  cases.assert_masters_close(
    fo.to_fp32(new, new_state),
    fo.to_fp32(desired, desired_state),
    params,
    24,
    1,
  )


@pytest.mark.parametrize(
  ("tx", "kind"),
  slow_but(
    [
      (optax.lion(1e-2), "manual"),
      (optax.sgd(1e-2, momentum=0.9), "manual"),
      (optax.sgd(1e-2, momentum=0.9), "explicit"),
    ]
  ),
  ids=["lion, manual", "momentum, manual", "momentum, explicit"],
)
def test_sharded_one_moment(tx, kind):
  tx = fo.compress(tx, cases.QUANTIZED)
  names = ["tensor", "mixed"]
  mesh = make_mesh("4x2", KINDS.get(kind, AxisType.Auto))
  shardings = shardings_on(mesh, {name: SPECS[name] for name in names})
  params = cases.tree({name: SHAPES[name] for name in names})
  grads, state = cases.grads_like(params), tx.init(params)
  placed = fo.state_shardings(tx, params, shardings)
  step = functools.partial(fo.step, tx)
  if kind == "manual":
    step = with_manual_axes(step, mesh, shardings, placed)
  args = jax.device_put((grads, state, params), (shardings, placed, shardings))
  compiled = jax.jit(step).lower(*args).compile()
  assert not COLLECTIVE.search(compiled.as_text())
  new, new_state = jax.device_get(compiled(*args))
  desired, desired_state = jax.device_get(cases.step(tx, grads, state, params))
  cases.assert_same(new_state.inner, desired_state.inner)
  cases.assert_same(new_state.scales, desired_state.scales)
  cases.assert_masters_close(
    fo.to_fp32(new, new_state), fo.to_fp32(desired, desired_state), params, 24, 1
  )


@pytest.mark.slow
def test_explicit_axes_that_cut_groups():
  tx = fo.compress(optax.sgd(1e-2, momentum=0.9), cases.QUANTIZED)
  mesh = make_mesh("4x2", AxisType.Explicit)
  names = ["sixteen", "eight"]
  shardings = shardings_on(mesh, {name: CUT_SPECS[name] for name in names})
  params = cases.tree({name: CUT_SHAPES[name] for name in names})
  grads, state = cases.grads_like(params), jax.jit(tx.init)(params)
  with pytest.warns(UserWarning, match="cut groups"):
    placed = fo.state_shardings(tx, params, shardings)
  args = jax.device_put((grads, state, params), (shardings, placed, shardings))
  new, new_state = jax.jit(functools.partial(fo.step, tx))(*args)
  for x, place in zip(*map(jax.tree.leaves, (new_state, placed)), strict=True):
    assert x.sharding.is_equivalent_to(place, x.ndim)
  desired, desired_state = cases.jitted_step(tx, grads, state, params)
  moments = jax.jit(fo.moments)
  for actual, expected in (
    ((new, new_state), (desired, desired_state)),
    (moments(new_state), moments(desired_state)),
  ):
    cases.assert_same(*jax.device_get((actual, expected)))


@pytest.mark.slow
def test_no_more_collectives_than_optax():
  """A trust ratio has to communicate; compression adds nothing to that."""
  params = cases.tree(SHAPES)
  mesh = make_mesh("4x2")
  found = []
  for tx, own in (
    (fo.compress(optax.lamb(1e-2), cases.QUANTIZED), params),
    (optax.lamb(1e-2), fo.cast_params(params, jnp.float32)),
  ):
    grads = cases.grads_like(own)
    _, text = sharded_step(tx, mesh, own, grads, tx.init(own))
    found.append(len(COLLECTIVE.findall(text)))
  assert 0 < found[0] <= found[1]


# Checkpoints and moves.


def test_checkpoint(tmp_path):
  tx = fo.compress(contrib.muon(1e-2), cases.QUANTIZED)
  params = cases.tree(cases.SMALL_SHAPES)
  params, state = cases.train(tx, params, 2)
  with ocp.CheckpointManager(tmp_path) as manager:
    manager.save(2, args=fo.checkpoint.Save((params, state)))
    manager.wait_until_finished()
    abstract = jax.eval_shape(lambda: (params, state))
    restored = manager.restore(2, args=fo.checkpoint.Restore(abstract))
    cases.assert_same(restored, (params, state))
    other = fo.compress(contrib.muon(1e-2), LOSSLESS)
    abstract = jax.eval_shape(lambda: (params, other.init(params)))
    with pytest.raises(ValueError, match="moment_bits=8"):
      manager.restore(2, args=fo.checkpoint.Restore(abstract))


def test_moves():
  tx, plain = fo.compress(optax.adamw(1e-2), cases.QUANTIZED), optax.adamw(1e-2)
  masters = cases.tree(cases.SMALL_SHAPES, dtype=jnp.float32)
  params, state = cases.train(tx, *fo.from_fp32(tx, masters)[:1], 2)
  left = fo.to_optax(tx, params, state)
  assert jax.tree.structure(left) == jax.tree.structure(plain.init(masters))
  cases.assert_same(left[0].mu, fo.moments(state)["mu"])
  arrived = fo.from_optax(tx, params, left, params_fp32=fo.to_fp32(params, state))
  cases.assert_same(arrived, state)
  wide = fo.compress(optax.adamw(1e-2), LOSSLESS)
  wider = fo.convert(tx, wide, params, state)
  cases.assert_same(fo.moments(wider[1]), fo.moments(state))
  cases.assert_same(fo.convert(wide, tx, *wider), (params, state))


@pytest.mark.slow
def test_gradient_release():
  tx = fo.compress(optax.adamw(1e-2), cases.QUANTIZED)
  params = cases.tree(cases.SMALL_SHAPES)
  state = tx.init(params)

  def loss(params):
    return sum(jnp.sum(leaf.astype(jnp.float32) ** 2) for leaf in params.values())

  def released(live):
    return sum(
      fo.released_call(lambda p: jnp.sum(p.astype(jnp.float32) ** 2), live[key])
      for key in live
    )

  release = jax.jit(fo.value_and_release(released, tx))
  _, params_released, state_released = release(params, state)
  grads = jax.jit(jax.grad(loss))(params)
  desired = cases.jitted_step(tx, grads, state, params)
  cases.assert_same((params_released, state_released), desired)


# Convergence, a sample: benchmarks/quality/compress_convergence.py has every optimizer.


@pytest.mark.slow
def test_muon_converges_like_plain_muon():
  rng = np.random.default_rng(0)
  inputs = jnp.asarray(rng.normal(size=(256, 64)), jnp.float32)
  targets = inputs @ jnp.asarray(rng.normal(size=(64, 32)), jnp.float32)

  def loss(params):
    return jnp.mean((inputs @ params["w"].astype(jnp.float32) - targets) ** 2)

  def run(tx, params, state):
    return cases.descend(tx, loss, params, state, steps=300)[2]

  masters = {"w": jnp.zeros((64, 32))}
  plain = contrib.muon(optax.cosine_decay_schedule(0.2, 300))
  compressed = fo.compress(plain, cases.QUANTIZED)
  desired = run(plain, masters, plain.init(masters))
  actual = run(compressed, *fo.from_fp32(compressed, masters))
  assert desired[-1] < 1e-2 * desired[0]
  assert actual[-1] < 1e-2 * actual[0]
