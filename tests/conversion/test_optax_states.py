"""To plain Optax and back, and between storages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flashoptim_jax as fo
from tests.support import cases
from tests.support.tiers import slow_but

EXACT = fo.Storage(32, 32)
SCHEDULE = optax.linear_schedule(2.0**-7, 2.0**-9, 10)


def no_vectors(params):
  return jax.tree.map(lambda p: p.ndim > 1, params)


def nest(nesting, module, **storage):
  """A transformation with our optimizers in it, or Optax's."""
  adamw, lion, sgd = (
    functools.partial(getattr(module, name), **storage)
    for name in ("adamw", "lion", "sgd")
  )
  masked = {"weight_decay": 0.1, "mask": no_vectors}

  def inject(name, *args, **kwargs):
    static = "mask" if "mask" in kwargs else ()
    wrapped = optax.inject_hyperparams(getattr(module, name), static)
    return wrapped(*args, **kwargs, **storage)

  def partition():
    inner = {
      "a": optax.chain(optax.clip(0.5), adamw(SCHEDULE)),
      "b": inject("lion", 3e-3),
      "c": sgd(SCHEDULE, 0.9, True),
      "d": optax.sgd(1e-2),
    }
    return optax.chain(optax.clip(1.0), optax.partition(inner, LABELS))

  makers = {
    "schedule": lambda: adamw(SCHEDULE, **masked),
    "decay-schedule": lambda: adamw(1e-3, weight_decay=SCHEDULE),
    "chain": lambda: optax.chain(
      optax.clip_by_global_norm(1.0), optax.ema(0.9), lion(SCHEDULE)
    ),
    "masked": lambda: optax.masked(adamw(1e-3), no_vectors),
    "inject": lambda: inject("adamw", SCHEDULE, **masked),
    "inject-sgd": lambda: inject("sgd", 1e-3, momentum=SCHEDULE),
    "partition": partition,
    "multi-steps": lambda: optax.MultiSteps(adamw(1e-3), 2),
    "if-finite": lambda: optax.apply_if_finite(sgd(SCHEDULE, 0.9), 3),
  }
  return makers[nesting]()


NESTINGS = (
  "schedule",
  "decay-schedule",
  "chain",
  "masked",
  "inject",
  "inject-sgd",
  "partition",
  "multi-steps",
  "if-finite",
)
SHAPES = cases.TINY_SHAPES | {
  "a": ((2, 40), jnp.bfloat16),
  "b": ((5,), jnp.bfloat16),
}
LABELS = {"matrix": "a", "norm": "b", "a": "c", "b": "d"}


def assert_same_but_for_sgd_count(actual, desired):
  """Bit for bit; but optax.sgd with a constant rate keeps no count."""
  assert jax.tree.structure(actual) == jax.tree.structure(desired)
  is_state = fo.storage.state.is_flash_state
  for a, b in zip(
    jax.tree.leaves(actual, is_leaf=is_state),
    jax.tree.leaves(desired, is_leaf=is_state),
    strict=True,
  ):
    if is_state(b) and b.format.optimizer in ("sgd", "momentum"):
      assert int(a.count) in (0, int(b.count))
      a = a._replace(count=b.count)  # noqa: PLW2901
    cases.assert_same(a, b)


def to_and_from(tx, params, state):
  masters = fo.to_fp32(params, state)
  optax_state = fo.to_optax(tx, params, state)
  back = fo.from_optax(tx, params, optax_state, params_fp32=masters)
  return optax_state, back


@cases.every_case
def test_there_and_back_is_exact(name, storage):
  tx = cases.make(name, storage)
  params = cases.tree(cases.TINY_SHAPES)
  state = cases.random_state(tx, params)
  optax_state, back = to_and_from(tx, params, state)
  desired = cases.make_plain(name).init(fo.to_fp32(params, state))
  cases.assert_same_types(optax_state, desired)
  assert_same_but_for_sgd_count(back, state)


@pytest.mark.parametrize("nesting", slow_but(NESTINGS, "partition"))
def test_nestings_there_and_back(nesting):
  params = cases.tree(SHAPES)
  tx, plain = nest(nesting, fo), nest(nesting, optax)
  state = cases.random_state(tx, params)
  optax_state, back = to_and_from(tx, params, state)
  desired = plain.init(fo.to_fp32(params, state))
  cases.assert_same_types(optax_state, desired)
  assert_same_but_for_sgd_count(back, state)
  # The state is one to go on with, in Optax.
  grads = fo.cast_params(cases.grads_like(params), jnp.float32)
  jax.eval_shape(plain.update, grads, optax_state, fo.to_fp32(params, state))


