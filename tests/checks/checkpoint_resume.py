"""Checks that a restored run is the run that was never interrupted, bit for bit.

Every optimizer and storage, in a bare tree, a linen TrainState and an nnx
module, saved synchronously, asynchronously and by a CheckpointManager, on one
device and on eight. The tests run a selection of it.

  JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=8 \
    python tests/checks/checkpoint_resume.py
"""

import argparse
import functools
import itertools
import pathlib
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flashoptim_jax as fo

SCHEDULE = optax.linear_schedule(1e-2, 1e-3, 10)
OPTIMIZERS: dict[str, Callable[..., Any]] = {
  "adamw": fo.adamw,
  "adamw_nesterov": functools.partial(fo.adamw, nesterov=True),
  "adam": fo.adam,
  "sgd": fo.sgd,
  "momentum": functools.partial(fo.sgd, momentum=0.9, weight_decay=0.1),
  "nesterov": functools.partial(fo.sgd, momentum=0.9, nesterov=True),
  "lion": fo.lion,
}
STORAGES = {
  "root": fo.Storage(min_quantized_size=0),
  "paper": fo.Storage(companding="paper", min_quantized_size=0),
  "32/32": fo.Storage(master_bits=32, moment_bits=32),
  "none/8": fo.Storage(master_bits=None, min_quantized_size=0),
  "16/8": fo.Storage(master_bits=16, min_quantized_size=0),
}
SHAPES = {"first": (16, 256), "scale": (256,), "second": (256, 8)}
SPECS = {"first": P("x", "y"), "scale": P("y"), "second": P("y", "x")}
BEFORE, AFTER = 2, 2


def make_tx(name: str, storage: str) -> optax.GradientTransformation:
  optimizer = OPTIMIZERS[name](SCHEDULE, storage=STORAGES[storage])
  return optax.chain(optax.clip_by_global_norm(1.0), optimizer)


def make_mesh(shape: tuple[int, int]):
  """A mesh with the axes x and y; (1, 1) is one device."""
  devices = jax.devices()[: shape[0] * shape[1]]
  return jax.make_mesh(
    shape, ("x", "y"), axis_types=(AxisType.Auto,) * 2, devices=devices
  )


def draw(seed: int) -> dict[str, jax.Array]:
  rng = np.random.default_rng(seed)
  return {
    name: jnp.asarray(0.2 * rng.normal(size=shape), jnp.float32)
    for name, shape in SHAPES.items()
  }


def loss_of(params: dict[str, jax.Array], step: jax.Array) -> jax.Array:
  """Loss on a batch that depends on the step."""
  x = jax.random.normal(jax.random.fold_in(jax.random.key(1), step), (8, 16))
  hidden = jnp.tanh(x @ params["first"].astype(jnp.float32))
  hidden *= params["scale"].astype(jnp.float32)
  y = hidden @ params["second"].astype(jnp.float32)
  return jnp.mean((y - x[:, :8]) ** 2)


class Run(NamedTuple):
  """A way to train.

  Attributes:
    start: Makes the state from a seed.
    step: Turns the state into the next one, and gives the loss.
    tree: What a checkpoint keeps of the state.
    load: Puts what it kept into a state.
  """

  start: Callable[[int], Any]
  step: Callable[[Any], tuple[Any, jax.Array]]
  tree: Callable[[Any], Any]
  load: Callable[[Any, Any], Any]


def start_on(tx: Any, mesh: Any, seed: int) -> tuple[Any, Any]:
  """Parameters and state, on the mesh."""
  params, opt_state = fo.from_fp32(tx, draw(seed), keep="scale")
  shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
  return (
    jax.device_put(params, shardings),
    jax.device_put(opt_state, fo.state_shardings(tx, params, shardings)),
  )


def bare(tx: Any, mesh: Any) -> Run:
  def start(seed):
    params, opt_state = start_on(tx, mesh, seed)
    step = jax.device_put(jnp.int32(0), NamedSharding(mesh, P()))
    return {"params": params, "opt_state": opt_state, "step": step}

  @jax.jit
  def step(state):
    loss, grads = jax.value_and_grad(loss_of)(state["params"], state["step"])
    params, opt_state = fo.step(tx, grads, state["opt_state"], state["params"])
    state = {"params": params, "opt_state": opt_state, "step": state["step"] + 1}
    return state, loss

  return Run(start, step, lambda state: state, lambda state, tree: tree)


def linen(tx: Any, mesh: Any) -> Run:
  def start(seed):
    params, opt_state = start_on(tx, mesh, seed)
    return fo.flax.TrainState(
      step=jax.device_put(jnp.int32(0), NamedSharding(mesh, P())),
      apply_fn=loss_of,
      params=params,
      tx=tx,
      opt_state=opt_state,
    )

  @jax.jit
  def step(state):
    loss, grads = jax.value_and_grad(state.apply_fn)(state.params, state.step)
    return state.apply_gradients(grads=grads), loss

  return Run(start, step, lambda state: state, lambda state, tree: tree)


