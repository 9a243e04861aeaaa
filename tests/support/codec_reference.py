"""The storage format in numpy's bits and float64, and the codec jitted."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flashoptim_jax import Storage
from flashoptim_jax.storage import codec
from tests.support.tiers import slow_but

LEVELS = {"first": 127, "second": 255}
# The smallest scale at which the value of code 1 is a normal float32. Below it
# the small codes decode to zero, since XLA flushes subnormals on the CPU.
SMALLEST_EXPONENT = {
  ("root", "first"): -112,
  ("root", "second"): -47,
  ("paper", "first"): -118,
  ("paper", "second"): -55,
}
# Above, v = s² or the inverse of a scale leaves float32's range.
LARGEST_EXPONENT = {
  ("root", "first"): 127,
  ("root", "second"): 63,
  ("paper", "first"): 125,
  ("paper", "second"): 63,
}

STORAGES = {
  f"{name}-{size}": Storage(companding=name, group_size=size)
  for name, size in (("root", 32), ("root", 8), ("paper", 32))
}
storages = pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)
_COMPANDINGS = {name: STORAGES[name] for name in ("root-32", "paper-32")}
companding = pytest.mark.parametrize(
  "storage", slow_but(_COMPANDINGS.values()), ids=_COMPANDINGS
)
kinds = pytest.mark.parametrize("kind", ["first", "second"])
bits = pytest.mark.parametrize("bits", [24, 32])
seeds = st.integers(0, 2**32 - 1)
counts = st.integers(0, 2**31 - 1)


@functools.cache
def encoder(kind, storage):
  """As after the first update, whose outliers are limited."""

  def encode(x, rounding):
    no_scale = jnp.zeros(codec.scale_shape(x.shape, storage.group_size))
    return codec.encode(x, kind, storage, rounding, no_scale)

  return jax.jit(encode)


@functools.cache
def decoder(kind, storage):
  return jax.jit(lambda codes, scale: codec.decode(codes, scale, kind, storage))


@functools.cache
def splitter(dtype, bits):
  return jax.jit(lambda x: codec.split(x, jnp.dtype(dtype), bits))


merge = jax.jit(codec.merge)
residual = jax.jit(codec.residual, static_argnums=2)


def encode(x, kind, storage, rounding=codec.TO_NEAREST):
  return tuple(map(np.asarray, encoder(kind, storage)(x, rounding)))


def decode(codes, scale, kind, storage):
  return np.asarray(decoder(kind, storage)(codes, scale))


def split(x, bits, dtype="bfloat16"):
  return tuple(map(np.asarray, splitter(dtype, bits)(x)))


def f64(x):
  with np.errstate(invalid="ignore"):  # ml_dtypes warns of signalling NaN.
    return np.asarray(x).astype(np.float64)


def random_moment(seed, kind, shape=(8, 96), spread=2.0, center=(-30, 20)):
  """Normal elements with scales that differ by group, and in a group."""
  rng = np.random.default_rng(seed)
  rows = 2.0 ** rng.uniform(*center, (*shape[:-1], 1))
  scales = rows * np.exp(spread * rng.standard_normal(shape))
  x = (scales * rng.standard_normal(shape)).astype(np.float32)
  return x if kind == "first" else x * x


def grouped(x, size):
  """Cut along the last axis, padded with zeros."""
  missing = -x.shape[-1] % size
  x = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
  return x.reshape(*x.shape[:-1], -1, size)


def expanded(scale, length, size):
  return np.repeat(f64(scale), size, -1)[..., :length]


def halves(x, kind, size):
  """The largest magnitudes in a group's halves, float32: runs of four, in turn."""
  magnitude = grouped(np.abs(x) if kind == "first" else x, size)
  runs = magnitude.reshape(*magnitude.shape[:-1], -1, 2, 4).max((-3, -1))
  return runs.max(-1), runs.min(-1)


def exact_scales(x, kind, size):
  """The largest |x|, or sqrt(x), of each group, an outlier's limited; float32."""
  largest, other = halves(x, kind, size)
  limit = np.float32(2.0**12 if kind == "first" else 2.0**24) * other
  largest = np.where((other > 0) & (largest > limit), limit, largest)
  return largest if kind == "first" else np.sqrt(largest)


def levels_of(x, kind, storage):
  """The numbers that become codes when they are rounded, in float64."""
  s = exact_scales(x, kind, storage.group_size)
  s = expanded(s, x.shape[-1], storage.group_size)
  ratio = (np.abs(f64(x)) if kind == "first" else np.sqrt(f64(x))) / s
  if storage.companding == "root":
    level = np.sqrt(ratio)
  else:
    level = 2 * ratio / (1 + ratio) if kind == "first" else ratio
  level = np.minimum(level, 1) * LEVELS[kind]
  if kind == "second":
    return level
  if storage.companding == "root":
    level = level * np.minimum(level, 1)
  return np.sign(x) * level


def rounding_for(count, kind):
  return getattr(codec.rounding_of(count), kind)


def values(kind, name, codes, s):
  """What codes mean, in float64."""
  y = np.abs(f64(codes)) / LEVELS[kind]
  if name == "root":
    y = y * y
  elif kind == "first":
    y = y / (2 - y)
  return np.sign(f64(codes)) * y * s if kind == "first" else (y * s) ** 2
