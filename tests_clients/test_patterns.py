"""What many training scripts do around an optimizer, and no package has."""

import functools
import re

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import optax
import pytest
from flax import nnx, serialization, struct, traverse_util
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import flashoptim_jax as fo
from tests_clients import support

STEPS, RATE = 40, 3e-3


def init_params(weights):
  keys = jax.random.split(jax.random.key(0), 3)
  params = {
    "norm": {"scale": jnp.ones(64)},
    "layers_0": {"kernel": jax.random.normal(keys[0], (64, 64)) / 8},
    "layers_1": {"kernel": jax.random.normal(keys[1], (64, 64)) / 8},
    "head": {"kernel": jax.random.normal(keys[2], (64, 1)) / 8},
  }
  if weights == support.MIXED:
    params = fo.cast_params(params, jnp.bfloat16, keep=("*norm*",))
  return params


def loss_fn(params, x, y):
  x = x * params["norm"]["scale"]
  for name in "layers_0", "layers_1":
    x = jax.nn.relu(x @ params[name]["kernel"])
  return jnp.mean(jnp.square((x @ params["head"]["kernel"])[:, 0] - y))


@struct.dataclass
class TrainState:
  params: dict
  opt_state: optax.OptState


def init(tx, weights):
  params = init_params(weights)
  return TrainState(params, tx.init(params))


def train_step(tx, state, x, y):
  loss, grads = jax.value_and_grad(loss_fn)(state.params, x, y)
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  return TrainState(optax.apply_updates(state.params, updates), opt_state), loss


def train(tx, weights, after_step=lambda state: None):
  """Losses of a plain loop."""
  state, step = init(tx, weights), jax.jit(functools.partial(train_step, tx))
  losses = []
  for x, y in support.batches(STEPS):
    state, loss = step(state, x, y)
    after_step(state)
    losses.append(loss)
  return losses


# --- Optax's wrappers and chains


@support.each_precision
@pytest.mark.parametrize("every", [1, 2])
def test_multi_steps_always_around(weights, every):
  def around(tx):
    return optax.MultiSteps(tx, every).gradient_transformation()

  theirs = train(around(optax.adamw(RATE)), "float32")
  support.assert_alike(train(around(fo.adamw(RATE)), weights), theirs, within=0.01)


def is_first(params):
  """The layers whose learning rate is a tenth."""
  return {name: name in ("norm", "layers_0") for name in params}


def labels(params):
  return {name: "slow" if first else "fast" for name, first in is_first(params).items()}


MULTIPLIERS = {
  # Of learning rates, whatever the optimizer.
  "rates": (
    optax.chain(
      optax.clip_by_global_norm(1.0),
      optax.adamw(RATE),
      optax.masked(optax.scale(0.1), is_first),
    ),
    optax.chain(
      optax.clip_by_global_norm(1.0),
      optax.partition({"slow": fo.adamw(0.1 * RATE), "fast": fo.adamw(RATE)}, labels),
    ),
  ),
  # Of gradients, which for SGD is the same.
  "gradients": (
    optax.chain(optax.sgd(0.1, 0.9), optax.masked(optax.scale(0.1), is_first)),
    optax.chain(optax.masked(optax.scale(0.1), is_first), fo.sgd(0.1, 0.9)),
  ),
  # Layers that don't move.
  "frozen": (
    optax.chain(optax.adamw(RATE), optax.masked(optax.set_to_zero(), is_first)),
    optax.partition({"slow": optax.set_to_zero(), "fast": fo.adamw(RATE)}, labels),
  ),
}


@support.each_precision
@pytest.mark.parametrize("what", MULTIPLIERS)
def test_multipliers_of_layers_before(what, weights):
  after, before = MULTIPLIERS[what]
  support.assert_alike(train(before, weights), train(after, "float32"), within=0.01)


# --- Averages of parameters


def own_average(decay=0.9):
  def init_fn(params):
    return jax.tree.map(lambda p: p.astype(jnp.float32), params)

  def update(average, params):
    average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, params)
    return average, average

  return init_fn, update


def optax_average(decay=0.9):
  average = optax.ema(decay, accumulator_dtype=jnp.float32)
  return average.init, lambda state, params: average.update(params, state)


@support.each_precision
@pytest.mark.parametrize("average", [own_average, optax_average])
def test_moving_average_of_parameters(average, weights):
  x, y = next(support.batches(1))

  def losses_of_average(tx, weights):
    init_fn, update = average()
    state, losses = init_fn(init_params(weights)), []

    def after_step(train_state):
      nonlocal state
      mean, state = update(state, train_state.params)
      losses.append(loss_fn(mean, x, y))

    train(tx, weights, after_step)
    return losses

  theirs = losses_of_average(optax.adamw(RATE), "float32")
  support.assert_alike(losses_of_average(fo.adamw(RATE), weights), theirs, within=0.01)


# --- Shardings made from the parameters'

RULES = [
  ("layers_0/kernel", P("fsdp", None)),
  ("layers_1/kernel", P(None, "fsdp")),
  (".*", P()),
]


def specs_by_path(tree):
  """EasyLM's way: the first rule that a leaf's path matches."""

  def spec(path, leaf):
    if leaf.size <= 1:
      return P()
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return next(spec for rule, spec in RULES if re.search(rule, name))

  return jax.tree.map_with_path(spec, tree)


