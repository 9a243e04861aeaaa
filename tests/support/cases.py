"""What several test files share: optimizers, storages, trees and comparisons."""

import collections
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import flashoptim_jax as fo
from flashoptim_jax.kernels import dispatch
from flashoptim_jax.kernels.by_platform import Place
from flashoptim_jax.storage import codec, scale_gaps
from flashoptim_jax.storage.state import by_path, flash_states, map_flash_states
from tests.support.tiers import slow_but


class Optimizer(NamedTuple):
  """A flash optimizer, its counterpart in Optax, and arguments for both."""

  flash: Callable[..., optax.GradientTransformationExtraArgs]
  plain: Callable[..., optax.GradientTransformation]
  kwargs: dict[str, Any]
  moments: tuple[str, ...]


OPTIMIZERS = {
  "adamw": Optimizer(fo.adamw, optax.adamw, {"weight_decay": 0.1}, ("mu", "nu")),
  "adamw_nesterov": Optimizer(
    fo.adamw,
    optax.adamw,
    {"weight_decay": 0.1, "nesterov": True},
    ("mu", "nu"),
  ),
  "adam": Optimizer(fo.adam, optax.adam, {}, ("mu", "nu")),
  "adam_nesterov": Optimizer(fo.adam, optax.adam, {"nesterov": True}, ("mu", "nu")),
  "sgd": Optimizer(fo.sgd, optax.sgd, {}, ()),
  "momentum": Optimizer(fo.sgd, optax.sgd, {"momentum": 0.9}, ("mu",)),
  "nesterov": Optimizer(
    fo.sgd, optax.sgd, {"momentum": 0.9, "nesterov": True}, ("mu",)
  ),
  "lion": Optimizer(fo.lion, optax.lion, {"weight_decay": 0.1}, ("mu",)),
}

# Leaves are small here, and shall have codes all the same.
STORAGES = {
  "root": fo.Storage(min_quantized_size=0),
  "paper": fo.Storage(companding="paper", min_quantized_size=0),
  "32/32": fo.Storage(master_bits=32, moment_bits=32),
  "none/8": fo.Storage(master_bits=None, min_quantized_size=0),
  "16/8": fo.Storage(master_bits=16, min_quantized_size=0),
}
QUANTIZED = STORAGES["root"]
# Codes for some leaves of a state, float32 for others.
STORAGES["mixed"] = fo.Storage(min_quantized_size=64)

LEARNING_RATE = 2.0**-7  # Exact in bfloat16, for optax.inject_hyperparams.

_ALL = [
  (name, storage) for storage in STORAGES if storage != "mixed" for name in OPTIMIZERS
]
SOME = [
  ("adamw", "root"),
  ("adamw_nesterov", "none/8"),
  ("adam", "paper"),
  ("adam_nesterov", "32/32"),
  ("sgd", "32/32"),
  ("momentum", "root"),
  ("nesterov", "paper"),
  ("lion", "root"),
  ("adamw", "mixed"),
  ("adamw", "16/8"),
]


def _parametrize(combinations, quick):
  return pytest.mark.parametrize(
    ("name", "storage"),
    slow_but(combinations, *quick),
    ids=[f"{name}-{storage}" for name, storage in combinations],
  )


# Every optimizer with every storage: for tests that compile nothing large.
every_case = _parametrize(_ALL, [case for case in SOME if case in _ALL])
# Every optimizer and every storage: for tests that compile whole updates.
some_cases = _parametrize(SOME, SOME[:1])
every_optimizer = pytest.mark.parametrize(
  "name", slow_but(OPTIMIZERS, "adamw", "momentum", "lion")
)


def make(name: str, storage: str = "root", learning_rate=LEARNING_RATE, **kwargs):
  """The flash optimizer of that name."""
  kwargs = {**OPTIMIZERS[name].kwargs, **kwargs}
  return OPTIMIZERS[name].flash(learning_rate, storage=STORAGES[storage], **kwargs)


