"""Flax's linen and nnx train with flash optimizers."""

import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx, serialization
from flax.training import train_state
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flashoptim_jax as fo
from tests.support import cases
from tests.support.tiers import slow_but

_RNG = np.random.default_rng(0)
X = jnp.asarray(_RNG.normal(size=(64, 32)), jnp.bfloat16)
Y = jnp.asarray(_RNG.normal(size=(64, 1)), jnp.bfloat16) + X[:, :1]

some_optimizers = pytest.mark.parametrize(
  "name", slow_but(["adamw", "momentum", "lion"], "lion")
)


def optimizer(name):
  rate = 0.02 if name == "momentum" else 0.01
  return optax.chain(optax.clip(1.0), cases.make(name, learning_rate=rate))


def mse(prediction):
  return jnp.mean(jnp.square(prediction - Y).astype(jnp.float32))


class Linen(linen.Module):
  """Two layers; the first is partitioned when asked to be."""

  partitioned: bool = False

  @linen.compact
  def __call__(self, x):
    init = linen.initializers.lecun_normal()
    if self.partitioned:
      init = linen.with_partitioning(init, ("rows", "columns"))
    dtypes = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    x = linen.Dense(64, kernel_init=init, **dtypes)(x)
    return linen.Dense(1, **dtypes)(linen.relu(x))


class Nnx(nnx.Module):
  """The same in nnx."""

  def __init__(self, rngs, width=64, **metadata):
    init = nnx.initializers.lecun_normal()
    if metadata:
      init = nnx.with_partitioning(init, **metadata)
    dtypes = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    self.first = nnx.Linear(32, width, kernel_init=init, rngs=rngs, **dtypes)
    self.last = nnx.Linear(width, 1, rngs=rngs, **dtypes)

  def __call__(self, x):
    return self.last(nnx.relu(self.first(x)))


def linen_params(partitioned=False):
  return Linen(partitioned).init(jax.random.key(0), X)["params"]


@pytest.fixture
def recorded_steps(monkeypatch):
  """The extra arguments of each call of ``step``, which does nothing here."""
  calls = []

  def step(tx, grads, opt_state, params, **extra_args):
    del tx, grads
    calls.append(extra_args)
    return params, opt_state

  monkeypatch.setattr("flashoptim_jax.update.step.step", step)
  return calls


def assert_one_step_agrees(actual, desired):
  """Two models after their first step.

  Where a step takes an element across zero, bfloat16 rounds the update that
  stock optimizers apply; the others land where they should.
  """
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
    np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=2**-7, atol=2**-14)


@jax.jit
def linen_step(state):
  def loss(params):
    return mse(state.apply_fn({"params": params}, X))

  value, grads = jax.value_and_grad(loss)(state.params)
  return state.apply_gradients(grads=grads), value


def train_linen(cls, tx, params):
  """The state at the end, parameters after one step, and the losses."""
  apply = Linen(isinstance(params["Dense_0"]["kernel"], linen.Partitioned)).apply
  state = cls.create(apply_fn=apply, params=params, tx=tx)
  first, losses = None, []
  for _ in range(20):
    state, loss = linen_step(state)
    first = first or state.params
    losses.append(float(loss))
  return state, first, losses


@some_optimizers
def test_linen_train_states(name):
  tx = optimizer(name)
  ours, first, losses = train_linen(fo.flax.TrainState, tx, linen_params())
  assert isinstance(ours, train_state.TrainState)
  assert int(ours.step) == 20
  assert int(optax.tree.get(ours.opt_state, "count")) == 20
  assert losses[-1] < 0.8 * losses[0]
  stock, stock_first, stock_losses = train_linen(
    train_state.TrainState, tx, linen_params()
  )
  cases.assert_same_types(ours.params, stock.params)
  assert_one_step_agrees(first, stock_first)
  # Later on, roundings take them apart.
  np.testing.assert_allclose(losses[:5], stock_losses[:5], rtol=1e-2)


def test_linen_train_state_uses_step(recorded_steps):
  state = fo.flax.TrainState.create(
    apply_fn=None, params=linen_params(), tx=fo.adamw(0.1, storage=cases.QUANTIZED)
  )
  state = state.apply_gradients(grads=state.params)
  assert recorded_steps == [{}]
  assert int(state.step) == 1


