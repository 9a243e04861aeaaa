"""ZeRO-1 on the devices of one host: memory, time of a step, what is sent.

    python benchmarks/memory/zero1.py --gpus 2
    JAX_NUM_CPU_DEVICES=2 python benchmarks/memory/zero1.py --model tiny  # On CPUs.

A Llama-architecture model whose parameters every device has whole, and whose state is
divided among them: optax.adamw on float32 masters, its gradients and state divided by
sharding constraints, and fo.adamw. Both shard the same dimensions. Says what a device
holds, the time of a step and of the update alone, what the update's kernels take and
what communication does (GPUs), and what collectives the compiled step has, in bytes.
Each optimizer has a process of its own.
"""

import argparse
import collections
import dataclasses
import json
import math
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.append(str(pathlib.Path(__file__).parents[2]))

from benchmarks import record

OPTIMIZERS = ("optax", "flash")
# Sequences that a device takes in a step, and their length.
BATCH = {"tiny": (1, 64), "1b": (4, 2048)}
SENT = re.compile(
  r"= (\(?.*?\)?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
  r"(?:-start)?\("
)
ARRAY = re.compile(r"([a-z]+)(\d+)\[([\d,]*)\]")


class Training:
  """A train step with whole parameters and divided state."""

  def __init__(self, model, optimizer):
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    from benchmarks.support import llama

    count, (sequences, seq) = jax.device_count(), BATCH[model]
    mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
    along_batch = NamedSharding(mesh, PartitionSpec("data"))
    config = {
      "tiny": llama.Config(256, 2, 4, 2, 512, 512),
      "1b": llama.ONE_BILLION,
    }[model]
    self.config = dataclasses.replace(
      config,
      attention="cudnn" if jax.default_backend() == "gpu" else "xla",
      chunk=seq * count,
      activations=along_batch,
    )
    self.dtype = jnp.bfloat16 if optimizer == "flash" else jnp.float32
    params = llama.structs(self.config, self.dtype)
    placed = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), params)
    self.tx, told = self._transformations(optimizer, params, placed)
    import flashoptim_jax as fo

    state = jax.eval_shape(self.tx.init, params)
    self.shardings = (
      placed,
      fo.state_shardings(self.tx, params, placed, over="data"),
    )
    self.carry = jax.tree.map(
      lambda leaf, sharding: leaf.update(sharding=sharding),
      (params, state),
      self.shardings,
    )
    self.tokens = jax.ShapeDtypeStruct(
      (sequences * count, seq), jnp.int32, sharding=along_batch
    )
    self.step = jax.jit(
      llama.ordinary_step(self.config, told),
      donate_argnums=(0, 1),
      out_shardings=(None, *self.shardings),
    )
    self.update = jax.jit(
      lambda params, state, grads: fo.step(told, grads, state, params),
      donate_argnums=(0, 1),
      out_shardings=self.shardings,
    )

  def _transformations(self, optimizer, params, placed):
    """The transformation, and itself told how the state is sharded."""
    import jax
    import optax

    import flashoptim_jax as fo

    kwargs = {"b2": 0.95, "weight_decay": 0.1}
    if optimizer == "flash":
      tx = fo.adamw(1e-4, **kwargs)
      return tx, fo.with_shardings(tx, params, placed, over="data")
    tx = optax.adamw(1e-4, **kwargs)
    divided = fo.state_shardings(tx, params, placed, over="data")[0].mu

    def update(grads, state, params=None):
      grads, params = (
        jax.lax.with_sharding_constraint(tree, divided) for tree in (grads, params)
      )
      return tx.update(grads, state, params)

    return tx, optax.GradientTransformation(tx.init, update)

  def start(self):
    """Parameters and state, sharded from the start."""
    import jax

    from benchmarks.support import llama

    def draw():
      return jax.tree.map(lambda leaf: leaf.astype(self.dtype), llama.init(self.config))

    params = jax.jit(draw, out_shardings=self.shardings[0])()
    return params, jax.jit(self.tx.init, out_shardings=self.shardings[1])(params)