def make_plain(name: str, learning_rate=LEARNING_RATE, **kwargs):
  """Its counterpart in Optax."""
  kwargs = {**OPTIMIZERS[name].kwargs, **kwargs}
  return OPTIMIZERS[name].plain(learning_rate, **kwargs)


MIXED_SHAPES = {
  "matrix": ((4, 64), jnp.bfloat16),
  "bias": ((33,), jnp.bfloat16),
  "conv": ((3, 3, 2, 40), jnp.bfloat16),
  "norm": ((5,), jnp.float32),
  "scale": ((), jnp.bfloat16),
}
SMALL_SHAPES = {name: MIXED_SHAPES[name] for name in ("matrix", "bias")}
TINY_SHAPES = {"matrix": ((2, 40), jnp.bfloat16), "norm": ((5,), jnp.float32)}


def tree(shapes=None, seed: int = 0, low: float = 0.5, dtype=None):
  """Random parameters: normal, and kept ``low`` away from zero.

  With small steps such parameters stay within a factor of two of themselves.
  """
  rng = np.random.default_rng(seed)
  result = {}
  for name, (shape, own) in (shapes or MIXED_SHAPES).items():
    x = rng.normal(size=shape)
    x = x + np.copysign(low, x)
    result[name] = jnp.asarray(x, dtype or own)
  return result


def small(seed: int = 0):
  """Two leaves of random parameters."""
  return tree(SMALL_SHAPES, seed)


# Trees of two leaves whose keys, joined by slashes, are the same.
TWINS = {
  "slash": lambda x, y: {"a": {"b": x}, "a/b": y},
  "number": lambda x, y: collections.OrderedDict([(1, x), ("1", y)]),
}
every_twin = pytest.mark.parametrize("twin", TWINS.values(), ids=TWINS)


def grads_like(params, seed: int = 1, dtype=None):
  """Random gradients, their magnitudes spread over a few orders."""
  rng = np.random.default_rng(seed)

  def draw(param):
    x = rng.normal(size=param.shape) * rng.lognormal(size=param.shape)
    return jnp.asarray(x, dtype or param.dtype)

  return jax.tree.map(draw, params)


# One operation at a time: each is compiled once for a shape, whichever optimizer
# and wrapper calls it, where compiling whole updates would take minutes.
def update(tx, grads, state, params, **extra_args):
  """``tx.update`` and ``optax.apply_updates``."""
  updates, state = tx.update(grads, state, params, **extra_args)
  return optax.apply_updates(params, updates), state


step = fo.step
jitted_update = jax.jit(update, static_argnums=0)
jitted_step = jax.jit(fo.step, static_argnums=0)


def train(tx, params, steps: int = 3, function=step, state=None, seed: int = 1):
  """Takes some steps with random gradients that don't depend on the params."""
  state = tx.init(params) if state is None else state
  for i in range(steps):
    params, state = function(tx, grads_like(params, seed + i), state, params)
  return params, state


@functools.partial(jax.jit, static_argnames=("tx", "loss", "steps"))
def descend(tx, loss, params, state, *, steps: int):
  """Parameters, state and losses after steps down a loss, with its own gradients."""

  def body(carry, _):
    params, state = carry
    value, grads = jax.value_and_grad(loss)(params)
    return fo.step(tx, grads, state, params), value

  (params, state), losses = jax.lax.scan(body, (params, state), length=steps)
  return params, state, losses


def there_and_back(tx, params, state):
  """Params and state that went to Optax, and to another storage, and came back."""
  wide = fo.adamw(1e-2, storage=fo.Storage(32, 32))
  masters = fo.to_fp32(params, state)
  back = fo.from_optax(tx, params, fo.to_optax(tx, params, state), params_fp32=masters)
  return (params, back), fo.convert(wide, tx, *fo.convert(tx, wide, params, state))


