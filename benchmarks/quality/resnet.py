"""ResNet-18 on small images of digits, for training_loss.py."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import flashoptim_jax as fo
from benchmarks.quality import corpora

WIDTHS = (64, 128, 256, 512)
CLASSES = 10
SHIFT = 3  # pixels, at most, in each direction


@dataclasses.dataclass(frozen=True)
class Setting:
  """How the model is trained: passes over the images, images per step."""

  epochs: int
  batch: int


RESNET18 = Setting(epochs=40, batch=128)


class Block(nn.Module):
  """Two 3 × 3 convolutions and a way around them (arXiv 1512.03385)."""

  width: int
  stride: int

  @nn.compact
  def __call__(self, x, train):
    """Maps (batch, height, width, channels) to width channels."""
    conv = functools.partial(nn.Conv, use_bias=False, dtype=jnp.bfloat16)
    norm = functools.partial(
      nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=jnp.bfloat16
    )
    h = conv(self.width, (3, 3), self.stride)(x)
    h = nn.relu(norm()(h))
    h = norm()(conv(self.width, (3, 3))(h))
    if x.shape != h.shape:
      x = norm()(conv(self.width, (1, 1), self.stride)(x))
    return nn.relu(x + h)


class ResNet18(nn.Module):
  """For images of 32 × 32: no pooling before the blocks."""

  @nn.compact
  def __call__(self, x, train):
    """Maps (batch, 32, 32, 1) to logits (batch, 10)."""
    x = nn.Conv(WIDTHS[0], (3, 3), use_bias=False, dtype=jnp.bfloat16)(x)
    x = nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=jnp.bfloat16)(x)
    x = nn.relu(x)
    for i, width in enumerate(WIDTHS):
      x = Block(width, 2 if i else 1)(x, train)
      x = Block(width, 1)(x, train)
    return nn.Dense(CLASSES, dtype=jnp.float32)(x.mean((1, 2)).astype(jnp.float32))


def loss_of(params, averages, images, labels, train):
  weights = fo.cast_params(params, jnp.bfloat16)
  logits, changed = ResNet18().apply(
    {"params": weights, "batch_stats": averages}, images, train, mutable=["batch_stats"]
  )
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  right = jnp.mean(jnp.argmax(logits, -1) == labels)
  return losses.mean(), (changed["batch_stats"], right)


def shifted(images, key):
  """Images, each moved by up to SHIFT pixels in both directions."""
  padded = jnp.pad(images, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)))
  corners = jax.random.randint(key, (len(images), 2), 0, 2 * SHIFT + 1)

  def cut(image, corner):
    return jax.lax.dynamic_slice(image, (*corner, 0), images.shape[1:])

  return jax.vmap(cut)(padded, corners)


def train_images(experiment, name, seed, folder):
  """One run; its value is the loss on the test images."""
  del folder
  setting: Setting = experiment.setting
  variant = experiment.variants[name]
  train, test = corpora.digits()
  steps = setting.epochs * (len(train.labels) // setting.batch)
  rate = optax.cosine_decay_schedule(experiment.learning_rate, steps)
  tx = variant.make(rate)
  variables = ResNet18().init(jax.random.key(seed), train.images[:1], train=False)
  params, state = variant.start(tx, variables["params"])

  @jax.jit
  def run(params, state, averages, images, labels, order, key):
    def step(carry, inputs):
      params, state, averages = carry
      chosen, key = inputs
      batch = shifted(images[chosen], key)
      grad = jax.value_and_grad(loss_of, has_aux=True)
      (loss, (averages, _)), grads = grad(params, averages, batch, labels[chosen], True)
      params, state = fo.step(tx, grads, state, params)
      return (params, state, averages), loss

    keys = jax.random.split(key, len(order))
    carry, losses = jax.lax.scan(step, (params, state, averages), (order, keys))
    return *carry, losses

  random = np.random.default_rng(seed)
  order = np.concatenate(
    [
      random.permutation(len(train.labels))[: steps // setting.epochs * setting.batch]
      for _ in range(setting.epochs)
    ]
  ).reshape(steps, setting.batch)
  params, state, averages, losses = run(
    params,
    state,
    variables["batch_stats"],
    *map(jnp.asarray, train),
    order,
    jax.random.key(seed),
  )
  loss, (_, right) = loss_of(params, averages, *test, False)
  means = np.asarray(losses).reshape(setting.epochs, -1).mean(1)
  return {
    "value": float(loss),
    "accuracy": float(right),
    "steps": [(i + 1) * steps // setting.epochs for i in range(setting.epochs)],
    "losses": means.tolist(),
  }