@pytest.mark.parametrize("nesting", slow_but(["schedule", "partition"]))
def test_the_state_is_the_one_that_optax_has(nesting):
  """At 32 bits and with the same gradients, Optax's own run ends up there."""
  params = cases.tree(SHAPES)
  tx, plain = nest(nesting, fo, storage=EXACT), nest(nesting, optax)
  masters = fo.cast_params(params, jnp.float32)
  plain_state, state = plain.init(masters), tx.init(params)
  for seed in range(2):
    grads = cases.grads_like(params, seed)
    params, state = cases.step(tx, grads, state, params)
    grads = fo.cast_params(grads, jnp.float32)
    masters, plain_state = cases.update(plain, grads, plain_state, masters)
  optax_state = fo.to_optax(tx, params, state)
  cases.assert_same_types(optax_state, plain_state)
  for a, b in zip(
    jax.tree.leaves(optax_state), jax.tree.leaves(plain_state), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_sgd_with_weight_decay_becomes_a_chain():
  params = cases.tree(cases.TINY_SHAPES)
  tx = fo.sgd(SCHEDULE, 0.9, weight_decay=0.1, mask=no_vectors, storage=cases.QUANTIZED)
  state = cases.random_state(tx, params)
  optax_state, back = to_and_from(tx, params, state)
  chain = optax.chain(
    optax.trace(0.9),
    optax.add_decayed_weights(0.1, no_vectors),
    optax.scale_by_learning_rate(SCHEDULE),
  )
  cases.assert_same_types(optax_state, chain.init(fo.to_fp32(params, state)))
  cases.assert_same(back, state)


def test_injected_hyperparams_lose_their_rounding():
  """In bfloat16, 0.999 is 1, with which optax.adamw would divide by zero."""
  params = {"w": jnp.ones(64, jnp.bfloat16)}
  tx = optax.inject_hyperparams(fo.adamw)(3e-4, b2=0.999)
  state = cases.random_state(tx, params)
  state.hyperparams["b1"] = jnp.bfloat16(0.5)  # Changed by hand: kept.
  optax_state, back = to_and_from(tx, params, state)
  found = {k: v.item() for k, v in optax_state.hyperparams.items()}
  assert found["b2"] == np.float32(0.999)
  assert found["learning_rate"] == np.float32(3e-4)
  assert found["b1"] == 0.5
  cases.assert_same(back, state)


def test_injected_weight_decay_of_sgd_has_no_counterpart():
  params = cases.tree(cases.TINY_SHAPES)
  tx = optax.inject_hyperparams(fo.sgd)(0.1, weight_decay=0.1)
  with pytest.raises(ValueError, match=r"weight_decay.*0.1.*; expected 0"):
    fo.to_optax(tx, params, tx.init(params))


def test_counts_and_moments_are_separate_arrays():
  """A state can be donated only if no array is in it twice."""
  tx = fo.adamw(SCHEDULE, storage=cases.QUANTIZED)
  params = cases.tree(cases.TINY_SHAPES)
  state = fo.to_optax(tx, params, tx.init(params))
  pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
  assert len(set(pointers)) == len(pointers)


def test_from_optax_without_masters():
  """Corrections are zero, and float32 parameters have none."""
  masters = fo.cast_params(cases.tree(), jnp.float32)
  tx = fo.adamw(1e-3, storage=cases.QUANTIZED)
  plain_state = optax.adamw(1e-3).init(masters)
  params = fo.cast_params(masters, jnp.bfloat16, keep="norm")
  state = fo.from_optax(tx, params, plain_state)
  cases.assert_same(state, tx.init(params))
  state = fo.from_optax(tx, masters, plain_state)
  cases.assert_same(state, tx.init(masters))


@cases.every_twin
@pytest.mark.parametrize(
  "make",
  [
    lambda storage: fo.adamw(1e-3, storage=storage),
    lambda storage: fo.compress(optax.adamw(1e-3), storage),
  ],
  ids=["adamw", "compress"],
)
def test_leaves_of_one_name(make, twin):
  """Each keeps its own master weight."""
  leaves = cases.tree(cases.SMALL_SHAPES, dtype=jnp.float32).values()
  tx, wide = make(fo.Storage()), make(EXACT)
  params, state = fo.from_fp32(tx, twin(*leaves))
  masters = fo.to_fp32(params, state)
  _, back = to_and_from(tx, params, state)
  cases.assert_same(back, state)
  moved = fo.convert(tx, wide, params, state)
  cases.assert_same(fo.to_fp32(*moved), masters)
  cases.assert_same(fo.convert(wide, tx, *moved), (params, state))
  # A tree that differs in one of the two is still refused.
  x, y = jax.tree.leaves(params)
  other = twin(x, y[:-1])
  with pytest.raises(ValueError, match=r"\(33,\)"):
    fo.to_optax(tx, other, state)


def test_from_optax_errors():
  params = cases.tree(cases.TINY_SHAPES)
  masters = fo.cast_params(params, jnp.float32)
  tx = fo.adamw(SCHEDULE, storage=cases.QUANTIZED)
  good = optax.adamw(SCHEDULE).init(masters)
  bad_shape = good[0]._replace(mu={**good[0].mu, "norm": jnp.zeros(4)})
  for bad, message in [
    (optax.adam(SCHEDULE).init(masters), "2/count.*expected"),
    (optax.lion(SCHEDULE).init(masters), r"0/nu/matrix.*found nothing"),
    ((bad_shape, *good[1:]), r"0/mu/norm.*\(4,\).*expected.*\(5,\)"),
    (
      (good[0], good[1], good[2]._replace(count=jnp.int32(4))),
      r"counts.*\[0, 4\]",
    ),
    (tx.init(params), "does not match"),
  ]:
    with pytest.raises(ValueError, match=message):
      fo.from_optax(tx, params, bad)
  with pytest.raises(ValueError, match="No flash optimizer state"):
    fo.from_optax(optax.adamw(1e-3), params, good)
  for bad, message in [
    ({"norm": masters["norm"]}, r"'matrix' in params_fp32.* none; .*\(2, 40\)"),
    ({**masters, "matrix": jnp.ones(40)}, r"'matrix' .*\(40,\); .*\(2, 40\)"),
  ]:
    with pytest.raises(ValueError, match=message):
      fo.from_optax(tx, params, good, params_fp32=bad)


def test_to_optax_errors():
  params = cases.tree(cases.TINY_SHAPES)
  tx = fo.adamw(1e-3, storage=cases.QUANTIZED)
  with pytest.raises(ValueError, match=r"lion.*; tx is flashoptim_jax.adam "):
    fo.to_optax(tx, params, fo.lion(1e-3, storage=cases.QUANTIZED).init(params))
  with pytest.raises(ValueError, match="No flash optimizer state"):
    fo.to_optax(tx, params, optax.adamw(1e-3).init(params))
  other = {**params, "more": params["norm"]}
  with pytest.raises(ValueError, match=r"mu/more.*found nothing"):
    fo.to_optax(tx, other, tx.init(params))


def regression():
  """Data, float32 parameters, and a loss of parameters in any dtype."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(512, 16))
  y = np.sin(x @ rng.normal(size=(16, 1))) + 0.3 * rng.normal(size=(512, 1))
  x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)
  params = {
    "first": jnp.asarray(rng.normal(size=(16, 32)) / 4, jnp.float32),
    "second": jnp.asarray(rng.normal(size=(32, 1)) / 6, jnp.float32),
  }

  def loss(params):
    params = fo.cast_params(params, jnp.bfloat16)
    hidden = jnp.tanh(x @ params["first"].astype(jnp.float32))
    return jnp.mean((hidden @ params["second"].astype(jnp.float32) - y) ** 2)

  return params, loss


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "momentum", "lion"])
def test_training_goes_on_in_either(name):
  """100 steps of ours, 100 of Optax's, 100 of ours: the loss of 300 of ours."""
  masters, loss = regression()
  rate = {"adamw": 1e-2, "momentum": 3e-2, "lion": 1e-3}[name]
  schedule = optax.cosine_decay_schedule(rate, 300)
  tx = cases.make(name, learning_rate=schedule)
  plain = cases.make_plain(name, learning_rate=schedule)

  def hundred(tx, params, state):
    return cases.descend(tx, loss, params, state, steps=100)

  def run(tx, params, state):
    losses = []
    for _ in range(3):
      params, state, part = hundred(tx, params, state)
      losses.append(part)
    return np.asarray(losses)

  start = fo.from_fp32(tx, masters)
  straight = run(tx, *start)
  noise = np.abs(run(plain, masters, plain.init(masters)) - straight)

  params, state, first = hundred(tx, *start)
  masters, optax_state, second = hundred(
    plain, fo.to_fp32(params, state), fo.to_optax(tx, params, state)
  )
  params, _ = fo.from_fp32(tx, masters)
  state = fo.from_optax(tx, params, optax_state, params_fp32=masters)
  params, state, third = hundred(tx, params, state)
  difference = np.abs(np.asarray([first, second, third]) - straight)
  # No further from our own run than Optax's own run is.
  assert difference.max() <= noise.max()
  assert straight[2][-1] < 0.7 * straight[0][0]


STORAGES = {
  **cases.STORAGES,
  "32/8": fo.Storage(master_bits=32, min_quantized_size=0),
  "24/32": fo.Storage(moment_bits=32),
}


@pytest.mark.parametrize(
  ("source", "target"),
  slow_but(
    [
      ("root", "root"),
      ("root", "paper"),
      ("root", "32/32"),
      ("root", "none/8"),
      ("paper", "root"),
      ("none/8", "24/32"),
      ("32/32", "root"),
      ("32/8", "paper"),
      ("24/32", "none/8"),
      ("root", "16/8"),
      ("16/8", "32/32"),
      ("16/8", "none/8"),
    ],
    ("root", "paper"),
    ("24/32", "none/8"),
    ("root", "16/8"),
  ),
)
def test_convert(source, target):
  """Masters and moments are kept as well as the target can."""
  old, new = STORAGES[source], STORAGES[target]
  tx_from, tx_to = (
    optax.chain(optax.clip(1.0), fo.adamw(SCHEDULE, storage=storage))
    for storage in (old, new)
  )
  params = cases.tree(cases.TINY_SHAPES)
  before = params, cases.random_state(tx_from, params)
  after = fo.convert(tx_from, tx_to, *before)
  cases.assert_same_types(after, (params, tx_to.init(params)))
  if old == new:
    cases.assert_same(after, before)
  same_bits = new.master_bits == old.master_bits
  widths = {16: 2.0**-8, 24: 2.0**-16, 32: 0, None: 2.0**-8}
  rtol = 0 if same_bits else widths[new.master_bits]
  for a, b in zip(
    jax.tree.leaves(fo.to_fp32(*after)),
    jax.tree.leaves(fo.to_fp32(*before)),
    strict=True,
  ):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=0)
  moments, old_moments = fo.moments(after[1]), fo.moments(before[1])
  same_codes = old.moment_bits == 8 and new.companding == old.companding
  if new.moment_bits == 32 or same_codes:
    cases.assert_same(moments, old_moments)
    return
  for name, levels in (("mu", 127), ("nu", 255)):
    for path, moment in old_moments[name].items():
      # In "paper", second moments are linear in their square root.
      root = np.sqrt(np.abs(moment))
      error = np.abs(np.sqrt(np.abs(moments[name][path])) - root)
      assert (error <= 12 / levels**0.5 * root.max()).all()


