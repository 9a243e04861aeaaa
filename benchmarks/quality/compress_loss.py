"""Loss of a small language model with Optax's optimizers, plain and compressed.

Every optimizer of ``optax_optimizers`` trains ``examples/lm``'s model on Python's
own sources twice: as it is, on float32 parameters, and inside ``fo.compress`` with
24-bit master weights and 8-bit moments. Initial weights, data and their order are
the same; both compute with bfloat16 weights. Seeds are trained at once, by
``jax.vmap``; optimizers by several processes that share the device.

    python benchmarks/quality/compress_loss.py --jobs 8

writes ``compress_quality.json`` after each optimizer, so a run that is cut off is
of use, and a later one with ``--only`` adds to it.
"""

import concurrent.futures
import functools
import multiprocessing
import os
import pathlib
import sys
import time
import traceback

# Before JAX starts, here and in the processes that share the device.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
sys.path.extend(
  str(pathlib.Path(__file__).parents[2] / name) for name in ("", "examples")
)

import jax
import jax.numpy as jnp
import numpy as np
import optax
from lm import data, model
from optax import contrib

import flashoptim_jax as fo
from benchmarks import record
from benchmarks.support.optax_optimizers import OPTIMIZERS
from flashoptim_jax import paths

RESULT = "compress_quality.json"
BATCH, SEQ = 16, 128
VALID_BATCHES = 32
WARMUP = 50
# Their learning rate can't be a schedule, or one that starts at 0, or isn't meant to.
CONSTANT = {
  "dadapt_adamw",
  "optimistic_adam",
  "polyak_sgd",
  "prodigy",
  "reduce_on_plateau",
  "rprop",
  "sam",
  "schedule_free",
  "schedule_free_adamw",
  "schedule_free_sgd",
  "sm3",
}
CONFIG = model.Config()


def muon_dimensions(params):
  """Which axes of the scanned blocks' parameters make up a matrix."""
  axes = {
    "qkv": contrib.MuonDimensionNumbers(1, (2, 3, 4)),
    "attention_out": contrib.MuonDimensionNumbers((1, 2), 3),
    "mlp_in": contrib.MuonDimensionNumbers(1, 2),
    "mlp_out": contrib.MuonDimensionNumbers(1, 2),
  }

  def of_leaf(path, _):
    keys = paths.name(path).split("/")
    return axes.get(keys[-2]) if "blocks" in keys else None

  return jax.tree.map_with_path(of_leaf, params)


SETTINGS = {
  "muon": {
    "muon_weight_dimension_numbers": muon_dimensions,
    "adam_learning_rate": 2e-3,
  },
  "schedule_free_adamw": {"warmup_steps": WARMUP},
  "schedule_free_sgd": {"warmup_steps": WARMUP},
}


