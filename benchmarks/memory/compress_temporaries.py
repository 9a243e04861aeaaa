"""Temporaries of a step with ``fo.compress``, in copies of the largest leaf.

    python benchmarks/memory/compress_temporaries.py
    python benchmarks/memory/compress_temporaries.py --only adamw --output runs

Compiles ``fo.step`` for a 12-layer model, parameters and state donated, on this
machine's first device, and divides what XLA plans besides them by the bytes of the
largest leaf in float32. The same for Optax's own optimizer on float32 parameters.
Nothing runs. Writes results/compress_memory.json.
"""

import json
import os
import pathlib
import sys

# XLA's CPU backend keeps to the order of leaves with one device only.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import optax

sys.path.append(str(pathlib.Path(__file__).parents[2]))

import flashoptim_jax as fo
from benchmarks import record
from benchmarks.support.optax_optimizers import OPTIMIZERS

WIDTH, LAYERS = 128, 12
# Those that a step's loss or function is an argument of can't be compiled alone.
MEASURED = {
  "clip, adamw": lambda rate: optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(rate)
  )
} | {name: each.make for name, each in OPTIMIZERS.items() if not each.needs}


def shapes():
  layer = {
    "qkv": (WIDTH, 3 * WIDTH),
    "mlp_in": (WIDTH, 4 * WIDTH),
    "mlp_out": (4 * WIDTH, WIDTH),
  }
  return {"embed": (512, WIDTH)} | {str(i): layer for i in range(LAYERS)}


def structs(dtype):
  return jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, dtype),
    shapes(),
    is_leaf=lambda node: isinstance(node, tuple),
  )


def temporaries(tx, dtype):
  """Of a step, in float32 copies of the largest leaf."""
  params = structs(dtype)
  state = jax.eval_shape(tx.init, params)
  step = jax.jit(lambda *args: fo.step(tx, *args), donate_argnums=(1, 2))
  memory = step.lower(params, state, params).compile().memory_analysis()
  kept = jax.tree.leaves((params, state))
  nbytes = sum(leaf.size * leaf.dtype.itemsize for leaf in kept)
  largest = max(leaf.size for leaf in jax.tree.leaves(params))
  return {
    "temporaries": memory.temp_size_in_bytes / (4 * largest),
    "all_in_place": memory.alias_size_in_bytes == nbytes,
  }


def measure(name):
  make = MEASURED[name]
  return {
    "compressed": temporaries(fo.compress(make(1e-3)), jnp.bfloat16),
    "plain": temporaries(make(1e-3), jnp.float32),
  }


def main():
  parser = record.parser(__doc__)
  parser.add_argument("--only", choices=MEASURED, nargs="+", default=MEASURED)
  arguments = parser.parse_args()
  sizes = [leaf.size for leaf in jax.tree.leaves(structs(jnp.float32))]
  found = {
    **record.about(),
    "tree": sum(sizes) / max(sizes),
    "optimizers": {},
  }
  for name in arguments.only:
    found["optimizers"][name] = measure(name)
    print(name, json.dumps(found["optimizers"][name]), flush=True)
    record.write("compress_memory.json", found, arguments.output)


if __name__ == "__main__":
  main()
