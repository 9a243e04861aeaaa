"""A small decoder-only transformer in Flax (linen)."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import flashoptim_jax as fo
from lm import data


@dataclasses.dataclass(frozen=True)
class Config:
  """The model's size.

  Attributes:
    dim: Width of the residual stream.
    layers: Number of blocks.
    heads: Attention heads per block; each takes dim / heads channels, an even
      number.
    vocabulary: Number of different tokens.
    dtype: The dtype that activations are computed in; the parameters' dtype is
      the caller's choice.
    unroll: Blocks per turn of the scan over blocks. 1 compiles fastest; on CPU,
      where a loop's body is optimised less, all of them run fastest.
    attention: ``implementation`` of ``jax.nn.dot_product_attention``.
  """

  dim: int = 128
  layers: int = 3
  heads: int = 4
  vocabulary: int = data.VOCABULARY
  dtype: Any = jnp.float32
  unroll: int = 1
  attention: Literal["xla", "cudnn"] | None = None

  def __post_init__(self):
    if self.dim % (2 * self.heads):
      raise ValueError(
        f"dim is {self.dim} with {self.heads} heads; expected a multiple of"
        f" {2 * self.heads}, for rotary positions rotate pairs of channels."
      )


def rotary(x: jax.Array) -> jax.Array:
  """Rotary position embedding (arXiv 2104.09864).

  Args:
    x: Queries or keys of shape (batch, seq, heads, channels).

  Returns:
    The same, with the pair (i, i + channels/2) at position t turned by the angle
    t · 10000^(-2i/channels).
  """
  half = x.shape[-1] // 2
  frequency = 10_000.0 ** (-jnp.arange(half) / half)
  angle = jnp.arange(x.shape[1])[:, None, None] * frequency
  cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
  a, b = jnp.split(x, 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class Block(nn.Module):
  """One pre-norm layer: causal self-attention, then an MLP."""

  config: Config

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps (batch, seq, dim) to the same shape."""
    c = self.config

    def dense(name: str, features: int | tuple[int, ...], **kwargs: Any):
      return nn.DenseGeneral(
        features, use_bias=False, dtype=c.dtype, name=name, **kwargs
      )

    h = nn.RMSNorm(dtype=c.dtype, name="attention_norm")(x)
    qkv = dense("qkv", (3, c.heads, c.dim // c.heads))(h)
    q, k, v = jnp.moveaxis(qkv, -3, 0)
    h = jax.nn.dot_product_attention(
      rotary(q), rotary(k), v, is_causal=True, implementation=c.attention
    )
    x = x + dense("attention_out", c.dim, axis=(-2, -1))(h)

    h = nn.RMSNorm(dtype=c.dtype, name="mlp_norm")(x)
    h = nn.gelu(dense("mlp_in", 4 * c.dim)(h))
    return x + dense("mlp_out", c.dim)(h)


class Transformer(nn.Module):
  """Predicts the next token at every position.

  The blocks are scanned: their parameters lie stacked along a first axis of
  length ``layers``.
  """

  config: Config

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Maps tokens, int32 (batch, seq), to logits, (batch, seq, vocabulary)."""
    c = self.config
    x = nn.Embed(c.vocabulary, c.dim, dtype=c.dtype, name="embed")(tokens)
    blocks = nn.scan(
      lambda block, x, _: (block(x), None),
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=c.layers,
      unroll=c.unroll,
    )
    x, _ = blocks(Block(c, name="blocks"), x, None)
    x = nn.RMSNorm(dtype=c.dtype, name="final_norm")(x)
    return nn.Dense(c.vocabulary, use_bias=False, dtype=c.dtype, name="head")(x)


def next_token_loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Mean cross-entropy in nats per token, float32 of shape ().

  Args:
    logits: (batch, seq, vocabulary), in any float dtype.
    targets: int32 of shape (batch, seq).
  """
  losses = optax.softmax_cross_entropy_with_integer_labels(
    logits.astype(jnp.float32), targets
  )
  return losses.mean()


def released_loss(config: Config, live: Any, tokens: jax.Array) -> jax.Array:
  """The loss of ``Transformer``, for ``flashoptim_jax.value_and_release``.

  Args:
    config: The model's.
    live: Stands for the variables of ``Transformer(config)``.
    tokens: Windows of tokens, int32 (batch, seq + 1).
  """
  c, params = config, live["params"]

  def call(module: nn.Module, part: Any, x: jax.Array, **kwargs: Any):
    return fo.released_call(
      lambda params, x: module.apply({"params": params}, x), part, x, **kwargs
    )

  def block(x: jax.Array, i: jax.Array):
    return call(Block(c), params["blocks"], x, index=i), None

  embed = nn.Embed(c.vocabulary, c.dim, dtype=c.dtype)
  x = call(embed, params["embed"], tokens[:, :-1])
  x, _ = jax.lax.scan(block, x, jnp.arange(c.layers), unroll=c.unroll)
  x = call(nn.RMSNorm(dtype=c.dtype), params["final_norm"], x)
  head = nn.Dense(c.vocabulary, use_bias=False, dtype=c.dtype)
  return next_token_loss(call(head, params["head"], x), tokens[:, 1:])
