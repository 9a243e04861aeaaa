"""Checks what changes a whole process.

Usage: python -m tests.support.stability_worker debug|memory

``debug`` runs everything on finite numbers where JAX raises for NaNs and infinities,
and prints how many cases it had. ``memory`` takes steps that are not jitted, and prints
by how many bytes the process grew for each.
"""

import functools
import gc
import pathlib
import sys

import jax
import jax.numpy as jnp
import optax

import flashoptim_jax as fo
from tests.support import cases

SHAPES = {"matrix": ((9, 50), jnp.bfloat16), "norm": ((5,), jnp.float32)}


def debug():
  jax.config.update("jax_debug_nans", True)
  jax.config.update("jax_debug_infs", True)
  masters = cases.tree(SHAPES, dtype=jnp.float32)
  masters["matrix"] = masters["matrix"].at[:, :40].set(0)
  count = 0
  for kind, storage in cases.STORAGES.items():
    transformations = [
      *(cases.make(name, kind, 1e-3) for name in cases.OPTIMIZERS),
      fo.compress(optax.adam(1e-3), storage),
    ]
    for tx in transformations:
      params, state = fo.from_fp32(tx, masters)
      grads = jax.tree.map(jnp.zeros_like, params)
      for function in (fo.step, cases.jitted_step, cases.update):
        params, state = function(tx, grads, state, params)
        grads = cases.grads_like(params)
      fo.check_numerics(params, state, 1e-3)
      count += 1
  print(count)


def resident():
  """Bytes."""
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
  return pages * 4096


def memory():
  tx = cases.make("adamw")
  params = cases.tree(SHAPES)
  grads = cases.grads_like(params)
  state = tx.init(params)
  step = functools.partial(fo.step, tx)
  calls = 200
  for i in range(calls + 50):
    if i == 50:
      gc.collect()
      before = resident()
    params, state = step(grads, state, params)
  gc.collect()
  print((resident() - before) / calls)


if __name__ == "__main__":
  {"debug": debug, "memory": memory}[sys.argv[1]]()
