"""Step time of the XLA path of fo.adamw beside optax.adamw on fp32 masters.

Both update the same leaves from the same bf16 gradients in one jitted, donated
call: ours is ``fo.step`` with 24-bit masters and 8-bit moments; the other is
``optax.adamw`` on float32 master weights followed by the cast to bfloat16 that
the next forward pass would need. They take turns in one process, and the ratio
is the median over pairs of neighbouring measurements.

Run it as ``python benchmarks/speed/xla_step.py``.
"""

import functools
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import optax

sys.path.append(str(pathlib.Path(__file__).parents[2]))

import flashoptim_jax as fo
from benchmarks import record
from flashoptim_jax import optimizers, rules
from flashoptim_jax.kernels import xla
from flashoptim_jax.kernels.base import Leaf, UpdateSpec
from flashoptim_jax.storage import codec

# 20 M parameters in one large, one tall and one small leaf.
SHAPES = {"wide": (2048, 4896), "tall": (9792, 1024), "norm": (4896,)}
STEPS = 3  # per measurement


def arrays(key, dtype, scale):
  keys = jax.random.split(key, len(SHAPES))
  return {
    name: scale * jax.random.normal(k, shape, dtype)
    for k, (name, shape) in zip(keys, SHAPES.items(), strict=True)
  }


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
def flash_step(tx, grads, opt_state, params):
  params, opt_state = fo.step(tx, grads, opt_state, params)
  return opt_state, params


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(2, 3, 4))
def optax_step(tx, grads, opt_state, masters, params):
  # The old copy is donated, so that the new one takes its place.
  grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
  updates, opt_state = tx.update(grads, opt_state, masters)
  masters = optax.apply_updates(masters, updates)
  params = jax.tree.map(lambda old, new: new.astype(old.dtype), params, masters)
  return opt_state, masters, params


def seconds_per_step(step, tx, grads, kept):
  begun = time.perf_counter()
  for _ in range(STEPS):
    kept = step(tx, grads, *kept)
  jax.block_until_ready(kept)
  return (time.perf_counter() - begun) / STEPS, kept


def profile(rule, storage, leaf, scalars):
  """Seconds of each of the CPU path's passes over one leaf, alone, in place."""
  spec = UpdateSpec(rule, storage, "xla", new_params=True)
  passes = {}
  for moment, stored in zip(rule.moments, leaf.moments, strict=True):
    kept = (spec, moment), (leaf.grad, stored, scalars)
    scale = stored[1].astype(jnp.float32)
    passes[f"{moment.name}_scale"] = xla._scale_pass, *kept, scale
    zero = jnp.uint32(0)
    kept = (spec, moment), (leaf.grad, stored, scalars, scale, zero)
    passes[moment.name] = xla._codes_pass, *kept, stored[0]
  passes["correction"] = (
    xla._correction_pass,
    (spec,),
    (leaf, scalars),
    leaf.correction,
  )
  passes["param"] = (
    xla._param_pass,
    (spec,),
    (leaf, scalars, leaf.correction),
    leaf.param,
  )
  seconds = {}
  for name, (function, static, inputs, target) in passes.items():
    # The donated target takes the result, as the old array does in a step.
    run = jax.jit(
      lambda _, *inputs, f=function, s=static: f(*s, *inputs),
      donate_argnums=0,
      keep_unused=True,
    )
    result, taken = jnp.copy(target), []
    for _ in range(8):
      begun = time.perf_counter()
      result = jax.block_until_ready(run(result, *inputs))
      taken.append(time.perf_counter() - begun)
    seconds[name] = statistics.median(taken[1:])
  return seconds


def main():
  parser = record.parser(__doc__)
  parser.add_argument("--pairs", type=int, default=11, help="measurements of each")
  arguments = parser.parse_args()

  masters = arrays(jax.random.key(0), jnp.float32, 0.02)
  grads = arrays(jax.random.key(1), jnp.bfloat16, 1e-3)
  flash, usual = fo.adamw(1e-3, implementation="xla"), optax.adamw(1e-3)
  params, state = fo.from_fp32(flash, masters)
  copy = fo.cast_params(masters, jnp.bfloat16)
  runs = {
    "fo.adamw": (flash_step, flash, (state, params)),
    "optax.adamw": (optax_step, usual, (usual.init(masters), masters, copy)),
  }
  temporaries = {
    name: step.lower(tx, grads, *kept).compile().memory_analysis().temp_size_in_bytes
    for name, (step, tx, kept) in runs.items()
  }
  seconds = {name: [] for name in runs}
  for pair in range(-1, arguments.pairs):
    for name, (step, tx, kept) in runs.items():
      taken, new = seconds_per_step(step, tx, grads, kept)
      runs[name] = (step, tx, new)
      if pair >= 0:  # The first pair warms up.
        seconds[name].append(taken)
  ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
  medians = {name: statistics.median(values) for name, values in seconds.items()}
  result = {
    **record.about(),
    "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
    "shapes": SHAPES,
    "pairs": arguments.pairs,
    "step_seconds": medians,
    "ratio": statistics.median(ratios),
    "ratio_range": [min(ratios), max(ratios)],
    "temporary_bytes": temporaries,
  }
  state, params = runs["fo.adamw"][2]
  leaf = Leaf(
    grads["wide"],
    params["wide"],
    state.correction["wide"],
    (
      (state.mu["wide"], state.mu_scale["wide"]),
      (state.nu["wide"], state.nu_scale["wide"]),
    ),
    path="",
    decay=True,
  )
  hyperparameters = optimizers._adam_scalars(
    jnp.int32(1), 0.9, 0.999, 1e-8, 0.0, nesterov=False
  )
  hyperparameters |= codec.rounding_scalars(jnp.int32(1), fo.Storage().master_bits)
  hyperparameters |= {"learning_rate": 1e-3, "weight_decay": 1e-4}
  result["profile_of_wide_seconds"] = profile(
    rules.ADAM, fo.Storage(), leaf, hyperparameters
  )
  name = f"xla_step_{jax.default_backend()}.json"
  record.write(name, result, arguments.output)
  print(f"{result['device']}, {result['parameters'] / 1e6:.1f} M parameters")
  print(f"{'':14}{'ms per step':>14}{'temporaries, MiB':>20}")
  for name in runs:
    print(f"{name:14}{medians[name] * 1e3:14.1f}{temporaries[name] / 2**20:20.1f}")
  for name, seconds in result["profile_of_wide_seconds"].items():
    print(f"  pass {name:14}{seconds * 1e3:9.1f} ms, wide")
  low, high = result["ratio_range"]
  print(f"ratio {result['ratio']:.2f} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
  main()
