"""Trains a small transformer on Python's standard library, twice.

Once with bf16 parameters and a flash optimizer, once with fp32 master weights
and the Optax optimizer of the same name: same model, same data, same seed. Ends
with a table, a picture and a JSON file in the output folder.

  python examples/train_lm.py
  python examples/train_lm.py --dim 512 --layers 8 --heads 8 --steps 2000
  python examples/train_lm.py --gradient-release
  python examples/train_lm.py --resume      # after Ctrl-C
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import json
import pathlib
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from flax.training import train_state
from lm import checkpoint, data, model, report

import flashoptim_jax as fo

# What each optimizer is run with: its peak learning rate, and the rest.
OPTIMIZERS: dict[str, tuple[float, dict[str, Any]]] = {
  "adamw": (3e-3, {"b2": 0.95, "weight_decay": 0.1}),
  "adam": (3e-3, {"b2": 0.95}),
  "lion": (5e-4, {"weight_decay": 0.3}),
  "sgd": (0.3, {"momentum": 0.9, "nesterov": True}),
}
# The two runs take turns of so many steps, so that a machine that is busy for a
# while slows both down and their times per step stay comparable.
TURN = 10
VALIDATIONS = 10  # points on the validation curve
QUICK_BATCHES, FINAL_BATCHES = 8, 64


@dataclasses.dataclass(frozen=True)
class Settings:
  """What decides a run's result; the flags of the same names.

  Attributes:
    dim: Width of the model.
    layers: Its number of blocks.
    heads: Its attention heads per block.
    seq: Predictions per window.
    batch: Windows per step.
    steps: Optimizer steps.
    optimizer: A key of ``OPTIMIZERS``.
    storage: Master bits, moment bits and companding, such as ``24/8/root``.
    learning_rate: The peak; None for the optimizer's usual one.
    seed: Decides the initial weights and the order of the data.
    baseline: Whether to train the fp32 baseline as well.
    gradient_release: Whether the flash run updates each layer in its backward
      pass. Both runs then clip each element of the gradient, for the global norm
      needs all gradients at once.
  """

  dim: int = 128
  layers: int = 3
  heads: int = 4
  seq: int = 128
  batch: int = 8
  steps: int = 250
  optimizer: str = "adamw"
  storage: str = "24/8/root"
  learning_rate: float | None = None
  seed: int = 0
  baseline: bool = True
  gradient_release: bool = False


@dataclasses.dataclass
class Run:
  """One of the two trainings.

  Attributes:
    name: The optimizer's name.
    state: Parameters and optimizer state.
    release: The model's size if gradients are released, else None.
    train_losses: Loss of every step so far.
    valid_losses: Pairs of step and loss.
    step_seconds: Mean time of a step in each turn but the first, which compiles.
  """

  name: str
  state: train_state.TrainState
  release: model.Config | None = None
  train_losses: list[float] = dataclasses.field(default_factory=list)
  valid_losses: list[tuple[int, float]] = dataclasses.field(default_factory=list)
  step_seconds: list[float] = dataclasses.field(default_factory=list)

  @property
  def step(self) -> int:
    """Steps done."""
    return len(self.train_losses)

  def arrays(self) -> dict[str, Any]:
    """What a checkpoint needs of the state."""
    s = self.state
    return {"step": s.step, "params": s.params, "opt_state": s.opt_state}

  def notes(self) -> dict[str, Any]:
    """What a checkpoint needs besides."""
    return {
      "train_losses": self.train_losses,
      "valid_losses": self.valid_losses,
      "step_seconds": self.step_seconds,
    }


def parse_storage(text: str) -> fo.Storage:
  """Reads ``master bits/moment bits/companding``; the end may be left out."""
  master, moment, companding, *rest = [*text.split("/"), "8", "root"][:3] + (
    text.split("/")[3:]
  )
  try:
    if rest:
      raise ValueError("too many parts")
    bits = None if master.lower() == "none" else int(master)
    return fo.Storage(bits, int(moment), companding=companding)  # type: ignore
  except ValueError as error:
    raise ValueError(
      f"--storage is {text!r}; expected for example 24/8/root, 32/32 or"
      f" none/8/paper ({error})."
    ) from error


def make_optimizer(settings: Settings, flash: bool) -> optax.GradientTransformation:
  """The chain of a run: ours, or the same from Optax."""
  peak, options = OPTIMIZERS[settings.optimizer]
  schedule = optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=settings.learning_rate or peak,
    warmup_steps=settings.steps // 10,
    decay_steps=settings.steps,
    end_value=0.1 * (settings.learning_rate or peak),
  )
  if flash:
    options = {**options, "storage": parse_storage(settings.storage)}
  factory = getattr(fo if flash else optax, settings.optimizer)
  released = settings.gradient_release
  clip = optax.clip(1.0) if released else optax.clip_by_global_norm(1.0)
  return optax.chain(clip, factory(schedule, **options))


def make_runs(settings: Settings) -> list[Run]:
  """The runs at step 0, from the same fp32 weights; the flash one first."""
  on_cpu = jax.default_backend() == "cpu"
  transformer = model.Transformer(
    model.Config(
      dim=settings.dim,
      layers=settings.layers,
      heads=settings.heads,
      # Parameters are bf16 either way; few CPUs multiply in bf16.
      dtype=jnp.float32 if on_cpu else jnp.bfloat16,
      unroll=settings.layers if on_cpu else 1,
    )
  )
  tokens = jnp.zeros((settings.batch, settings.seq), jnp.int32)
  params_fp32 = jax.jit(transformer.init)(jax.random.key(settings.seed), tokens)

  tx = make_optimizer(settings, flash=True)
  params, opt_state = fo.from_fp32(tx, params_fp32)
  flash = fo.flax.TrainState(
    step=jnp.zeros([], jnp.int32),
    apply_fn=transformer.apply,
    params=params,
    tx=tx,
    opt_state=opt_state,
  )
  release = transformer.config if settings.gradient_release else None
  runs = [Run(f"fo.{settings.optimizer}", flash, release)]
  if settings.baseline:
    fp32 = train_state.TrainState.create(
      apply_fn=transformer.apply,
      params=params_fp32,
      tx=make_optimizer(settings, flash=False),
    )
    fp32 = fp32.replace(step=jnp.zeros([], jnp.int32))
    runs.append(Run(f"optax.{settings.optimizer} fp32", fp32))
  return runs


def loss_of(apply_fn: Callable, params: Any, tokens: jax.Array) -> jax.Array:
  """Loss on windows of tokens, int32 (batch, seq + 1), with bf16 parameters."""
  params = fo.cast_params(params, jnp.bfloat16)  # for the baseline
  logits = apply_fn(params, tokens[:, :-1])
  return model.next_token_loss(logits, tokens[:, 1:])


# Compiled once for both runs: it is given bf16 parameters by either.
valid_loss = jax.jit(loss_of, static_argnums=0)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=2)
def train_step(
  state: train_state.TrainState,
  tokens: jax.Array,
  release: model.Config | None = None,
):
  """One step: the new state and the loss before it."""
  if release is not None:
    loss_fn = functools.partial(model.released_loss, release)
    step = fo.value_and_release(loss_fn, state.tx)
    loss, params, opt_state = step(state.params, state.opt_state, tokens)
    new = {"params": params, "opt_state": opt_state}
    return state.replace(step=state.step + 1, **new), loss
  loss, grads = jax.value_and_grad(
    lambda params: loss_of(state.apply_fn, params, tokens)
  )(state.params)
  return state.apply_gradients(grads=grads), loss


def validate(run: Run, batches: np.ndarray) -> float:
  """Mean loss over validation batches."""
  params = fo.cast_params(run.state.params, jnp.bfloat16)
  losses = [valid_loss(run.state.apply_fn, params, batch) for batch in batches]
  return float(np.mean(jax.device_get(losses)))


@contextlib.contextmanager
def interruptible() -> Iterator[list[int]]:
  """Notes the first Ctrl-C in the list it yields; a second one interrupts."""
  signals: list[int] = []

  def note(signum, frame):
    del frame
    signals.append(signum)
    signal.signal(signal.SIGINT, previous)
    tqdm.tqdm.write("Stopping after this step; Ctrl-C again to give up.")

  previous = signal.signal(signal.SIGINT, note)
  try:
    yield signals
  finally:
    signal.signal(signal.SIGINT, previous)


def train(settings: Settings, runs: list[Run], interrupted: list[int]) -> None:
  """Trains every run to its last step, or until interrupted."""
  corpus = data.standard_library()
  batches = data.valid_batches(
    corpus.valid, settings.batch, settings.seq, QUICK_BATCHES
  )
  every = max(1, settings.steps // VALIDATIONS)
  first_turn = {run.name: True for run in runs}
  with tqdm.tqdm(
    total=settings.steps * len(runs),
    initial=sum(run.step for run in runs),
    unit="step",
    dynamic_ncols=True,
  ) as bar:
    while any(run.step < settings.steps for run in runs):
      # The run that is behind goes next; after a Ctrl-C they may be uneven.
      run = min(runs, key=lambda run: run.step)
      end = min(run.step - run.step % TURN + TURN, settings.steps)
      start, losses, begun = run.step, [], time.perf_counter()
      for step in range(start, end):
        tokens = data.train_batch(
          corpus.train, settings.batch, settings.seq, settings.seed, step
        )
        run.state, loss = train_step(run.state, tokens, run.release)
        losses.append(loss)
        # Waiting here costs little and makes Ctrl-C prompt.
        loss.block_until_ready()
        bar.update()
        if interrupted:
          break
      if not first_turn[run.name]:
        seconds = time.perf_counter() - begun
        run.step_seconds.append(seconds / len(losses))
      first_turn[run.name] = False
      run.train_losses += [float(loss) for loss in losses]
      done = {step for step, _ in run.valid_losses}
      if run.step // every > start // every and run.step not in done:
        run.valid_losses.append((run.step, validate(run, batches)))
      latest = {r.name: f"{r.train_losses[-1]:.3f}" for r in runs if r.step}
      bar.set_postfix(latest)
      if interrupted:
        return


def result_of(settings: Settings, run: Run) -> dict[str, Any]:
  """What the table, the picture and the JSON file say about a finished run."""
  corpus = data.standard_library()
  batches = data.valid_batches(
    corpus.valid, settings.batch, settings.seq, FINAL_BATCHES
  )
  memory = fo.memory_report(run.state.tx, run.state.params)
  sizes = {
    "weights": memory.params,
    "correction": memory.correction,
    # Optax's own moments count as other; the steps' count is a few bytes.
    "moments": memory.moments + memory.other,
    "scales": memory.scales,
  }
  return {
    "name": run.name,
    "valid_loss": validate(run, batches),
    "bytes_per_param": memory.bytes_per_param,
    "step_seconds": statistics.median(run.step_seconds or [float("nan")]),
    "parameters": memory.num_params,
    "components": {k: v / memory.num_params for k, v in sizes.items()},
    "train_losses": run.train_losses,
    "valid_losses": run.valid_losses,
  }


def parse_arguments() -> tuple[Settings, pathlib.Path, bool]:
  """Reads the flags: settings, output folder, whether to resume."""
  usual = Settings()
  parser = argparse.ArgumentParser(
    description=(__doc__ or "").split("\n", maxsplit=1)[0],
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  for name, text in (
    ("dim", "width of the model"),
    ("layers", "number of blocks"),
    ("heads", "attention heads per block"),
    ("seq", "bytes per window"),
    ("batch", "windows per step"),
    ("steps", "optimizer steps"),
    ("seed", "seed of weights and data order"),
  ):
    parser.add_argument(f"--{name}", type=int, default=getattr(usual, name), help=text)
  parser.add_argument(
    "--optimizer", choices=OPTIMIZERS, default=usual.optimizer, help="which one"
  )
  parser.add_argument(
    "--storage",
    default=usual.storage,
    help="master bits/moment bits/companding, with none for no correction",
  )
  parser.add_argument(
    "--learning-rate", type=float, help="peak; by default the optimizer's usual"
  )
  parser.add_argument(
    "--no-baseline",
    dest="baseline",
    action="store_false",
    help="train with the flash optimizer alone",
  )
  parser.add_argument(
    "--gradient-release",
    action="store_true",
    help="update each layer in the backward pass, and never hold the gradients",
  )
  parser.add_argument(
    "--output",
    type=pathlib.Path,
    default=pathlib.Path("runs/train_lm"),
    help="folder for checkpoint, table, picture and JSON",
  )
  parser.add_argument(
    "--resume",
    action="store_true",
    help="go on from the output folder's checkpoint, with its settings",
  )
  names = [field.name for field in dataclasses.fields(Settings)]
  arguments = parser.parse_args()
  saved = {}
  if arguments.resume:
    try:
      notes = checkpoint.restore_notes(arguments.output / "checkpoint")
    except FileNotFoundError as error:
      parser.error(str(error))
    # A resumed run has its own settings; flags may repeat them, not change them.
    saved = notes["settings"]
    parser.set_defaults(**saved)
    arguments = parser.parse_args()
  settings = Settings(**{name: getattr(arguments, name) for name in names})
  for name, value in saved.items():
    if getattr(settings, name) != value:
      parser.error(
        f"{name} is {getattr(settings, name)!r}, but the run to resume has {value!r}"
      )
  try:
    parse_storage(settings.storage)
  except ValueError as error:
    parser.error(str(error))
  return settings, arguments.output, arguments.resume


def main() -> int:
  """Trains, and reports."""
  settings, output, resume = parse_arguments()
  folder = output / "checkpoint"
  runs = make_runs(settings)
  if resume:
    arrays = checkpoint.restore_arrays(folder, [run.arrays() for run in runs])
    notes = checkpoint.restore_notes(folder)["runs"]
    for run, saved, note in zip(runs, arrays, notes, strict=True):
      run.state = run.state.replace(**saved)
      run.train_losses = note["train_losses"]
      run.valid_losses = [(step, loss) for step, loss in note["valid_losses"]]
      run.step_seconds = note["step_seconds"]
  with interruptible() as interrupted:
    train(settings, runs, interrupted)
    if not resume:  # Only now that there is something to put in its place.
      shutil.rmtree(folder, ignore_errors=True)
    checkpoint.save(
      folder,
      sum(run.step for run in runs),
      [run.arrays() for run in runs],
      {
        "settings": dataclasses.asdict(settings),
        "runs": [run.notes() for run in runs],
      },
    )
  if interrupted:
    print(f"Saved {folder}; --resume --output {output} goes on from there.")
    return 130

  results = [result_of(settings, run) for run in runs]
  text = report.table(results)
  (output / "table.txt").write_text(text + "\n")
  report.picture(output / "losses.png", results)
  about = {
    "date": datetime.date.today().isoformat(),
    "device": jax.devices()[0].device_kind,
    "python": sys.version.split()[0],
    "jax": jax.__version__,
    "optax": optax.__version__,
    "settings": dataclasses.asdict(settings),
    "runs": results,
  }
  (output / "results.json").write_text(json.dumps(about, indent=1) + "\n")
  print(f"\n{text}\n\nTable, picture and figures are in {output}.")
  return 0


if __name__ == "__main__":
  sys.exit(main())
