"""One process of several: trains with given gradients, and saves the result.

Usage: multihost_worker.py COORDINATOR PROCESSES PROCESS OPTIMIZER FILE
"""

import functools
import pickle
import sys

import cases
import jax
import test_sharding
from jax.experimental import multihost_utils

import flashoptim_jax as fo


def main():
  coordinator, processes, process, name, file = sys.argv[1:]
  jax.distributed.initialize(coordinator, int(processes), int(process))
  mesh = test_sharding.make_mesh("4x2")
  shardings = test_sharding.shardings_on(mesh)
  tx = cases.make(name)

  def place(whole):
    return jax.tree.map(
        lambda leaf, sharding: jax.make_array_from_callback(
            leaf.shape, sharding, leaf.__getitem__
        ),
        jax.device_get(whole),
        shardings,
    )

  whole = cases.tree(test_sharding.SHAPES)
  params = place(whole)
  placed = fo.state_shardings(tx, params, shardings)
  state = jax.jit(tx.init, out_shardings=placed)(params)
  step = jax.jit(functools.partial(fo.step, tx), donate_argnums=(1, 2))
  for i in range(test_sharding.STEPS):
    grads = place(cases.grads_like(whole, 1 + i))
    params, state = step(grads, state, params)
  result = multihost_utils.process_allgather((params, state), tiled=True)
  if jax.process_index() == 0:
    with open(file, "wb") as output:
      pickle.dump(result, output)


if __name__ == "__main__":
  main()
