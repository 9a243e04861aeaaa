"""Bad input: the exception, and that it names the leaf, the finding, the wish."""

import functools
import inspect

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import flashoptim_jax as fo
from tests.support import cases
from tests.support.cases import every_optimizer, raises
from tests.support.tiers import slow_but

SHAPES = {"kernel": ((4, 64), jnp.bfloat16), "bias": ((33,), jnp.bfloat16)}


def model():
  """Parameters whose leaves have the paths layer/kernel and layer/bias."""
  return {"layer": cases.tree(SHAPES)}


def attempts(tx, grads, state, params):
  """Every way to take a step."""
  return (
    lambda: tx.update(grads, state, params),
    lambda: fo.step(tx, grads, state, params),
    lambda: jax.eval_shape(tx.update, grads, state, params),
  )


def refused(tx, grads, state, params, *parts):
  for attempt in attempts(tx, grads, state, params):
    with raises(*parts):
      attempt()


# Options.


@pytest.mark.parametrize("storage", ["root", 8, None, {"moment_bits": 8}])
@every_optimizer
def test_storage_of_another_type(name, storage):
  flash, _, kwargs, _ = cases.OPTIMIZERS[name]
  with raises(repr(storage), "flashoptim_jax.Storage"):
    flash(0.1, **kwargs, storage=storage)


@every_optimizer
def test_dtype_options_point_to_storage(name):
  arguments = inspect.signature(cases.OPTIMIZERS[name].flash).parameters
  (option,) = (argument for argument in arguments if argument.endswith("_dtype"))
  for value in (jnp.float32, jnp.bfloat16, "float32"):
    with raises(
      option, repr(value), "None", "leave it out", "storage=flashoptim_jax.Storage"
    ):
      cases.make(name, **{option: value})


@every_optimizer
def test_unknown_implementation(name):
  for value in ("cuda", "XLA", ""):
    with raises(repr(value), "None", "'xla'", "'mosaic_tpu'", "'triton'"):
      cases.make(name, implementation=value)
  cases.make(name, implementation="xla")


def test_unknown_option():
  with raises("amsgrad", error=TypeError):
    fo.adamw(0.1, amsgrad=True)


DECAYING = ["adamw", "sgd", "momentum", "lion"]


@pytest.mark.parametrize("name", slow_but(DECAYING))
@pytest.mark.parametrize(
  "rate",
  [0.0, optax.linear_schedule(0.0, 1.0, 10), lambda count: 0.0 * count],
  ids=["number", "warmup", "function"],
)
def test_decouple_lr_needs_a_rate_above_0(name, rate):
  params = model()
  with raises("decouple_lr=True", "step 0", "which is 0", "above 0"):
    tx = cases.make(name, learning_rate=rate, weight_decay=0.1, decouple_lr=True)
    fo.step(tx, params, tx.init(params), params)


@pytest.mark.parametrize("name", slow_but(DECAYING))
def test_decouple_lr_needs_a_number_or_a_schedule(name):
  with raises("decouple_lr=True", "a number or a schedule", "static_args"):
    cases.make(name, learning_rate=jnp.float32(0.1), decouple_lr=True)


def test_dampening():
  with raises("dampening is 0.5", "nesterov=True", "expected 0"):
    fo.sgd(0.1, 0.9, nesterov=True, dampening=0.5)
  with raises("dampening is 0.5", "momentum=None", "expected 0"):
    fo.sgd(0.1, dampening=0.5)
  fo.sgd(0.1, 0.9, dampening=0.5)
  fo.sgd(0.1, 0.9, nesterov=True, dampening=0)


# Parameters.


@pytest.mark.parametrize(
  ("dtype", "advice"),
  slow_but(
    [
      ("int8", "optax.masked"),
      ("int32", "optax.masked"),
      ("bool", "optax.masked"),
      ("float8_e4m3fn", "optax.masked"),
      ("complex64", "split_real_and_imaginary"),
    ]
  ),
)
@every_optimizer
def test_params_of_other_dtypes(name, dtype, advice):
  tx = cases.make(name)
  params = model()
  state = tx.init(params)
  bad = {"layer": params["layer"] | {"bias": jnp.ones(33, dtype)}}
  parts = ("'layer/bias'", dtype, "bfloat16, float16, float32, float64", advice)
  with raises(*parts):
    tx.init(bad)
  with raises(*parts):
    tx.init(jax.eval_shape(lambda tree: tree, bad))
  refused(tx, params, state, bad, *parts)


