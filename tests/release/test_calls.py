"""Gradient release against the ordinary step."""

import functools
import warnings

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import assert_equal, assert_same, jitted_step, make, some_cases
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flashoptim_jax as fo

VOCABULARY, DIM, LAYERS, BATCH, SEQ = 40, 32, 3, 2, 8
STEPS = 20


def normal(*shape, seed=0):
  key = jax.random.key(sum(shape) * 31 + seed)
  return jax.random.normal(key, shape) * shape[-2] ** -0.5


def wide(params):
  """Computing in float32 keeps the two programs' gradients the same."""
  return jax.tree.map(lambda p: p.astype(jnp.float32), params)


def plain_call(fn, part, *args, index=None):
  """What ``released_call`` computes, and when, for ``jax.grad``.

  Two programs' gradients are the same to the last bit only if they compute them
  in the same way: again from the arguments, each rounded to its dtype.
  """
  for i in index if isinstance(index, tuple) else (index,):
    if i is not None:
      part = jax.tree.map(lambda p, i=i: p[i], part)
  floats, others = partitioned(args)
  return recomputed(fn, part, floats, others)


def partitioned(args):
  """Arguments that can be differentiated, and the rest, with None in between."""

  def keep(wanted):
    return jax.tree.map(
        lambda x: x if jnp.issubdtype(x.dtype, jnp.floating) == wanted else None, args
    )

  return keep(True), keep(False)


