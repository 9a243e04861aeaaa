"""FSDP training on the GPUs of one host: memory, speed, equality, communication.

    python benchmarks/memory/fsdp_gpu.py                    # on one GPU and on all
    python benchmarks/memory/fsdp_gpu.py --part train --gpus 1 2 4 --model 8b

train: a Llama-architecture model of 1.1 or 8 billion parameters, every matrix and
the batch split over the GPUs, with optax.adamw on float32 masters, fo.adamw, and
fo.adamw with gradient release. Says what a GPU holds, the allocator's peak, the
time of a step, of the update alone, and what the kernels and the communication
take of a GPU's time, from a profile of the step.
batch: the largest batch that fits by XLA's plan, which in train is the allocator's
peak to the byte. equality: the update on several GPUs
against one, fed with the same gradients, by Triton and by XLA, and the collectives
in its program; then a small model trained on one GPU and on several.

Each cell is a process of its own. As many run at a time as there are GPUs for, and
each is added to results/fsdp_gpu.json when it ends.
"""

import argparse
import bisect
import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

sys.path.append(str(pathlib.Path(__file__).parents[2]))

from benchmarks import record

GIB = 2**30
SEQ = 2048
# Sequences that a GPU takes in a step.
BATCH = {"1b": 8, "8b": 2}
OPTIMIZERS = ("optax", "flash", "released")
COLLECTIVE = re.compile(
  r"(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
)
UPDATE_KERNEL = re.compile(r"update_\d+_leaves")  # Triton's


class Training:
  """A model's train step over some of the process's GPUs."""

  def __init__(self, config, optimizer, devices, sequences, seq=SEQ):
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    import flashoptim_jax as fo
    from benchmarks.support import llama

    flash = optimizer != "optax"
    dtype = jnp.bfloat16 if flash else jnp.float32
    mesh = Mesh(np.array(devices), ("fsdp",), axis_types=(AxisType.Auto,))

    def place(leaf):
      # A stack's first axis is the layers'. Norms' gains stay whole.
      spec = {2: PartitionSpec("fsdp"), 3: PartitionSpec(None, "fsdp")}
      whole = leaf.shape[0] == config.layers and leaf.ndim == 2
      return NamedSharding(
        mesh, PartitionSpec() if whole else spec.get(leaf.ndim, PartitionSpec())
      )

    along_batch = NamedSharding(mesh, PartitionSpec("fsdp"))
    config = dataclasses.replace(config, activations=along_batch)
    self.config = config
    self.tx = (fo if flash else optax).adamw(1e-4, b2=0.95, weight_decay=0.1)
    params = llama.structs(config, dtype)
    state = jax.eval_shape(self.tx.init, params)
    placed = jax.tree.map(place, params)
    state_placed = fo.state_shardings(self.tx, params, placed)
    self.shardings = placed, state_placed
    self.carry = jax.tree.map(
      lambda leaf, sharding: leaf.update(sharding=sharding),
      (params, state),
      self.shardings,
    )
    self.tokens = jax.ShapeDtypeStruct(
      (sequences, seq), jnp.int32, sharding=along_batch
    )
    make = {
      "optax": llama.ordinary_step,
      "flash": llama.ordinary_step,
      "released": llama.released_step,
    }[optimizer]
    self.step = jax.jit(
      make(config, self.tx),
      donate_argnums=(0, 1),
      out_shardings=(None, *self.shardings),
    )

  def compile(self):
    """The step, for donated parameters and state."""
    return self.step.lower(*self.carry, self.tokens, self.tokens).compile()

  def start(self):
    """Parameters and state, sharded from the start."""
    import jax

    from benchmarks.support import llama

    dtype = jax.tree.leaves(self.carry[0])[0].dtype

    def draw():
      return jax.tree.map(lambda leaf: leaf.astype(dtype), llama.init(self.config))

    params = jax.jit(draw, out_shardings=self.shardings[0])()
    return params, jax.jit(self.tx.init, out_shardings=self.shardings[1])(params)

  def update_alone(self, carry, steps=20):
    """Seconds of the update, which consumes params and state, and its program."""
    import jax
    import jax.numpy as jnp

    import flashoptim_jax as fo

    grads = jax.jit(
      lambda: jax.tree.map(
        lambda leaf: jnp.ones(leaf.shape, jnp.bfloat16), self.carry[0]
      ),
      out_shardings=self.shardings[0],
    )()
    update = jax.jit(
      lambda params, state, grads: fo.step(self.tx, grads, state, params),
      donate_argnums=(0, 1),
      out_shardings=self.shardings,
    )
    compiled = update.lower(*carry, grads).compile()
    carry = jax.block_until_ready(compiled(*carry, grads))
    begun = time.perf_counter()
    for _ in range(steps):
      carry = compiled(*carry, grads)
    jax.block_until_ready(carry)
    return (time.perf_counter() - begun) / steps, compiled.as_text()

  def batch(self, seed=0):
    """Random inputs and targets."""
    import jax

    from benchmarks.support import llama

    tokens = llama.random_tokens(self.config, *self.tokens.shape, seed)
    return jax.device_put(tokens, self.tokens.sharding)


