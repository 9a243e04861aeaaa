"""Shardings of the state that others make: Optax's, Flax's, and rules on paths.

None of them asks :func:`flashoptim_jax.state_shardings`; each gives an array of the
state what it gives the array's parameter.
"""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flashoptim_jax as fo
from tests.support import cases
from tests.support.tiers import slow_but

STEPS = 3
WIDTHS = (64, 96, 192, 1000)
WAYS = (2, 4, 8)
SIZES = [(width, ways) for width in WIDTHS for ways in WAYS]
TRAINED = [(64, 8), (96, 4), (192, 2), (1000, 8)]
SPEC = P(None, "x")
OPTIMIZERS = {"adamw": fo.adamw(1e-2), "compress": fo.compress(optax.adamw(1e-2))}


def some_sizes(names, first, *others):
  """Some sizes for the first values of parameters, and one for the others."""
  quick = (96, 4)
  chosen = [(*size, *first) for size in TRAINED]
  chosen += [(*quick, *values) for values in others]
  return pytest.mark.parametrize(
    ("width", "ways", *names), slow_but(chosen, (*quick, *first))
  )


def mesh_of(ways):
  return jax.make_mesh(
    (ways,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:ways]
  )


def kernel_of(width, dtype=jnp.bfloat16):
  """Large enough to be quantised."""
  return cases.tree({"kernel": ((80, width), dtype)})["kernel"]


def by_tree_map_params(tx, params, mesh):
  state = jax.eval_shape(tx.init, params)
  return optax.tree.map_params(
    tx,
    lambda _, sharding: sharding,
    state,
    {"layer": {"kernel": NamedSharding(mesh, SPEC)}},
    transform_non_params=lambda _: NamedSharding(mesh, P()),
  )


def by_path_rules(tx, params, mesh):
  rules = (("layer/kernel", SPEC), (".*", P()))

  def place(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    spec = next(spec for rule, spec in rules if re.search(rule, name))
    return NamedSharding(mesh, spec if leaf.ndim else P())

  return jax.tree.map_with_path(place, jax.eval_shape(tx.init, params))


def by_state_shardings(tx, params, mesh):
  shardings = {"layer": {"kernel": NamedSharding(mesh, SPEC)}}
  return fo.state_shardings(tx, params, shardings)


def step(tx, params, state, i):
  grads = cases.grads_like({"kernel": params["layer"]["kernel"]}, 1 + i)
  return fo.step(tx, {"layer": grads}, state, params)


def saved_and_restored(path, tree):
  """Through Orbax, as it is sharded."""
  with ocp.Checkpointer(fo.checkpoint.Handler()) as checkpointer:
    checkpointer.save(path, args=fo.checkpoint.Save(tree))
    target = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
    )
    restored = checkpointer.restore(path, args=fo.checkpoint.Restore(target))
  cases.assert_same(*jax.device_get((restored, tree)))
  return restored


@pytest.mark.parametrize(("width", "ways"), slow_but(SIZES, (64, 4), (1000, 8)))
def test_states_of_all_sizes(width, ways):
  """They are created where a borrowed spec says."""
  mesh, whole = mesh_of(ways), {"layer": {"kernel": kernel_of(width)}}
  for tx in OPTIMIZERS.values():
    for place in (by_tree_map_params, by_path_rules):
      places = place(tx, whole, mesh)
      state = jax.jit(tx.init, out_shardings=places)(whole)
      parts = [x.addressable_shards[0].data.size for x in jax.tree.leaves(state)]
      # All but the counts are divided.
      assert all(
        part * ways == x.size
        for part, x in zip(parts, jax.tree.leaves(state), strict=True)
        if x.ndim
      )


@pytest.mark.filterwarnings("ignore:Shards cut groups")
@some_sizes(
  ("tx", "place"),
  ("adamw", by_tree_map_params),
  ("adamw", by_path_rules),
  ("adamw", by_state_shardings),
  ("compress", by_tree_map_params),
  ("compress", by_path_rules),
)
def test_states_train_as_unsharded_ones(width, ways, tx, place, tmp_path):
  tx, mesh = OPTIMIZERS[tx], mesh_of(ways)
  whole = {"layer": {"kernel": kernel_of(width)}}
  places = place(tx, whole, mesh)
  state = jax.jit(tx.init, out_shardings=places)(whole)
  of_params = {"layer": {"kernel": NamedSharding(mesh, SPEC)}}
  run = jax.jit(
    functools.partial(step, tx), static_argnums=2, out_shardings=(of_params, places)
  )
  sharded, alone = (jax.device_put(whole, of_params), state), (whole, tx.init(whole))
  for i in range(STEPS):
    if i == 1:
      sharded = saved_and_restored(tmp_path / "checkpoint", sharded)
    sharded = run(*sharded, i)
    alone = jax.jit(functools.partial(step, tx), static_argnums=2)(*alone, i)
  for array, sharding in zip(*map(jax.tree.leaves, (sharded[1], places)), strict=True):
    assert array.sharding.is_equivalent_to(sharding, array.ndim)
  moments = [fo.moments(jax.device_get(state)) for _, state in (sharded, alone)]
  cases.assert_same(*jax.device_get(moments))
  masters = [fo.to_fp32(*jax.device_get(each)) for each in (sharded, alone)]
  kernels = [each["layer"]["kernel"] for each in masters]
  cases.assert_within_units(*kernels, STEPS, jnp.bfloat16, 24)