def sent_bytes(text):
  """Bytes of results of each kind of collective of a program, by dtype.

  A result is what a device has afterwards: of a gather the whole, of a reduce-scatter
  a part.
  """
  found = collections.Counter()
  for results, kind in SENT.findall(text):
    arrays = ARRAY.findall(results)
    # Asynchronous ones give their operands as well.
    if results.startswith("((") or f"{kind}-start" in results:
      arrays = arrays[len(arrays) // 2 :]
    for name, bits, shape in arrays:
      size = math.prod(map(int, filter(None, shape.split(","))))
      found[f"{kind} {name}{bits}"] += size * int(bits) // 8
  return dict(found)


def seconds_of(call, carry, steps, warmup=3):
  """The median time of a call, and what it leaves."""
  import jax

  seconds = []
  for _ in range(warmup + steps):
    begun = time.perf_counter()
    carry = jax.block_until_ready(call(carry))
    seconds.append(time.perf_counter() - begun)
  return statistics.median(seconds[warmup:]), carry


def measure(model, optimizer, steps=10):
  """One optimizer, on all devices of the process."""
  import jax

  from benchmarks.memory import fsdp_gpu
  from benchmarks.support import llama

  training = Training(model, optimizer)
  compiled = training.step.lower(
    *training.carry, training.tokens, training.tokens
  ).compile()
  carry = training.start()
  grads = jax.jit(
    lambda: jax.tree.map(
      lambda leaf: jax.numpy.ones(leaf.shape, training.dtype), training.carry[0]
    ),
    out_shardings=training.shardings[0],
  )()
  update = training.update.lower(*carry, grads).compile()
  held = [
    sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))
    for tree in carry
  ]
  tokens = llama.random_tokens(training.config, *training.tokens.shape, 0)
  batch = jax.device_put(tokens, training.tokens.sharding)
  losses = []

  def step(carry):
    loss, *carry = compiled(*carry, *batch)
    losses.append(loss)
    return carry

  step_seconds, carry = seconds_of(step, carry, steps)
  busy = None
  if jax.default_backend() == "gpu":
    with tempfile.TemporaryDirectory() as folder:
      with jax.profiler.trace(folder):
        for _ in range(2):
          carry = step(carry)
        jax.block_until_ready(carry)
      (trace,) = pathlib.Path(folder).rglob("*.xplane.pb")
      busy = fsdp_gpu.busy_seconds(trace)
  update_seconds, carry = seconds_of(lambda carry: update(*carry, grads), carry, steps)
  analysis, text = compiled.memory_analysis(), compiled.as_text()
  return record.about("triton", "jax-triton") | {
    "parameters": sum(leaf.size for leaf in jax.tree.leaves(carry[0])),
    "sequences": training.tokens.shape[0],
    "params_bytes": held[0],
    "state_bytes": held[1],
    "argument_bytes": analysis.argument_size_in_bytes,
    "temporary_bytes": analysis.temp_size_in_bytes,
    "step_seconds": step_seconds,
    "update_seconds": update_seconds,
    "busy_seconds": busy,
    "triton_kernels": len(re.findall(r'custom_call_target="[^"]*triton', text)),
    "collectives_of_step": sent_bytes(text),
    "collectives_of_update": sent_bytes(update.as_text()),
    "losses": [float(loss) for loss in losses],
  }


def main():
  parser = record.parser(__doc__)
  parser.add_argument("--model", choices=BATCH, default="1b")
  parser.add_argument("--gpus", type=int, help="default: all")
  parser.add_argument("--here", choices=OPTIMIZERS, help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.here:
    print(json.dumps(measure(arguments.model, arguments.here)))
    return

  environment = dict(os.environ) | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
  if arguments.gpus:
    environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(arguments.gpus)))
  name = f"zero1_{arguments.model}.json"
  results = record.earlier(name, arguments.output)
  for optimizer in OPTIMIZERS:
    done = subprocess.run(
      [sys.executable, __file__, "--model", arguments.model, "--here", optimizer],
      stdout=subprocess.PIPE,
      text=True,
      env=environment,
      check=True,
    )
    cell = json.loads(done.stdout.splitlines()[-1])
    about = {key: cell.pop(key) for key in ("date", "device", "versions")}
    results |= about | {optimizer: cell}
    record.write(name, results, arguments.output)
    print(
      f"{optimizer}: {1e3 * cell['step_seconds']:.2f} ms a step,"
      f" {1e3 * cell['update_seconds']:.2f} the update; bytes of"
      f" parameters {cell['params_bytes']}, of state {cell['state_bytes']};"
      f" {cell['triton_kernels']} Triton kernels;"
      f" update sends {cell['collectives_of_update']}",
      flush=True,
    )


if __name__ == "__main__":
  main()