def config_of(model):
  import jax

  from benchmarks.support import llama

  config = {"1b": llama.ONE_BILLION, "8b": llama.LLAMA3_8B}[model]
  chunk = SEQ * jax.device_count()
  return dataclasses.replace(config, attention="cudnn", chunk=chunk)


def peak_bytes():
  """The largest peak of the process's GPUs."""
  import jax

  return max(device.memory_stats()["peak_bytes_in_use"] for device in jax.devices())


def train(model, optimizer, warmup=3, steps=10):
  """Memory and time of a training step on all GPUs of the process."""
  import jax

  count = jax.device_count()
  training = Training(config_of(model), optimizer, jax.devices(), count * BATCH[model])
  begun = time.perf_counter()
  compiled = training.compile()
  compile_seconds = time.perf_counter() - begun
  carry, batch = training.start(), training.batch()
  kept = collections.Counter()
  for leaf in jax.tree.leaves(carry):
    for shard in leaf.addressable_shards:
      kept[shard.device] += shard.data.nbytes
  losses, seconds = [], []
  for _ in range(warmup + steps):
    begun = time.perf_counter()
    loss, *carry = jax.block_until_ready(compiled(*carry, *batch))
    seconds.append(time.perf_counter() - begun)
    losses.append(float(loss))
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(2):
        loss, *carry = compiled(*carry, *batch)
      jax.block_until_ready(carry)
    (trace,) = pathlib.Path(folder).rglob("*.xplane.pb")
    busy = busy_seconds(trace)
  peak = peak_bytes()
  update_seconds, update_text = training.update_alone(carry)
  analysis = compiled.memory_analysis()
  return {
    "parameters": sum(leaf.size for leaf in jax.tree.leaves(carry[0])),
    "sequences": training.tokens.shape[0],
    "params_and_state_bytes": max(kept.values()),
    "peak_bytes": peak,
    "argument_bytes": analysis.argument_size_in_bytes,
    "temporary_bytes": analysis.temp_size_in_bytes,
    "aliased_bytes": analysis.alias_size_in_bytes,
    "step_seconds": statistics.median(seconds[warmup:]),
    "update_seconds": update_seconds,
    "collectives_in_update": sorted(set(COLLECTIVE.findall(update_text))),
    "busy_seconds": busy,
    "losses": losses,
    "compile_seconds": compile_seconds,
  }


def busy_seconds(trace, steps=2):
  """Seconds per step of the first GPU's kernels: all, Triton's, communication."""
  import jax

  seconds = dict.fromkeys(("all", "update_kernels", "communication"), 0.0)
  data = jax.profiler.ProfileData.from_file(str(trace))
  plane = next(p for p in data.planes if p.name == "/device:GPU:0")
  for line in plane.lines:
    if not line.name.startswith("Stream"):
      continue
    for event in line.events:
      duration = event.duration_ns * 1e-9 / steps
      seconds["all"] += duration
      if UPDATE_KERNEL.search(event.name):
        seconds["update_kernels"] += duration
      elif event.name.startswith("nccl"):
        seconds["communication"] += duration
  return seconds


def batch(model, optimizer):
  """The most sequences per GPU that XLA's plan fits; allocates nothing."""
  import jax

  count = jax.device_count()
  limit = jax.devices()[0].memory_stats()["bytes_limit"]

  @functools.cache
  def planned(per_gpu):
    training = Training(config_of(model), optimizer, jax.devices(), per_gpu * count)
    found = training.compile().memory_analysis()
    return found.argument_size_in_bytes + found.temp_size_in_bytes

  sequences = bisect.bisect_right(range(1, 256), limit, key=planned)
  return {
    "sequences_per_gpu": sequences,
    "planned_bytes": planned(sequences) if sequences else None,
    "planned_bytes_of_one_more": planned(sequences + 1),
    "limit_bytes": limit,
  }


