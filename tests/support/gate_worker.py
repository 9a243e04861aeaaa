"""Trains and checkpoints a gate that has fewer rows than there are devices.

Usage: python -m tests.support.gate_worker FOLDER
"""

import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import flashoptim_jax as fo
from tests.support import cases

SHAPES = {"gate": ((8, 128), jnp.bfloat16)}
TX = cases.make("adamw")
STEPS = 2


def main(folder):
  whole = cases.tree(SHAPES)
  alone = cases.train(TX, whole, 2 * STEPS, cases.jitted_step)
  mesh = jax.make_mesh((8, 4), ("rows", "columns"))
  assert mesh.size == 32
  step = jax.jit(functools.partial(fo.step, TX))
  for name, spec in {
    "replicated": P(),
    "rows": P("rows"),
    "columns": P(None, "columns"),
  }.items():
    shardings = {"gate": NamedSharding(mesh, spec)}
    placed = fo.state_shardings(TX, whole, shardings)

    def train(carry, first, shardings=shardings):
      params, state = carry
      for seed in range(first, first + STEPS):
        grads = jax.device_put(cases.grads_like(whole, seed), shardings)
        params, state = step(grads, state, params)
      return params, state

    start = jax.device_put((whole, TX.init(whole)), (shardings, placed))
    saved = train(start, 1)
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(folder / name, saved)
    target = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
      saved,
    )
    with ocp.StandardCheckpointer() as checkpointer:
      restored = checkpointer.restore(folder / name, target)
    cases.assert_same(restored, saved)
    result = train(restored, 1 + STEPS)
    assert result[0]["gate"].sharding.is_equivalent_to(shardings["gate"], 2)
    cases.assert_equal(result, alone, 2 * STEPS)


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))
