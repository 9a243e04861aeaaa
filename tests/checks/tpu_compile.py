"""Compiles the TPU kernel ahead of time for every optimizer, storage and shape.

Needs ``pip install libtpu`` on x86-64 Linux and no TPU. Reads in the optimised HLO
that each leaf is a Mosaic custom call, updates its arrays in place, and that no
array of a leaf's size is copied or given another layout on the way.

Run it as ``python tests/checks/tpu_compile.py``; it takes hours. ``--sample 1`` gives
each case one of the shapes in turn, so that every case and every shape is compiled,
but not every pair. ``--quick`` compiles a few cases and prints them, in which order of
axes XLA keeps arrays, and where the kernel is chosen by itself.
"""

import functools
import itertools
import json
import math
import pathlib
import re
import sys
import time

import jax
import numpy as np

sys.path.append(str(pathlib.Path(__file__).parents[2]))

import flashoptim_jax as fo
from benchmarks import record
from benchmarks.support import leaf_sets
from benchmarks.support.tpu_ahead_of_time import (
  OPTIMIZERS,
  STORAGES,
  TOPOLOGIES,
  compile_step,
  devices_of,
  single,
)
from flashoptim_jax.kernels.mosaic_layout import axis_order

ODD_SHAPES = [(8, 14336, 64), (4, 5, 72), (1000, 1001), (7, 33), (33, 129)]


def shapes() -> list[tuple[int, ...]]:
  """Distinct shapes that the kernel is for: of rank 2 or more, groups last."""
  models = (leaf_sets.llama3_8b(), leaf_sets.gpt2(), leaf_sets.resnet50())
  found = {shape for model in models for shape in model.values()}
  found |= {(8, 4096, 14336), (64, 2048, 1408), *ODD_SHAPES}
  return sorted(s for s in found if len(s) > 1 and s[-1] >= 32)


def check(chip: str, optimizer: str, storage: str, shapes, dtype="bfloat16") -> dict:
  """Compiles one tree of leaves; returns what its HLO says."""
  tx = OPTIMIZERS[optimizer](storage=STORAGES[storage], implementation="mosaic_tpu")
  params = {str(i): jax.ShapeDtypeStruct(s, dtype) for i, s in enumerate(shapes)}
  start = time.perf_counter()
  compiled = compile_step(tx, params, chip)
  seconds = time.perf_counter() - start
  hlo = compiled.as_text()
  calls = [line for line in hlo.splitlines() if "tpu_custom_call" in line]
  aliased = sum(len(re.findall(r"\{\d*\}: \(\d+, \{\}\)", line)) for line in calls)
  outputs = len(jax.tree.leaves((params, jax.eval_shape(tx.init, params)))) - 1
  return {
    "chip": chip,
    "optimizer": optimizer,
    "storage": storage,
    "dtype": dtype,
    "shapes": [list(shape) for shape in shapes],
    "leaves": len(shapes),
    "kernels": len(calls),
    "outputs": outputs,
    "aliased": aliased,
    "copies": copies(hlo, set(map(math.prod, shapes))),
    "temporaries": compiled.memory_analysis().temp_size_in_bytes,
    "seconds": round(seconds, 1),
  }


def copies(hlo: str, sizes: set[int]) -> list[str]:
  """What moves arrays of as many elements as a leaf has."""
  found = []
  pattern = r"= (.*?) (copy|transpose|reshape|fusion|pad|slice)\("
  for line in hlo.splitlines():
    match = re.search(pattern, line)
    shapes = re.findall(r"\w\[([\d,]*)\]", match[1]) if match else []
    if any(math.prod(map(int, filter(None, s.split(",")))) in sizes for s in shapes):
      found.append(line.strip()[:200])
  return found


def quick() -> list[dict]:
  small = [(3, 100, 1000), (4, 64, 320)]
  # XLA keeps the last of each with its axes in another order.
  cases = [
    ("v4", "adamw", "24/8", [*small, (256, 200)]),
    ("v5e", "adamw", "24/8", [*small, (2, 384, 64)]),
    ("v5p", "lion", "24/8", [*small, (40, 5, 72)]),
    ("v6e", "momentum", "32/32", [*small, (256, 200)]),
  ]
  return [check(*case) for case in cases]