def equality():
  """One GPU against all of the process, for the update and for training."""
  update = {
    ", ".join(case): update_equality(*case)
    for case in itertools.product(
      ("adamw", "lion", "momentum"), ("triton", "xla"), ("auto", "explicit")
    )
  }
  return {
    "update": update,
    "training": {optimizer: train_equality(optimizer) for optimizer in OPTIMIZERS},
  }


def update_equality(optimizer, implementation, axes, steps=20):
  """The same gradients on one GPU and on all: what differs, what is sent."""
  import jax
  import jax.numpy as jnp
  import numpy as np
  from jax.sharding import AxisType, Mesh, NamedSharding
  from jax.sharding import PartitionSpec as P

  import flashoptim_jax as fo

  make = {
    "adamw": functools.partial(fo.adamw, weight_decay=0.1),
    "lion": fo.lion,
    "momentum": functools.partial(fo.sgd, momentum=0.9),
  }[optimizer]
  tx = make(1e-3, implementation=implementation)
  shapes = {
    "rows": (1024, 768),
    "columns": (768, 2048),
    "stack": (4, 512, 1408),
    "odd": (16, 33),
    "gain": (4096,),
  }
  specs = {
    "rows": P("x"),
    "columns": P(None, "x"),
    "stack": P(None, "x"),
    "odd": P("x"),
    "gain": P(),
  }

  def draw(key):
    return {
      name: jax.random.normal(jax.random.fold_in(key, i), shape, jnp.bfloat16)
      for i, (name, shape) in enumerate(shapes.items())
    }

  params, *grads = map(draw, jax.random.split(jax.random.key(0), steps + 1))

  def run(devices):
    kind = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}[axes]
    mesh = Mesh(np.array(devices), ("x",), axis_types=(kind,))
    placed = jax.tree.map(functools.partial(NamedSharding, mesh), specs)
    state_placed = fo.state_shardings(tx, params, placed)
    step = jax.jit(
      lambda grads, state, params: fo.step(tx, grads, state, params),
      out_shardings=(placed, state_placed),
    )
    p = jax.device_put(params, placed)
    s = jax.device_put(tx.init(params), state_placed)
    text = step.lower(p, s, p).compile().as_text()
    for g in grads:
      p, s = step(jax.device_put(g, placed), s, p)
    return jax.tree.leaves(jax.device_get((p, s))), text

  (one, _), (many, text) = run(jax.devices()[:1]), run(jax.devices())
  return {
    "elements": sum(np.size(leaf) for leaf in one),
    "differ": int(sum(map(np.sum, map(np.not_equal, one, many)))),
    "collectives": sorted(set(COLLECTIVE.findall(text))),
    "kernels": len(re.findall(r'custom_call_target="[^"]*triton', text)),
  }


def train_equality(optimizer, steps=20):
  """A small model's training on one GPU and on all, with the same batches.

  Sums over the batch are then made in another order, with every optimizer.
  """
  import jax
  import numpy as np

  import flashoptim_jax as fo
  from benchmarks.support import llama

  config = llama.Config(512, 4, 8, 4, 1408, 4096, attention="cudnn")

  def run(devices):
    training = Training(config, optimizer, devices, 16, seq=256)
    carry, losses = training.start(), []
    for i in range(steps):
      loss, *carry = training.step(*carry, *training.batch(seed=i))
      losses.append(float(loss))
    params = carry[0] if optimizer == "optax" else fo.to_fp32(*carry)
    return np.array(losses), jax.tree.leaves(jax.device_get(params))

  (loss, one), (sharded_loss, many) = run(jax.devices()[:1]), run(jax.devices())
  squares = [
    (np.sum((a - b) ** 2), np.sum(a**2)) for a, b in zip(one, many, strict=True)
  ]
  difference, size = np.sqrt(np.sum(squares, axis=0))
  return {
    "final_loss": float(loss[-1]),
    "largest_loss_difference": float(np.max(np.abs(loss - sharded_loss))),
    "relative_difference_of_parameters": float(difference / size),
  }


PARTS = {"train": train, "batch": batch, "equality": equality}


class Cell(NamedTuple):
  """One process: a part, its arguments and its number of GPUs."""

  part: str
  arguments: tuple[str, ...]
  gpus: int

  def run(self, gpus):
    """Runs it on the GPUs with these numbers.

    Returns:
      The exit code and what was printed.
    """
    environment = os.environ | {
      "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)),
      "TF_CPP_MIN_LOG_LEVEL": "2",
      "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
    }
    if self.part == "batch":  # They share their GPUs; XLA's trials would fill them.
      environment |= {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_FLAGS": "--xla_gpu_autotune_level=0",
      }
    done = subprocess.run(
      [sys.executable, __file__, "--here", self.part, *self.arguments],
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      env=environment,
      check=False,
    )
    return done.returncode, done.stdout.splitlines()