def merged(floats, others):
  return jax.tree.map(
      lambda x, y: y if x is None else x, floats, others, is_leaf=lambda x: x is None
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def recomputed(fn, part, floats, others):
  return fn(part, *merged(floats, others))


def recomputed_backward(fn, residuals, cotangents):
  part, floats, others = residuals
  floats, cotangents = jax.lax.optimization_barrier((floats, cotangents))
  _, vjp = jax.vjp(lambda w, x: fn(w, *merged(x, others)), part, floats)
  grads, floats = vjp(cotangents)
  return jax.lax.optimization_barrier(grads), floats, None


recomputed.defvjp(
    lambda fn, *operands: (recomputed(fn, *operands), operands), recomputed_backward
)


def embed(weight, tokens):
  return wide(weight)[tokens]


def norm(x, weight):
  return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * weight


def block(w, x):
  w = wide(w)
  q, k, v = jnp.split(norm(x, w["norm"]) @ w["qkv"], 3, -1)
  mask = jnp.tril(jnp.ones((x.shape[1],) * 2, bool))
  scores = jnp.where(mask, q @ k.swapaxes(1, 2) * DIM**-0.5, -1e9)
  x = x + jax.nn.softmax(scores) @ v
  return x + jax.nn.gelu(x @ w["mlp"])


def cross_entropy(w, x, targets):
  w = wide(w)
  logits = norm(x, w["norm"]) @ w["head"]
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  return losses.mean()


def over_layers(call, live, x, fn=block):
  def body(x, i):
    return call(fn, live, x, index=i), None

  return jax.lax.scan(body, x, jnp.arange(LAYERS))[0]


def transformer(call, live, tokens):
  x = call(embed, live["embed"], tokens[:, :-1])
  x = over_layers(call, live["layers"], x)
  top = {"norm": live["norm"], "head": live["head"]}
  return call(cross_entropy, top, x, tokens[:, 1:])


def transformer_params():
  layers = {
      "norm": jnp.ones((LAYERS, DIM)),
      "qkv": normal(LAYERS, DIM, 3 * DIM),
      "mlp": normal(LAYERS, DIM, DIM),
  }
  return {
      "embed": normal(VOCABULARY, DIM),
      "layers": layers,
      "norm": jnp.ones(DIM),
      "head": normal(DIM, VOCABULARY),
  }


def tied(call, live, tokens):
  def head(w, x, targets):
    return cross_entropy({"norm": jnp.ones(DIM), "head": wide(w).T}, x, targets)

  x = call(embed, live["embed"], tokens[:, :-1])
  x = over_layers(call, live["layers"], x, lambda w, x: jnp.tanh(x @ wide(w)))
  return call(head, live["embed"], x, tokens[:, 1:])


def tied_params():
  return {"embed": normal(VOCABULARY, DIM), "layers": normal(LAYERS, DIM, DIM)}


def unrolled_mlp(call, live, tokens):
  x = jax.nn.one_hot(tokens[:, 0], DIM)
  for w in live:
    x = call(lambda w, x: jnp.tanh(x @ wide(w["w"]) + wide(w["b"])), w, x)
  return jnp.mean(x**2)


def mlp_params():
  return [{"w": normal(DIM, DIM, seed=i), "b": jnp.ones(DIM)} for i in range(3)]


def unrolled_stack(call, live, tokens):
  """One stack, its layers called in a Python loop, and in halves."""
  x = jax.nn.one_hot(tokens[:, 0], DIM)
  for i in range(LAYERS):
    x = call(lambda w, x: jnp.tanh(x @ wide(w)), live, x, index=i)
  return jnp.mean(x**2)


def nested(call, live, tokens):
  """Blocks of layers: two scans, and a stack along two axes."""
  x = jax.nn.one_hot(tokens, DIM)

  def layer(w, x):
    return x + jnp.tanh(x @ wide(w))

  def outer(x, i):
    def inner(x, j):
      x = call(layer, live["flat"], x, index=i * 2 + j)
      return call(layer, live["square"], x, index=(i, j)), None

    return jax.lax.scan(inner, x, jnp.arange(2))[0], None

  x, _ = jax.lax.scan(outer, x, jnp.arange(2))
  return jnp.mean(x**2)


def nested_params():
  return {"flat": normal(4, DIM, DIM), "square": normal(2, 2, DIM, DIM)}


def experts(call, live, tokens):
  """Mixture of experts: leaves of rank 3, in a stack of rank 4."""

  def layer(w, x, key):
    w = wide(w)
    gates = jax.nn.softmax(x @ w["router"] + jax.random.normal(key, (2,)))
    h = jnp.einsum("bsd,edf->bsef", x, w["up"])
    y = jnp.einsum("bsef,efd->bsed", jax.nn.gelu(h), w["down"])
    return x + jnp.einsum("bse,bsed->bsd", gates, y), jnp.sum(gates, -1)

  def body(carry, i):
    x, key = carry
    key, used = jax.random.split(key)
    x, sums = call(layer, live, x, used, index=i)
    return (x, key), sums

  start = jax.nn.one_hot(tokens, DIM), jax.random.key(0)
  (x, _), sums = jax.lax.scan(body, start, jnp.arange(2))
  return jnp.mean(x**2) + jnp.mean(sums)


def experts_params():
  return {
      "router": normal(2, DIM, 2),
      "up": normal(2, 2, DIM, 40),
      "down": normal(2, 2, 40, DIM),
  }


def ungrouped(call, live, tokens):
  """Stacks whose groups reach across layers, and loops over a whole leaf."""
  x = jax.nn.one_hot(tokens, 8)

  def body(x, i):
    x = call(lambda w, x: jnp.tanh(x * wide(w)), live["stack"], x, index=i)
    return call(lambda w, x: x + wide(w), live["again"], x), None

  x, _ = jax.lax.scan(body, x, jnp.arange(40))
  return jnp.mean(x**2)


def ungrouped_params():
  return {"stack": normal(40, 8), "again": normal(1, 8)}


MODELS = {
    "transformer": (transformer, transformer_params),
    "tied": (tied, tied_params),
    "unrolled MLP": (unrolled_mlp, mlp_params),
    "unrolled stack": (unrolled_stack, lambda: normal(LAYERS, DIM, DIM)),
    "nested": (nested, nested_params),
    "experts": (experts, experts_params),
    "ungrouped": (ungrouped, ungrouped_params),
}


def batch(step: int):
  return jax.random.randint(
      jax.random.key(step), (BATCH, SEQ + 1), 0, VOCABULARY
  )


@functools.cache
def value_and_grad(model):
  return jax.jit(jax.value_and_grad(functools.partial(model, plain_call)))


def released(model, tx, **kwargs):
  loss = functools.partial(model, fo.released_call)
  return fo.value_and_release(loss, tx, **kwargs)


def assert_equals_ordinary(model, tx, params, steps=STEPS, dtype=jnp.bfloat16):
  """Value, parameters and state, after each step of a run.

  Both programs start each step from the same state: where one contracts a
  multiply-add a parameter may round to its neighbour, and another parameter has
  another gradient.
  """
  ours = fo.from_fp32(tx, params, dtype)
  step = jax.jit(released(model, tx), donate_argnums=(0, 1))
  for i in range(steps):
    params, state = jax.tree.map(jnp.copy, ours)
    value, *ours = step(*ours, batch(i))
    expected, grads = value_and_grad(model)(params, batch(i))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert_equal(ours, jitted_step(tx, grads, state, params), 1)
  return ours


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_ordinary_step(name):
  model, params = MODELS[name]
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    assert_equals_ordinary(model, make("adamw"), params())


def test_tpu_kernel():
  """In interpret mode, on slices of a stack."""
  tx = make("adamw", implementation="mosaic_tpu")
  assert_equals_ordinary(unrolled_stack, tx, normal(LAYERS, DIM, DIM))


@some_cases
def test_every_optimizer(name, storage):
  assert_equals_ordinary(tied, make(name, storage), tied_params())


SMALL = {"stack": (LAYERS, DIM, DIM), "norm": (LAYERS, DIM), "top": (DIM, DIM)}


def small_layer(w, x):
  return jnp.tanh(x @ wide(w["stack"])) * wide(w["norm"])


def small_top(w, x):
  return jnp.mean((x @ wide(w)) ** 2)


def small(call, live, tokens):
  """Cheap to compile: a stack of two leaves, and a leaf on top."""
  stack = {name: live[name] for name in ("stack", "norm")}
  x = over_layers(call, stack, jax.nn.one_hot(tokens, DIM), small_layer)
  return call(small_top, live["top"], x)


def small_params():
  return {
      name: normal(*shape) + (name == "norm") for name, shape in SMALL.items()
  }


def sgd(*before):
  """A chain whose optimizer compiles fast."""
  return optax.chain(*before, fo.sgd(2.0**-3, weight_decay=0.1))


def matrices(params):
  """The usual mask, which takes stacked vectors for matrices."""
  return jax.tree.map(lambda p: p.ndim > 1, params)


CHAINS = {
    "clip": sgd(optax.clip(1e-3)),
    "scale": sgd(optax.scale(0.5), optax.scale_by_schedule(lambda n: 1 / (1 + n))),
    "add decayed": sgd(optax.add_decayed_weights(0.1, matrices)),
    "trace": sgd(optax.trace(0.9)),
    "masked": sgd(optax.masked(optax.clip(1e-3), matrices)),
    "schedule": fo.sgd(optax.linear_schedule(0.5, 0.1, 4)),
    "mask": fo.sgd(0.5, weight_decay=0.5, mask=matrices),
    "mask tree": fo.sgd(0.5, weight_decay=0.5, mask=dict.fromkeys(SMALL, False)),
    "injected": optax.inject_hyperparams(fo.sgd, hyperparam_dtype=jnp.float32)(0.5),
    "partition": optax.partition(
        {"a": sgd(optax.clip(1e-3)), "b": fo.lion(1e-2, storage=cases.QUANTIZED)},
        {"stack": "a", "norm": "b", "top": "b"},
    ),
    "frozen": optax.partition(
        {"a": fo.sgd(0.5), "b": optax.set_to_zero()},
        lambda params: {name: "ba"[name == "stack"] for name in params},
    ),
    "optax": optax.sgd(0.5, 0.9),
    "frozen after": optax.chain(
        fo.sgd(0.5), optax.freeze({"stack": True, "norm": False, "top": False})
    ),
    "compress": fo.compress(optax.adamw(1e-2)),
    "compress, no moments": fo.compress(optax.sgd(0.5)),
    "compress, lossless": fo.compress(optax.sgd(0.5, 0.9), fo.Storage(32, 32)),
    "compress, partition": fo.compress(
        optax.chain(
            optax.clip(1e-3),
            optax.partition(
                {"a": optax.inject_hyperparams(optax.lion)(1e-2), "b": optax.sgd(0.5)},
                {"stack": "a", "norm": "a", "top": "b"},
            ),
        )
    ),
}
WHOLE_LEAF_CHAINS = {
    "block rms": sgd(optax.clip_by_block_rms(1e-4)),
    "adaptive": sgd(optax.adaptive_grad_clip(1e-3)),
    "noise": sgd(optax.add_noise(1e-3, 0.5, 0)),
    "compress": fo.compress(
        optax.chain(optax.clip_by_block_rms(1e-4), optax.sgd(2.0**-3))
    ),
}


def assert_close(actual, desired):
  """To a unit of bf16: XLA may fuse these updates in other ways."""
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(
          np.float32(a), np.float32(b), rtol=2**-7, atol=2**-12
      ),
      actual,
      desired,
  )