def make(name: str, steps: int):
  """The optimizer, with a warmed-up and decaying learning rate if it takes one."""
  optimizer = OPTIMIZERS[name]
  rate = optimizer.lm_rate
  if name not in CONSTANT:
    warmup = min(WARMUP, steps // 2)
    rate = optax.warmup_cosine_decay_schedule(0.0, rate, warmup, steps, rate / 10)
  return optimizer.make(rate, **SETTINGS.get(name, {}))


def loss_of(params, tokens):
  weights = fo.cast_params(params, jnp.bfloat16)
  logits = model.Transformer(CONFIG).apply({"params": weights}, tokens[:, :-1])
  return model.next_token_loss(logits, tokens[:, 1:])


def windows(corpus, starts):
  return corpus[starts[:, None] + jnp.arange(SEQ + 1)].astype(jnp.int32)


def train(tx, needs, corpus, params, state, starts):
  """Trains on one seed's data; gives parameters, state and losses."""

  def step(carry, starts):
    params, state = carry
    tokens = windows(corpus, starts)
    loss, grads = jax.value_and_grad(loss_of)(params, tokens)
    extra = {
      "": {},
      "value": {"value": loss},
      "obj_fn": {"obj_fn": functools.partial(loss_of, tokens=tokens)},
    }[needs]
    return fo.step(tx, grads, state, params, **extra), loss

  (params, state), losses = jax.lax.scan(step, (params, state), starts)
  return params, state, losses


def evaluate(corpus, starts, params):
  """Mean loss over batches of validation windows."""

  def step(total, starts):
    return total + loss_of(params, windows(corpus, starts)), None

  total, _ = jax.lax.scan(step, 0.0, starts)
  return total / len(starts)


def to_evaluate(name, params, state):
  """The weights that the optimizer means to be used."""
  compressed = isinstance(state, fo.CompressedState)
  masters = fo.to_fp32(params, state) if compressed else params
  if name.startswith("schedule_free"):
    inner = state.inner if compressed else state
    return contrib.schedule_free_eval_params(inner, masters)
  return masters


def kept_in_float32(tx, params):
  """Fields of the state that hold arrays like the parameters in float32."""
  state = jax.eval_shape(tx.init, params).inner
  shapes = {path: leaf.shape for path, leaf in jax.tree.leaves_with_path(params)}
  found = set()
  for path, leaf in jax.tree.leaves_with_path(state):
    end = paths.param_path(path, shapes)
    if end and leaf.shape == shapes[end] and leaf.dtype == jnp.float32:
      found.add(jax.tree_util.keystr(path[: -len(end)][-1:], simple=True))
  return sorted(found)


def nbytes(tree):
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def measure(name: str, steps: int) -> dict:
  """Trains with one optimizer, plain and compressed."""
  began = time.perf_counter()
  optimizer = OPTIMIZERS[name]
  plain = make(name, steps)
  compressed = fo.compress(plain)
  corpus = data.standard_library()
  seeds = np.arange(optimizer.seeds)
  starts = np.stack(
    [
      np.random.default_rng(int(seed)).integers(
        0, len(corpus.train) - SEQ, (steps, BATCH), np.int32
      )
      for seed in seeds
    ]
  )
  valid = np.linspace(0, len(corpus.valid) - SEQ - 1, VALID_BATCHES * BATCH)
  valid = jnp.asarray(valid.reshape(VALID_BATCHES, BATCH), jnp.int32)
  train_bytes, valid_bytes = map(jnp.asarray, (corpus.train, corpus.valid))
  module = model.Transformer(CONFIG)
  masters = jax.jit(
    jax.vmap(
      lambda seed: module.init(jax.random.key(seed), jnp.zeros((1, SEQ), jnp.int32))
    )
  )(seeds)["params"]
  one = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), masters
  )
  count = sum(leaf.size for leaf in jax.tree.leaves(one))
  narrow = jax.tree.map(lambda leaf: leaf.update(dtype=jnp.bfloat16), one)
  row = {
    "optimizer": name,
    "learning_rate": optimizer.lm_rate,
    "schedule": name not in CONSTANT,
    "parameters": count,
    "bytes_per_param": {
      "plain": (nbytes(one) + nbytes(jax.eval_shape(plain.init, one))) / count,
      "compressed": fo.memory_report(compressed, narrow).bytes_per_param,
    },
    "kept_in_float32": kept_in_float32(compressed, narrow),
  }

  def start_plain(masters):
    return masters, plain.init(masters)

  def run(tx, start):
    @jax.jit
    @jax.vmap
    def run_seed(params, state, starts):
      params, state, losses = train(
        tx, optimizer.needs, train_bytes, params, state, starts
      )
      weights = to_evaluate(name, params, state)
      return losses, evaluate(valid_bytes, valid, weights)

    params, state = jax.vmap(start)(masters)
    losses, valid_losses = jax.device_get(run_seed(params, state, starts))
    return {
      "valid_losses": valid_losses.tolist(),
      "valid_loss": float(valid_losses.mean()),
      # Means over a twentieth of the run.
      "train_losses": losses.mean(0)[: steps // 20 * 20]
      .reshape(20, -1)
      .mean(1)
      .tolist()
      if steps >= 20
      else losses.mean(0).tolist(),
    }

  row["plain"] = run(plain, start_plain)
  row["compressed"] = run(compressed, functools.partial(fo.from_fp32, compressed))
  differences = [
    100 * (ours / theirs - 1)
    for ours, theirs in zip(
      row["compressed"]["valid_losses"], row["plain"]["valid_losses"], strict=True
    )
  ]
  row["difference_percent"] = float(np.mean(differences))
  row["difference_percent_by_seed"] = differences
  row["seconds"] = time.perf_counter() - began
  row["device"] = f"{jax.default_backend()}: {record.device_kind()}"
  return row


def attempt(name: str, steps: int) -> dict:
  try:
    return measure(name, steps)
  except Exception:
    return {"optimizer": name, "error": traceback.format_exc()}


def save(folder: pathlib.Path, rows: dict[str, dict], steps: int) -> None:
  content = {
    **record.about(device=""),  # Rows have it: this process takes no device.
    "settings": {
      "steps": steps,
      "batch": BATCH,
      "seq": SEQ,
      "warmup": WARMUP,
      "model": {"dim": CONFIG.dim, "layers": CONFIG.layers, "heads": CONFIG.heads},
    },
    "optimizers": [rows[name] for name in OPTIMIZERS if name in rows],
  }
  record.write(RESULT, content, folder)


def main() -> int:
  parser = record.parser(__doc__)
  parser.add_argument("--jobs", type=int, default=8, help="processes")
  parser.add_argument("--steps", type=int, default=1000)
  parser.add_argument("--only", help="optimizers, separated by commas")
  arguments = parser.parse_args()
  names = [name for name, each in OPTIMIZERS.items() if each.lm_rate is not None]
  if arguments.only:
    wanted = arguments.only.split(",")
    names = [name for name in names if name.partition(",")[0] in wanted]
  # Those that take longest first.
  names.sort(key=lambda name: -OPTIMIZERS[name].seeds)
  known = record.earlier(RESULT, arguments.output)
  rows = {}
  if known and known["settings"]["steps"] == arguments.steps:
    rows = {row["optimizer"]: row for row in known["optimizers"]}
  failed = 0
  with concurrent.futures.ProcessPoolExecutor(
    arguments.jobs, mp_context=multiprocessing.get_context("spawn")
  ) as pool:
    futures = [pool.submit(attempt, name, arguments.steps) for name in names]
    for future in concurrent.futures.as_completed(futures):
      row = future.result()
      rows[row["optimizer"]] = row
      save(arguments.output, rows, arguments.steps)
      if "error" in row:
        failed += 1
        print(f"{row['optimizer']}: {row['error']}", flush=True)
        continue
      print(
        f"{row['optimizer']:32} {row['plain']['valid_loss']:.4f}"
        f" {row['compressed']['valid_loss']:.4f}"
        f" {row['difference_percent']:+.3f} %"
        f" {row['bytes_per_param']['plain']:.2f} B"
        f" {row['bytes_per_param']['compressed']:.2f} B"
        f" {row['kept_in_float32']} {row['seconds']:.0f} s",
        flush=True,
      )
  return int(failed > 0)


if __name__ == "__main__":
  sys.exit(main())
