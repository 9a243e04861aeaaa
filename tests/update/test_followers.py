"""What follows a flash optimizer in a chain, through ``tx.update``."""

import functools
import warnings

import jax
import jax.numpy as jnp
import optax
import pytest

import flashoptim_jax as fo
from tests.support import cases
from tests.support.tiers import slow_but

LR = 1e-2
FLASH = {
  "adamw": fo.adamw,
  "sgd": fo.sgd,
  "compress": lambda learning_rate: fo.compress(optax.adamw(learning_rate)),
}
every_flash = pytest.mark.parametrize("flash", slow_but(FLASH, "adamw", "compress"))
FROZEN = {"matrix": False, "bias": True}
# Each puts something around a flash optimizer and what follows it.
AROUND = {
  "chain": lambda flash, last: optax.chain(flash(LR), last),
  "nested": lambda flash, last: optax.chain(
    optax.clip(1.0), optax.chain(optax.identity(), flash(LR)), optax.identity(), last
  ),
  "named": lambda flash, last: optax.named_chain(("a", flash(LR)), ("b", last)),
  "MultiSteps": lambda flash, last: optax.MultiSteps(
    optax.chain(flash(LR), last), 1
  ).gradient_transformation(),
  "inject_hyperparams": lambda flash, last: optax.chain(
    optax.inject_hyperparams(flash, hyperparam_dtype=jnp.float32)(learning_rate=LR),
    last,
  ),
  "partition": lambda flash, last: optax.chain(
    optax.partition({"a": flash(LR), "b": flash(LR)}, {"matrix": "a", "bias": "b"}),
    last,
  ),
}


def masters():
  params = cases.tree({"matrix": ((4, 64), jnp.bfloat16), "bias": ((8,), jnp.bfloat16)})
  return jax.tree.map(lambda x: x.astype(jnp.float32) * 1.001, params)


@pytest.mark.parametrize("function", [cases.update, cases.jitted_update])
@pytest.mark.parametrize("around", slow_but(AROUND, "named", "MultiSteps", "partition"))
@every_flash
def test_update_holds_what_is_frozen(flash, around, function):
  """A frozen leaf's master weight stays; the others train as without the freeze."""
  ends = {}
  for last in (optax.freeze(FROZEN), optax.identity()):
    tx = AROUND[around](FLASH[flash], last)
    params, state = fo.from_fp32(tx, masters())
    before = fo.to_fp32(params, state)
    with warnings.catch_warnings(action="error"):
      params, state = cases.train(tx, params, function=function, state=state)
    ends[last] = fo.to_fp32(params, state), fo.moments(state)
  (held, moments), (trained, same_moments) = ends.values()
  cases.assert_same(held["bias"], before["bias"])
  assert (trained["bias"] != before["bias"]).any()
  cases.assert_same(held["matrix"], trained["matrix"])
  cases.assert_same(moments, same_moments)


@pytest.mark.parametrize(
  "last",
  [
    optax.scale(0.5),
    optax.add_decayed_weights(0.1),
    optax.masked(optax.scale(0.5), FROZEN),
    optax.chain(optax.freeze({"matrix": True, "bias": False}), optax.trace(0.9)),
  ],
  ids=["scale", "decay", "masked scale", "freeze, then trace"],
)
@pytest.mark.parametrize("around", slow_but(AROUND, "chain", "MultiSteps"))
@every_flash
def test_update_warns_of_what_computes(flash, around, last):
  tx = AROUND[around](FLASH[flash], last)
  params, state = fo.from_fp32(tx, masters())
  with pytest.warns(UserWarning, match="one after it that computes .* leaf 'bias'"):
    jax.eval_shape(functools.partial(cases.update, tx), params, state, params)


@every_flash
def test_chains_around_something_else(flash):
  """They follow an optimizer that has nothing to do with the one inside."""
  inner = FLASH[flash](LR)

  def learned(updates, state, params):
    task = {"w": jnp.ones((4, 64), jnp.bfloat16)}
    cases.update(inner, task, inner.init(task), task)
    return updates, state

  outer = optax.chain(
    optax.GradientTransformation(lambda params: optax.EmptyState(), learned),
    optax.scale(0.5),
  )
  params = masters()
  with warnings.catch_warnings(action="error"):
    cases.update(outer, params, outer.init(params), params)
