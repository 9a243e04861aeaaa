"""Train steps over whole TPU slices, compiled ahead of time: memory, communication.

    python benchmarks/tpu/sharded_update.py

Needs libtpu, and no TPU: nothing runs. A Llama-shaped model is split over FSDP ×
TP on 256 v5e chips and 64 v5p chips. Says what a device holds, beside what the
arithmetic says; which collectives the update adds (the update alone is compiled
too, and is to have none); and where the arguments are with the state in host
memory. Writes results/tpu_sharding.json.
"""

import functools
import json
import math
import os
import pathlib
import re
import sys

os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu"}

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

sys.path.append(str(pathlib.Path(__file__).parents[2]))

import flashoptim_jax as fo
from benchmarks import record
from benchmarks.support import llama

COLLECTIVE = re.compile(
  r"(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
)
# Topology, devices along fsdp and tensor.
SLICES = {"v5e:16x16": (32, 8), "v5p:4x4x4": (8, 8)}
CONFIG = llama.Config(4096, 4, 32, 8, 14336, 32768)


def measure(topology, sizes):
  """Compiles the update and the train step for a slice."""
  found = topologies.get_topology_desc(topology_name=topology, platform="tpu")
  mesh = Mesh(
    np.array(found.devices).reshape(sizes),
    ("fsdp", "tensor"),
    axis_types=(AxisType.Auto,) * 2,
  )

  tx = fo.adamw(1e-3)
  shardings = jax.tree.map(functools.partial(NamedSharding, mesh), llama.SPECS)
  params = llama.placed(llama.structs(CONFIG), shardings)
  batch = jax.ShapeDtypeStruct(
    (2 * sizes[0], 2048), jnp.int32, sharding=NamedSharding(mesh, P("fsdp"))
  )
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  result = {
    "device": found.devices[0].device_kind,
    "devices": math.prod(sizes),
    "mesh": dict(zip(mesh.axis_names, sizes, strict=True)),
    "parameters": count,
  }

  def update(grads, state, params):
    return fo.step(tx, grads, state, params)

  for name, memory_kind in (("resident", None), ("hosted", "pinned_host")):
    placement = fo.state_shardings(tx, params, shardings, memory_kind=memory_kind)
    state = llama.placed(jax.eval_shape(tx.init, params), placement)
    compiled = (
      jax.jit(update, donate_argnums=(1, 2), out_shardings=(shardings, placement))
      .lower(params, state, params)
      .compile()
    )
    memory = compiled.memory_analysis()
    gradients = sum(llama.per_device(leaf) for leaf in jax.tree.leaves(params))
    kept = memory.argument_size_in_bytes - gradients
    result[name] = {
      "collectives_in_update": sorted(set(COLLECTIVE.findall(compiled.as_text()))),
      "params_and_state_bytes": kept + memory.host_argument_size_in_bytes,
      "of_arithmetic": (kept + memory.host_argument_size_in_bytes)
      / ((2 + 3.125) * count / result["devices"]),
      "device_argument_bytes": memory.argument_size_in_bytes,
      "host_argument_bytes": memory.host_argument_size_in_bytes,
      "temporary_bytes": memory.temp_size_in_bytes,
      "aliased_bytes": memory.alias_size_in_bytes,
      "host_aliased_bytes": memory.host_alias_size_in_bytes,
    }
    if memory_kind is None:
      step = jax.jit(
        llama.ordinary_step(CONFIG, tx),
        donate_argnums=(0, 1),
        out_shardings=(None, shardings, placement),
      )
      memory = step.lower(params, state, batch, batch).compile().memory_analysis()
      result["train_step"] = {
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "aliased_bytes": memory.alias_size_in_bytes,
      }
  return result


def main():
  arguments = record.parser(__doc__).parse_args()
  results = record.about("libtpu", device="") | {"slices": {}}
  for topology, sizes in SLICES.items():
    results["slices"][topology] = measure(topology, sizes)
    print(topology, json.dumps(results["slices"][topology], indent=1), flush=True)
    record.write("tpu_sharding.json", results, arguments.output)


if __name__ == "__main__":
  main()
