"""Gradient release with the Triton kernel, against the ordinary step, on a GPU.

python -m pytest tests_gpu/test_release_gpu.py -n 0
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flashoptim_jax as fo
from flashoptim_jax.kernels import triton as launches
from flashoptim_jax.kernels.by_platform import Place
from tests.support.cases import OPTIMIZERS, STORAGES
from tests.support.release_models import MODELS, batch, released, value_and_grad

STEPS = 20
SHARE_OF_CODES = 1e-4


@pytest.fixture(scope="module", autouse=True)
def available():
  reason = launches.unavailable(Place("gpu", 1, None))
  assert reason is None, f"This suite needs a GPU and jax-triton: {reason}."


def make(name, storage="root", implementation="triton"):
  case = OPTIMIZERS[name]
  return case.flash(
    2.0**-7,
    storage=STORAGES[storage],
    implementation=implementation,
    **case.kwargs,
  )


def assert_equals_ordinary(tx, model, params):
  """Each step from the same parameters and state, both taking the kernel."""
  params, state = fo.from_fp32(tx, params)
  release = jax.jit(released(model, tx))
  step = jax.jit(functools.partial(fo.step, tx))
  differing = codes = 0
  for i in range(STEPS):
    value, *ours = release(params, state, batch(i))
    expected, grads = value_and_grad(model)(params, batch(i))
    params, state = step(grads, state, params)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    leaves = zip(
      jax.tree.leaves(fo.moments(ours[1])),
      jax.tree.leaves(fo.moments(state)),
      strict=True,
    )
    for a, b in leaves:
      differing += int(jnp.sum(a != b))
      codes += a.size
    pairs = zip(
      jax.tree.leaves(fo.to_fp32(*ours)),
      jax.tree.leaves(fo.to_fp32(params, state)),
      strict=True,
    )
    for a, b in pairs:
      spacing = float(jnp.max(jnp.abs(b))) * 2.0**-15
      assert float(jnp.max(jnp.abs(a - b))) <= spacing
  assert differing <= SHARE_OF_CODES * codes


@pytest.mark.parametrize("name", sorted({*MODELS} - {"experts", "ungrouped"}))
def test_models(name):
  model, params = MODELS[name]
  with jax.default_matmul_precision("highest"):
    assert_equals_ordinary(make("adamw"), model, params())


@pytest.mark.parametrize("storage", list(STORAGES))
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_optimizers(name, storage):
  model, params = MODELS["tied"]
  with jax.default_matmul_precision("highest"):
    assert_equals_ordinary(make(name, storage), model, params())


@pytest.mark.parametrize("name", ["experts", "ungrouped"])
def test_best_available(name):
  """Leaves that the kernel can't update go to XLA."""
  model, params = MODELS[name]
  with jax.default_matmul_precision("highest"):
    assert_equals_ordinary(make("adamw", implementation=None), model, params())


def test_updates_in_place():
  model, params = MODELS["transformer"]
  tx = make("adamw")
  params, state = fo.from_fp32(tx, params())
  step = jax.jit(released(model, tx), donate_argnums=(0, 1))
  memory = step.lower(params, state, batch(0)).compile().memory_analysis()
  kept = sum(leaf.nbytes for leaf in jax.tree.leaves((params, state)))
  assert memory.alias_size_in_bytes == kept