def specs_by_params(tx, abstract):
  """Optax's way: each tree of the state that is like the parameters gets theirs."""
  specs = specs_by_path(abstract.params)

  def is_masked(node):
    return isinstance(node, optax.MaskedNode)

  opt_specs = optax.tree.map_params(
    tx,
    lambda leaf, spec: leaf if is_masked(leaf) else spec,
    abstract.opt_state,
    specs,
    transform_non_params=lambda _: P(),
    is_leaf=is_masked,
  )
  return TrainState(specs, opt_specs)


SPECS = {
  "path rules": lambda tx, abstract: specs_by_path(abstract),
  "tree.map_params": specs_by_params,
}


def train_sharded(tx, weights, specs, devices, checkpoint=lambda state: state):
  """EasyLM's loop: shardings for the whole state, before it is made."""
  mesh = support.mesh((devices,), ("fsdp",))
  start = functools.partial(init, tx, weights)
  shardings = jax.tree.map(
    functools.partial(NamedSharding, mesh), SPECS[specs](tx, jax.eval_shape(start))
  )
  step = jax.jit(
    functools.partial(train_step, tx),
    donate_argnums=0,
    in_shardings=(shardings, None, None),
    out_shardings=(shardings, None),
  )
  state, losses = jax.jit(start, out_shardings=shardings)(), []
  for i, (x, y) in enumerate(support.batches(STEPS)):
    if i == STEPS // 2:
      state = jax.device_put(checkpoint(state), shardings)
    state, loss = step(state, x, y)
    losses.append(float(loss))
  return losses


each_specs = pytest.mark.parametrize("specs", SPECS)


@support.each_mesh
@each_specs
@support.each_precision
def test_shardings_from_the_parameters(weights, specs, devices):
  theirs = train_sharded(optax.adamw(RATE), "float32", specs, devices)
  ours = train_sharded(fo.adamw(RATE), weights, specs, devices)
  support.assert_alike(ours, theirs, within=0.01)


def nnx_optimizer(tx, weights, devices):
  """Flax's optimizer of a model that says how it is sharded."""

  class Model(nnx.Module):
    def __init__(self, rngs):
      init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "fsdp"))
      dtype = jnp.bfloat16 if weights == support.MIXED else jnp.float32
      self.norm = nnx.RMSNorm(64, rngs=rngs)
      self.linear = nnx.Linear(64, 64, kernel_init=init, param_dtype=dtype, rngs=rngs)

  with jax.set_mesh(support.mesh((devices,), ("fsdp",))):
    return nnx.Optimizer(Model(nnx.Rngs(0)), tx, wrt=nnx.Param)


@support.each_mesh
@support.each_precision
def test_variables_of_an_optimizer(weights, devices):
  """Trainers that walk nnx variables read each one's dtype, and map its spec."""
  optimizer = nnx_optimizer(fo.adamw(RATE), weights, devices)
  state = nnx.state(optimizer, nnx.optimizer.OptState)
  for variable in jax.tree.leaves(
    state, is_leaf=lambda node: isinstance(node, nnx.Variable)
  ):
    assert jnp.issubdtype(variable.get_value().dtype, jnp.number)
  jax.tree.map(lambda leaf, spec: None, state, nnx.get_partition_spec(state))


@support.each_mesh
@support.each_precision
def test_frozen_variables(weights, devices):
  """As MaxText's ``trainable_parameters_mask``, which has no state for the others."""

  def labels(params):
    return jax.tree.map_with_path(
      lambda path, _: "frozen" if "norm" in str(path[0]) else "trained", params
    )

  tx = optax.partition(
    {"trained": fo.adamw(RATE), "frozen": optax.set_to_zero()}, labels
  )
  optimizer = nnx_optimizer(tx, weights, devices)
  codes = optax.tree.get(nnx.as_pure(optimizer.opt_state), "mu")
  assert [leaf.size for leaf in jax.tree.leaves(codes)] == [64, 64 * 64]


# --- Checkpoints of Flax's serialization


def to_and_from_bytes(start, path):
  def checkpoint(state):
    path.write_bytes(serialization.to_bytes(state))
    return serialization.from_bytes(start(), path.read_bytes())

  return checkpoint


def streamed(start, path):
  """EasyLM's checkpoints: one array at a time."""

  def checkpoint(state):
    packer = msgpack.Packer()
    with path.open("wb") as file:
      flat = traverse_util.flatten_dict(serialization.to_state_dict(state))
      for key, value in flat.items():
        file.write(packer.pack((key, serialization.to_bytes(value))))
    found = {}
    with path.open("rb") as file:
      for key, value in msgpack.Unpacker(file, max_buffer_size=0):
        found[tuple(key)] = serialization.from_bytes(None, value)
    target = serialization.to_state_dict(start())
    for key, value in traverse_util.flatten_dict(target, keep_empty_nodes=True).items():
      if key not in found and value == traverse_util.empty_node:
        found[key] = value
    return serialization.from_state_dict(start(), traverse_util.unflatten_dict(found))

  return checkpoint


@support.each_precision
@pytest.mark.parametrize("form", [to_and_from_bytes, streamed])
@pytest.mark.parametrize(
  "make", [fo.adamw, lambda rate: fo.compress(optax.adamw(rate))]
)
def test_resumes_from_flax_checkpoints(make, form, weights, tmp_path):
  tx = make(RATE)
  checkpoint = form(functools.partial(init, tx, weights), tmp_path / "state")
  run = functools.partial(train_sharded, tx, weights, "path rules", 1)
  np.testing.assert_array_equal(run(checkpoint), run())
