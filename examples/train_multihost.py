"""Trains a small transformer over many devices, on one host or several.

Parameters and optimizer state are sharded over a mesh of two axes: ``fsdp``, over
which the batch is split too, and ``tensor``. No process ever holds all of them.

  python examples/train_multihost.py                  # all devices of this host
  python examples/train_multihost.py --processes 4    # try it: 4 CPU processes
  python examples/train_multihost.py --cluster        # on every host of a cluster
  python examples/train_multihost.py --resume         # from the last checkpoint

With ``--cluster`` the processes find each other as ``jax.distributed.initialize``
does: on Cloud TPU, Slurm, Kubernetes and Open MPI by themselves, elsewhere by
``--coordinator``, ``--num-processes`` and ``--process-id``. The output folder
must be one that all of them see.
"""

import argparse
import fnmatch
import functools
import json
import os
import pathlib
import socket
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import tqdm
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from lm import checkpoint, data, model

import flashoptim_jax as fo

# How parameters are split; the first pattern that a path matches decides. Blocks
# lie stacked along a first axis, which is not split.
SPECS = {
  "*/qkv/kernel": P(None, "fsdp", None, "tensor", None),
  "*/attention_out/kernel": P(None, "tensor", None, "fsdp"),
  "*/mlp_in/kernel": P(None, "fsdp", "tensor"),
  "*/mlp_out/kernel": P(None, "tensor", "fsdp"),
  "*/embed/embedding": P("tensor", "fsdp"),
  "*/head/kernel": P("fsdp", "tensor"),
  "*": P(),
}


class TrainState(NamedTuple):
  """What is trained, and what a checkpoint holds."""

  step: jax.Array
  params: Any
  opt_state: Any


class Training(NamedTuple):
  """The pieces of a run.

  Attributes:
    init: Makes the state at step 0 from a PRNG key.
    step: Takes a state and tokens, int32 (batch, seq + 1); returns the next state
      and the loss.
    state: Shapes, dtypes and shardings of the state.
    tokens: Sharding of the tokens.
  """

  init: Any
  step: Any
  state: TrainState
  tokens: NamedSharding


def param_shardings(params: Any, mesh: Mesh) -> Any:
  """A sharding for every parameter, by ``SPECS``."""

  def place(path, leaf):
    del leaf
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    spec = next(s for glob, s in SPECS.items() if fnmatch.fnmatch(name, glob))
    return NamedSharding(mesh, spec)

  return jax.tree.map_with_path(place, params)


def make_training(arguments: argparse.Namespace, mesh: Mesh) -> Training:
  """Compiles nothing and allocates nothing yet."""
  config = model.Config(arguments.dim, arguments.layers, arguments.heads)
  transformer = model.Transformer(config)
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, 3e-3, arguments.steps // 10, arguments.steps, 3e-4
  )
  tx = optax.chain(
    optax.clip_by_global_norm(1.0),
    fo.adamw(schedule, b2=0.95, weight_decay=0.1),
  )

  def init(key: jax.Array) -> TrainState:
    tokens = jnp.zeros((1, arguments.seq), jnp.int32)
    params, opt_state = fo.from_fp32(tx, transformer.init(key, tokens))
    return TrainState(jnp.zeros([], jnp.int32), params, opt_state)

  def step(state: TrainState, tokens: jax.Array) -> tuple[TrainState, jax.Array]:
    def loss_of(params):
      logits = transformer.apply(params, tokens[:, :-1])
      return model.next_token_loss(logits, tokens[:, 1:])

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    params, opt_state = fo.step(tx, grads, state.opt_state, state.params)
    return TrainState(state.step + 1, params, opt_state), loss

  abstract = jax.eval_shape(init, jax.random.key(0))
  of_params = param_shardings(abstract.params, mesh)
  shardings = TrainState(
    NamedSharding(mesh, P()),
    of_params,
    fo.state_shardings(tx, abstract.params, of_params),
  )
  return Training(
    jax.jit(init, out_shardings=shardings),
    jax.jit(
      step,
      out_shardings=(shardings, NamedSharding(mesh, P())),
      donate_argnums=0,
    ),
    jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=sharding
      ),
      abstract,
      shardings,
    ),
    NamedSharding(mesh, P("fsdp")),
  )


