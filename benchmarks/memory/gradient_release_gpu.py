"""Gradient release on a GPU: memory at 8 billion parameters, speed at one.

    python benchmarks/memory/gradient_release_gpu.py  # all parts
    python benchmarks/memory/gradient_release_gpu.py --part memory

memory: training steps of a model of Llama-3-8B's shapes with random bf16 weights,
six sequences of 2,048 tokens, and the allocator's peak. baseline: the memory that
XLA says the same step would take with optax.adamw on float32 master weights;
nothing is allocated. speed: the time of a released and an ordinary step of a
model of 1.1 billion parameters, and their losses. Each part runs in a process of its
own and adds to results/release_gpu.json.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import time

sys.path.append(str(pathlib.Path(__file__).parents[2]))

from benchmarks import record

GIB = 2**30
SEQUENCES, LENGTH = 6, 2048  # of a step of the 8 B model


def start(config, tx):
  """Parameters and state, without float32 copies of all of them."""
  import jax

  from benchmarks.support import llama

  params = llama.init(config)
  return params, jax.jit(tx.init)(params)


def memory(attention, steps=3):
  """Steps of the 8 B model, and the allocator's peak."""
  import dataclasses

  import jax

  import flashoptim_jax as fo
  from benchmarks.support import llama

  config = dataclasses.replace(llama.LLAMA3_8B, attention=attention)
  tx = fo.adamw(1e-4, b2=0.95, weight_decay=0.1)
  params, state = start(config, tx)
  kept = sum(x.nbytes for x in jax.tree.leaves((params, state)))
  stats = jax.devices()[0].memory_stats
  after_init = stats()["peak_bytes_in_use"]
  batch = llama.random_tokens(config, SEQUENCES, LENGTH)
  step = jax.jit(llama.released_step(config, tx), donate_argnums=(0, 1))
  begun = time.perf_counter()
  compiled = step.lower(params, state, *batch).compile()
  compile_seconds = time.perf_counter() - begun
  analysis = compiled.memory_analysis()
  losses, seconds = [], []
  for _ in range(steps):
    begun = time.perf_counter()
    loss, params, state = compiled(params, state, *batch)
    losses.append(float(loss))
    jax.block_until_ready(params)
    seconds.append(time.perf_counter() - begun)
  return {
    "parameters": sum(x.size for x in jax.tree.leaves(params)),
    "tokens": SEQUENCES * LENGTH,
    "params_and_state_bytes": kept,
    "peak_bytes_after_init": after_init,
    "peak_bytes": stats()["peak_bytes_in_use"],
    "temporary_bytes": analysis.temp_size_in_bytes,
    "aliased_bytes": analysis.alias_size_in_bytes,
    "losses": losses,
    "step_seconds": seconds,
    "compile_seconds": compile_seconds,
  }


def baseline(attention):
  """What optax.adamw on float32 masters would need, by XLA's account.

  Each layer casts its weights as it uses them, as Flax's modules do with float32
  parameters and a dtype of bfloat16, so that gradients are float32; or all
  weights are cast first, and XLA keeps bfloat16 gradients.
  """
  import dataclasses

  import jax
  import jax.numpy as jnp
  import optax

  from benchmarks.support import llama

  config = dataclasses.replace(llama.LLAMA3_8B, attention=attention)
  tx = optax.adamw(1e-4, b2=0.95, weight_decay=0.1)
  masters = llama.structs(config, jnp.float32)
  state = jax.eval_shape(tx.init, masters)
  tokens = jax.ShapeDtypeStruct((SEQUENCES, LENGTH), jnp.int32)

  def measure(cast):
    def step(masters, state, tokens, targets):
      value, grads = jax.value_and_grad(
        lambda masters: llama.ordinary_loss(config, cast(masters), tokens, targets)
      )(masters)
      updates, new_state = tx.update(grads, state, masters)
      return value, optax.apply_updates(masters, updates), new_state

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(
      masters, state, tokens, tokens
    )
    found = compiled.compile().memory_analysis()
    return {
      "masters_and_state_bytes": found.argument_size_in_bytes,
      "temporary_bytes": found.temp_size_in_bytes,
      "total_bytes": found.argument_size_in_bytes
      + found.temp_size_in_bytes
      + found.output_size_in_bytes
      - found.alias_size_in_bytes,
    }

  return {
    "cast_in_layers": measure(lambda masters: masters),
    "cast_first": measure(llama.as_bfloat16),
  }


