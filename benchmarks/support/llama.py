"""A Llama-architecture model with stacked layers.

The same functions make two losses: one for ``value_and_release``, one for
``jax.grad`` with every layer rematerialised.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

import flashoptim_jax as fo


@dataclasses.dataclass(frozen=True)
class Config:
  """The model's size.

  Attributes:
    dim: Width of the residual stream.
    layers: Number of layers.
    heads: Query heads.
    kv_heads: Key and value heads.
    hidden: Width of the MLP.
    vocabulary: Number of tokens.
    chunk: Tokens whose logits exist at a time.
    attention: ``implementation`` of ``jax.nn.dot_product_attention``.
    activations: Sharding of activations, along the batch; None leaves it to XLA.
  """

  dim: int
  layers: int
  heads: int
  kv_heads: int
  hidden: int
  vocabulary: int
  chunk: int = 512
  attention: str = "xla"
  activations: jax.sharding.NamedSharding | None = None

  def along_batch(self, x):
    """An activation, sharded as all of them are."""
    if self.activations is None:
      return x
    return jax.lax.with_sharding_constraint(x, self.activations)

  def shapes(self) -> dict[str, Any]:
    """Shapes of the parameters."""
    head = self.dim // self.heads
    layer = {
      "attention_norm": (self.dim,),
      "wq": (self.dim, self.heads * head),
      "wk": (self.dim, self.kv_heads * head),
      "wv": (self.dim, self.kv_heads * head),
      "wo": (self.heads * head, self.dim),
      "mlp_norm": (self.dim,),
      "gate": (self.dim, self.hidden),
      "up": (self.dim, self.hidden),
      "down": (self.hidden, self.dim),
    }
    return {
      "embed": (self.vocabulary, self.dim),
      "layers": {name: (self.layers, *shape) for name, shape in layer.items()},
      "norm": (self.dim,),
      "head": (self.dim, self.vocabulary),
    }


LLAMA3_8B = Config(4096, 32, 32, 8, 14336, 128256)
LLAMA3_70B = Config(8192, 80, 64, 8, 28672, 128256)
ONE_BILLION = Config(2048, 16, 32, 8, 8192, 32768)

# Of the parameters, over axes of devices called fsdp and tensor.
SPECS = {
  "embed": P("tensor", "fsdp"),
  "head": P("fsdp", "tensor"),
  "norm": P(),
  "layers": {
    **dict.fromkeys(("attention_norm", "mlp_norm"), P()),
    **dict.fromkeys(("wq", "gate", "up"), P(None, "fsdp", "tensor")),
    # Two of the eight heads' 128 channels on each of eight devices.
    **dict.fromkeys(("wk", "wv"), P(None, "fsdp", "tensor")),
    **dict.fromkeys(("wo", "down"), P(None, "tensor", "fsdp")),
  },
}


def structs(config: Config, dtype=jnp.bfloat16):
  """The parameters' types."""
  return jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, dtype),
    config.shapes(),
    is_leaf=lambda node: isinstance(node, tuple),
  )


def placed(structs, shardings):
  """Types of arrays with those shardings."""
  return jax.tree.map(lambda s, place: s.update(sharding=place), structs, shardings)


def per_device(struct) -> int:
  """Bytes of an array that one device holds."""
  shape = struct.sharding.shard_shape(struct.shape)
  return math.prod(shape) * struct.dtype.itemsize


def random_tokens(config: Config, batch: int, seq: int, seed: int = 0):
  """Inputs and targets."""
  keys = jax.random.split(jax.random.key(seed))
  shape = (batch, seq)
  return [jax.random.randint(key, shape, 0, config.vocabulary) for key in keys]


def init(config: Config, seed: int = 0):
  """Random bf16 parameters, made a slice at a time."""

  @functools.partial(jax.jit, static_argnums=1)
  def draw(key, shape):
    scale = 1.0 / math.sqrt(shape[-2]) if len(shape) > 1 else 0.1
    if len(shape) < 2 or shape[-2] == config.layers:  # norms
      return jnp.ones(shape, jnp.bfloat16)
    if len(shape) == 2:
      scale = 0.02
    return jax.lax.map(
      lambda k: (scale * jax.random.normal(k, shape[1:])).astype(jnp.bfloat16),
      jax.random.split(key, shape[0]),
    )

  shapes, treedef = jax.tree.flatten(
    config.shapes(), is_leaf=lambda node: isinstance(node, tuple)
  )
  keys = jax.random.split(jax.random.key(seed), len(shapes))
  return treedef.unflatten(draw(k, s) for k, s in zip(keys, shapes, strict=True))


