"""Losses beside Optax's on float32 parameters, seed by seed, on GPUs.

    python benchmarks/quality/training_loss.py                         # all of them
    python benchmarks/quality/training_loss.py --only lm_adamw lm_lion # some

Within an experiment all runs of a seed start from the same weights and see the same
data in the same order. Each run is a process; the GPUs of the machine share them.
Results go to quality_EXPERIMENT.json in the folder --output as runs end; runs that are
there already are not repeated. What 8 bits do to the moments of the language model goes
to moments.json. Data are made on the machine (:mod:`corpora`) and kept in --data.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import os
import pathlib
import queue
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

sys.path.extend(
  str(pathlib.Path(__file__).parents[2] / name) for name in ("", "examples")
)

import jax
import jax.numpy as jnp
import numpy as np
import optax
from lm import model

import flashoptim_jax as fo
from benchmarks import record
from benchmarks.quality import corpora
from benchmarks.quality.moment_errors import linear_8bit, moment_errors
from benchmarks.quality.resnet import RESNET18, train_images

LOSS_SCALE = 2.0**12  # of float16 runs
POINTS = 60  # of a training curve


@dataclasses.dataclass(frozen=True)
class Setting:
  """How an experiment's language model is trained.

  Attributes:
    config: The model.
    steps: Number of steps.
    batch: Sequences per step.
    seq: Predictions per sequence.
    warmup: Steps in which the learning rate grows from 0; a cosine takes it down to
      a tenth afterwards. None keeps it constant.
  """

  config: model.Config
  steps: int
  batch: int
  seq: int
  warmup: int | None


def _config(dim, layers, dtype=jnp.bfloat16):
  return model.Config(
    dim=dim,
    layers=layers,
    heads=dim // 64,
    vocabulary=corpora.VOCABULARY,
    dtype=dtype,
    attention="cudnn",
  )


# GPT-2's 12 blocks of width 768; 124 M parameters with this vocabulary.
LARGE = Setting(_config(768, 12), steps=300, batch=64, seq=1024, warmup=50)
SMALL = Setting(_config(512, 6), steps=500, batch=32, seq=512, warmup=50)
FLOAT16 = dataclasses.replace(SMALL, config=_config(512, 6, jnp.float16))
# 2,048 tokens a step, so that most rows of the embedding have no gradient.
SPARSE = dataclasses.replace(SMALL, steps=1000, batch=8, seq=256)
FINETUNE = dataclasses.replace(SMALL, steps=300, batch=16, warmup=None)


@dataclasses.dataclass(frozen=True)
class Variant:
  """One of the optimizers that an experiment compares.

  Attributes:
    make: Takes the learning rate.
    dtype: The parameters' dtype; float32 for Optax's.
  """

  make: Callable[..., optax.GradientTransformation]
  dtype: Any = jnp.bfloat16

  def start(self, tx, masters):
    """Parameters and state from float32 parameters."""
    if self.dtype == jnp.float32:
      # A copy, for steps are donated what they are given.
      return jax.tree.map(jnp.copy, masters), tx.init(masters)
    return fo.from_fp32(tx, masters, self.dtype)


@dataclasses.dataclass(frozen=True)
class Experiment:
  """Runs that are compared.

  Attributes:
    title: Heading of its table.
    metric: What ``value`` is.
    setting: What is trained.
    learning_rate: The peak.
    variants: By name; the first is the baseline.
    seeds: How many there are. Variants of which one seed is enough say so in
      ``once``.
    once: Names of variants that run with the first seed alone.
    train: The function that makes one run.
    per_gpu: Runs that share a GPU.
  """

  title: str
  metric: str
  setting: Any
  learning_rate: float
  variants: dict[str, Variant]
  train: Callable[..., dict]
  seeds: int = 3
  once: frozenset[str] = frozenset()
  per_gpu: int = 4

  def runs(self):
    """Names and seeds."""
    return [
      (name, seed)
      for seed in range(self.seeds)
      for name in self.variants
      if seed == 0 or name not in self.once
    ]


def schedule(setting: Setting, rate: float):
  """The learning rate over an experiment's steps."""
  if setting.warmup is None:
    return rate
  return optax.warmup_cosine_decay_schedule(
    0.0, rate, setting.warmup, setting.steps, rate / 10
  )


