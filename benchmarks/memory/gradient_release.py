"""Memory of a training step with and without gradient release, by XLA's account.

    python benchmarks/memory/gradient_release.py
    python benchmarks/memory/gradient_release.py --tpu v5e:2x2 --tpu v5e:4x4

Compiles a 24-layer Llama-architecture model's step for this machine's devices or,
with libtpu installed, ahead of time for TPUs that need not be there, every
parameter split over all chips of the slice and the batch with it. Nothing runs.
Writes results/release_memory_<where>.json.
"""

import json
import os
import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).parents[2]))

from benchmarks import record


def main():
  parser = record.parser(__doc__)
  parser.add_argument("--tpu", action="append", default=[], metavar="TOPOLOGY")
  arguments = parser.parse_args()
  if arguments.tpu:
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu"}
  for name in arguments.tpu or [None]:
    result = measure(name)
    where = f"tpu_{name.replace(':', '_')}" if name else result["backend"]
    record.write(f"release_memory_{where}.json", result, arguments.output)
    print(json.dumps(result, indent=1), flush=True)


def measure(topology):
  """Compiles both steps, on one device or over a whole topology."""
  import jax
  import jax.numpy as jnp
  import numpy as np
  from jax.experimental import topologies
  from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

  import flashoptim_jax as fo
  from benchmarks.support import llama

  small = topology is None
  config = (
    llama.Config(256, 24, 4, 2, 1024, 1024, chunk=64)
    if small
    else llama.Config(2048, 24, 16, 8, 5632, 32768)
  )
  devices = (
    jax.devices()[:1]
    if small
    else topologies.get_topology_desc(topology_name=topology, platform="tpu").devices
  )
  mesh = Mesh(np.array(devices), ("fsdp",), axis_types=(AxisType.Auto,))
  tokens_per_device = 128 if small else 2048

  def split(struct):
    # The longest axis but the stack's goes over the devices.
    axes = range(len(struct.shape) == 3, struct.ndim)
    axis = max(axes, key=lambda a: struct.shape[a])
    if struct.ndim == 2 and struct.shape[0] == config.layers:
      axis = 1
    spec = [None] * struct.ndim
    if struct.shape[axis] % len(devices) == 0:
      spec[axis] = "fsdp"
    return placed(struct, *spec)

  def placed(struct, *spec):
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=sharding)

  params = jax.tree.map(split, llama.structs(config))
  tx = fo.adamw(1e-3)
  # State arrays are placed as their parameters, scales where they divide.
  state = jax.tree.map(
    lambda s: split(s) if s.ndim else placed(s), jax.eval_shape(tx.init, params)
  )
  batch = jax.ShapeDtypeStruct((len(devices), tokens_per_device), jnp.int32)
  batch = placed(batch, "fsdp")
  grads = sum(llama.per_device(leaf) for leaf in jax.tree.leaves(params))
  kept = sum(llama.per_device(leaf) for leaf in jax.tree.leaves((params, state)))
  result = {
    **record.about("libtpu", device=devices[0].device_kind),
    "backend": devices[0].platform,
    "devices": len(devices),
    "topology": topology,
    "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
    "tokens_per_device": tokens_per_device,
    "per_device_bytes": {"gradients": grads, "params_and_state": kept},
  }
  for name, make in (
    ("ordinary", llama.ordinary_step),
    ("released", llama.released_step),
  ):
    step = jax.jit(
      make(config, tx),
      donate_argnums=(0, 1),
      out_shardings=(
        None,
        *jax.tree.map(lambda s: s.sharding, (params, state)),
      ),
    )
    memory = step.lower(params, state, batch, batch).compile().memory_analysis()
    result["per_device_bytes"][name] = {
      "temporaries": memory.temp_size_in_bytes,
      "aliased": memory.alias_size_in_bytes,
    }
  found = result["per_device_bytes"]
  saved = found["ordinary"]["temporaries"] - found["released"]["temporaries"]
  result["saved_share_of_gradients"] = saved / grads
  result["all_updated_in_place"] = found["released"]["aliased"] >= kept
  return result


if __name__ == "__main__":
  main()