def assert_small_equals_ordinary(tx, model=small):
  params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), small_params())
  state = tx.init(params)
  step = jax.jit(released(model, tx))
  ours = ordinary = params, state
  for i in range(3):
    _, *ours = step(*ours, batch(i))
    _, grads = value_and_grad(model)(ordinary[0], batch(i))
    ordinary = fo.step(tx, grads, *reversed(ordinary))
  assert_close(ours[0], ordinary[0])
  assert jax.tree.structure(ours[1]) == jax.tree.structure(ordinary[1])
  return ours


@pytest.mark.parametrize("name", CHAINS)
def test_chains_of_leafwise_transformations(name):
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    assert_small_equals_ordinary(CHAINS[name])


@pytest.mark.parametrize("name", WHOLE_LEAF_CHAINS)
def test_what_takes_a_stack_as_a_whole_is_held(name):
  with pytest.warns(UserWarning, match="'stack' as a whole"):
    assert_small_equals_ordinary(WHOLE_LEAF_CHAINS[name])


def trace(model, tx=None, params=None, **kwargs):
  """Traces a step, which raises what it raises."""
  tx = fo.adamw(1e-2, storage=cases.QUANTIZED) if tx is None else tx
  params = small_params() if params is None else params
  state = jax.eval_shape(tx.init, params)
  return jax.eval_shape(released(model, tx, **kwargs), params, state, batch(0))


