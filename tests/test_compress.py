"""``compress``: the storage around any Optax transformation."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax_optimizers
import pytest
from optax_optimizers import OPTIMIZERS

import flashoptim_jax as fo

STEPS = 50
import os
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True} if os.environ.get("Q") else None
LOSSLESS = fo.Storage(master_bits=32, moment_bits=32)
SHAPES = {
    "matrix": ((4, 40), jnp.float32),
    "bias": ((33,), jnp.float32),
    "conv": ((2, 3, 2, 5), jnp.float32),
    "norm": ((5,), jnp.float32),
    "scale": ((), jnp.float32),
}


def test_every_export_is_listed():
  assert optax_optimizers.exported() == {
      name.partition(",")[0] for name in OPTIMIZERS
  }


def objective(params):
  return sum(jnp.sum((leaf - 1.0) ** 2) for leaf in jax.tree.leaves(params))


def extra_args(needs, params, grads):
  """What an optimizer needs beside gradients."""
  value = objective(params)
  return {
      "": {},
      "examples": {},
      "value": {"value": value},
      "value_fn": {"value": value, "grad": grads, "value_fn": objective},
      "obj_fn": {"obj_fn": objective},
  }[needs]


@functools.partial(
    jax.jit,
    static_argnums=(0, 1),
    compiler_options=QUICK,
)
def train(tx, needs, params, state, grads):
  """Fifty steps; gradients come from outside and from the parameters."""

  def step(carry, noise):
    params, state = carry
    # As float32 sees them: both runs then have the same gradients.
    masters = jax.tree.map(lambda x: x.astype(jnp.float32), fo_masters(params, state))
    if needs == "value_fn":  # A line search needs the function's own gradient.
      grads = jax.grad(objective)(masters)
    else:
      grads = jax.tree.map(lambda n, p: n + 0.1 * p, noise, masters)
    extra = extra_args(needs, masters, grads)
    if needs == "examples":
      grads = jax.tree.map(lambda g: jnp.stack([g, 2 * g]), grads)
    return fo.step(tx, grads, state, params, **extra), None

  return jax.lax.scan(step, (params, state), grads)[0]


def fo_masters(params, state):
  return fo.to_fp32(params, state) if isinstance(state, fo.CompressedState) else params


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_lossless_storage_is_the_optimizer_itself(name):
  optimizer = OPTIMIZERS[name]
  plain = optimizer.make(optimizer.rate)
  tx = fo.compress(plain, LOSSLESS)
  # Optax's own sm3 takes no scalars.
  masters = cases.tree(SHAPES | {"scale": ((1,), jnp.float32)} if name == "sm3" else SHAPES)
  noise = [cases.grads_like(masters, 1 + i) for i in range(STEPS)]
  noise = jax.tree.map(lambda *leaves: jnp.stack(leaves), *noise)
  params, state = fo.from_fp32(tx, masters)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
  params, state = train(tx, optimizer.needs, params, state, noise)
  desired, plain_state = train(
      plain, optimizer.needs, masters, plain.init(masters), noise
  )
  actual = fo.to_fp32(params, state)
  err={k: float(np.abs(np.asarray(actual[k])-np.asarray(desired[k])).max()/ np.abs(desired[k]).max()/2**-23) for k in actual}
  print("ERR", name, {k: round(v,2) for k,v in err.items()})
  for key, leaf in desired.items():
    assert np.isfinite(leaf).all()
    cases.assert_within_units(actual[key], leaf, STEPS, jnp.float32, None)
  assert jax.tree.structure(state.inner) == jax.tree.structure(plain_state)