def speed(attention, batch=8, steps=10, repeats=5):
  """Time of a step of the 1 B model, released and ordinary."""
  import dataclasses

  import jax

  import flashoptim_jax as fo
  from benchmarks.support import llama

  config = dataclasses.replace(llama.ONE_BILLION, attention=attention)
  tx = fo.adamw(1e-4, b2=0.95, weight_decay=0.1)
  data = llama.random_tokens(config, batch, 2048)
  result = {"tokens": batch * 2048}
  steps_of = {"ordinary": llama.ordinary_step, "released": llama.released_step}
  compiled = {}
  params, state = jax.eval_shape(lambda: start(config, tx))
  result["parameters"] = sum(x.size for x in jax.tree.leaves(params))
  for name, make in steps_of.items():
    step = jax.jit(make(config, tx), donate_argnums=(0, 1))
    compiled[name] = step.lower(params, state, *data).compile()
    analysis = compiled[name].memory_analysis()
    result[name] = {
      "temporary_bytes": analysis.temp_size_in_bytes,
      "losses": [],
      "step_seconds": [],
    }
  carries = {name: start(config, tx) for name in steps_of}
  for name, run in compiled.items():  # the same steps from the same start
    for _ in range(steps):
      loss, *carries[name] = run(*carries[name], *data)
      result[name]["losses"].append(float(loss))
  for _ in range(repeats):  # in turns
    for name, run in compiled.items():
      jax.block_until_ready(carries[name])
      begun = time.perf_counter()
      for _ in range(steps):
        loss, *carries[name] = run(*carries[name], *data)
      jax.block_until_ready((loss, carries[name]))
      seconds = (time.perf_counter() - begun) / steps
      result[name]["step_seconds"].append(seconds)
  times = {n: statistics.median(result[n]["step_seconds"]) for n in steps_of}
  result["released_over_ordinary"] = times["released"] / times["ordinary"]
  pairs = zip(result["ordinary"]["losses"], result["released"]["losses"], strict=True)
  result["largest_loss_difference"] = max(abs(a - b) for a, b in pairs)
  return result


PARTS = {"memory": memory, "baseline": baseline, "speed": speed}


def table(results):
  """What was measured, in short."""
  lines = []
  if found := results.get("memory"):
    lines.append(
      f"8 B released: peak {found['peak_bytes'] / GIB:.2f} GiB, parameters and"
      f" state {found['params_and_state_bytes'] / GIB:.2f} GiB, losses"
      f" {', '.join(f'{loss:.4f}' for loss in found['losses'])},"
      f" {min(found['step_seconds']):.3f} s a step"
    )
  if found := results.get("baseline"):
    for how, cell in found.items():
      total = cell["total_bytes"] / GIB
      lines.append(f"8 B optax.adamw fp32, {how}: {total:.2f} GiB")
  if found := results.get("speed"):
    times = [
      1e3 * statistics.median(found[name]["step_seconds"])
      for name in ("ordinary", "released")
    ]
    lines.append(
      f"1 B step: ordinary {times[0]:.1f} ms, released {times[1]:.1f} ms,"
      f" ratio {found['released_over_ordinary']:.3f}; losses differ by at most"
      f" {found['largest_loss_difference']:.2e}"
    )
  return "\n".join(lines)


def main():
  parser = record.parser(__doc__)
  parser.add_argument("--part", choices=PARTS, action="append")
  parser.add_argument(
    "--attention",
    choices=("cudnn", "xla"),
    default="cudnn",
    help="implementation of jax.nn.dot_product_attention",
  )
  parser.add_argument("--here", choices=PARTS, help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.here:
    print(json.dumps(PARTS[arguments.here](arguments.attention)))
    return

  results = record.earlier("release_gpu.json", arguments.output)
  for part in arguments.part or PARTS:
    command = [sys.executable, __file__, "--here", part]
    command += ["--attention", arguments.attention]
    # A peak is a process's; so each part has its own.
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
      print(f"{part} failed", flush=True)
      continue
    results[part] = json.loads(done.stdout.splitlines()[-1])
    results["attention"] = arguments.attention
    results |= record.about_in_process("triton", "jax-triton")
    record.write("release_gpu.json", results, arguments.output)
    print(part, json.dumps(results[part]), flush=True)
  print(table(results))


if __name__ == "__main__":
  main()