@pytest.mark.parametrize(
    ("tx", "message"),
    [
        (
            sgd(optax.clip_by_global_norm(1.0)),
            "'stack'.*clip_by_global_norm.*optax.clip",
        ),
        (sgd(optax.normalize_by_update_norm()), "all gradients at once"),
        (optax.MultiSteps(fo.adamw(1e-3), 2), "MultiSteps.*larger batches"),
        (
            optax.MultiSteps(fo.adamw(1e-3), 2).gradient_transformation(),
            "MultiSteps.*larger batches",
        ),
        (optax.apply_if_finite(fo.adamw(1e-3), 2), "apply_if_finite.*Clip each"),
        (sgd(optax.apply_if_finite(optax.clip(1.0), 2)), "apply_if_finite"),
    ],
)
def test_what_needs_all_gradients_is_refused(tx, message):
  with pytest.raises(ValueError, match=message):
    trace(small, tx)


def test_lookahead_is_refused():
  tx = optax.lookahead(optax.sgd(0.1), 2, 0.5)
  params = optax.LookaheadParams.init_synced(small_params())
  with pytest.raises(ValueError, match="two sets of parameters"):
    trace(small, tx, params)


def used_directly(call, live, tokens):
  return jnp.mean(jnp.ones(DIM) @ live["top"])


def multiplied(call, live, tokens):
  return jnp.mean(live["top"] * 2)


def given_to_a_jitted_function(call, live, tokens):
  return jnp.mean(jnp.clip(live["top"], 0, 1))


def checkpointed(call, live, tokens):
  x = jnp.ones((1, DIM))
  return jax.checkpoint(lambda x: call(lambda w, x: (x @ w).mean(), live["top"], x))(x)


def mapped(call, live, tokens):
  f = functools.partial(call, lambda w, x: (x @ w).mean(), live["top"])
  return jax.vmap(f)(jnp.ones((2, DIM))).mean()


def differentiated(call, live, tokens):
  f = functools.partial(call, lambda w, x: (x @ w).mean(), live["top"])
  return jax.grad(f)(jnp.ones(DIM)).mean()


def conditional(call, live, tokens):
  f = functools.partial(call, lambda w, x: (x @ w).mean(), live["top"])
  return jax.lax.cond(tokens[0, 0] > 0, f, jnp.mean, jnp.ones(DIM))


def within(call, live, tokens):
  def outer(w, x):
    return call(lambda w, x: (x @ w).mean(), live["stack"], x @ w, index=0)

  return call(outer, live["top"], jnp.ones(DIM))


def foreign(call, live, tokens):
  return call(lambda w: w.mean(), jnp.ones(3))


def far(call, live, tokens):
  return call(lambda w: w.mean(), live["stack"], index=LAYERS)


def fractional(call, live, tokens):
  return call(lambda w: w.mean(), live["stack"], index=1.0)