class Model(nnx.Module):
  """The same model, of nnx parameters."""

  def __init__(self, params):
    for name, value in params.items():
      setattr(self, name, nnx.Param(value))


def nnx_run(tx: Any, mesh: Any) -> Run:
  def start(seed):
    params, opt_state = start_on(tx, mesh, seed)
    model = Model(params)
    optimizer = fo.flax.Optimizer(model, tx, wrt=nnx.Param)
    load(
      (model, optimizer),
      {
        "model": nnx.as_pure(nnx.state(model)),
        "opt_state": jax.tree.unflatten(
          jax.tree.structure(nnx.as_pure(optimizer.opt_state)),
          jax.tree.leaves(opt_state),
        ),
        "step": jax.device_put(jnp.uint32(0), NamedSharding(mesh, P())),
      },
    )
    return model, optimizer

  @nnx.jit
  def update(model, optimizer):
    def loss(model):
      params = {name: getattr(model, name)[...] for name in SHAPES}
      return loss_of(params, optimizer.step[...])

    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value

  def step(state):
    return state, update(*state)

  def tree(state):
    model, optimizer = state
    return {
      "model": nnx.as_pure(nnx.state(model)),
      "opt_state": nnx.as_pure(optimizer.opt_state),
      "step": optimizer.step[...],
    }

  def load(state, tree):
    model, optimizer = state
    nnx.update(model, tree["model"])
    nnx.update(optimizer.opt_state, nnx.state(tree["opt_state"]))
    optimizer.step[...] = tree["step"]
    return state

  return Run(start, step, tree, load)


CONTAINERS = {"bare": bare, "linen": linen, "nnx": nnx_run}


def _sync(folder: pathlib.Path, tree: Any) -> None:
  with ocp.Checkpointer(fo.checkpoint.Handler()) as checkpointer:
    checkpointer.save(folder / "0", args=fo.checkpoint.Save(tree))


def _async(folder: pathlib.Path, tree: Any) -> None:
  with ocp.AsyncCheckpointer(fo.checkpoint.Handler()) as checkpointer:
    checkpointer.save(folder / "0", args=fo.checkpoint.Save(tree))


def _manager(folder: pathlib.Path, tree: Any) -> None:
  with ocp.CheckpointManager(folder) as manager:
    manager.save(0, args=fo.checkpoint.Save(tree))


def restore(folder: pathlib.Path, abstract: Any) -> Any:
  """What one of the above saved."""
  if (folder / "0" / "default").exists():
    with ocp.CheckpointManager(folder) as manager:
      return manager.restore(0, args=fo.checkpoint.Restore(abstract))
  with ocp.Checkpointer(fo.checkpoint.Handler()) as checkpointer:
    return checkpointer.restore(folder / "0", args=fo.checkpoint.Restore(abstract))


SAVES = {"sync": _sync, "async": _async, "manager": _manager}


def steps(run: Run, state: Any, count: int) -> tuple[Any, list[float]]:
  losses = []
  for _ in range(count):
    state, loss = run.step(state)
    losses.append(float(loss))
  return state, losses


def abstract(tree: Any) -> Any:
  """Shapes, dtypes and shardings of a tree."""
  return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)


def identical(a: Any, b: Any) -> bool:
  """Whether two trees agree in structure, dtypes and every bit."""
  return jax.tree.structure(a) == jax.tree.structure(b) and all(
    x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


def resumes(run: Run, saves: tuple[str, ...], folder: pathlib.Path) -> list[str]:
  """The ways of saving after which the run does not go on as if nothing was."""
  state, _ = steps(run, run.start(0), BEFORE)
  for name in saves:
    # A save that is under way must not see later steps.
    SAVES[name](folder / name, run.tree(state))
  target = abstract(run.tree(state))
  state, losses = steps(run, state, AFTER)
  failed = []
  for name in saves:
    other = run.load(run.start(1), restore(folder / name, target))
    other, other_losses = steps(run, other, AFTER)
    if other_losses != losses or not identical(run.tree(other), run.tree(state)):
      failed.append(name)
  return failed


def main() -> int:
  argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0]).parse_args()
  cases = list(itertools.product(OPTIMIZERS, STORAGES, CONTAINERS, [(1, 1), (4, 2)]))
  failures = 0
  for name, storage, container, shape in cases:
    run = CONTAINERS[container](make_tx(name, storage), make_mesh(shape))
    with tempfile.TemporaryDirectory() as folder:
      failed = resumes(run, tuple(SAVES), pathlib.Path(folder))
    failures += len(failed)
    if failed:
      print(name, storage, container, shape, "differs after", failed, flush=True)
  print(f"{len(cases) * len(SAVES)} resumed runs, {failures} differ.")
  return 1 if failures else 0


if __name__ == "__main__":
  sys.exit(main())
