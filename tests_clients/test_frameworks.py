"""Train steps and checkpoints as the frameworks' own guides write them."""

import contextlib
import functools
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen, nnx, serialization
from flax.training import train_state

import flashoptim_jax as fo
from tests_clients import support

STEPS, RATE = 40, 3e-3


class Script(NamedTuple):
  """A user's script: whatever it trains is ``state`` here."""

  start: Callable[[], Any]
  step: Callable[..., tuple[Any, jax.Array]]
  save: Callable[[Any], None]
  restore: Callable[[], Any]


def mse(prediction, y):
  return jnp.mean(jnp.square(prediction.astype(jnp.float32) - y))


def cast(params, weights):
  """Weights as the run wants them, of the same values in all."""
  if weights == support.MIXED:
    return fo.cast_params(params, jnp.bfloat16, keep=("*norm*", "*Norm*"))
  return params


class Linen(linen.Module):
  @linen.compact
  def __call__(self, x):
    init = linen.with_partitioning(linen.initializers.lecun_normal(), (None, "model"))
    x = linen.LayerNorm()(x)
    x = linen.Dense(64, kernel_init=init)(x)
    x = linen.Dense(64, kernel_init=init)(linen.relu(x))
    return linen.Dense(1)(linen.relu(x))[:, 0]


def with_linen(tx, weights, mesh, folder):
  """Flax's guide to linen on several devices: boxes give the state's sharding."""
  model = Linen()

  def init():
    params = model.init(jax.random.key(0), jnp.zeros((1, 64)))["params"]
    params = cast(params, weights)
    return train_state.TrainState.create(apply_fn=model.apply, params=params, tx=tx)

  shardings = linen.get_sharding(jax.eval_shape(init), mesh)
  start = jax.jit(init, out_shardings=shardings)

  @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
  def step(state, x, y):
    def loss_fn(params):
      return mse(state.apply_fn({"params": params}, x), y)

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss

  def save(state):
    (folder / "state").write_bytes(serialization.to_bytes(state))

  def restore():
    state = serialization.from_bytes(start(), (folder / "state").read_bytes())
    return jax.device_put(state, shardings)

  return Script(start, step, save, restore)


class Nnx(nnx.Module):
  def __init__(self, rngs):
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
    layer = functools.partial(nnx.Linear, rngs=rngs)
    self.norm = nnx.LayerNorm(64, rngs=rngs)
    self.first = layer(64, 64, kernel_init=init)
    self.second = layer(64, 64, kernel_init=init)
    self.head = layer(64, 1)

  def __call__(self, x):
    x = nnx.relu(self.first(self.norm(x)))
    return self.head(nnx.relu(self.second(x)))[:, 0]


def with_nnx(tx, weights, mesh, folder):
  """Flax's guide to nnx on several devices, with Orbax."""
  del mesh  # It is set while the script runs.

  @nnx.jit
  def start():
    model = Nnx(nnx.Rngs(0))
    nnx.update(model, cast(nnx.as_pure(nnx.state(model, nnx.Param)), weights))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for part in model, optimizer:
      state = nnx.state(part)
      specs = nnx.get_partition_spec(state)
      nnx.update(part, jax.lax.with_sharding_constraint(state, specs))
    return model, optimizer

  @nnx.jit
  def train_step(model, optimizer, x, y):
    loss, grads = nnx.value_and_grad(lambda model: mse(model(x), y))(model)
    optimizer.update(model, grads)
    return loss

  def step(state, x, y):
    return state, train_step(*state, x, y)

  def save(state):
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(folder / "state", nnx.state(state))

  def restore():
    state = start()
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, nnx.state(state))
    with ocp.StandardCheckpointer() as checkpointer:
      nnx.update(state, checkpointer.restore(folder / "state", abstract))
    return state

  return Script(start, step, save, restore)


def with_equinox(tx, weights, mesh, folder):
  """Equinox's examples: filtered transformations and ``eqx.apply_updates``."""
  del mesh

  def start():
    model = {
      "norm": eqx.nn.LayerNorm(64),
      "mlp": eqx.nn.MLP(64, "scalar", width_size=64, depth=2, key=jax.random.key(0)),
    }
    arrays, static = eqx.partition(model, eqx.is_inexact_array)
    model = eqx.combine(cast(arrays, weights), static)
    return model, tx.init(eqx.filter(model, eqx.is_inexact_array))

  @eqx.filter_jit(donate="all-except-first")
  def make_step(batch, model, opt_state):
    x, y = batch

    @eqx.filter_value_and_grad
    def compute_loss(model):
      return mse(jax.vmap(lambda x: model["mlp"](model["norm"](x)))(x), y)

    loss, grads = compute_loss(model)
    params = eqx.filter(model, eqx.is_inexact_array)
    updates, opt_state = tx.update(grads, opt_state, params)
    return (eqx.apply_updates(model, updates), opt_state), loss

  return Script(
    start,
    lambda state, x, y: make_step((x, y), *state),
    lambda state: eqx.tree_serialise_leaves(folder / "state", state),
    lambda: eqx.tree_deserialise_leaves(folder / "state", start()),
  )


def with_haiku(tx, weights, mesh, folder):
  """Haiku's examples: ``transform``, ``tx.update``, ``optax.apply_updates``, pickle."""
  del mesh

  @hk.without_apply_rng
  @hk.transform
  def network(x):
    x = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
    return hk.nets.MLP([64, 64, 1])(x)[:, 0]

  def start():
    params = network.init(jax.random.key(0), jnp.zeros((1, 64)))
    params = cast(params, weights)
    return params, tx.init(params)

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state, x, y):
    params, opt_state = state
    loss, grads = jax.value_and_grad(lambda p: mse(network.apply(p, x), y))(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), loss

  def save(state):
    (folder / "state").write_bytes(pickle.dumps(jax.device_get(state)))

  return Script(
    start, step, save, lambda: pickle.loads((folder / "state").read_bytes())
  )


SCRIPTS = {
  "linen": with_linen,
  "nnx": with_nnx,
  "equinox": with_equinox,
  "haiku": with_haiku,
}
each_script = pytest.mark.parametrize(
  ("script", "devices"),
  [("linen", 1), ("linen", 4), ("nnx", 1), ("nnx", 4), ("equinox", 1), ("haiku", 1)],
)


@pytest.fixture(autouse=True)
def flax_defaults():
  """Of which Tunix changes one when it is imported."""
  flax.config.update("flax_always_shard_variable", True)


def train(tx, script, weights, devices, folder=None, resumed_at=None):
  mesh = support.mesh((devices,), ("model",))
  run = SCRIPTS[script](tx, weights, mesh, folder)
  losses = []
  with jax.set_mesh(mesh) if script == "nnx" else contextlib.nullcontext():
    state = run.start()
    for i, (x, y) in enumerate(support.batches(STEPS)):
      if i == resumed_at:
        run.save(state)
        state = run.restore()
      state, loss = run.step(state, x, y)
      losses.append(float(loss))
  return losses


@support.each_precision
@each_script
def test_losses_beside_optax(script, weights, devices):
  theirs = train(optax.adamw(RATE), script, "float32", devices)
  ours = train(fo.adamw(RATE), script, weights, devices)
  support.assert_alike(ours, theirs, within=0.01)


@support.each_precision
@each_script
def test_resumes(script, weights, devices, tmp_path):
  tx = fo.adamw(RATE)
  whole = train(tx, script, weights, devices)
  resumed = train(tx, script, weights, devices, tmp_path, resumed_at=STEPS // 2)
  np.testing.assert_array_equal(resumed, whole)
