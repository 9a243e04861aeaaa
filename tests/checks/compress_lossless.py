"""Every Optax optimizer inside ``fo.compress`` with storage that loses nothing.

With ``Storage(master_bits=32, moment_bits=32)`` bfloat16 parameters and their
corrections are float32 master weights, so an optimizer must follow itself on
float32 parameters: over 50 jitted steps, from the same gradients, on leaves of five
shapes. Two compiled programs may differ by a unit in the last place, at the leaf's
largest weight, per step. ``python tests/checks/compress_lossless.py`` checks all of
them; the tests a few.
"""

import argparse
import functools
import os
import pathlib
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

sys.path.append(str(pathlib.Path(__file__).parents[2]))

import flashoptim_jax as fo
from benchmarks.support.optax_optimizers import OPTIMIZERS

STEPS = 50
STORAGE = fo.Storage(master_bits=32, moment_bits=32)
SHAPES = {
  "matrix": (4, 40),
  "bias": (33,),
  "conv": (2, 3, 2, 5),
  "norm": (5,),
  "scale": (),
}


def objective(params):
  return sum(jnp.sum((leaf - 1.0) ** 2) for leaf in jax.tree.leaves(params))


@functools.partial(jax.jit, static_argnums=(0, 1))
def train(tx, needs, params, state, noise):
  """Steps with gradients from outside and from the master weights."""

  def step(carry, noise):
    params, state = carry
    compressed = isinstance(state, fo.CompressedState)
    masters = fo.to_fp32(params, state) if compressed else params
    value, grads = jax.value_and_grad(objective)(masters)
    extra = {
      "value": {"value": value},
      "value_fn": {"value": value, "grad": grads, "value_fn": objective},
      "obj_fn": {"obj_fn": objective},
    }.get(needs, {})
    if needs != "value_fn":  # A line search needs the function's own gradient.
      grads = jax.tree.map(lambda n, g: n + 0.1 * g, noise, grads)
    if needs == "examples":
      grads = jax.tree.map(lambda g: jnp.stack([g, 2 * g]), grads)
    return fo.step(tx, grads, state, params, **extra), None

  return jax.lax.scan(step, (params, state), noise)[0]


def draw(name: str):
  """Float32 parameters, away from zero, and a step's worth of noise per step."""
  random = np.random.default_rng(0)
  shapes = dict(SHAPES)
  if name == "sm3":  # Optax's own takes no scalars.
    shapes["scale"] = (1,)

  def away_from_zero(shape):
    x = random.normal(size=shape)
    return jnp.asarray(x + np.copysign(0.5, x), jnp.float32)

  masters = {key: away_from_zero(shape) for key, shape in shapes.items()}
  noise = {
    key: jnp.asarray(
      random.normal(size=(STEPS, *shape)) * random.lognormal(size=(STEPS, *shape)),
      jnp.float32,
    )
    for key, shape in shapes.items()
  }
  return masters, noise


def follow(name: str):
  """Trains twice; gives master weights, parameters of plain Optax, both states."""
  optimizer = OPTIMIZERS[name]
  plain = optimizer.make(optimizer.rate)
  tx = fo.compress(plain, STORAGE)
  masters, noise = draw(name)
  params, state = train(tx, optimizer.needs, *fo.from_fp32(tx, masters), noise)
  desired, plain_state = train(
    plain, optimizer.needs, masters, plain.init(masters), noise
  )
  return fo.to_fp32(params, state), desired, state, plain_state


def units(actual, desired) -> float:
  """Largest difference, in units in the last place of the leaf's largest weight."""
  found = [0.0]
  for ours, theirs in zip(
    jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True
  ):
    error = np.abs(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64))
    if not np.isfinite(error).all():
      return float("inf")
    found.append(float(error.max() / np.spacing(np.abs(np.float32(theirs)).max())))
  return max(found)


def main() -> int:
  argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
  found = {}
  for name in OPTIMIZERS:
    actual, desired, _, _ = follow(name)
    found[name] = units(actual, desired)
    print(f"{name:30} {found[name]:.1f}", flush=True)
  return int(max(found.values()) > STEPS)


if __name__ == "__main__":
  sys.exit(main())
