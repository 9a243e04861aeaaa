"""``fo.step``: ``update`` and ``apply_updates`` in one, where it can be."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax import contrib

import flashoptim_jax as fo
from flashoptim_jax.update.new_params import NewParams
from tests.support import cases
from tests.support.cases import every_optimizer, small, some_cases
from tests.support.tiers import slow_but


@some_cases
def test_step_equals_update_and_apply_updates(name, storage):
  """Where parameters stay within a factor of two of themselves."""
  tx = cases.make(name, storage)
  params = {
    key: jnp.clip(leaf, -4, 4).astype(leaf.dtype) for key, leaf in cases.tree().items()
  }
  stepped = updated = params, tx.init(params)
  for i in range(3):
    grads = jax.tree.map(lambda g: jnp.clip(g, -2, 2), cases.grads_like(params, i))
    stepped = cases.step(tx, grads, stepped[1], stepped[0])
    updated = cases.update(tx, grads, updated[1], updated[0])
  cases.assert_equal(stepped, updated, steps=3)
  assert not np.array_equal(stepped[0]["matrix"], params["matrix"])


@pytest.mark.parametrize(
  "after",
  slow_but(
    [
      optax.scale(0.5),
      optax.add_decayed_weights(0.1),
      optax.identity(),
      optax.sgd(0.1),
      fo.sgd(0.1),
      optax.chain(optax.clip(1.0), optax.scale(2.0)),
    ]
  ),
  ids=["scale", "decay", "identity", "sgd", "flash", "chain"],
)
@every_optimizer
def test_step_refuses_what_follows_a_flash_optimizer(name, after):
  tx = optax.chain(optax.clip(1.0), cases.make(name), after)
  params = small()
  with pytest.raises(ValueError, match="must be the last transformation"):
    fo.step(tx, params, tx.init(params), params)


def bias_only(optimizer):
  return optax.masked(optimizer, {"matrix": False, "bias": True})


@pytest.mark.parametrize(
  "make_tx",
  [
    lambda flash: optax.named_chain(("a", flash), ("b", optax.scale(0.5))),
    lambda flash: optax.MultiSteps(optax.chain(flash, optax.scale(0.5)), 2),
    lambda flash: optax.chain(optax.apply_if_finite(flash, 2), optax.scale(0.5)),
    lambda flash: optax.chain(flash, bias_only(optax.scale(0.5))),
    lambda flash: optax.chain(flash, bias_only(optax.add_decayed_weights(0.1))),
    lambda flash: optax.chain(flash, bias_only(optax.clip(1.0))),
    lambda flash: optax.chain(flash, bias_only(optax.trace(0.9))),
    lambda flash: optax.chain(flash, bias_only(optax.flatten(optax.scale(0.5)))),
  ],
  ids=[
    "named",
    "in a wrapper",
    "after a wrapper",
    "masked scale",
    "masked decay",
    "masked clip",
    "masked trace",
    "masked flatten",
  ],
)
@pytest.mark.parametrize("flash", [fo.adamw(0.1), fo.compress(optax.adamw(0.1))])
def test_step_refuses_what_follows_behind_masks_and_names(make_tx, flash):
  tx = make_tx(flash)
  params = small()
  with pytest.raises(ValueError, match="must be the last transformation"):
    jax.eval_shape(functools.partial(fo.step, tx), params, tx.init(params), params)


@pytest.mark.parametrize(
  "freeze",
  slow_but(
    [
      optax.freeze,
      lambda mask: optax.masked(optax.set_to_zero(), mask),
      lambda mask: optax.masked(
        optax.set_to_zero(),
        lambda updates: jax.tree.map(
          lambda u: u.dtype == jnp.bfloat16 and u.ndim == 1, updates
        ),
      ),
    ]
  ),
  ids=["freeze", "set_to_zero", "mask of dtypes"],
)
@pytest.mark.parametrize(
  "flash",
  [fo.adamw(0.1), fo.sgd(0.1), fo.compress(optax.adamw(0.1))],
  ids=["adamw", "sgd", "compress"],
)
def test_step_holds_what_is_frozen_after_a_flash_optimizer(freeze, flash):
  """A frozen leaf's master weight stays; the others train as without the freeze."""
  mask = {"matrix": False, "bias": True}
  tx = optax.chain(flash, freeze(mask))
  masters = jax.tree.map(lambda x: x.astype(jnp.float32) * 1.001, small())
  params, state = fo.from_fp32(tx, masters)
  before = fo.to_fp32(params, state)
  alone, alone_state = fo.from_fp32(flash, masters)
  desired = cases.train(flash, alone, state=alone_state)
  params, state = cases.train(tx, params, state=state)
  after = fo.to_fp32(params, state)
  cases.assert_same(after["bias"], before["bias"])
  cases.assert_same(after["matrix"], fo.to_fp32(*desired)["matrix"])
  cases.assert_same(fo.moments(state), fo.moments(desired[1]))