def too_deep(call, live, tokens):
  return call(lambda w: w.mean(), live["norm"], index=(0, 0, 0))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (used_directly, "'top' was used directly.*released_call"),
        (multiplied, "'top' was used directly.*released_call"),
        (given_to_a_jitted_function, "'top' was used directly.*released_call"),
        (checkpointed, "inside jax.checkpoint.*leave the jax.checkpoint out"),
        (mapped, "inside jax.vmap"),
        (differentiated, "inside jax.grad"),
        (conditional, "inside 'cond'.*Put that inside"),
        (within, "inside the function of another one"),
        (foreign, "part of the `live` tree.*found a"),
        (far, f"Index {LAYERS}.*'stack'"),
        (fractional, "dtype float32; expected an integer"),
        (too_deep, "'norm' has shape"),
    ],
)
def test_misuse(model, message):
  with pytest.raises(ValueError, match=message):
    trace(model)


def test_live_tree_of_another_step():
  kept = []

  def keep(call, live, tokens):
    kept.append(live)
    return small(call, live, tokens)

  trace(keep)
  for live in kept:  # Of both runs of its loss function.
    with pytest.raises(ValueError, match="of another step's `live`"):
      trace(lambda call, _, tokens, live=live: small(call, live, tokens))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize(
    "scalar",
    [lambda value, params, state: value, lambda value, params, state: params.sum()],
    ids=["loss", "parameters"],
)
def test_reverse_mode_is_refused(wrap, scalar):
  tx = fo.sgd(0.1)
  step = wrap(fo.value_and_release(
      lambda live, x: fo.released_call(lambda w, x: jnp.sin(w * x).sum(), live, x), tx
  ))
  x = jnp.linspace(0.0, 1.0, 4)
  args = x, tx.init(x), x
  for argnum in (0, 2):
    with pytest.raises(ValueError, match="differentiate it in reverse mode"):
      jax.grad(lambda *args: scalar(*step(*args)), argnums=argnum)(*args)
  _, tangent = jax.jvp(lambda x: jax.jit(step)(*args[:2], x)[0], (x,), (x,))
  np.testing.assert_allclose(tangent, (jnp.cos(x * x) * x * x).sum(), rtol=1e-6)
  losses, *_ = jax.vmap(step, (None, None, 0))(*args[:2], jnp.stack([x, 2 * x]))
  np.testing.assert_allclose(losses[1], jnp.sin(2 * x * x).sum(), rtol=1e-6)


def test_leaf_that_is_never_used():
  params = small_params() | {"spare": jnp.ones(DIM)}
  tx = fo.adamw(1e-2, storage=cases.QUANTIZED)
  params, state = fo.from_fp32(tx, params)
  with pytest.warns(UserWarning, match="'spare' is not used"):
    _, new, new_state = jax.jit(released(small, tx))(params, state, batch(0))
  assert_same(new["spare"], params["spare"])
  assert_same(new_state.nu["spare"], state.nu["spare"])
  assert int(new_state.count) == 1


def unheeded(call, live, tokens):
  """A call whose result does not matter: its gradient is zero."""
  call(lambda w: wide(w).sum(), live["top"])
  x = call(lambda w, x: x * wide(w)[0], live["norm"], jax.nn.one_hot(tokens, DIM))
  return jnp.mean(over_layers(call, live["stack"], x, lambda w, x: x @ wide(w)) ** 2)


def test_result_that_does_not_matter():
  ours = assert_small_equals_ordinary(fo.sgd(0.5, weight_decay=0.5), unheeded)
  assert (ours[0]["top"] != small_params()["top"].astype(jnp.bfloat16)).any()


def data_dependent(call, live, tokens):
  def body(x, i):
    return call(lambda w, x: jnp.tanh(x @ wide(w)), live["stack"], x, index=i), None

  x, _ = jax.lax.scan(body, jax.nn.one_hot(tokens, DIM), tokens[0] % LAYERS)
  x = call(lambda w, x: x * wide(w)[0], live["norm"], x)
  return jnp.mean(call(lambda w, x: x @ wide(w), live["top"], x) ** 2)


def test_slices_known_only_at_run_time():
  with pytest.warns(UserWarning, match="'stack' depends on its arguments"):
    assert_small_equals_ordinary(fo.sgd(0.5), data_dependent)