def random_state(tx, params, seed: int = 2, count: int = 3):
  """A state of ``tx`` that training might have led to, made without training."""
  rng = np.random.default_rng(seed)

  def codes(leaf):
    info = np.iinfo(leaf.dtype)
    low = -info.max if info.min else 1
    values = rng.integers(low, info.max, leaf.shape, leaf.dtype, endpoint=True)
    # Every group has an element at its scale.
    axis = codec.group_axis(leaf.shape, 32)
    where = tuple(
      slice(None, None, 32) if i == axis else slice(None) for i in range(leaf.ndim)
    )
    values[where] = info.max
    return jnp.asarray(values)

  def positive(leaf):
    return jnp.asarray(rng.lognormal(size=leaf.shape), leaf.dtype)

  def scale(zeros, of):
    if of.dtype == jnp.float32:
      return zeros
    exact = jax.ShapeDtypeStruct(codec.scale_shape(of.shape, 32), zeros.dtype)
    return scale_gaps.insert(positive(exact), of.shape, zeros.shape, 32)

  def moment(leaf):
    return (codes if jnp.issubdtype(leaf.dtype, jnp.integer) else positive)(leaf)

  def correction(leaf):
    info = np.iinfo(leaf.dtype)
    values = rng.integers(info.min, info.max, leaf.shape, leaf.dtype)
    return jnp.asarray(values)

  def fill(state):
    fields = {"correction": jax.tree.map(correction, state.correction)}
    for name in ("mu", "nu"):
      values, scales = getattr(state, name), getattr(state, f"{name}_scale")
      fields[name] = jax.tree.map(moment, values)
      fields[f"{name}_scale"] = jax.tree.map(
        scale, scales, values if jax.tree.leaves(scales) else scales
      )
    return state._replace(count=jnp.int32(count), **fields)

  return map_flash_states(fill, tx.init(params))


def update_as_on(platform: str, monkeypatch, devices: int | None = None):
  """Has leaves updated as on another platform, and number of devices."""
  update_at = dispatch._update_at

  def elsewhere(place, *args):
    count = place.devices if devices is None else devices
    return update_at(Place(platform, count, None), *args)

  monkeypatch.setattr(dispatch, "_update_at", elsewhere)
  monkeypatch.setattr(Place, "is_here", lambda place: True)


def largest_steps(b1, b2, nesterov, steps):
  """How far exact Adam can go with a learning rate of 1, after 1, 2, ... updates.

  Gradients count (1-b1)·b1^k in the first moment, (1-b2)·b2^k in the second; the rest
  is Cauchy's and Schwarz's.
  """
  t = np.arange(1, steps + 1, dtype=np.float64)
  w = w_0 = (1 - b1) / (1 - b1**t)
  if nesterov:
    w = b1 * (1 - b1) / (1 - b1 ** (t + 1))
    w_0 = w + (1 - b1) / (1 - b1**t)
  ratio = b1**2 / b2
  older = (1 - ratio**t) / (1 - ratio) - 1
  return np.sqrt((1 - b2**t) / (1 - b2) * (w_0**2 + w**2 * older))


def spiky(shape, steps, seed=0):
  """Gradients with which errors of 8 bits make the longest steps."""
  rng = np.random.default_rng(seed)
  grads = rng.standard_normal((steps, *shape)) * 10.0 ** rng.uniform(-6, 0, shape)
  grads *= np.arange(steps)[:, None, None] < rng.integers(1, 2 * steps, shape)
  grads[rng.random(grads.shape) < 0.01] = 1e20
  grads[rng.random(grads.shape) < 0.01] = 1e-20
  return grads.astype(np.float32)


def types(values):
  """Shapes, dtypes and weak types (and explicit shardings) of a tree."""
  return jax.tree.map(jax.typeof, values)


def assert_same(actual, desired):
  """Two trees agree in structure, types and every bit (NaNs included)."""
  assert jax.tree.structure(actual) == jax.tree.structure(desired)
  pairs = zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(desired), strict=True)
  for (path, a), b in pairs:
    where = jax.tree_util.keystr(path)
    assert (a.shape, a.dtype) == (b.shape, b.dtype), where
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), where


