"""Rules that the package does not have: what it takes to add an optimizer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flashoptim_jax as fo
from flashoptim_jax import optimizers
from flashoptim_jax.kernels import dispatch, triton
from flashoptim_jax.kernels.base import Leaf, UpdateSpec
from flashoptim_jax.rules import ADAM, Moment, Rule
from flashoptim_jax.storage import codec
from flashoptim_jax.storage.state import Format
from flashoptim_jax.update.transform import flash_transformation
from tests.support import cases
from tests.support.tiers import slow_but


def _clipped(grad, old, new, h):
  """Calls other programs, and functions that have derivatives of their own."""
  mu, nu = new[:2]
  step = jnp.where(mu * grad > 0, mu, h["damping"] * mu) / (jnp.sqrt(nu) + h["eps"])
  return jax.nn.relu6(jnp.clip(step, -2.0, 2.0)) - jax.nn.relu(-step) + sum(old[2:])


MU, NU, TREND = (
  Moment(name, kind, "rate", "one_minus_rate")
  for name, kind in (("mu", "first"), ("nu", "second"), ("trend", "first"))
)
TWO = Rule("clipped", (MU, NU), _clipped)
THREE = Rule("trending", (MU, NU, TREND), _clipped)
# With the name of a rule that kernels know, and another arithmetic.
DISGUISED = ADAM._replace(direction=_clipped)
SCALARS = {
  "rate": 0.25,
  "one_minus_rate": 0.75,
  "damping": 0.5,
  "eps": 1e-3,
  "b1": 0.75,
  "one_minus_b1": 0.25,
  "b2": 0.75,
  "one_minus_b2": 0.25,
  "learning_rate": 2.0**-7,
  "weight_decay": 0.5,
}


def make(rule, implementation=None):
  moments = tuple((moment.name, moment.kind) for moment in rule.moments)
  return flash_transformation(
    rule,
    Format(rule.name, moments, cases.QUANTIZED),
    lambda count: SCALARS,
    plain=lambda: None,
    decay=True,
    implementation=implementation,
  )


def _sign(grad, old, new, scalars):
  del grad, old, scalars
  return jnp.sign(new[0])


SIGNUM = Rule("signum", (Moment("mu", "first", "one_minus_b1", "b1"),), _sign)


def signum(learning_rate, b1=0.75, *, storage, implementation=None):
  """A factory as the guide for contributors asks for."""

  def scalars(count):
    del count
    return {"b1": b1, "one_minus_b1": 1 - b1}

  return optimizers._transformation(
    SIGNUM,
    scalars,
    learning_rate,
    plain=lambda: optax.signum(learning_rate, b1),
    storage=storage,
    implementation=implementation,
  )


def params():
  return cases.tree({"w": ((5, 168), jnp.bfloat16)})


def test_a_new_optimizer_follows_optax():
  tx = signum(2.0**-7, storage=cases.STORAGES["32/32"])
  plain = optax.signum(2.0**-7, 0.75)
  new, state = params(), tx.init(params())
  expected = fo.to_fp32(new, state)
  moments = plain.init(expected)
  for i in range(3):
    grads = cases.grads_like(params(), i)
    new, state = fo.step(tx, grads, state, new)
    grads = jax.tree.map(lambda x: x.astype(jnp.float32), grads)
    expected, moments = cases.update(plain, grads, moments, expected)
  mu = fo.moments(state)["mu"]["w"]
  cases.assert_within_units(mu, moments[0].ema["w"], 3, jnp.float32, None)
  cases.assert_masters_close(fo.to_fp32(new, state), expected, params(), 32, 3)


@pytest.mark.parametrize("storage", slow_but(["root", "paper", "32/32"]))
def test_a_new_optimizer_is_on_every_backend_or_refused(storage):
  def train(implementation=None):
    storage_ = cases.STORAGES[storage]
    tx = signum(2.0**-7, storage=storage_, implementation=implementation)
    return cases.train(tx, params(), 3, cases.jitted_step)

  cases.assert_equal(train("mosaic_tpu"), train("xla"), 3)
  with pytest.raises(ValueError, match=r"'triton'.*the rule 'signum'"):
    train("triton")


@pytest.mark.slow
def test_tpu_kernel_equals_xla():
  both = [
    cases.train(make(TWO, implementation), params(), 3, cases.jitted_step)
    for implementation in ("mosaic_tpu", "xla")
  ]
  cases.assert_equal(*both, 3)
  assert not np.array_equal(both[0][0]["w"], params()["w"])


@pytest.mark.slow
def test_tpu_kernel_takes_any_moments():
  """The state of optimizers has no place for them, but kernels do not mind."""
  param = params()["w"]
  grad = cases.grads_like(param, dtype=jnp.float32)
  storage = cases.QUANTIZED
  pairs = []
  for moment in THREE.moments:
    value = grad if moment.kind == "first" else grad**2
    codes, scale = codec.encode(value, moment.kind, storage)
    pairs.append((codes, scale.astype(codec.SCALE_DTYPE)))
  arrays = grad, param, jnp.zeros(param.shape, jnp.int8), tuple(pairs)
  scalars = SCALARS | codec.rounding_scalars(jnp.int32(0), 24)

  def update(implementation):
    def updated(*arrays):
      (result,) = dispatch.update_leaves(
        UpdateSpec(THREE, storage, implementation, new_params=True),
        [Leaf(*arrays, path="w", decay=True)],
        scalars,
        shardings={},
      )
      return result

    return jax.jit(updated)(*arrays)

  kernel, xla = update("mosaic_tpu"), update("xla")
  cases.assert_same(kernel.moments, xla.moments)
  cases.assert_within_units(
    codec.merge(kernel.result, kernel.correction),
    codec.merge(xla.result, xla.correction),
    1,
    jnp.bfloat16,
    24,
  )


@pytest.mark.parametrize("rule", [TWO, DISGUISED], ids=lambda rule: rule.name)
def test_triton_refuses_rules_that_it_has_no_code_for(rule, monkeypatch):
  train = functools.partial(cases.train, steps=1, function=cases.jitted_step)
  with pytest.raises(ValueError, match=rf"'w'.*'triton'.*the rule '{rule.name}'"):
    train(make(rule, "triton"), params())
  xla = train(make(rule, "xla"), params())
  cases.update_as_on("gpu", monkeypatch, devices=1)
  monkeypatch.setattr(triton, "unavailable", lambda place: None)
  cases.assert_equal(train(make(rule), params()), xla, 1)


def test_moments_that_the_state_has_no_place_for():
  with pytest.raises(ValueError, match="'trending' keeps a moment 'trend'"):
    make(THREE)