def cells(parts, models, gpus):
  """The cells to run, those that need most GPUs first."""
  grid = list(itertools.product(models, OPTIMIZERS))
  found = []
  for count in sorted(gpus, reverse=True):
    for part in ("train", "batch"):
      if part in parts:
        found += [Cell(part, case, count) for case in grid]
    if "equality" in parts and count > 1:
      found.append(Cell("equality", (), count))
  return found


def run_all(waiting, available):
  """Runs cells as GPUs become free; yields each with what it returned."""
  free, running = set(range(available)), {}
  with concurrent.futures.ThreadPoolExecutor() as pool:
    while waiting or running:
      for cell in list(waiting):
        needed = 0 if cell.part == "batch" else cell.gpus
        if needed <= len(free):
          waiting.remove(cell)
          mine = sorted(free)[:needed]
          free -= set(mine)
          running[pool.submit(cell.run, mine or range(cell.gpus))] = cell, mine
      done, _ = concurrent.futures.wait(running, return_when="FIRST_COMPLETED")
      for future in done:
        cell, mine = running.pop(future)
        free |= set(mine)
        yield cell, *future.result()


def table(results):
  """What was measured, in short."""
  lines = [
    "                            GiB per GPU: kept     peak   ms/step"
    "   update   share  kernels   communication"
  ]
  for name, cell in sorted(results.get("train", {}).items()):
    busy = cell["busy_seconds"]
    lines.append(
      f"{name:36}{cell['params_and_state_bytes'] / GIB:12.2f}"
      f"{cell['peak_bytes'] / GIB:9.2f}{1e3 * cell['step_seconds']:10.1f}"
      f"{1e3 * cell['update_seconds']:9.2f}"
      f"{100 * cell['update_seconds'] / cell['step_seconds']:7.2f}%"
      f"{1e3 * busy['update_kernels']:9.2f}{1e3 * busy['communication']:16.1f}"
      f"  {' '.join(cell['collectives_in_update'])}"
    )
  for name, cell in sorted(results.get("batch", {}).items()):
    lines.append(f"{name}: {cell['sequences_per_gpu']} sequences per GPU")
  for name, cell in results.get("equality", {}).items():
    for case, found in cell["update"].items():
      lines.append(
        f"{name}, {case}: {found['differ']} of {found['elements']} differ,"
        f" {found['kernels']} kernels, collectives {found['collectives']}"
      )
    for optimizer, found in cell["training"].items():
      lines.append(f"{name}, {optimizer}: {found}")
  return "\n".join(lines)


def main():
  parser = record.parser(__doc__)
  parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS))
  parser.add_argument("--model", choices=BATCH, nargs="+", default=list(BATCH))
  parser.add_argument("--gpus", type=int, nargs="+", help="default: one and all")
  parser.add_argument("--here", nargs="+", help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.here:
    part, *rest = arguments.here
    print(json.dumps(PARTS[part](*rest)))
    return

  listed = subprocess.run(
    ["nvidia-smi", "--list-gpus"], stdout=subprocess.PIPE, text=True, check=True
  )
  available = len(listed.stdout.splitlines())
  results = record.earlier("fsdp_gpu.json", arguments.output)
  results |= record.about_in_process("triton", "jax-triton")

  gpus = arguments.gpus or sorted({1, available})
  grid = cells(arguments.part, arguments.model, gpus)
  # What only compiles would take memory and time from what is measured.
  compiling = [cell for cell in grid if cell.part == "batch"]
  measuring = [cell for cell in grid if cell.part != "batch"]
  for cell, code, lines in itertools.chain(
    run_all(measuring, available), run_all(compiling, available)
  ):
    name = " ".join((*cell.arguments, f"{cell.gpus} GPUs"))
    if code:
      print(f"{cell.part} {name} failed:", *lines[-12:], sep="\n", flush=True)
      continue
    results.setdefault(cell.part, {})[name] = json.loads(lines[-1])
    record.write("fsdp_gpu.json", results, arguments.output)
    print(f"{time.strftime('%X')} {cell.part} {name}", flush=True)
  print(table(results))


if __name__ == "__main__":
  main()
