"""Bytes per parameter of Llama-3-8B's shapes in bf16; allocates nothing.

Run it as ``python benchmarks/llama_memory.py``.
"""

import datetime
import json
import pathlib

import jax
import jax.numpy as jnp
from leaf_sets import llama3_8b

import flashoptim_jax as fo

RESULTS = pathlib.Path(__file__).parent / "results"


def main():
  params = {
    name: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    for name, shape in llama3_8b().items()
  }
  report = fo.memory_report(fo.adamw(1e-3), params)
  print(report)
  components = ("params", "correction", "moments", "scales", "other", "gradients")
  result = {
    "date": datetime.date.today().isoformat(),
    "flashoptim_jax": fo.__version__,
    "parameters": report.num_params,
    "bytes_per_param": report.bytes_per_param,
    "bytes": {name: getattr(report, name) for name in components},
    "baseline_bytes": dict(report.baseline),
  }
  path = RESULTS / "llama_memory.json"
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
  main()
