"""Bytes per parameter of Llama-3-8B's shapes in bf16; allocates nothing.

Run it as ``python benchmarks/llama_memory.py``.
"""

import datetime
import json
import pathlib

import jax
import jax.numpy as jnp

import flashoptim_jax as fo

RESULTS = pathlib.Path(__file__).parent / "results"
LAYERS, DIM, MLP, KEY_VALUE, VOCABULARY = 32, 4096, 14336, 1024, 128256


def llama_3_8b():
  """The parameters' shapes, the layers stacked."""
  layer = {
    "query": (DIM, DIM),
    "key": (DIM, KEY_VALUE),
    "value": (DIM, KEY_VALUE),
    "out": (DIM, DIM),
    "gate": (DIM, MLP),
    "up": (DIM, MLP),
    "down": (MLP, DIM),
    "attention_norm": (DIM,),
    "mlp_norm": (DIM,),
  }
  shapes = {name: (LAYERS, *shape) for name, shape in layer.items()}
  shapes |= {"embed": (VOCABULARY, DIM), "head": (DIM, VOCABULARY), "norm": (DIM,)}
  return {
    name: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    for name, shape in shapes.items()
  }


def main():
  report = fo.memory_report(fo.adamw(1e-3), llama_3_8b())
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