@pytest.mark.parametrize("target", slow_but(["32/32", "32/8", "24/32"]))
@pytest.mark.parametrize("dtype", slow_but([jnp.bfloat16, jnp.float16]))
def test_convert_to_more_bits_and_back_is_exact(target, dtype):
  tx, wide = (
    fo.adamw(1e-3, storage=storage) for storage in (cases.QUANTIZED, STORAGES[target])
  )
  params = cases.tree(cases.TINY_SHAPES, dtype=dtype)
  before = params, cases.random_state(tx, params)
  if dtype == jnp.float16:  # Its corrections stop at -127.
    correction = jax.tree.map(lambda c: jnp.maximum(c, -127), before[1].correction)
    before = params, before[1]._replace(correction=correction)
  cases.assert_same(fo.convert(wide, tx, *fo.convert(tx, wide, *before)), before)


def test_convert_finds_every_state():
  tx_from, tx_to = nest("partition", fo), nest("partition", fo, storage=EXACT)
  params = cases.tree(SHAPES)
  before = params, cases.random_state(tx_from, params)
  params, state = fo.convert(tx_from, tx_to, *before)
  cases.assert_same_types(state, tx_to.init(params))
  cases.assert_same(fo.to_fp32(params, state), fo.to_fp32(*before))
  cases.assert_same(fo.moments(state), fo.moments(before[1]))


def test_convert_errors():
  params = cases.tree(cases.TINY_SHAPES)
  tx = fo.adamw(1e-3, storage=cases.QUANTIZED)
  state = tx.init(params)
  for tx_to, message in [
    (fo.lion(1e-3), "'<root>' is the state of flashoptim_jax.adam of tx_from"),
    (optax.chain(fo.adamw(1e-3)), "differ in more than storage"),
    (optax.adamw(1e-3), "differ in more than storage"),
  ]:
    with pytest.raises(ValueError, match=message):
      fo.convert(tx, tx_to, params, state)
  with pytest.raises(ValueError, match=r"tx_from is flashoptim_jax.lion"):
    fo.convert(fo.lion(1e-3, storage=cases.QUANTIZED), tx, params, state)