SERIALIZED = {
  "chain": lambda: optax.chain(optax.clip(1.0), fo.adamw(0.1)),
  "lossless": lambda: fo.adamw(0.1, storage=cases.STORAGES["32/32"]),
  "lion": lambda: fo.lion(0.1),
  "compress": lambda: fo.compress(optax.adamw(0.1)),
  "codecs": lambda: fo.compress(optax.adamw(0.1), codecs={"nu": "float32"}),
}


@pytest.mark.parametrize("name", slow_but(SERIALIZED))
def test_states_as_bytes(name):
  """What is read back is what was written; another format is refused by name."""
  params = cases.tree(cases.TINY_SHAPES)
  fresh = train_state.TrainState.create(
    apply_fn=None, params=params, tx=SERIALIZED[name]()
  )
  state = fresh.replace(
    params=cases.tree(cases.TINY_SHAPES, seed=1),
    opt_state=jax.tree.map(lambda x: x + 1, fresh.opt_state),
  )
  restored = serialization.from_bytes(fresh, serialization.to_bytes(state))
  cases.assert_same(
    (restored.params, restored.opt_state), (state.params, state.opt_state)
  )
  # Its format is still no leaf.
  as_dict = serialization.to_state_dict(state)
  assert len(jax.tree.leaves(as_dict)) == len(jax.tree.leaves(state))


def test_states_as_bytes_of_another_format():
  forms = [
    fo.storage.state.flash_states(make().init(cases.tree(cases.TINY_SHAPES)))[0].format
    for make in SERIALIZED.values()
  ]
  for form, other in itertools.permutations(forms, 2):
    with pytest.raises(ValueError, match="was made by") as error:
      serialization.from_state_dict(form, serialization.to_state_dict(other))
    assert str(form) in str(error.value)
    assert f"{other} and the moments {other.moments}" in str(error.value)
  with pytest.raises(ValueError, match="'what': 1"):
    serialization.from_state_dict(forms[0], {"what": 1})


@pytest.mark.parametrize("late", slow_but([False, True]))
def test_states_as_bytes_without_the_flax_module(late):
  """In a process that imports Flax before the optimizer is made, or after."""
  code = """if True:
    import flashoptim_jax as fo, jax.numpy as jnp, sys
    assert "flax" not in sys.modules
    {}from flax import serialization
    tx = fo.adamw(0.1)
    state = tx.init({{"w": jnp.ones(64, jnp.bfloat16)}})
    {}import flashoptim_jax.flax
    from flax import serialization
    restored = serialization.from_bytes(state, serialization.to_bytes(state))
    assert restored.format == state.format
  """.format(*(("# ", "") if late else ("", "# ")))
  subprocess.run([sys.executable, "-c", code], check=True)


def test_linen_leaves_that_are_overwritten():
  """Flax's fp8 statistics: their gradient is their new value."""
  key = train_state.OVERWRITE_WITH_GRADIENT
  params = {"params": {"w": jnp.ones(32, jnp.bfloat16)}, key: jnp.zeros(3)}
  grads = {"params": {"w": jnp.ones(32, jnp.bfloat16)}, key: jnp.arange(3.0)}
  results = [
    jax.jit(cls.apply_gradients)(
      cls.create(
        apply_fn=None,
        params=params,
        tx=fo.adamw(0.5, storage=cases.QUANTIZED),
      ),
      grads=grads,
    )
    for cls in (fo.flax.TrainState, train_state.TrainState)
  ]
  assert int(results[0].step) == 1
  np.testing.assert_array_equal(results[0].params[key], [0, 1, 2])
  assert np.all(np.asarray(results[0].params["params"]["w"]) < 1)
  cases.assert_same(results[0].params, results[1].params)


