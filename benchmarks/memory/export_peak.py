"""Peak host memory of exporting a tree of 1.2 B parameters to safetensors.

Llama-3-8B's embedding and three of its layers, with AdamW's state. Linux only: it
reads the process's resident memory.

  JAX_PLATFORMS=cpu python benchmarks/memory/export_peak.py
"""

import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.append(str(pathlib.Path(__file__).parents[2]))

import flashoptim_jax as fo
from benchmarks import record
from benchmarks.support.leaf_sets import llama3_8b

STATUS = pathlib.Path("/proc/self/status")


def resident(field: str) -> int:
  """``VmRSS`` (now) or ``VmHWM`` (peak), in bytes."""
  lines = STATUS.read_text().splitlines()
  return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(field))


def measured(function: Callable[[], Any]) -> dict[str, float]:
  """Bytes above the start at the peak, and seconds."""
  pathlib.Path("/proc/self/clear_refs").write_text("5")  # Resets the peak.
  before, begun = resident("VmRSS"), time.perf_counter()
  function()
  seconds = time.perf_counter() - begun
  return {"extra_bytes": resident("VmHWM") - before, "seconds": seconds}


def draw() -> dict[str, jax.Array]:
  rng = np.random.default_rng(0)
  row = rng.standard_normal(2**20, np.float32)
  return {
    name: jnp.asarray(np.resize(row, shape), jnp.bfloat16)
    for name, shape in llama3_8b(layers=3).items()
  }


def main() -> None:
  arguments = record.parser(__doc__).parse_args()
  tx = fo.adamw(1e-3)
  params = draw()
  opt_state = tx.init(params)
  opt_state = opt_state._replace(
    correction=jax.tree.map(lambda c: c + jnp.int8(5), opt_state.correction)
  )
  jax.block_until_ready(opt_state)
  largest = max(param.nbytes for param in params.values())
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "model.safetensors"
    export = measured(lambda: fo.export_safetensors(path, params, opt_state))
    size = path.stat().st_size
    sharded = measured(
      lambda: fo.export_safetensors(path, params, opt_state, max_shard_bytes=2**30)
    )
  result = {
    **record.about(),
    "parameters": sum(param.size for param in params.values()),
    "largest_leaf_bytes": largest,
    "file_bytes": size,
    "one_file": export,
    "shards_of_1_GiB": sharded,
    "extra_over_largest_leaf": max(export["extra_bytes"], sharded["extra_bytes"])
    / largest,
  }
  record.write("export_memory.json", result, arguments.output)
  print(json.dumps(result, indent=1))


if __name__ == "__main__":
  main()
