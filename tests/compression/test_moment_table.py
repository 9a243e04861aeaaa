"""Which arrays of a state are moments."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flashoptim_jax as fo
from tests.support import cases


def test_arrays_that_nothing_is_known_of_are_named_once():
  def init(params):
    return {"padded": jnp.zeros((2, sum(map(jnp.size, jax.tree.leaves(params)))))}

  tx = fo.compress(
    optax.chain(
      optax.GradientTransformation(init, lambda grads, state, _=None: (grads, state)),
      optax.flatten(optax.adam(1e-2)),
    )
  )
  params = cases.tree(cases.SMALL_SHAPES)
  with pytest.warns(UserWarning, match=r"keeps '0.padded'.* in float32") as caught:
    for _ in range(2):
      state = tx.init(params)
  assert len(caught) == 1
  assert [name for name, _ in state.format.moments] == ["1.0.mu", "1.0.nu"]


def test_codecs():
  params = cases.tree(cases.SMALL_SHAPES)
  tx = fo.compress(
    optax.adam(1e-2), cases.QUANTIZED, codecs={"ScaleByAdamState.nu": "float32"}
  )
  state = tx.init(params)
  assert state.format.moments == (("0.mu", "first"),)
  assert optax.tree.get(state, "nu")["bias"].dtype == jnp.float32
  tx = fo.compress(
    optax.MultiSteps(optax.sgd(1e-2), 2),
    cases.QUANTIZED,
    codecs={"acc_grads": "first_moment"},
  )
  assert optax.tree.get(tx.init(params), "acc_grads")["bias"].dtype == jnp.int8
  tx = fo.compress(
    optax.adagrad(1e-2),
    cases.QUANTIZED,
    codecs={"sum_of_squares": "second_moment"},
  )
  sums = fo.moments(tx.init(params))["sum_of_squares"]
  np.testing.assert_allclose(sums["matrix"], 0.1, rtol=2**-7)  # its initial value