def spacing(magnitude: float, dtype, master_bits: int | None) -> float:
  """Distance of neighbouring master weights at a magnitude."""
  binade = 2.0 ** (math.frexp(magnitude or 1e-30)[1] - 1)
  unit = binade * 2.0 ** -ml_dtypes.finfo(dtype).nmant
  if np.dtype(dtype).itemsize != 2 or master_bits in (None, 16):
    return unit
  if np.dtype(dtype) == np.float16:
    # A correction is a share of half a unit; their sum is rounded to float32.
    return unit / 2 / {24: 127, 32: 32767}[master_bits] + binade * 2.0**-23
  return unit / 2.0 ** (master_bits - 16)


def assert_within_units(actual, desired, units: int, dtype, master_bits):
  """Agreement to some units of a format at the array's largest magnitude."""
  actual = np.asarray(actual, np.float64)
  desired = np.asarray(desired, np.float64)
  unit = spacing(float(np.abs(desired).max(initial=0)), dtype, master_bits)
  np.testing.assert_allclose(actual, desired, rtol=0, atol=units * unit)


def assert_masters_close(actual, desired, params, master_bits, steps: int):
  """Master weights agree to a unit per step, at the leaf's largest weight."""
  assert actual.keys() == desired.keys() == params.keys()
  for name, param in params.items():
    assert_within_units(actual[name], desired[name], steps, param.dtype, master_bits)


def assert_codes_close(actual, desired, share=1e-4):
  """Scales agree bit for bit, codes but for a share (or one), which are off by 1.

  Both are ``(mu, mu_scale, nu, nu_scale)``.
  """
  assert_same(actual[1::2], desired[1::2])
  assert_same_types(actual[::2], desired[::2])
  pairs = zip(*(jax.tree.leaves(x[::2]) for x in (actual, desired)), strict=True)
  for a, b in pairs:
    if not jnp.issubdtype(a.dtype, jnp.integer):
      assert_same(a, b)
      continue
    apart = np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int))
    assert apart.max(initial=0) <= 1
    assert apart.sum() <= max(1, share * apart.size)


def assert_equal(actual, desired, steps: int, assert_moments_equal=assert_same):
  """Two (params, state) pairs are equal as far as two compiled programs can be.

  Counts, codes and scales bit for bit, or as ``assert_moments_equal`` says. Master
  weights, and moments kept in float32, within one unit of their own format at the
  leaf's largest value, per step: XLA may contract a multiply-add in one program and
  not in the other.
  """
  (params, state), (other_params, other_state) = actual, desired
  flash, other = flash_states(state), flash_states(other_state)
  assert len(flash) == len(other)
  for a, b in zip(flash, other, strict=True):
    assert a.format == b.format
    assert_same(a.count, b.count)
    assert_same_types(a, b)
    if a.format.storage.moment_bits == 8:
      assert_moments_equal(a[1:5], b[1:5])
      continue
    for x, y in zip(jax.tree.leaves(a[1:5]), jax.tree.leaves(b[1:5]), strict=True):
      assert_within_units(x, y, steps, jnp.float32, None)
  assert_same_types(params, other_params)
  assert_masters_close(
    by_path(fo.to_fp32(params, state)),
    by_path(fo.to_fp32(other_params, other_state)),
    by_path(params),
    flash[0].format.storage.master_bits,
    steps,
  )


def assert_same_types(actual, desired):
  """Two trees agree in structure, shapes and dtypes."""
  assert jax.tree.structure(actual) == jax.tree.structure(desired)
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)


def raises(*parts, error=ValueError):
  """The block raises exactly ``error``, with all of ``parts`` in its message."""

  def check(exception):
    assert type(exception) is error
    message = str(exception)
    assert not [part for part in parts if str(part) not in message], message
    return True

  return pytest.RaisesExc(error, check=check)


def arguments(tx, shapes=None):
  """Of a step: gradients, state and parameters."""
  params = tree(shapes)
  return grads_like(params), tx.init(params), params