def initial(config: model.Config, seed: int):
  """Float32 parameters."""
  module = model.Transformer(config)
  tokens = jnp.zeros((1, 64), jnp.int32)
  return jax.jit(module.init)(jax.random.key(seed), tokens)["params"]


def loss_of(config: model.Config, params, tokens):
  """Mean loss of windows (batch, seq + 1)."""
  weights = fo.cast_params(params, config.dtype)
  logits = model.Transformer(config).apply({"params": weights}, tokens[:, :-1])
  return model.next_token_loss(logits, tokens[:, 1:])


def windows(tokens, starts, seq):
  return tokens[starts[:, None] + jnp.arange(seq + 1)].astype(jnp.int32)


def train_tokens(setting, tx, params, state, tokens, seed):
  """Trains; gives parameters, state and every step's loss."""
  scale = LOSS_SCALE if setting.config.dtype == jnp.float16 else 1.0

  def scaled_loss(params, batch):
    return loss_of(setting.config, params, batch) * scale

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def steps(params, state, tokens, starts):
    def step(carry, starts):
      params, state = carry
      batch = windows(tokens, starts, setting.seq)
      loss, grads = jax.value_and_grad(scaled_loss)(params, batch)
      return fo.step(tx, grads, state, params), loss / scale

    (params, state), losses = jax.lax.scan(step, (params, state), starts)
    return params, state, losses

  random = np.random.default_rng(seed)
  limit = len(tokens) - setting.seq
  starts = random.integers(0, limit, (setting.steps, setting.batch), np.int32)
  losses = []
  turn = setting.steps // 10
  tokens = jnp.asarray(tokens)
  for i in range(0, setting.steps, turn):
    params, state, part = steps(params, state, tokens, starts[i : i + turn])
    losses.append(part)
  return params, state, np.concatenate(jax.device_get(losses))


def valid_loss(setting, params, tokens, batches=40):
  """Mean loss over windows spread evenly over the validation tokens."""

  @jax.jit
  def evaluate(params, tokens, starts):
    def step(total, starts):
      loss = loss_of(setting.config, params, windows(tokens, starts, setting.seq))
      return total + loss, None

    return jax.lax.scan(step, 0.0, starts)[0] / len(starts)

  count = batches * setting.batch
  starts = np.linspace(0, len(tokens) - setting.seq - 1, count).astype(np.int32)
  starts = starts.reshape(batches, setting.batch)
  return float(evaluate(params, jnp.asarray(tokens), starts))


def finite(value):
  """JSON has no NaN."""
  return float(value) if np.isfinite(value) else None


