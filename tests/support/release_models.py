"""Models whose gradients are released, and the ordinary step beside them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import flashoptim_jax as fo
from tests.support import cases
from tests.support.cases import assert_equal, jitted_step

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
  return jax.random.randint(jax.random.key(step), (BATCH, SEQ + 1), 0, VOCABULARY)


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
  return {name: normal(*shape) + (name == "norm") for name, shape in SMALL.items()}


def sgd(*before):
  """A chain whose optimizer compiles fast."""
  return optax.chain(*before, fo.sgd(2.0**-3, weight_decay=0.1))


def matrices(params):
  """The usual mask, which takes stacked vectors for matrices."""
  return jax.tree.map(lambda p: p.ndim > 1, params)


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


def trace(model, tx=None, params=None, **kwargs):
  """Traces a step, which raises what it raises."""
  tx = fo.adamw(1e-2, storage=cases.QUANTIZED) if tx is None else tx
  params = small_params() if params is None else params
  state = jax.eval_shape(tx.init, params)
  return jax.eval_shape(released(model, tx, **kwargs), params, state, batch(0))
