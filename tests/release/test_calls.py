"""Gradient release against the ordinary step."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flashoptim_jax as fo
from tests.support import cases
from tests.support.cases import jitted_step, make, some_cases
from tests.support.release_models import (
  DIM,
  LAYERS,
  MODELS,
  SMALL,
  assert_close,
  assert_equals_ordinary,
  batch,
  embed,
  normal,
  over_layers,
  released,
  small,
  small_layer,
  small_params,
  small_top,
  tied,
  tied_params,
  trace,
  unrolled_stack,
  value_and_grad,
  wide,
)
from tests.support.tiers import slow_but


@pytest.mark.parametrize("name", slow_but(MODELS, "unrolled stack"))
def test_equals_the_ordinary_step(name):
  model, params = MODELS[name]
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    assert_equals_ordinary(model, make("adamw"), params())


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["root", "16/8"])
def test_tpu_kernel(storage):
  """In interpret mode, on slices of a stack."""
  tx = make("adamw", storage, implementation="mosaic_tpu")
  assert_equals_ordinary(unrolled_stack, tx, normal(LAYERS, DIM, DIM))


@pytest.mark.slow
@some_cases
def test_every_optimizer(name, storage):
  assert_equals_ordinary(tied, make(name, storage), tied_params())


@pytest.mark.parametrize("compressed", slow_but([False, True], False, True))
def test_slices_have_the_thresholds_of_their_stack(compressed):
  """Bit for bit: with others, half of the parameters would differ."""
  storage = fo.Storage(master_bits=16)
  tx = (
    fo.compress(optax.sgd(0.1), storage) if compressed else fo.sgd(0.1, storage=storage)
  )
  params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), small_params())
  ours = params, tx.init(params)
  step = jax.jit(released(small, tx))
  for i in range(2):
    _, grads = value_and_grad(small)(ours[0], batch(i))
    ordinary = jitted_step(tx, grads, *reversed(ours))
    _, *ours = step(*ours, batch(i))
    cases.assert_same(ours[0], ordinary[0])


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


@pytest.mark.parametrize("wrap", slow_but([lambda f: f, jax.jit]), ids=["eager", "jit"])
@pytest.mark.parametrize(
  "scalar",
  [lambda value, params, state: value, lambda value, params, state: params.sum()],
  ids=["loss", "parameters"],
)
def test_reverse_mode_is_refused(wrap, scalar):
  tx = fo.sgd(0.1)
  step = wrap(
    fo.value_and_release(
      lambda live, x: fo.released_call(lambda w, x: jnp.sin(w * x).sum(), live, x), tx
    )
  )
  x = jnp.linspace(0.0, 1.0, 4)
  args = x, tx.init(x), x
  for argnum in (0, 2):
    with pytest.raises(ValueError, match="differentiate it in reverse mode"):
      jax.grad(lambda *args: scalar(*step(*args)), argnums=argnum)(*args)
  _, tangent = jax.jvp(lambda x: jax.jit(step)(*args[:2], x)[0], (x,), (x,))
  np.testing.assert_allclose(tangent, (jnp.cos(x * x) * x * x).sum(), rtol=1e-6)
  losses, *_ = jax.vmap(step, (None, None, 0))(*args[:2], jnp.stack([x, 2 * x]))
  np.testing.assert_allclose(losses[1], jnp.sin(2 * x * x).sum(), rtol=1e-6)


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


@pytest.mark.slow
def test_runs_without_jit():
  tx = fo.sgd(0.5)
  params, state = fo.from_fp32(tx, small_params())
  value, new, _ = released(small, tx)(params, state, batch(0))
  expected, compiled, _ = jax.jit(released(small, tx))(params, state, batch(0))
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  assert_close(new, compiled)


@pytest.mark.slow
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


@pytest.mark.slow
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
  slow_but(
    [
      ("Auto", fo.sgd(2.0**-3, 0.9)),
      ("Explicit", fo.sgd(2.0**-3, 0.9)),
      ("Explicit", fo.compress(optax.sgd(2.0**-3, 0.9))),
    ]
  ),
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


@pytest.mark.slow
@pytest.mark.parametrize(
  ("tx", "layers"),
  [
    (fo.sgd(1e-3, 0.9), 24),
    # What compress needs for one layer weighs less beside more of them.
    (fo.compress(optax.adamw(1e-3)), 96),
    (fo.compress(optax.sgd(1e-3)), 24),
    (fo.compress(optax.sgd(1e-3, 0.9)), 96),
  ],
  ids=["flash", "compress(adamw)", "compress(sgd)", "compress(momentum)"],
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