def embed(weight, tokens):
  """(batch, seq) to (batch, seq, dim)."""
  return weight[tokens]


def rms_norm(x, weight):
  wide = x.astype(jnp.float32)
  scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-5)
  return (wide * scale).astype(x.dtype) * weight


def rotary(x):
  """Rotary position embedding of (batch, seq, heads, channels)."""
  half = x.shape[-1] // 2
  frequency = 500_000.0 ** (-jnp.arange(half) / half)
  angle = jnp.arange(x.shape[1])[:, None, None] * frequency
  cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
  a, b = jnp.split(x, 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def layer(config: Config, w, x):
  """One layer: grouped-query attention, then a gated MLP."""
  head = config.dim // config.heads
  keep = config.along_batch
  h = keep(rms_norm(keep(x), w["attention_norm"]))
  q = keep(h @ w["wq"]).reshape(*x.shape[:2], config.heads, head)
  k = keep(h @ w["wk"]).reshape(*x.shape[:2], config.kv_heads, head)
  v = keep(h @ w["wv"]).reshape(*x.shape[:2], config.kv_heads, head)
  h = jax.nn.dot_product_attention(
    rotary(q),
    rotary(k),
    v,
    is_causal=True,
    implementation=config.attention,
  )
  x = keep(x + keep(h.reshape(x.shape)) @ w["wo"])
  h = keep(rms_norm(x, w["mlp_norm"]))
  h = keep(jax.nn.silu(keep(h @ w["gate"])) * keep(h @ w["up"]))
  return keep(x + h @ w["down"])


def token_loss(config: Config, w, x, targets):
  """Mean cross-entropy, the logits made for some of each sequence at a time."""
  keep = config.along_batch
  batch, seq, _ = x.shape
  share = max(1, config.chunk // batch)  # of a sequence
  chunk = math.gcd(seq, 1 << (share.bit_length() - 1))
  x = keep(rms_norm(keep(x), w["norm"]))

  @jax.checkpoint
  def chunk_loss(total, chunk):
    x, targets = map(keep, chunk)
    logits = keep((x @ w["head"]).astype(jnp.float32))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return total + losses.sum(), None

  def split(array):
    chunks = array.reshape(batch, seq // chunk, chunk, *array.shape[2:])
    return jnp.moveaxis(chunks, 1, 0)

  total, _ = jax.lax.scan(chunk_loss, jnp.zeros(()), (split(x), split(targets)))
  return total / targets.size


def released_loss(config: Config, live, tokens, targets):
  """For ``value_and_release``."""
  x = config.along_batch(fo.released_call(embed, live["embed"], tokens))
  block = functools.partial(layer, config)

  def body(x, i):
    return fo.released_call(block, live["layers"], x, index=i), None

  x, _ = jax.lax.scan(body, x, jnp.arange(config.layers))
  top = {"norm": live["norm"], "head": live["head"]}
  return fo.released_call(functools.partial(token_loss, config), top, x, targets)


def ordinary_loss(config: Config, params, tokens, targets):
  """For ``jax.grad``."""
  x = config.along_batch(embed(params["embed"], tokens).astype(jnp.bfloat16))

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def block(w, x):
    return layer(config, as_bfloat16(w), x)

  x, _ = jax.lax.scan(lambda x, w: (block(w, x), None), x, params["layers"])
  top = {"norm": params["norm"], "head": params["head"]}
  return token_loss(config, as_bfloat16(top), x, targets)


def as_bfloat16(tree):
  """Casts float32 weights where they are used, as Flax's modules do."""
  return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)


def released_step(config: Config, tx):
  """``step(params, state, tokens, targets)`` with gradient release."""
  return fo.value_and_release(functools.partial(released_loss, config), tx)


def ordinary_step(config: Config, tx):
  """The same with gradients."""
  return train_step(functools.partial(ordinary_loss, config), tx)


def train_step(loss, tx):
  """``step(params, state, tokens, targets)`` for a loss of these but the state."""

  def step(params, state, tokens, targets):
    value, grads = jax.value_and_grad(loss)(params, tokens, targets)
    return value, *fo.step(tx, grads, state, params)

  return step