def test_step_holds_what_is_frozen_on_explicit_axes():
  mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
  sharding = NamedSharding(mesh, P("x"))
  params = jax.device_put({"w": jnp.ones((8, 64), jnp.bfloat16)}, sharding)
  tx = optax.chain(fo.adamw(0.1), optax.freeze({"w": True}))
  new, state = jax.jit(functools.partial(fo.step, tx))(params, tx.init(params), params)
  assert new["w"].sharding.is_equivalent_to(sharding, 2)
  cases.assert_same(
    jax.device_get((new, fo.to_fp32(new, state))),
    jax.device_get((params, fo.cast_params(params, jnp.float32))),
  )


@some_cases
def test_step_falls_back_where_leaves_are_others(name, storage):
  """Parameters that a wrapper makes are not those that step replaces."""
  flash = cases.make(name, storage)
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), small())
  grads = cases.grads_like(params)
  halved = optax.GradientTransformationExtraArgs(
    flash.init,
    lambda grads, state, params, **extra: flash.update(
      grads, state, jax.tree.map(lambda p: p / 2, params), **extra
    ),
  )
  for tx in (optax.flatten(flash), halved):
    state = tx.init(params)
    cases.assert_same(
      cases.step(tx, grads, state, params),
      cases.update(tx, grads, state, params),
    )


@some_cases
def test_step_falls_back_where_wrappers_choose_or_accumulate(name, storage):
  """There it is ``update`` and ``apply_updates``: the very same program."""
  params = small()
  grads = cases.grads_like(params)
  flash = cases.make(name, storage)
  for tx in (
    optax.MultiSteps(flash, 2),
    optax.MultiSteps(flash, 2).gradient_transformation(),
    optax.apply_if_finite(optax.chain(optax.clip(1.0), flash), 2),
    optax.chain(optax.clip(1.0), optax.apply_if_finite(flash, 2)),
    optax.conditionally_mask(flash, lambda step: step % 2 == 0),
    contrib.schedule_free(flash, 0.1),
  ):
    state = tx.init(params)
    stepped, updated = (
      str(jax.make_jaxpr(functools.partial(f, tx))(grads, state, params))
      for f in (cases.step, cases.update)
    )
    assert stepped == updated
  assert stepped != str(
    jax.make_jaxpr(functools.partial(cases.step, flash))(
      grads, flash.init(params), params
    )
  )


@pytest.mark.parametrize("plain", slow_but(["adamw", "sgd", "lion"]))
def test_step_applies_plain_optax(plain):
  tx = cases.make_plain(plain)
  params = cases.tree()
  grads = cases.grads_like(params)
  for each in (tx, optax.chain(optax.clip(1.0), tx, optax.scale(0.5))):
    state = each.init(params)
    cases.assert_same(
      cases.step(each, grads, state, params),
      cases.update(each, grads, state, params),
    )


@some_cases
def test_step_through_every_transparent_wrapper(name, storage):
  """New parameters travel through these: no update is computed."""
  flash = cases.make(name, storage)
  params = small()
  labels = {"matrix": "a", "bias": "b"}
  for tx in (
    optax.chain(optax.clip(1.0), optax.chain(optax.identity(), flash)),
    optax.named_chain(("clip", optax.clip(1.0)), ("flash", flash)),
    optax.partition({"a": flash, "b": optax.sgd(0.1)}, labels),
    optax.masked(flash, {"matrix": True, "bias": False}),
    optax.inject_hyperparams(lambda rate: cases.make(name, storage, rate))(1.0),
  ):
    grads, state = cases.grads_like(params), tx.init(params)
    new_params, new_state = jax.eval_shape(
      functools.partial(fo.step, tx), grads, state, params
    )
    cases.assert_same_types(new_params, params)
    cases.assert_same_types(new_state, state)
    seen = optax.with_extra_args_support(tx).update(
      grads, state, params, flashoptim_new_params=NewParams(params)
    )[0]
    assert type(seen["matrix"]).__name__ == "NewParam"
