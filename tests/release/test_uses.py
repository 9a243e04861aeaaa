"""How often a leaf is used: never, twice, or who knows."""

import jax
import jax.numpy as jnp
import pytest

import flashoptim_jax as fo
from tests.support import cases
from tests.support.cases import assert_same
from tests.support.release_models import (
  DIM,
  LAYERS,
  assert_close,
  assert_small_equals_ordinary,
  batch,
  normal,
  over_layers,
  released,
  small,
  small_params,
  value_and_grad,
  wide,
)


def test_leaf_that_is_never_used():
  params = small_params() | {"spare": jnp.ones(DIM)}
  tx = fo.adamw(1e-2, storage=cases.QUANTIZED)
  params, state = fo.from_fp32(tx, params)
  with pytest.warns(UserWarning, match="'spare' is not used"):
    _, new, new_state = jax.jit(released(small, tx))(params, state, batch(0))
  assert_same(new["spare"], params["spare"])
  assert_same(new_state.nu["spare"], state.nu["spare"])
  assert int(new_state.count) == 1


def unheeded(call, live, tokens):
  """A call whose result does not matter: its gradient is zero."""
  call(lambda w: wide(w).sum(), live["top"])
  x = call(lambda w, x: x * wide(w)[0], live["norm"], jax.nn.one_hot(tokens, DIM))
  return jnp.mean(over_layers(call, live["stack"], x, lambda w, x: x @ wide(w)) ** 2)


def test_result_that_does_not_matter():
  ours = assert_small_equals_ordinary(fo.sgd(0.5, weight_decay=0.5), unheeded)
  assert (ours[0]["top"] != small_params()["top"].astype(jnp.bfloat16)).any()


def data_dependent(call, live, tokens):
  def body(x, i):
    return call(lambda w, x: jnp.tanh(x @ wide(w)), live["stack"], x, index=i), None

  x, _ = jax.lax.scan(body, jax.nn.one_hot(tokens, DIM), tokens[0] % LAYERS)
  x = call(lambda w, x: x * wide(w)[0], live["norm"], x)
  return jnp.mean(call(lambda w, x: x @ wide(w), live["top"], x) ** 2)


def test_slices_known_only_at_run_time():
  with pytest.warns(UserWarning, match="'stack' depends on its arguments"):
    assert_small_equals_ordinary(fo.sgd(0.5), data_dependent)


def test_one_leaf_twice_in_a_call():
  def model(call, live, tokens):
    part = {"a": live["top"], "b": live["top"]}
    x = jax.nn.one_hot(tokens, DIM)
    return jnp.mean(call(lambda w, x: x @ wide(w["a"]) @ wide(w["b"]).T, part, x) ** 2)

  def plain(call, live, tokens):
    w = live["top"]
    return model(call, {"top": w}, tokens)

  tx = fo.sgd(0.5)
  params, state = fo.from_fp32(tx, {"top": normal(DIM, DIM)})
  _, ours, _ = jax.jit(released(model, tx))(params, state, batch(0))
  _, grads = value_and_grad(plain)(params, batch(0))
  expected, _ = fo.step(tx, grads, state, params)
  assert_close(ours, expected)
