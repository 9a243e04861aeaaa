"""Time of an optimizer step on a GPU, beside the alternatives, in one run.

    python benchmarks/speed/gpu_step.py

Each optimizer takes many steps inside one jit, with the gradients fixed. Of JAX's
optimizers two times are taken: "milliseconds", from start to end, which counts
the host's launches where the device waits for them, and "device_milliseconds",
in which the device was busy, from a profile. PyTorch's optimizers take their
steps one after the other between two CUDA events. The copy ceiling is ``x + 1``
on 2 GiB, bytes read and written. "Of copy" is the bytes that a step has to move,
over the device's time, over that ceiling.

The peers, if installed where ``--peers`` says (a folder on its own path, since
one of them has this package's import name): flashoptim and flashoptim-jax.
"""

import functools
import gzip
import json
import math
import pathlib
import subprocess
import sys
import tempfile
import time

sys.path.append(str(pathlib.Path(__file__).parents[2]))

from benchmarks import record
from benchmarks.support.leaf_sets import LEAF_SETS

# Bytes per parameter and step: gradient read; parameter, correction and moments
# read and written. Updates are written, and read with the parameter that they
# are added to.
BYTES = {
  "adamw": 12.25,
  "adamw, Storage(16)": 10.25,
  "lion": 10.125,
  "sgd momentum": 10.125,
  "optax.adamw fp32": 30.0,
}


def random_tree(shapes, dtype, scale):
  """Normal arrays of the given shapes, by name."""
  import jax

  sizes = [math.prod(shape) for shape in shapes.values()]

  # One program: one for each shape takes half a minute to compile.
  @jax.jit
  def fill(key):
    values = scale * jax.random.normal(key, sum(sizes), dtype)
    parts = jax.lax.split(values, sizes)
    return [x.reshape(shape) for x, shape in zip(parts, shapes.values(), strict=True)]

  return dict(zip(shapes, fill(jax.random.key(0)), strict=True))