@pytest.mark.parametrize("storage", slow_but(cases.STORAGES, "root", "32/32"))
@cases.every_optimizer
def test_linen_partitioned_params_give_specs(name, storage):
  tx = optax.chain(optax.clip(1.0), cases.make(name, storage))

  def create():
    params = linen_params(partitioned=True)
    params["Dense_0"]["bias"] = params["Dense_0"]["bias"].astype(jnp.float32)
    return fo.flax.TrainState.create(apply_fn=None, params=params, tx=tx)

  state = jax.eval_shape(create)
  specs = linen.get_partition_spec(state)
  unboxed = linen.unbox(state)
  assert jax.tree.structure(specs) == jax.tree.structure(unboxed)
  flash = fo.storage.state.flash_states(specs.opt_state)[0]
  kernel = P("rows", "columns")
  assert specs.params["Dense_0"]["kernel"] == kernel
  for field in flash[1:-1]:
    if not isinstance(field, optax.MaskedNode):
      assert field["Dense_0"]["kernel"] == kernel
  for spec, leaf in zip(
    jax.tree.leaves(specs, is_leaf=lambda node: isinstance(node, P)),
    jax.tree.leaves(unboxed),
    strict=True,
  ):
    assert len(spec) <= leaf.ndim
  # Which makes them shardings for the state as it is made.
  mesh = jax.make_mesh(
    (2, 2),
    ("rows", "columns"),
    axis_types=(AxisType.Auto,) * 2,
  )
  shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
  jax.tree.map(
    lambda leaf, sharding: sharding.shard_shape(leaf.shape),
    unboxed,
    shardings,
  )


def test_linen_partitioned_params_train():
  params = linen_params(partitioned=True)
  boxed, _, losses = train_linen(fo.flax.TrainState, optimizer("adamw"), params)
  assert losses[-1] < 0.8 * losses[0]
  assert jax.tree.structure(boxed.params) == jax.tree.structure(params)
  # The box's names travel with both moments and the correction.
  flash = fo.storage.state.flash_states(boxed.opt_state)[0]
  for field in (flash.mu, flash.nu_scale, flash.correction):
    assert field["Dense_0"]["kernel"].names == ("rows", "columns")


@nnx.jit
def nnx_step(model, optimizer):
  loss, grads = nnx.value_and_grad(lambda model: mse(model(X)))(model)
  optimizer.update(model, grads)
  return loss


def train_nnx(cls, tx):
  """The optimizer at the end, parameters after one step, and the losses."""
  model = Nnx(nnx.Rngs(0))
  model.counter = nnx.Variable(jnp.zeros(3))  # Not to be optimized.
  optimizer = cls(model, tx, wrt=nnx.Param)
  first, losses = None, []
  for _ in range(20):
    losses.append(float(nnx_step(model, optimizer)))
    first = first or nnx.to_pure_dict(nnx.state(model, nnx.Param))
  assert model.first.kernel.dtype == jnp.bfloat16
  np.testing.assert_array_equal(model.counter[...], np.zeros(3))
  return optimizer, first, losses


@some_optimizers
def test_nnx_optimizers(name):
  tx = optimizer(name)
  ours, first, losses = train_nnx(fo.flax.Optimizer, tx)
  assert isinstance(ours, nnx.Optimizer)
  assert int(ours.step[...]) == 20
  assert losses[-1] < 0.8 * losses[0]
  pure = nnx.as_pure(ours.opt_state)
  flash = fo.storage.state.flash_states(pure)[0]
  assert int(flash.count) == 20
  assert flash.mu["first"]["kernel"].dtype == jnp.int8
  stock, stock_first, stock_losses = train_nnx(nnx.Optimizer, tx)
  cases.assert_same_types(pure, nnx.as_pure(stock.opt_state))
  assert_one_step_agrees(first, stock_first)
  np.testing.assert_allclose(losses[:5], stock_losses[:5], rtol=1e-2)


def test_nnx_optimizer_uses_step(recorded_steps):
  model = Nnx(nnx.Rngs(0))
  tx = fo.adamw(0.1, storage=cases.QUANTIZED)
  state = fo.flax.Optimizer(model, tx, wrt=nnx.Param)
  state.update(model, nnx.state(model, nnx.Param), value=1.0)
  assert recorded_steps == [{"value": 1.0}]
  assert int(state.step[...]) == 1