WHOLE_MODEL_CALLS = {
  "init": lambda tx, state, whole: tx.init(whole),
  "update": lambda tx, state, whole: tx.update(whole, state, whole),
  "step": lambda tx, state, whole: fo.step(tx, whole, state, whole),
  "from_fp32": lambda tx, state, whole: fo.from_fp32(tx, whole),
  "to_optax": lambda tx, state, whole: fo.to_optax(tx, whole, state),
  "from_optax": lambda tx, state, whole: fo.from_optax(tx, whole, state),
  "convert": lambda tx, state, whole: fo.convert(tx, tx, whole, state),
  "memory_report": lambda tx, state, whole: fo.memory_report(tx, whole),
  "check_numerics": lambda tx, state, whole: fo.check_numerics(whole, state, 0.1),
  "state_shardings": lambda tx, state, whole: fo.state_shardings(
    tx, whole, jax.sharding.SingleDeviceSharding(jax.devices()[0])
  ),
  "release": lambda tx, state, whole: fo.value_and_release(lambda live: 0.0, tx)(
    whole, state
  ),
}


@pytest.mark.parametrize("call", slow_but(WHOLE_MODEL_CALLS))
@pytest.mark.parametrize(
  "tx", [fo.adamw(0.1), fo.compress(optax.adamw(0.1))], ids=["flash", "compress"]
)
@pytest.mark.parametrize("leaf", [jax.nn.relu, "relu"], ids=["function", "string"])
def test_a_model_passed_whole(tx, call, leaf):
  """As an Equinox model is, whose leaves are functions too."""
  params = {"layer": cases.tree(SHAPES)["bias"]}
  state = tx.init(params)
  whole = {**params, "activation": leaf}
  parts = ("'activation'", f"is a {type(leaf).__name__}", "expected an array")
  with raises(*parts, "eqx.filter(model", "nnx.state(model, nnx.Param)"):
    WHOLE_MODEL_CALLS[call](tx, state, whole)
  assert fo.cast_params(whole, jnp.float16)["activation"] is leaf
  assert fo.to_fp32(whole, state)["activation"] is leaf


def test_an_nnx_module_passed_whole():
  """It has counts and keys beside its parameters."""
  module = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
  with raises("dtype", "expected one of", "nnx.state(model, nnx.Param)"):
    fo.adamw(0.1).init(module)


def test_a_single_leaf_has_a_name():
  with raises("'<root>'", "int32"):
    fo.adamw(0.1).init(jnp.arange(3))


# States that do not match the parameters.


@every_optimizer
def test_state_of_another_tree(name):
  tx = cases.make(name)
  params = model()
  less = {"layer": {"kernel": params["layer"]["kernel"]}}
  more = {"layer": params["layer"] | {"scale": jnp.ones(3, jnp.bfloat16)}}
  renamed = {"other": params["layer"]}
  for found, path in (
    (less, "'layer/bias'"),
    (more, "'layer/scale'"),
    (renamed, "'layer/bias'"),
  ):
    parts = (path, "the state's", "the parameters", "no counterpart")
    refused(tx, params, tx.init(found), params, *parts)


@every_optimizer
def test_state_of_another_shape(name):
  tx = cases.make(name)
  params = model()
  other = {"layer": params["layer"] | {"bias": jnp.ones(34, jnp.bfloat16)}}
  parts = ("state's correction of 'layer/bias'", "(34,)", "int8", "(33,)")
  refused(tx, params, tx.init(other), params, *parts)


@pytest.mark.parametrize(
  "name", [name for name, case in cases.OPTIMIZERS.items() if case.moments]
)
def test_scales_of_another_shape(name):
  tx = cases.make(name)
  params = model()
  state = tx.init(params)
  scale = {"layer": state.mu_scale["layer"] | {"bias": jnp.ones(3, jnp.bfloat16)}}
  parts = ("state's mu_scale of 'layer/bias'", "(3,)", "(2,)", "bfloat16")
  refused(tx, params, state._replace(mu_scale=scale), params, *parts)


