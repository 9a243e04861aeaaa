"""What the TPU kernel costs, from ahead-of-time compilation alone; needs no TPU.

Needs ``pip install libtpu`` on x86-64 Linux. The compiler writes down the final
bundles (instructions that issue together, one a cycle) of every kernel. A leaf's
bundles over the cycles that HBM needs for the leaf's bytes is the figure: at 1.0
the kernel keeps up with the memory. Bundles of a loop are counted once for each
trip; code that runs in some of the grid's steps is counted in all of them.

Run it as ``python benchmarks/tpu_static.py``; it compiles in one process for each
case, since libtpu reads its flags once, and takes a few minutes.
"""

import argparse
import datetime
import glob
import importlib.metadata
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

RESULTS = pathlib.Path(__file__).parent / "results"
# Name of a topology, HBM bytes/s and clock of a chip (the vendor's public
# figures), and cores that share a grid.
CHIPS = {
    "v4": ("v4:2x2x1", 1228e9, 1.05e9, 2),
    "v5e": ("v5e:2x2", 819e9, 1.5e9, 1),
    "v5p": ("v5p:2x2x1", 2765e9, 1.75e9, 2),
    "v6e": ("v6e:2x2", 1640e9, 1.75e9, 1),
}
SHAPE = (8192, 4096)
FP32_ADAMW_BYTES = 28  # optax.adamw: read 16, write 12


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--case", nargs=3, metavar=("CHIP", "OPTIMIZER", "BACKEND"))
  args = parser.parse_args()
  if args.case:
    print(json.dumps(measure(*args.case)))
    return
  rows = []
  for chip in CHIPS:
    for optimizer in ("adamw", "lion", "momentum", "sgd"):
      rows.append(run(chip, optimizer, "mosaic_tpu"))
    rows.append(run(chip, "adamw", "xla"))
  result = {
      "date": datetime.date.today().isoformat(),
      "jax": importlib.metadata.version("jax"),
      "libtpu": importlib.metadata.version("libtpu"),
      "shape": SHAPE,
      "fp32_adamw_over_hbm_cycles": FP32_ADAMW_BYTES / 12.25,
      "rows": rows,
  }
  (RESULTS / "tpu_static.json").write_text(json.dumps(result, indent=1) + "\n")


def run(*case):
  """Measures one case in a process of its own."""
  command = [sys.executable, __file__, "--case", *case]
  found = subprocess.run(command, check=True, capture_output=True, text=True)
  row = json.loads(found.stdout.splitlines()[-1])
  print(
      f"{row['chip']:4} {row['optimizer']:9} {row['backend']:10}"
      f" bundles {row['bundles']:>9,} /HBM cycles {row['over_hbm_cycles']:6.2f}"
      f" a unit {row['loop_over_hbm_cycles'] or 0:5.2f}"
      f" compile {row['compile_seconds']:5.1f} s"
      f" temporaries {row['temporaries'] >> 20:4} MiB",
      flush=True,
  )
  return row


def measure(chip: str, optimizer: str, backend: str) -> dict:
  """Compiles the update of one leaf; returns a row of the table."""
  dump = tempfile.mkdtemp(prefix="llo_")
  os.environ |= {
      "TPU_SKIP_MDS_QUERY": "1",
      "JAX_PLATFORMS": "cpu",
      "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true",
  }
  import jax
  import jax.numpy as jnp

  import flashoptim_jax as fo

  _, bandwidth, clock, cores = CHIPS[chip]
  tx = {
      "adamw": lambda: fo.adamw(1e-3, implementation=backend),
      "lion": lambda: fo.lion(1e-3, implementation=backend),
      "momentum": lambda: fo.sgd(1e-3, momentum=0.9, implementation=backend),
      "sgd": lambda: fo.sgd(1e-3, implementation=backend),
  }[optimizer]()
  params = {"w": jax.ShapeDtypeStruct(SHAPE, jnp.bfloat16)}
  state = jax.eval_shape(tx.init, params)
  start = time.perf_counter()
  compiled = compile_step(tx, params, state, chip)
  seconds = time.perf_counter() - start
  arrays = [*jax.tree.leaves((params, params, params)), *2 * jax.tree.leaves(state)]
  # The gradient is read, the parameter and the state are read and written.
  nbytes = sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays)
  cycles = nbytes / bandwidth * clock * cores
  kernels = dict(read_bundles(dump))
  loop, blocks = None, 1
  if backend == "mosaic_tpu":
    (counts,) = (c for name, c in kernels.items() if "flashoptim" in name)
    blocks, units = grid(compiled.as_text(), counts)
    total = blocks * counts[1] + units * counts[2]
    loop = units * counts[2] / cycles
  else:
    total = None
  return {
      "chip": chip,
      "optimizer": optimizer,
      "backend": backend,
      "bytes_per_parameter": nbytes / math.prod(SHAPE),
      "hbm_cycles": cycles,
      "bundles": total,
      "over_hbm_cycles": total / cycles,
      "loop_over_hbm_cycles": loop,
      "bundles_by_loop_depth": counts,
      "compile_seconds": seconds,
      "temporaries": compiled.memory_analysis().temp_size_in_bytes,
  }


if __name__ == "__main__":
  main()