def curve(losses):
  """The training loss, as means over equal parts of the run."""
  width = max(1, len(losses) // POINTS)
  count = len(losses) // width
  means = losses[: count * width].reshape(count, width).mean(1)
  steps = [width * (i + 1) for i in range(count)]
  return {"steps": steps, "losses": [finite(mean) for mean in means]}


def train_lm(experiment: Experiment, name: str, seed: int, folder) -> dict:
  """One run of a language model on Python sources."""
  variant, setting = experiment.variants[name], experiment.setting
  text = corpora.text(folder, "python")
  tx = variant.make(schedule(setting, experiment.learning_rate))
  params, state = variant.start(tx, initial(setting.config, seed))
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  began = time.perf_counter()
  params, state, losses = train_tokens(setting, tx, params, state, text.train, seed)
  seconds = time.perf_counter() - began
  result = {
    "value": finite(valid_loss(setting, params, text.valid)),
    "parameters": count,
    "tokens": setting.steps * setting.batch * setting.seq,
    "seconds_with_compilation": seconds,
    **curve(losses),
  }
  if experiment is EXPERIMENTS["lm_adamw"] and (name, seed) == ("optax.adamw fp32", 0):
    result["moments"] = moment_errors(state)
  return result


def train_finetune(experiment: Experiment, name: str, seed: int, folder) -> dict:
  """Pretraining on Python with Optax, then a run on C and C++ headers.

  The value is what the run changed, for pretraining is not the same to the bit.
  """
  variant, setting = experiment.variants[name], experiment.setting
  text = corpora.text(folder, "python")
  usual = optax.adamw(schedule(SMALL, 1e-3), b2=0.95, weight_decay=0.1)
  masters = initial(setting.config, seed)
  masters, _, _ = train_tokens(
    SMALL, usual, masters, usual.init(masters), text.train, seed
  )
  headers = corpora.text(folder, "headers")
  before = valid_loss(setting, masters, headers.valid)
  tx = variant.make(experiment.learning_rate)
  params, state = variant.start(tx, masters)
  stalled = ()
  if variant.dtype != jnp.float32:
    masters = fo.to_fp32(params, state)
    stalled = fo.check_numerics(params, state, experiment.learning_rate)
  params, state, losses = train_tokens(setting, tx, params, state, headers.train, seed)
  end = params if variant.dtype == jnp.float32 else fo.to_fp32(params, state)
  moved = sum(
    int(jnp.sum(a != b))
    for a, b in zip(jax.tree.leaves(end), jax.tree.leaves(masters), strict=True)
  )
  after = valid_loss(setting, end, headers.valid)
  return {
    "value": finite(after - before),
    "before": finite(before),
    "after": finite(after),
    "stalled_leaves": len(stalled),
    "leaves": len(jax.tree.leaves(params)),
    "moved": moved / sum(leaf.size for leaf in jax.tree.leaves(end)),
    **curve(losses),
  }


def clipped(make, **kwargs):
  """The optimizer after clipping by the global norm."""

  def tx(rate):
    return optax.chain(optax.clip_by_global_norm(1.0), make(rate, **kwargs))

  return tx


def unscaled(make, **kwargs):
  """The optimizer after undoing the loss's scale in float32."""

  def unscale(grads, params):
    del params
    return jax.tree.map(lambda g: g.astype(jnp.float32) / LOSS_SCALE, grads)

  def tx(rate):
    return optax.chain(optax.stateless(unscale), make(rate, **kwargs))

  return tx


STORAGES = {
  "24/8 root": fo.Storage(),
  "24/8 paper": fo.Storage(companding="paper"),
  "32/8 root": fo.Storage(master_bits=32),
  "16/8 root": fo.Storage(master_bits=16),
  "bf16/8 root": fo.Storage(master_bits=None),
}


def pair(usual, ours, name, wrap=clipped, dtype=jnp.bfloat16, **kwargs):
  """Optax's optimizer on float32 and ours with the default storage."""
  return {
    f"optax.{name} fp32": Variant(wrap(usual, **kwargs), jnp.float32),
    f"fo.{name} 24/8 root": Variant(wrap(ours, **kwargs), dtype),
  }


def of_storages(ours, name, labels=(*STORAGES,), **kwargs):
  """Ours with some storages, but for the default."""
  return {
    f"fo.{name} {label}": Variant(clipped(ours, storage=STORAGES[label], **kwargs))
    for label in labels
    if label != "24/8 root"
  }


ADAMW = {"b2": 0.95, "weight_decay": 0.1}
SLOW_ADAMW = ADAMW | {"b2": 0.999}
LION = {"b1": 0.95, "b2": 0.98, "weight_decay": 1.0}
NATS = "validation loss, nats per token"
CHANGE = "change of the validation loss, nats per token"
LINEAR = "adamw, 8-bit moments without companding"

EXPERIMENTS = {
  "lm_adamw": Experiment(
    "A language model of 124 M parameters, AdamW",
    NATS,
    LARGE,
    6e-4,
    {
      **pair(optax.adamw, fo.adamw, "adamw", **ADAMW),
      **of_storages(fo.adamw, "adamw", **ADAMW),
      LINEAR: Variant(
        clipped(lambda *a, **k: linear_8bit(optax.adamw(*a, **k)), **ADAMW),
        jnp.float32,
      ),
    },
    train_lm,
    seeds=5,
    once=frozenset(
      {"fo.adamw 24/8 paper", "fo.adamw 32/8 root", "fo.adamw bf16/8 root", LINEAR}
    ),
    per_gpu=1,
  ),
  "lm_lion": Experiment(
    "A language model of 124 M parameters, Lion",
    NATS,
    LARGE,
    1e-4,
    pair(optax.lion, fo.lion, "lion", **LION),
    train_lm,
    per_gpu=1,
  ),
  "lm_slow_decay": Experiment(
    "A language model of 45 M parameters, AdamW with β2 = 0.999",
    NATS,
    SMALL,
    1e-3,
    {
      **pair(optax.adamw, fo.adamw, "adamw", **SLOW_ADAMW),
      **of_storages(fo.adamw, "adamw", ["16/8 root"], **SLOW_ADAMW),
    },
    train_lm,
    seeds=5,
  ),
  "lm_small": Experiment(
    "A language model of 45 M parameters, AdamW with β2 = 0.95",
    NATS,
    SMALL,
    1e-3,
    {
      **pair(optax.adamw, fo.adamw, "adamw", **ADAMW),
      **of_storages(fo.adamw, "adamw", ["16/8 root"], **ADAMW),
    },
    train_lm,
    seeds=5,
  ),
  "lm_float16": Experiment(
    "A language model of 45 M parameters in float16, with loss scaling",
    NATS,
    FLOAT16,
    1e-3,
    pair(optax.adamw, fo.adamw, "adamw", unscaled, jnp.float16, **ADAMW),
    train_lm,
  ),
  "lm_sparse": Experiment(
    "A language model of 45 M parameters, 2,048 tokens a step: sparse gradients",
    NATS,
    SPARSE,
    5e-4,
    pair(optax.adamw, fo.adamw, "adamw", **SLOW_ADAMW),
    train_lm,
  ),
  "finetune": Experiment(
    "Fine-tuning from Python to C and C++ headers at a learning rate of 1e-5",
    CHANGE,
    FINETUNE,
    1e-5,
    {
      **pair(optax.adamw, fo.adamw, "adamw", b2=0.95),
      **of_storages(fo.adamw, "adamw", b2=0.95),
    },
    train_finetune,
  ),
  "finetune_slow": Experiment(
    "Fine-tuning from Python to C and C++ headers at a learning rate of 1e-6",
    CHANGE,
    FINETUNE,
    1e-6,
    {
      **pair(optax.adamw, fo.adamw, "adamw", b2=0.95),
      **of_storages(fo.adamw, "adamw", b2=0.95),
    },
    train_finetune,
  ),
  "images_sgd": Experiment(
    "ResNet-18 on digits, SGD with Nesterov momentum",
    "test loss, nats per image",
    RESNET18,
    0.05,
    pair(
      optax.sgd,
      fo.sgd,
      "sgd",
      lambda make, **k: lambda rate: make(rate, **k),
      momentum=0.9,
      nesterov=True,
    ),
    train_images,
    seeds=5,
  ),
  "images_adamw": Experiment(
    "ResNet-18 on digits, AdamW",
    "test loss, nats per image",
    RESNET18,
    1e-3,
    pair(optax.adamw, fo.adamw, "adamw", weight_decay=0.05),
    train_images,
    seeds=5,
  ),
}


def known_runs(output, key):
  """Runs of an experiment, as it is set up now, that ended earlier."""
  found = record.earlier(f"quality_{key}.json", output)
  if found.get("setting") != repr(EXPERIMENTS[key].setting):
    return []
  wanted = set(EXPERIMENTS[key].runs())
  return [run for run in found["runs"] if (run["name"], run["seed"]) in wanted]


def save(output, key, results, data):
  """The runs of an experiment, in its own order."""
  experiment = EXPERIMENTS[key]
  order = {run: i for i, run in enumerate(experiment.runs())}
  runs = sorted(results, key=lambda run: order[run["name"], run["seed"]])
  devices = ", ".join(sorted({run["device"] for run in runs}))
  about = record.about("flax", device=devices)
  moments = [run["moments"] for run in runs if "moments" in run]
  content = {
    "title": experiment.title,
    "metric": experiment.metric,
    "baseline": next(iter(experiment.variants)),
    "learning_rate": experiment.learning_rate,
    "setting": repr(experiment.setting),
    **about,
    "data": data,
    "runs": [{k: v for k, v in run.items() if k != "moments"} for run in runs],
  }
  record.write(f"quality_{key}.json", content, output)
  if moments:
    record.write("moments.json", about | moments[0], output)


def one_run(key, name, seed, folder):
  """A run, in this process."""
  experiment = EXPERIMENTS[key]
  return {
    "name": name,
    "seed": seed,
    "device": record.device_kind(),
    **experiment.train(experiment, name, seed, folder),
  }


def one_run_on(gpus, key, name, seed, folder):
  """The same in a process of its own, on a GPU that has room."""
  gpu = gpus.get()
  try:
    environment = {
      **os.environ,
      "CUDA_VISIBLE_DEVICES": gpu,
      "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
      "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
    }
    command = [sys.executable, __file__, "--data", str(folder), "--here"]
    done = subprocess.run(
      [*command, json.dumps([key, name, seed])],
      env=environment,
      capture_output=True,
      text=True,
      check=False,
    )
  finally:
    gpus.put(gpu)
  if done.returncode:
    raise RuntimeError(f"{key}, {name}, seed {seed}:\n{done.stderr[-2000:]}")
  return json.loads(done.stdout.splitlines()[-1])


def run_all(keys, output, folder, devices):
  """Every run of some experiments; gives how many failed."""
  data = json.loads((folder / "about.json").read_text())
  results = {key: known_runs(output, key) for key in keys}
  known = {(key, run["name"], run["seed"]) for key in keys for run in results[key]}
  failed = 0
  for per_gpu in sorted({EXPERIMENTS[key].per_gpu for key in keys}):
    gpus: queue.Queue[str] = queue.Queue()
    for _ in range(per_gpu):
      for device in devices:
        gpus.put(device)
    jobs = [
      (seed, key, name)
      for key in keys
      if EXPERIMENTS[key].per_gpu == per_gpu
      for name, seed in EXPERIMENTS[key].runs()
      if (key, name, seed) not in known
    ]
    with concurrent.futures.ThreadPoolExecutor(gpus.qsize()) as pool:
      # A seed of everything first, for a run that is cut off.
      futures = {
        pool.submit(one_run_on, gpus, key, name, seed, folder): key
        for seed, key, name in sorted(jobs, key=lambda job: job[0])
      }
      for future in concurrent.futures.as_completed(futures):
        key = futures[future]
        try:
          run = future.result()
        except RuntimeError as error:
          failed += 1
          print(error, flush=True)
          continue
        results[key].append(run)
        save(output, key, results[key], data)
        print(key, run["name"], run["seed"], run["value"], flush=True)
  return failed


def main():
  parser = record.parser(__doc__)
  parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=[*EXPERIMENTS])
  parser.add_argument(
    "--data",
    type=pathlib.Path,
    default=pathlib.Path(tempfile.gettempdir()) / "flashoptim_jax_quality",
  )
  parser.add_argument("--gpus", default="0", help="their numbers, with commas")
  parser.add_argument("--here", help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.here:
    print(json.dumps(one_run(*json.loads(arguments.here), arguments.data)))
    return 0
  if not (arguments.data / "about.json").exists():
    print(corpora.prepare(arguments.data), flush=True)
  devices = arguments.gpus.split(",")
  return int(run_all(arguments.only, arguments.output, arguments.data, devices) > 0)


if __name__ == "__main__":
  sys.exit(main())