@pytest.mark.parametrize(
  ("kind", "metadata", "tx", "cls"),
  slow_but(
    [
      ("Auto", {"sharding": (None, "tensor")}, fo.adamw(0.1), fo.flax.Optimizer),
      ("Explicit", {"sharding": (None, "tensor")}, fo.adamw(0.1), nnx.Optimizer),
      ("Explicit", {"sharding": P("data", "tensor")}, fo.lion(0.1), nnx.Optimizer),
      (
        "Auto",
        {
          "sharding": (None, "out"),
          "sharding_rules": (("out", ("data", "tensor")),),
        },
        fo.lion(0.1),
        nnx.Optimizer,
      ),
      (
        "Auto",
        {"sharding": (None, "tensor")},
        fo.compress(optax.sgd(0.1, 0.9)),
        fo.flax.Optimizer,
      ),
    ]
  ),
  ids=["Auto", "Explicit", "spec", "logical", "compress"],
)
def test_nnx_sharding_metadata_that_scales_do_not_fit(kind, metadata, tx, cls):
  """A scale's axis is left out of what doesn't divide it; the parameter's stays."""
  mesh = jax.make_mesh((2, 3), ("data", "tensor"), axis_types=(AxisType[kind],) * 2)
  with jax.set_mesh(mesh):
    model = Nnx(nnx.Rngs(0), width=96, **metadata)
    before = model.first.kernel.get_metadata()
    optimizer = cls(model, tx, wrt=nnx.Param)
    assert model.first.kernel.get_metadata() == before
  kernel = model.first.kernel.get_value()
  rows, columns = kernel.sharding.spec
  assert columns is not None
  shapes = set()
  for path, variable in nnx.to_flat_state(nnx.state(optimizer)):
    if path[-2:] == ("first", "kernel"):
      array = variable.get_value()
      shapes.add(array.shape)
      spec = (rows, columns) if array.shape == kernel.shape else (rows,)
      sharding = NamedSharding(mesh, P(*spec))
      assert array.sharding.is_equivalent_to(sharding, 2), path
  assert shapes == {(32, 96), (32, 8)}  # Three scales, and gaps.


@pytest.mark.parametrize("cls", [nnx.Optimizer, fo.flax.Optimizer])
def test_nnx_variables_that_are_masked(cls):
  """Optax leaves an ``optax.MaskedNode`` in the variables of the others."""
  tx = optax.partition(
    {"trained": fo.adamw(0.1), "frozen": optax.set_to_zero()},
    lambda params: jax.tree.map_with_path(
      lambda path, _: "frozen" if "last" in str(path[0]) else "trained", params
    ),
  )
  mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
  with jax.set_mesh(mesh):
    model = Nnx(nnx.Rngs(0), sharding=(None, "tensor"))
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    optimizer = cls(model, tx, wrt=nnx.Param)
    for _ in range(2):
      nnx_step(model, optimizer)
  after = nnx.state(model, nnx.Param)
  cases.assert_same(after["last"], before["last"])
  assert (after["first"]["kernel"][...] != before["first"]["kernel"][...]).any()


@pytest.mark.slow
def test_nnx_sharding_metadata_fits_after_conversions():
  mesh = jax.make_mesh((2, 3), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
  narrow, wide = (fo.lion(0.1, storage=fo.Storage(moment_bits=n)) for n in (8, 32))
  with jax.set_mesh(mesh):
    model = Nnx(nnx.Rngs(0), width=96, sharding=(None, "tensor"))
    params = nnx.state(model, nnx.Param)
    expected = jax.tree.structure(narrow.init(params))
    float32 = jax.tree.map(lambda param: param.astype(jnp.float32), params)
    plain = optax.lion(0.1).init(float32)
    _, converted = fo.convert(wide, narrow, params, wide.init(params))
    assert jax.tree.structure(converted) == expected
    assert jax.tree.structure(fo.from_optax(narrow, params, plain)) == expected


def test_nnx_sharding_metadata_reaches_the_state():
  mesh = jax.make_mesh((2, 2), ("rows", "columns"), axis_types=(AxisType.Auto,) * 2)

  def create():
    model = Nnx(nnx.Rngs(0), sharding=("rows", "columns"))
    tx = fo.adamw(0.1, storage=cases.QUANTIZED)
    return fo.flax.Optimizer(model, tx, wrt=nnx.Param)

  with jax.set_mesh(mesh):
    specs = nnx.get_partition_spec(nnx.state(nnx.eval_shape(create)))
  kernels = [
    variable.get_value()
    for path, variable in nnx.to_flat_state(specs)
    if path[-2:] == ("first", "kernel")
  ]
  assert kernels == [P("rows", "columns")] * 5