def chosen(chip: str) -> dict[str, dict]:
  """What is compiled for one chip, or four, where nobody asks for a kernel."""
  devices = np.array(devices_of(chip))
  auto, explicit = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit

  def meshed(devices, kind):
    found = jax.sharding.Mesh(devices, ("x",), axis_types=(kind,))
    return jax.sharding.NamedSharding(found, jax.sharding.PartitionSpec("x"))

  placements = {
    "one, no mesh": jax.sharding.SingleDeviceSharding(devices[0]),
    "one, auto": meshed(devices[:1], auto),
    "all, explicit": meshed(devices, explicit),
    "all, auto": meshed(devices, auto),
    "all, auto, given": meshed(devices, auto),
  }
  result = {}
  for name, sharding in placements.items():
    tx = fo.lion(1e-3)
    params = {"w": jax.ShapeDtypeStruct((512, 1024), "bfloat16", sharding=sharding)}
    if name.endswith("given"):
      tx = fo.with_shardings(tx, params, {"w": sharding})
    state = jax.tree.map(
      lambda a, s=sharding: a.update(sharding=s if a.ndim else None),
      jax.eval_shape(tx.init, params),
    )
    step = jax.jit(functools.partial(fo.step, tx), donate_argnums=(1, 2))
    compiled = step.lower(params, state, params).compile()
    memory = compiled.memory_analysis()
    result[name] = {
      "kernels": compiled.as_text().count("tpu_custom_call"),
      "temporaries": memory.temp_size_in_bytes,
    }
  return result


def orders(chip: str) -> list[dict]:
  """The order of axes in which XLA keeps arrays, and the one the kernel expects."""
  sizes = (1, 2, 3, 4, 5, 7, 8, 9, 16, 33, 64, 72, 100, 128, 130, 200, 256, 1000)
  rng = np.random.default_rng(0)
  drawn = {
    tuple(map(int, rng.choice(sizes, rank))) for rank in (2, 3, 4) for _ in range(150)
  }
  arrays = [
    jax.ShapeDtypeStruct(shape, dtype, sharding=single(chip))
    for shape in sorted({*shapes(), *drawn})
    for dtype in ("float32", "bfloat16", "int16", "int8")
    if math.prod(shape) < 1 << 23
  ]
  compiled = jax.jit(lambda *_: 0, keep_unused=True).lower(*arrays).compile()
  return [
    {
      "shape": list(array.shape),
      "dtype": array.dtype.name,
      "kept": list(found.layout.major_to_minor),
      "expected": list(axis_order(array.shape, array.dtype.itemsize)),
    }
    for array, found in zip(arrays, compiled.input_formats[0], strict=True)
  ]


def main():
  parser = record.parser(__doc__)
  parser.add_argument("--quick", action="store_true")
  parser.add_argument("--sample", type=int, metavar="SHAPES", help="for each case")
  arguments = parser.parse_args()
  if arguments.quick:
    found = {"rows": quick(), "orders": orders("v5e"), "chosen": chosen("v5e")}
    print(json.dumps(found))
    return 0
  every = shapes()
  count = arguments.sample or len(every)
  rows = []
  chips, pairs = list(TOPOLOGIES), list(itertools.product(OPTIMIZERS, STORAGES))
  # Each pair once, on the chips in turn, then each on the next chip: what is done
  # after part of the time says something of all of them.
  cases = [
    (chips[(turn + i) % len(chips)], *pair)
    for turn in range(len(chips))
    for i, pair in enumerate(pairs)
  ]
  for i, case in enumerate(cases):
    # One more for each round, or a chip would meet the same shapes in all of them.
    first = (i + i // len(pairs)) * count
    row = check(*case, [every[(first + j) % len(every)] for j in range(count)])
    print(*case, {k: row[k] for k in ("kernels", "leaves", "copies", "seconds")})
    rows.append(row)
    result = record.about("libtpu", device="") | {"cases": len(cases), "rows": rows}
    record.write("tpu_compile.json", result, arguments.output)
  return int(any(fails(row) for row in rows))


def fails(row: dict) -> bool:
  """Whether a leaf has no kernel, is not updated in place, or is copied."""
  in_place = row["kernels"] == row["leaves"] and row["aliased"] == row["outputs"]
  return not in_place or bool(row["copies"])


if __name__ == "__main__":
  sys.exit(main())