class Linen(nn.Module):
  """One kernel with names for its axes, and a float32 norm."""

  width: int

  @nn.compact
  def __call__(self, x):
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "x"))
    x = nn.Dense(self.width, kernel_init=init, param_dtype=jnp.bfloat16)(x)
    scale = nn.with_partitioning(nn.initializers.ones, ("x",))
    return nn.RMSNorm(scale_init=scale)(x)


X = np.random.default_rng(0).normal(size=(8, 80)).astype(np.float32)


@pytest.mark.filterwarnings("ignore:Shards cut groups")
@some_sizes(("tx",), ("adamw",), ("compress",))
def test_linen_boxes(width, ways, tx, tmp_path):
  """With the whole state's shardings from its boxes, as Flax's guide has it."""
  mesh, tx, model = mesh_of(ways), OPTIMIZERS[tx], Linen(width)

  def create(key):
    params = model.init(key, X)["params"]
    return fo.flax.TrainState.create(apply_fn=model.apply, params=params, tx=tx)

  def train(state):
    def loss(params):
      return jnp.mean(jnp.square(state.apply_fn({"params": params}, X) - 1))

    return state.apply_gradients(grads=jax.grad(loss)(state.params))

  key = jax.random.key(0)
  places = nn.get_sharding(jax.eval_shape(create, key), mesh)
  sharded = jax.jit(create, out_shardings=places)(key)
  alone = jax.jit(create)(key)
  for i in range(STEPS):
    if i == 1:
      sharded = saved_and_restored(tmp_path / "checkpoint", sharded)
    sharded = jax.jit(train, out_shardings=places)(sharded)
    alone = jax.jit(train)(alone)
  kernels = [
    fo.to_fp32(*jax.device_get((nn.unbox(s.params), nn.unbox(s.opt_state))))
    for s in (sharded, alone)
  ]
  for a, b in zip(*map(jax.tree.leaves, kernels), strict=True):
    # Gradients come from another order of sums.
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-3)


class Nnx(nnx.Module):
  """The same in nnx."""

  def __init__(self, width, rngs):
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "x"))
    dtype = jnp.bfloat16
    self.dense = nnx.Linear(80, width, kernel_init=init, param_dtype=dtype, rngs=rngs)
    ones = nnx.with_partitioning(nnx.initializers.ones, ("x",))
    self.norm = nnx.RMSNorm(width, scale_init=ones, rngs=rngs)

  def __call__(self, x):
    return self.norm(self.dense(x))


@some_sizes(
  ("tx", "cls"),
  ("adamw", nnx.Optimizer),
  ("adamw", fo.flax.Optimizer),
  ("compress", nnx.Optimizer),
)
def test_nnx_variables(width, ways, tx, cls, tmp_path):
  """Shardings come from the variables' metadata, under ``jax.set_mesh``."""

  @nnx.jit
  def train(model, optimizer):
    def loss(model):
      return jnp.mean(jnp.square(model(X) - 1))

    optimizer.update(model, nnx.grad(loss)(model))

  def run(restart):
    model = Nnx(width, nnx.Rngs(0))
    optimizer = cls(model, OPTIMIZERS[tx], wrt=nnx.Param)
    for i in range(STEPS):
      if i == 1 and restart:
        state = nnx.as_pure(optimizer.opt_state)
        restored = saved_and_restored(tmp_path / "checkpoint", state)
        nnx.update(optimizer.opt_state, nnx.state(restored))
      train(model, optimizer)
    for _, variable in nnx.to_flat_state(nnx.state(optimizer)):
      assert variable.get_value().dtype  # Each box holds an array.
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    state = nnx.as_pure(optimizer.opt_state)
    return jax.device_get(fo.to_fp32(params, state)), model, optimizer

  with jax.set_mesh(mesh_of(ways)):
    sharded, model, optimizer = run(restart=True)
    kernel = model.dense.kernel.get_value()
    assert kernel.addressable_shards[0].data.shape == (80, width // ways)
    state = fo.storage.state.flash_states(nnx.as_pure(optimizer.opt_state))[0]
    codes = fo.storage.state.stored_moments(state)[0].values["dense"]["kernel"]
    assert codes.addressable_shards[0].data.shape == (80, width // ways)
  with jax.set_mesh(mesh_of(1)):
    alone, _, _ = run(restart=False)
  for a, b in zip(*map(jax.tree.leaves, (sharded, alone)), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-3)
