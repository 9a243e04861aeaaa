"""What the TPU kernel costs, from ahead-of-time compilation alone; needs no TPU.

Needs ``pip install libtpu`` on x86-64 Linux. The compiler writes down the final
bundles (instructions that issue together, one a cycle) of every kernel. A leaf's
bundles over the cycles that HBM needs for the leaf's bytes is the figure: at 1.0
the kernel keeps up with the memory; where two cores share a grid and the memory,
each is counted with half of both. Bundles of a loop are counted once for each trip;
code that runs in some of the grid's steps is counted in all of them. XLA's own
fusions have no such listing, so for them the sum of the compiler's estimates of
cycles stands in.

Run it as ``python benchmarks/tpu/kernel_cycles.py``; it compiles in one process for
each case, since libtpu reads its flags once, and takes a few minutes.
"""

import collections
import glob
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

sys.path.append(str(pathlib.Path(__file__).parents[2]))

from benchmarks import record

# HBM bytes/s and clock of a chip (the vendor's public
# figures), and cores that share a grid.
CHIPS = {
  "v5e": (819e9, 1.5e9, 1),
  "v5p": (2765e9, 1.75e9, 2),
  "v6e": (1640e9, 1.75e9, 1),
  "v4": (1228e9, 1.05e9, 2),
}
SHAPE = (8192, 4096)
# XLA keeps these with the axis of their groups along rows.
ODD_SHAPES = [(16384, 1000), (8, 14336, 64)]
FP32_ADAMW_BYTES = 28  # optax.adamw: read 16, write 12


def main():
  parser = record.parser(__doc__)
  names = ("CHIP", "OPTIMIZER", "BACKEND", "SHAPE")
  parser.add_argument("--case", nargs=4, metavar=names)
  args = parser.parse_args()
  if args.case:
    *case, shape = args.case
    print(json.dumps(measure(*case, tuple(json.loads(shape)))))
    return
  optimizers = ("adamw", "lion", "momentum", "sgd")
  cases = [(chip, name, "mosaic_tpu", SHAPE) for chip in CHIPS for name in optimizers]
  cases += [
    (chip, "adamw", "mosaic_tpu", shape) for chip in CHIPS for shape in ODD_SHAPES
  ]
  rows = []
  # XLA takes minutes to compile its form, so it is compared on one chip.
  for case in [*cases, ("v5e", "adamw", "xla", SHAPE)]:
    rows.append(run(*case))
    result = {
      **record.about("libtpu", device=""),
      "fp32_adamw_over_hbm_cycles": round(FP32_ADAMW_BYTES / 12.25, 3),
      "rows": rows,
    }
    record.write("tpu_static.json", result, args.output)


def run(*case):
  """Measures one case in a process of its own."""
  *names, shape = case
  command = [sys.executable, __file__, "--case", *names, json.dumps(shape)]
  found = subprocess.run(command, check=True, capture_output=True, text=True)
  row = json.loads(found.stdout.splitlines()[-1])
  print(
    f"{row['chip']:4} {row['optimizer']:9} {row['backend']:10} {row['shape']}"
    f" {row['cycles']:>10,} cycles, over HBM's {row['over_hbm_cycles']:6.2f}"
    f" (inner loop {row['loop_over_hbm_cycles'] or 0:5.2f})"
    f" compile {row['compile_seconds']:5.1f} s"
    f" temporaries {row['temporary_bytes'] >> 20:4} MiB",
    flush=True,
  )
  return row


def measure(chip: str, optimizer: str, backend: str, shape: tuple[int, ...]) -> dict:
  """Compiles the update of one leaf; returns a row of the table."""
  dump = tempfile.mkdtemp(prefix="llo_")
  flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
  os.environ["LIBTPU_INIT_ARGS"] = flags
  import jax
  import jax.numpy as jnp

  from benchmarks.support import tpu_ahead_of_time
  from flashoptim_jax.kernels.mosaic_layout import UNIT, cut_into_blocks

  bandwidth, clock, cores = CHIPS[chip]
  tx = tpu_ahead_of_time.OPTIMIZERS[optimizer](implementation=backend)
  params = {"w": jax.ShapeDtypeStruct(shape, jnp.bfloat16)}
  state = jax.eval_shape(tx.init, params)
  start = time.perf_counter()
  compiled = tpu_ahead_of_time.compile_step(tx, params, chip)
  seconds = time.perf_counter() - start
  # The gradient is read, the parameter and the state are read and written.
  arrays = 3 * jax.tree.leaves(params) + 2 * jax.tree.leaves(state)
  nbytes = sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays)
  cycles = nbytes / bandwidth * clock
  counts = loop = vmem = None
  if backend == "mosaic_tpu":
    counts = bundles_by_depth(dump)
    mesh = tpu_ahead_of_time.mesh(chip).abstract_mesh
    with jax.sharding.use_abstract_mesh(mesh):
      blocks = cut_into_blocks(shape, 2, nbytes / math.prod(shape), optimizer != "sgd")
    rows = math.prod(blocks.leading) * math.ceil(blocks.rows / blocks.block_rows)
    units = rows * math.ceil(blocks.columns / (UNIT // blocks.block_rows))
    steps = rows * math.ceil(blocks.columns / blocks.block_columns)
    block = blocks.block_rows * blocks.block_columns
    vmem = round(2 * nbytes * block / math.prod(shape))
    loop = units * counts[2] / cores
    total = steps * counts[1] / cores + loop
  else:
    estimates = re.findall(r'"estimated_cycles":"(\d+)"', compiled.as_text())
    total = sum(map(int, estimates))
  return {
    "chip": chip,
    "optimizer": optimizer,
    "backend": backend,
    "shape": shape,
    "bytes_per_parameter": round(nbytes / math.prod(shape), 4),
    "hbm_cycles": round(cycles),
    "cycles": round(total),
    "over_hbm_cycles": round(total / cycles, 3),
    "loop_over_hbm_cycles": loop and round(loop / cycles, 3),
    "bundles_by_loop_depth": counts,
    "compile_seconds": round(seconds, 1),
    "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
    "vmem_block_bytes": vmem,
  }


def bundles_by_depth(dump: str) -> dict[int, int]:
  """Bundles of the kernel by the depth of the loops that they are in."""
  names = glob.glob(f"{dump}/*flashoptim_update*final_bundles.txt")
  (name,) = (name for name in names if "schedule" not in name)
  depths = collections.Counter()
  for line in pathlib.Path(name).read_text().splitlines():
    bundle = re.match(r"\s*(?:0x[0-9a-f]+|0)\s+[A-Z]*\s*:\s*((?:> ?)*)\s*\{", line)
    if bundle:
      depths[bundle[1].count(">")] += 1
  return dict(depths)


if __name__ == "__main__":
  main()
