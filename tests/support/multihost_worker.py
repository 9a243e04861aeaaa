"""One process of several: trains with given gradients, and saves the result.

Usage: python -m tests.support.multihost_worker COORDINATOR PROCESSES PROCESS \
  OPTIMIZER FILE
"""

import functools
import pickle
import sys

import jax
from jax.experimental import multihost_utils

import flashoptim_jax as fo
from tests.support import cases, meshes


def main():
  coordinator, processes, process, name, file = sys.argv[1:]
  jax.distributed.initialize(coordinator, int(processes), int(process))
  mesh = meshes.make_mesh("4x2")
  shardings = meshes.shardings_on(mesh)
  tx = cases.make(name)

  def place(whole):
    return jax.tree.map(
      lambda leaf, sharding: jax.make_array_from_callback(
        leaf.shape, sharding, leaf.__getitem__
      ),
      jax.device_get(whole),
      shardings,
    )

  whole = cases.tree(meshes.SHAPES)
  params = place(whole)
  placed = fo.state_shardings(tx, params, shardings)
  state = jax.jit(tx.init, out_shardings=placed)(params)
  step = jax.jit(functools.partial(fo.step, tx), donate_argnums=(1, 2))
  for i in range(meshes.STEPS):
    grads = place(cases.grads_like(whole, 1 + i))
    params, state = step(grads, state, params)
  result = multihost_utils.process_allgather((params, state), tiled=True)
  if jax.process_index() == 0:
    with open(file, "wb") as output:
      pickle.dump(result, output)


if __name__ == "__main__":
  main()
