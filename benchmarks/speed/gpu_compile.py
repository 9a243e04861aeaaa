"""Seconds to compile a step of GPT-2's 148 leaves on a GPU, twice.

    python benchmarks/speed/gpu_compile.py

Each optimizer's step is traced, lowered and compiled in two processes, one after
the other, that share a folder of JAX's compilation cache, empty at first. The
second should find its program there. Triton kernels are compiled while the step is
lowered, before JAX looks into its cache. What Triton imports is timed apart: where
PyTorch is installed, Triton imports it with the first kernel.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

sys.path.append(str(pathlib.Path(__file__).parents[2]))

from benchmarks import record
from benchmarks.support.leaf_sets import LEAF_SETS

LEAF_SET = "GPT-2 124 M"
OPTIMIZERS = ("adamw", "optax.adamw fp32")


def import_seconds():
  """Seconds to import the packages that launching a Triton kernel imports."""
  start = time.perf_counter()
  for name in ("triton", "jax_triton", "torch"):
    if importlib.util.find_spec(name):
      importlib.import_module(name)
  return time.perf_counter() - start


def compile_once(optimizer):
  """Seconds, and whether the program came from JAX's compilation cache."""
  import jax
  import optax

  import flashoptim_jax as fo
  from benchmarks.speed import gpu_step

  ours = optimizer == "adamw"
  tx = fo.adamw(1e-3) if ours else optax.adamw(1e-3)
  step, carry = (
    (gpu_step.flash_step(tx), gpu_step.flash_carry)
    if ours
    else (gpu_step.optax_step(tx), gpu_step.optax_carry)
  )
  shapes = LEAF_SETS[LEAF_SET]()
  types = jax.eval_shape(lambda: carry(tx, shapes))
  hits = []
  jax.monitoring.register_event_listener(
    lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None
  )
  jax.block_until_ready(jax.numpy.zeros(()))  # The device is up.
  hits.clear()
  imports = import_seconds() if ours else 0.0
  start = time.perf_counter()
  lowered = jax.jit(step, donate_argnums=0).lower(types)
  middle = time.perf_counter()
  lowered.compile()
  return {
    "import_seconds": imports,
    "lower_seconds": middle - start,
    "compile_seconds": time.perf_counter() - middle,
    "from_cache": bool(hits),
  }


def in_process(optimizer, cache):
  """``compile_once`` in a process of its own."""
  environment = os.environ | {
    "JAX_COMPILATION_CACHE_DIR": cache,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
  }
  done = subprocess.run(
    [sys.executable, __file__, "--one", optimizer],
    stdout=subprocess.PIPE,
    text=True,
    env=environment,
    check=True,
  )
  return json.loads(done.stdout.splitlines()[-1])


def main():
  parser = record.parser(__doc__)
  parser.add_argument("--one", choices=OPTIMIZERS, help="in this process, once")
  arguments = parser.parse_args()
  if arguments.one:
    print(json.dumps(compile_once(arguments.one)))
    return
  runs = {}
  for optimizer in OPTIMIZERS:
    with tempfile.TemporaryDirectory() as cache:
      runs[optimizer] = {
        run: in_process(optimizer, cache) for run in ("first", "second")
      }
  result = record.about_in_process("triton", "jax-triton") | {"runs": runs}
  record.write("gpu_compile.json", result, arguments.output)
  print(json.dumps(result, indent=1))


if __name__ == "__main__":
  main()