def test_arguments_and_results():
  """Integer, key, static and absent inputs; several outputs; aux; a policy."""
  policy = jax.checkpoint_policies.dots_saveable

  def layer(w, x, extra, train, name):
    assert train is True and name == "layer" and extra["none"] is None
    dropped = jax.random.bernoulli(extra["key"], 0.5, x.shape)
    y = jax.checkpoint(lambda x, w: jnp.tanh(x @ w), policy=policy)(x, wide(w))
    return {"x": jnp.where(dropped, y, x), "count": dropped.sum(), "key": extra["key"]}

  def model(call, live, tokens):
    x, extra = jax.nn.one_hot(tokens, DIM), {"key": jax.random.key(0), "none": None}

    def body(x, i):
      extra["key"] = jax.random.fold_in(jax.random.key(0), i)
      out = call(layer, live["stack"], x, extra, True, "layer", index=i)
      return out["x"], out["count"]

    x, counts = jax.lax.scan(body, x, jnp.arange(LAYERS))
    x = call(lambda w, x: x * wide(w)[0], live["norm"], x)
    x = call(lambda w, x, scale: scale * (x @ wide(w)), live["top"], x, np.float32(2))
    return jnp.mean(x**2), {"counts": counts}

  tx = fo.sgd(0.5)
  params, state = fo.from_fp32(tx, small_params())
  step = jax.jit(released(model, tx, has_aux=True))
  (value, aux), new, _ = step(params, state, batch(0))
  assert value.shape == () and aux["counts"].shape == (LAYERS,)
  assert all((new[name] != params[name]).any() for name in SMALL)
  step(new, state, batch(1))
  assert step._cache_size() == 1


def test_one_leaf_twice_in_a_call():
  def model(call, live, tokens):
    part = {"a": live["top"], "b": live["top"]}
    x = jax.nn.one_hot(tokens, DIM)
    return jnp.mean(call(lambda w, x: x @ wide(w["a"]) @ wide(w["b"]).T, part, x) ** 2)

  def plain(call, live, tokens):
    w = live["top"]
    return model(call, {"top": w}, tokens)

  tx = fo.sgd(0.5)
  params, state = fo.from_fp32(tx, {"top": normal(DIM, DIM)})
  _, ours, _ = jax.jit(released(model, tx))(params, state, batch(0))
  _, grads = value_and_grad(plain)(params, batch(0))
  expected, _ = fo.step(tx, grads, state, params)
  assert_close(ours, expected)


def test_runs_without_jit():
  tx = fo.sgd(0.5)
  params, state = fo.from_fp32(tx, small_params())
  value, new, _ = released(small, tx)(params, state, batch(0))
  expected, compiled, _ = jax.jit(released(small, tx))(params, state, batch(0))
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  assert_close(new, compiled)


def test_float16_loss_scaling():
  """Scaled in the loss, unscaled leaf by leaf in float32."""
  scale = 2.0**10

  def unscale(grads, params):
    del params
    return jax.tree.map(lambda g: g.astype(jnp.float32) / scale, grads)

  def scaled(call, live, tokens):
    return scale * small(call, live, tokens)

  tx = fo.sgd(0.5, 0.9, storage=cases.QUANTIZED)
  unscaled = optax.chain(optax.stateless(unscale), tx)
  params, state = fo.from_fp32(tx, small_params(), jnp.float16)
  value, ours, _ = jax.jit(released(scaled, unscaled))(
      params, unscaled.init(params), batch(0)
  )
  expected, reference, _ = jax.jit(released(small, tx))(params, state, batch(0))
  np.testing.assert_allclose(value / scale, expected, rtol=1e-5)
  assert_close(ours, reference)


def test_nnx_stack():
  """The example of docs/gradient-release.md."""
  nnx = pytest.importorskip("flax.nnx")

  class Block(nnx.Module):
    def __init__(self, rngs):
      self.linear = nnx.Linear(DIM, DIM, rngs=rngs)

    def __call__(self, x):
      return x + nnx.tanh(self.linear(x))

  keys = nnx.Rngs(0).fork(split=LAYERS)
  graph, params = nnx.split(nnx.vmap(Block, in_axes=0)(keys), nnx.Param)

  def model(call, live, tokens):
    x = jax.nn.one_hot(tokens, DIM)
    x = over_layers(call, live, x, lambda w, x: nnx.merge(graph, wide(w))(x))
    return jnp.mean((x - 1) ** 2)

  tx = fo.sgd(0.5)
  params, state = fo.from_fp32(tx, nnx.to_pure_dict(params))
  _, ours, _ = jax.jit(released(model, tx))(params, state, batch(0))
  _, grads = value_and_grad(model)(params, batch(0))
  assert_close(ours, fo.step(tx, grads, state, params)[0])