@every_optimizer
def test_state_of_another_dtype(name):
  tx = cases.make(name)
  params = model()
  wide = {"layer": params["layer"] | {"bias": jnp.ones(33, jnp.float32)}}
  parts = ("'layer/bias'", "correction", "int8")
  refused(tx, params, tx.init(wide), params, *parts, "MaskedNode", "(33,)")
  refused(tx, wide, tx.init(params), wide, *parts, "expected none")
  if cases.OPTIMIZERS[name].moments:
    cast = optax.tree.cast(tx.init(params).mu, jnp.float32)
    state = tx.init(params)._replace(mu=cast)
    parts = ("state's mu of 'layer/bias'", "float32", "(33,)", "int8")
    refused(tx, params, state, params, *parts)


@pytest.mark.parametrize("other", [key for key in cases.STORAGES if key != "root"])
@every_optimizer
def test_state_of_another_storage(name, other):
  tx = cases.make(name)
  params = model()
  state = cases.make(name, other).init(params)
  parts = (cases.STORAGES[other], cases.STORAGES["root"], "flashoptim_jax.")
  refused(tx, params, state, params, *parts)


def test_state_of_another_optimizer():
  params = model()
  state = fo.lion(0.1).init(params)
  refused(fo.adamw(0.1), params, state, params, "lion", "adam", "made by")
  state = optax.adamw(0.1).init(params)
  for attempt in attempts(fo.adamw(0.1), params, state, params)[::2]:
    with raises("is a tuple", "expected a FlashState"):
      attempt()


def test_master_weights_of_another_tree():
  tx = fo.adamw(0.1)
  params = model()
  state = tx.init(params)
  with raises("'layer/bias'", "params lacks"):
    fo.to_fp32({"layer": {"kernel": params["layer"]["kernel"]}}, state)
  other = {"layer": params["layer"] | {"bias": jnp.ones(34, jnp.bfloat16)}}
  with raises("'layer/bias'", "(34,)", "(33,)"):
    fo.to_fp32(other, state)
  plain = optax.sgd(0.1).init(params)
  for call in (fo.moments, lambda s: fo.to_fp32(params, s)):
    with raises("No flash optimizer state", "tuple", "flashoptim_jax.adamw"):
      call(plain)
  with raises("No flash optimizer state"):
    fo.from_fp32(optax.sgd(0.1), params)
  with raises("int8", "floating-point"):
    fo.from_fp32(tx, params, jnp.int8)
  with raises("int32", "floating-point"):
    fo.cast_params(params, jnp.int32)


# Gradients.


@every_optimizer
def test_gradients_of_another_tree(name):
  tx = cases.make(name)
  params = model()
  state = tx.init(params)
  less = {"layer": {"kernel": params["layer"]["kernel"]}}
  more = {"layer": params["layer"] | {"scale": jnp.ones(3)}}
  parts = ("the gradients", "the parameters", "no counterpart")
  refused(tx, less, state, params, "'layer/bias'", *parts)
  refused(tx, more, state, params, "'layer/scale'", *parts)
  listed = {"layer": list(params["layer"].values())}
  refused(tx, listed, state, params, "the gradients", "does not match")


@every_optimizer
def test_gradients_of_another_shape_or_dtype(name):
  tx = cases.make(name)
  params = model()
  state = tx.init(params)
  for leaf, found in (
    (jnp.ones(34), "(34,)"),
    (jnp.ones((1, 33)), "(1, 33)"),
    (jnp.ones(()), "()"),
    (jnp.ones(33, jnp.int32), "int32"),
    (jnp.ones(33, jnp.complex64), "complex64"),
  ):
    grads = {"layer": params["layer"] | {"bias": leaf}}
    parts = ("gradient of 'layer/bias'", found, "(33,)", "floating-point")
    refused(tx, grads, state, params, *parts)


# Masks.


@pytest.mark.parametrize("name", ["adamw", "momentum", "lion"])
def test_mask_of_another_tree(name):
  params = model()
  for mask in (
    {"other": True},
    {"layer": {"kernel": True}},
    lambda params: {"layer": [True, False]},
  ):
    tx = cases.make(name, mask=mask, weight_decay=0.1)
    parts = ("weight decay mask", "prefix of the parameters")
    refused(tx, params, tx.init(params), params, *parts, "'bias'")


@every_optimizer
def test_two_flash_optimizers_on_one_leaf(name):
  params = model()
  tx = cases.make(name)
  both = optax.chain(
    optax.masked(tx, {"layer": {"kernel": True, "bias": True}}),
    optax.masked(tx, {"layer": {"kernel": False, "bias": True}}),
  )
  with raises("'layer/bias'", "two flash optimizers", "expected masks"):
    jax.eval_shape(functools.partial(fo.step, both), params, both.init(params), params)