def batch(arguments: argparse.Namespace, sharding: NamedSharding, step: int):
  """The batch of a step; every process makes the part of its own devices."""
  tokens = data.train_batch(
    data.standard_library().train,
    arguments.batch,
    arguments.seq,
    arguments.seed,
    step,
  )
  return jax.make_array_from_callback(tokens.shape, sharding, tokens.__getitem__)


def train(arguments: argparse.Namespace) -> None:
  """Trains from step 0 or the last checkpoint, and saves the losses."""
  tensor = arguments.tensor
  if jax.device_count() % tensor:
    sys.exit(f"--tensor is {tensor}; it must divide {jax.device_count()} devices.")
  mesh = jax.make_mesh(
    (jax.device_count() // tensor, tensor),
    ("fsdp", "tensor"),
    axis_types=(AxisType.Auto,) * 2,
  )
  training = make_training(arguments, mesh)
  folder = arguments.output / "checkpoint"
  if arguments.resume:
    state = checkpoint.restore_arrays(folder, training.state)
    losses = checkpoint.restore_notes(folder)["losses"]
  else:
    state, losses = training.init(jax.random.key(arguments.seed)), []
  leader = jax.process_index() == 0
  steps = range(len(losses), arguments.steps)
  for step in tqdm.tqdm(steps, unit="step", disable=not leader):
    state, loss = training.step(state, batch(arguments, training.tokens, step))
    losses.append(float(loss))
    if (step + 1) % arguments.save_every == 0 or step + 1 == arguments.steps:
      checkpoint.save(folder, step + 1, state, {"losses": losses})
  if leader:
    result = {"devices": jax.device_count(), "losses": losses}
    (arguments.output / "losses.json").write_text(json.dumps(result) + "\n")
    print(f"{jax.device_count()} devices: loss {losses[-1]:.4f} after {len(losses)}")


def launch(arguments: argparse.Namespace) -> int:
  """Runs this script in several processes that share this machine's CPU."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{probe.getsockname()[1]}"
  count = arguments.processes
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": str(arguments.devices_per_process),
  }
  flags = ["--cluster", f"--coordinator={address}", f"--num-processes={count}"]
  processes = [
    subprocess.Popen(
      [sys.executable, *sys.argv, *flags, f"--process-id={i}", "--processes=0"],
      env=environment,
    )
    for i in range(count)
  ]
  # One that dies takes the others with it: they can't train without it.
  codes = [process.wait() for process in processes]
  return next((1 for code in codes if code), 0)


def parse_arguments() -> argparse.Namespace:
  """Reads the flags."""
  parser = argparse.ArgumentParser(
    description=(__doc__ or "").split("\n", maxsplit=1)[0],
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  integer = functools.partial(parser.add_argument, type=int)
  integer("--dim", default=128, help="width of the model")
  integer("--layers", default=3, help="number of blocks")
  integer("--heads", default=4, help="attention heads per block")
  integer("--seq", default=128, help="bytes per window")
  integer("--batch", default=16, help="windows per step, over all devices")
  integer("--steps", default=100, help="optimizer steps")
  integer("--seed", default=0, help="seed of weights and data order")
  integer("--tensor", default=2, help="devices along the tensor axis")
  integer("--save-every", default=50, help="steps between checkpoints")
  parser.add_argument(
    "--output",
    type=pathlib.Path,
    default=pathlib.Path("runs/train_multihost"),
    help="folder for checkpoints and losses",
  )
  parser.add_argument(
    "--resume", action="store_true", help="go on from the last checkpoint"
  )
  parser.add_argument(
    "--cluster", action="store_true", help="this is one process of several"
  )
  parser.add_argument("--coordinator", help="address:port of process 0")
  integer("--num-processes", help="number of processes")
  integer("--process-id", help="number of this process")
  integer("--processes", default=0, help="CPU processes to start here")
  integer("--devices-per-process", default=2, help="devices for each of those")
  integer("--heartbeat", default=100, help="seconds until a process counts as dead")
  return parser.parse_args()


def main() -> int:
  """Trains, in this process or in those that it starts."""
  arguments = parse_arguments()
  if arguments.processes:
    return launch(arguments)
  if arguments.cluster:
    jax.distributed.initialize(
      arguments.coordinator,
      arguments.num_processes,
      arguments.process_id,
      heartbeat_timeout_seconds=arguments.heartbeat,
    )
  train(arguments)
  return 0


if __name__ == "__main__":
  sys.exit(main())