@pytest.mark.parametrize(
    ("kind", "tx"),
    [
        ("Auto", fo.sgd(2.0**-3, 0.9)),
        ("Explicit", fo.sgd(2.0**-3, 0.9)),
        ("Explicit", fo.compress(optax.sgd(2.0**-3, 0.9))),
    ],
    ids=["Auto", "Explicit", "Explicit, compress"],
)
def test_sharded(kind, tx):
  """FSDP × TP: as one device's ordinary step, and no stack is gathered whole."""
  mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType[kind],) * 2)
  specs = {"stack": P(None, "data", "model"), "norm": P(), "top": P("data", "model")}
  # Adam would blow up the rounding errors of gradients summed in another order.
  params, state = ordinary = fo.from_fp32(tx, small_params())

  def model(call, live, tokens):
    def gathered(fn):
      # With explicit axes, products of two sharded ones are ambiguous.
      replicate = jax.sharding.reshard if kind == "Explicit" else lambda p, _: p
      return lambda w, x: fn(jax.tree.map(lambda p: replicate(p, P()), w), x)

    stack = {name: live[name] for name in ("stack", "norm")}
    x = jax.nn.one_hot(tokens, DIM)
    x = over_layers(call, stack, x, gathered(small_layer))
    return call(gathered(small_top), live["top"], x)

  shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
  sharded = jax.device_put(params, shardings)
  batches = [batch(i).repeat(2, 0) for i in range(3)]
  with jax.set_mesh(mesh):
    ours = sharded, jax.jit(tx.init)(sharded)
    batch_sharding = NamedSharding(mesh, P("data"))
    step = jax.jit(
        released(model, tx),
        out_shardings=(None, *jax.tree.map(lambda x: x.sharding, ours)),
    )
    tokens = jax.device_put(batches, batch_sharding)
    compiled = step.lower(*ours, tokens[0]).compile()
    for some in tokens:
      _, *ours = compiled(*ours, some)
  gathers = [line for line in compiled.as_text().splitlines() if "all-gather(" in line]
  assert gathers
  assert not any(f"= bf16[{LAYERS},{DIM}," in line for line in gathers)
  for tokens in batches:
    params, state = ordinary
    _, grads = value_and_grad(small)(params, tokens)
    ordinary = fo.step(tx, grads, state, params)
  for name, sharding in shardings.items():
    assert ours[0][name].sharding.is_equivalent_to(sharding, ours[0][name].ndim), name
  assert_close(fo.to_fp32(*ours), fo.to_fp32(*ordinary))


@pytest.mark.parametrize(
    ("tx", "layers"),
    # What compress needs for one layer weighs less beside more of them.
    [(fo.sgd(1e-3, 0.9), 24), (fo.compress(optax.adamw(1e-3)), 96)],
    ids=["flash", "compress"],
)
def test_memory_of_many_layers(tx, layers):
  """Temporaries shrink by the gradients; everything is updated in place."""
  dim = 128
  struct = jax.ShapeDtypeStruct
  params = {
      "embed": struct((64, dim), jnp.bfloat16),
      "layers": struct((layers, dim, 4 * dim), jnp.bfloat16),
  }
  state = jax.eval_shape(tx.init, params)

  def layer(w, x):
    w = wide(w)
    return x + jax.nn.gelu(x @ w) @ w.T

  def model(call, live, tokens):
    def body(x, i):
      return call(layer, live["layers"], x, index=i), None

    x = call(embed, live["embed"], tokens)
    return jnp.mean(jax.lax.scan(body, x, jnp.arange(layers))[0] ** 2)

  def loss(params, tokens):
    def body(x, w):
      return jax.checkpoint(layer)(w, x), None

    x = embed(params["embed"], tokens)
    return jnp.mean(jax.lax.scan(body, x, params["layers"])[0] ** 2)

  def ordinary(params, state, tokens):
    value, grads = jax.value_and_grad(loss)(params, tokens)
    return value, *fo.step(tx, grads, state, params)

  temporaries = []
  for step in (ordinary, released(model, tx)):
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, batch(0))
    memory = compiled.compile().memory_analysis()
    kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((params, state)))
    assert memory.alias_size_in_bytes == kept
    temporaries.append(memory.temp_size_in_bytes)
  gradients = sum(2 * p.size for p in jax.tree.leaves(params))
  assert temporaries[0] - temporaries[1] >= 0.9 * gradients
