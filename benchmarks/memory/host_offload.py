"""An optimizer step with its state in host memory, beside the resident one.

    python benchmarks/memory/host_offload.py

Parameters and gradients of a Llama-shaped model of 1.2 B parameters in bfloat16;
``adamw`` with its state on the device and in pinned host memory, and, for what
the bytes are worth, float32 moments in pinned host memory. Says how long a step
takes, what XLA plans to hold on the device besides arguments, and the allocator's
peak beyond parameters and gradients.
"""

import pathlib
import sys
import time

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

sys.path.append(str(pathlib.Path(__file__).parents[2]))

import flashoptim_jax as fo
from benchmarks import record
from benchmarks.support.leaf_sets import llama32_1b

STEPS = 5


def make(seed, scale):
  """Normal arrays in bfloat16."""
  shapes = llama32_1b()
  keys = jax.random.split(jax.random.key(seed), len(shapes))
  return {
    name: scale * jax.random.normal(key, shape, jnp.bfloat16)
    for key, (name, shape) in zip(keys, shapes.items(), strict=True)
  }


def measure(storage, memory_kind):
  """Memory and time of one variant, and its parameters' checksum."""
  device = jax.devices()[0]
  tx = fo.adamw(1e-3, storage=storage)
  params, grads = make(0, 0.02), make(1, 0.01)
  # The whole device state at once, before it is moved, would count as a peak.
  resident = fo.state_shardings(tx, params, SingleDeviceSharding(device))
  placed = fo.state_shardings(
    tx, params, SingleDeviceSharding(device), memory_kind=memory_kind
  )
  state = jax.tree.map(
    lambda leaf, here, there: jax.device_put(
      jnp.zeros(leaf.shape, leaf.dtype, device=here), there
    ),
    jax.eval_shape(tx.init, params),
    resident,
    placed,
  )
  nbytes = {
    name: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    for name, tree in (("params", params), ("state", state))
  }
  step = jax.jit(
    lambda grads, state, params: fo.step(tx, grads, state, params),
    donate_argnums=(1, 2),
    out_shardings=(None, placed),
  )
  compiled = step.lower(grads, state, params).compile()
  analysis = compiled.memory_analysis()
  before = (device.memory_stats() or {}).get("bytes_in_use", 0)
  times = []
  for _ in range(STEPS):
    start = time.perf_counter()
    params, state = jax.block_until_ready(compiled(grads, state, params))
    times.append(time.perf_counter() - start)
  stats = device.memory_stats() or {}
  kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.mu)}
  return {
    "storage": repr(storage),
    "memory_kind": memory_kind or "device",
    "state_is_in": sorted(kinds),
    "milliseconds": 1e3 * sorted(times)[STEPS // 2],
    "params_bytes": nbytes["params"],
    "state_bytes": nbytes["state"],
    "argument_bytes": analysis.argument_size_in_bytes,
    "host_argument_bytes": analysis.host_argument_size_in_bytes,
    "temporary_bytes": analysis.temp_size_in_bytes,
    "aliased_bytes": analysis.alias_size_in_bytes,
    "host_aliased_bytes": analysis.host_alias_size_in_bytes,
    "in_use_before_bytes": before,
    "peak_bytes": stats.get("peak_bytes_in_use", 0),
    "checksum": float(
      sum(jnp.sum(jnp.abs(p.astype(jnp.float32))) for p in params.values())
    ),
  }


def main():
  arguments = record.parser(__doc__).parse_args()
  # Offloaded first: the allocator's peak is that of the whole process so far.
  variants = {
    "host, 24/8": (fo.Storage(), "pinned_host"),
    "device, 24/8": (fo.Storage(), None),
    "host, float32 moments": (fo.Storage(moment_bits=32), "pinned_host"),
  }
  result = record.about("triton", "jax-triton") | {"variants": {}}
  for name, variant in variants.items():
    found = result["variants"][name] = measure(*variant)
    record.write("host_offload.json", result, arguments.output)
    print(f"{name}: {found['milliseconds']:.1f} ms, in GiB:", flush=True)
    for key, value in found.items():
      if key.endswith("_bytes"):
        print(f"  {key.removesuffix('_bytes'):16}{value / 2**30:8.3f}", flush=True)


if __name__ == "__main__":
  main()
