"""Bytes per parameter of Llama-3-8B's shapes in bf16; allocates nothing.

Run it as ``python benchmarks/memory/bytes_per_param.py``.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp

sys.path.append(str(pathlib.Path(__file__).parents[2]))

import flashoptim_jax as fo
from benchmarks import record
from benchmarks.support.leaf_sets import llama3_8b


def main():
  arguments = record.parser(__doc__).parse_args()
  params = {
    name: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    for name, shape in llama3_8b().items()
  }
  report = fo.memory_report(fo.adamw(1e-3), params)
  print(report)
  components = ("params", "correction", "moments", "scales", "other", "gradients")
  result = {
    **record.about(device=""),
    "parameters": report.num_params,
    "bytes_per_param": report.bytes_per_param,
    "bytes": {name: getattr(report, name) for name in components},
    "baseline_bytes": dict(report.baseline),
  }
  record.write("llama_memory.json", result, arguments.output)


if __name__ == "__main__":
  main()
