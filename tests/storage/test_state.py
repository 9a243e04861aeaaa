"""The state that every flash optimizer starts with."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flashoptim_jax.storage import scale_gaps
from flashoptim_jax.storage.state import FlashState
from tests.support import cases
from tests.support.cases import every_case


@every_case
def test_init_is_the_same_however_it_is_called(name, storage):
  tx = cases.make(name, storage)
  params = cases.tree()
  state = tx.init(params)
  assert isinstance(state, FlashState)
  assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(state))
  abstract = jax.eval_shape(lambda tree: tree, params)
  cases.assert_same(jax.jit(tx.init)(params), state)
  cases.assert_same_types(tx.init(abstract), state)
  cases.assert_same_types(jax.eval_shape(tx.init, params), state)
  cases.assert_same_types(jax.eval_shape(tx.init, abstract), state)


@every_case
def test_state_mirrors_the_parameters(name, storage):
  tx = cases.make(name, storage)
  params = cases.tree()
  state = tx.init(params)
  kept = set(cases.OPTIMIZERS[name].moments)
  for field in ("mu", "nu"):
    values, scale = getattr(state, field), getattr(state, f"{field}_scale")
    if field not in kept:
      assert values == scale == optax.MaskedNode()
      continue
    assert jax.tree.structure(values) == jax.tree.structure(params)
    if cases.STORAGES[storage].moment_bits == 32:
      assert scale == optax.MaskedNode()
      continue
    assert jax.tree.map(jnp.ndim, scale) == jax.tree.map(jnp.ndim, params)
  if not cases.STORAGES[storage].has_corrections:
    assert state.correction == optax.MaskedNode()
    return
  assert state.correction.keys() == params.keys()
  assert state.correction["norm"] == optax.MaskedNode()  # float32
  assert state.correction["scale"].shape == ()


def test_small_leaves_have_float32_moments():
  """And zeros for scales, so that every leaf has the same arrays."""
  params = cases.tree()
  state = cases.make("adamw", "mixed").init(params)
  for values, scales, codes in (
    (state.mu, state.mu_scale, jnp.int8),
    (state.nu, state.nu_scale, jnp.uint8),
  ):
    assert scales.keys() == params.keys()
    for name, param in params.items():
      large = param.size >= 64
      assert values[name].dtype == (codes if large else jnp.float32)
      assert scales[name].shape == scale_gaps.stored_shape(param.shape, 32)
      assert not scales[name].any()