def time_jax(step, carry, steps, repeats=5):
  """Milliseconds per step, seconds to compile, temporary bytes."""
  import jax

  loop = jax.jit(
    lambda carry: jax.lax.fori_loop(0, steps, lambda _, c: step(c), carry),
    donate_argnums=0,
  )
  start = time.perf_counter()
  compiled = loop.lower(carry).compile()
  compile_seconds = time.perf_counter() - start
  carry = jax.block_until_ready(compiled(carry))
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    carry = jax.block_until_ready(compiled(carry))
    times.append((time.perf_counter() - start) / steps)
  carries = [carry]

  def run():
    carries[0] = jax.block_until_ready(compiled(carries[0]))

  return {
    "milliseconds": 1e3 * sorted(times)[repeats // 2],
    "device_milliseconds": device_milliseconds(run) / steps,
    "compile_seconds": compile_seconds,
    "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
  }


def device_milliseconds(run):
  """Time for which the GPU's streams were busy while ``run`` ran."""
  import jax

  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      run()
    (path,) = pathlib.Path(folder).rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
  gpus = {
    event["pid"]
    for event in events
    if event.get("name") == "process_name" and "GPU" in event["args"]["name"]
  }
  spans = sorted(
    (event["ts"], event["ts"] + event["dur"])
    for event in events
    if event.get("ph") == "X" and event["pid"] in gpus
  )
  busy, until = 0.0, 0.0
  for start, end in spans:
    busy += max(0.0, end - max(start, until))
    until = max(until, end)
  return busy / 1e3


def copy_ceiling():
  """Bytes per second that a copy reads and writes."""
  import jax.numpy as jnp

  x = jnp.zeros(1 << 30, jnp.bfloat16)
  found = time_jax(lambda x: x + jnp.bfloat16(1), x, 20)
  return 2 * x.nbytes / found["milliseconds"] * 1e3


def flash_step(tx, via="step"):
  """A step of our optimizers, through ``step`` or ``update``."""
  import optax

  import flashoptim_jax as fo

  def step(carry):
    grads, params, state = carry
    if via == "step":
      return grads, *fo.step(tx, grads, state, params)
    updates, state = tx.update(grads, state, params)
    return grads, optax.apply_updates(params, updates), state

  return step


def flash_carry(tx, shapes):
  """What :func:`flash_step` takes."""
  import jax
  import jax.numpy as jnp

  import flashoptim_jax as fo

  grads = random_tree(shapes, jnp.bfloat16, 0.01)
  from_fp32 = jax.jit(functools.partial(fo.from_fp32, tx))
  return grads, *from_fp32(random_tree(shapes, jnp.float32, 0.02))


def optax_step(tx):
  """A step of one of Optax's on float32 masters, and the cast to bfloat16."""
  import jax.numpy as jnp
  import optax

  def step(carry):
    grads, masters, _, state = carry
    updates, state = tx.update(cast(grads, jnp.float32), state, masters)
    masters = optax.apply_updates(masters, updates)
    return grads, masters, cast(masters, jnp.bfloat16), state

  return step


def optax_carry(tx, shapes):
  """What :func:`optax_step` takes."""
  import jax
  import jax.numpy as jnp

  masters = random_tree(shapes, jnp.float32, 0.02)
  grads = random_tree(shapes, jnp.bfloat16, 0.01)
  params = jax.jit(functools.partial(cast, dtype=jnp.bfloat16))(masters)
  return grads, masters, params, jax.jit(tx.init)(masters)


def cast(tree, dtype):
  import jax

  return jax.tree.map(lambda x: x.astype(dtype), tree)


def peer_flashoptim_jax(shapes, steps):
  """flashoptim-jax 0.1.0, whose optimizer has ``init`` and ``step``."""
  import jax.numpy as jnp

  import flashoptim_jax as peer

  tx = peer.flash_adamw(1e-3)

  def step(carry):
    grads, params, state = carry
    return grads, *tx.step(params, state, grads)

  params = random_tree(shapes, jnp.bfloat16, 0.02)
  grads = random_tree(shapes, jnp.bfloat16, 0.01)
  return time_jax(step, (grads, params, tx.init(params)), steps)


def torch_optimizer(shapes, steps, make, dtype, repeats=7):
  """An optimizer of PyTorch, in milliseconds per step."""
  import torch

  torch.manual_seed(0)
  params = []
  for shape in shapes.values():
    param = torch.nn.Parameter(0.02 * torch.randn(shape, device="cuda").to(dtype))
    param.grad = 0.01 * torch.randn(shape, device="cuda").to(dtype)
    params.append(param)
  optimizer = make(params)
  for _ in range(3):
    optimizer.step()
  times = []
  for _ in range(repeats):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(steps):
      optimizer.step()
    end.record()
    torch.cuda.synchronize()
    times.append(start.elapsed_time(end) / steps)
  return {"milliseconds": sorted(times)[repeats // 2]}


def peer_flashoptim(shapes, steps):
  """Flashoptim 0.1.4 (PyTorch)."""
  import flashoptim
  import torch

  return torch_optimizer(
    shapes, steps, lambda p: flashoptim.FlashAdamW(p, lr=1e-3), torch.bfloat16
  )


def peer_torch_fused(shapes, steps):
  """torch.optim.AdamW(fused=True) in float32."""
  import torch

  return torch_optimizer(
    shapes,
    steps,
    lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    torch.float32,
  )


PEERS = {
  "flashoptim (PyTorch)": peer_flashoptim,
  "flashoptim-jax": peer_flashoptim_jax,
  "torch AdamW fused fp32": peer_torch_fused,
}


def measure(leaf_set, row):
  """One cell of the table, in this process."""
  shapes = LEAF_SETS[leaf_set]()
  count = sum(map(math.prod, shapes.values()))
  steps = max(20, min(500, int(1e10 / count)))
  if row in PEERS:
    return PEERS[row](shapes, steps)
  if row == "optax.adamw fp32":
    import optax

    tx = optax.adamw(1e-3)
    return time_jax(optax_step(tx), optax_carry(tx, shapes), steps)
  import flashoptim_jax as fo

  rows = {
    "adamw": (fo.adamw(1e-3), "step"),
    "adamw, update": (fo.adamw(1e-3), "update"),
    "adamw, XLA": (fo.adamw(1e-3, implementation="xla"), "step"),
    "adamw, Storage(16)": (fo.adamw(1e-3, storage=fo.Storage(16)), "step"),
    "lion": (fo.lion(1e-3), "step"),
    "sgd momentum": (fo.sgd(1e-3, 0.9), "step"),
  }
  tx, via = rows[row]
  return time_jax(flash_step(tx, via), flash_carry(tx, shapes), steps)


OURS = (
  "adamw",
  "adamw, update",
  "adamw, XLA",
  "adamw, Storage(16)",
  "lion",
  "sgd momentum",
  "optax.adamw fp32",
)


def in_subprocess(arguments, path):
  """Runs this script for a peer, in a process with another path."""
  import os

  environment = {
    **os.environ,
    "PYTHONPATH": path,
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
  }
  # jax-triton sets this to a folder that can't exist.
  environment.pop("TRITON_CACHE_DIR", None)
  done = subprocess.run(
    [sys.executable, __file__, *arguments],
    capture_output=True,
    text=True,
    env=environment,
    check=False,
  )
  if done.returncode:
    return {"error": done.stderr.strip().splitlines()[-1:]}
  return json.loads(done.stdout.splitlines()[-1])


def save(results, folder):
  """Writes what has been measured, beside earlier runs of other leaf sets."""
  found = record.earlier("gpu_step.json", folder) | results
  ordered = {name: found[name] for name in LEAF_SETS if name in found}
  record.write("gpu_step.json", ordered, folder)


def table(results):
  """Markdown: device time, and the share of the copy ceiling."""
  lines = ["| " + " | ".join(["", *results]) + " |"]
  lines.append("|---" * (len(results) + 1) + "|")
  for row in (*OURS, *PEERS):
    cells = [row]
    for found in results.values():
      cell = found["rows"].get(row, {})
      time = cell.get("device_milliseconds", cell.get("milliseconds"))
      text = "–" if time is None else f"{time:.3f} ms"
      if "of_copy" in cell:
        text += f", {cell['of_copy']:.0%}"
      cells.append(text)
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines)


def main():
  parser = record.parser(__doc__)
  parser.add_argument("--peers", help="the path on which the peers are installed")
  parser.add_argument("--leaf-sets", nargs="*", default=list(LEAF_SETS))
  parser.add_argument("--one", nargs=2, metavar=("LEAF_SET", "ROW"))
  arguments = parser.parse_args()
  if arguments.one:
    print(json.dumps(measure(*arguments.one)))
    return

  # Before this process takes the GPU's memory.
  peers: dict[str, dict[str, dict]] = {
    leaf_set: {
      row: in_subprocess(["--one", leaf_set, row], arguments.peers)
      for row in PEERS
      if arguments.peers
    }
    for leaf_set in arguments.leaf_sets
  }

  ceiling = copy_ceiling()
  results = {}
  for leaf_set, rows in peers.items():
    results[leaf_set] = record.about("triton", "jax-triton")
    results[leaf_set]["copy_bytes_per_second"] = ceiling
    shapes = LEAF_SETS[leaf_set]()
    count = sum(map(math.prod, shapes.values()))
    for row in OURS:
      cell = rows[row] = measure(leaf_set, row)
      if row in BYTES:
        seconds = cell["device_milliseconds"] / 1e3
        cell["of_copy"] = BYTES[row] * count / seconds / ceiling
      print(leaf_set, row, cell, flush=True)
      ordered = {row: rows[row] for row in (*OURS, *PEERS) if row in rows}
      results[leaf_set]["rows"] = ordered
      save(results, arguments.output)
  print(table(results))


if __name__ == "__main__":
  main()
