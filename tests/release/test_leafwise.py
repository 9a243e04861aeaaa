"""Chains around a flash optimizer, taken apart by leaf."""

import warnings

import jax.numpy as jnp
import optax
import pytest

import flashoptim_jax as fo
from tests.support import cases
from tests.support.release_models import (
  SMALL,
  assert_small_equals_ordinary,
  matrices,
  sgd,
  small,
  small_params,
  trace,
)
from tests.support.tiers import slow_but

CHAINS = {
  "clip": sgd(optax.clip(1e-3)),
  "scale": sgd(optax.scale(0.5), optax.scale_by_schedule(lambda n: 1 / (1 + n))),
  "add decayed": sgd(optax.add_decayed_weights(0.1, matrices)),
  "trace": sgd(optax.trace(0.9)),
  "masked": sgd(optax.masked(optax.clip(1e-3), matrices)),
  "schedule": fo.sgd(optax.linear_schedule(0.5, 0.1, 4)),
  "mask": fo.sgd(0.5, weight_decay=0.5, mask=matrices),
  "mask tree": fo.sgd(0.5, weight_decay=0.5, mask=dict.fromkeys(SMALL, False)),
  "injected": optax.inject_hyperparams(fo.sgd, hyperparam_dtype=jnp.float32)(0.5),
  "partition": optax.partition(
    {"a": sgd(optax.clip(1e-3)), "b": fo.lion(1e-2, storage=cases.QUANTIZED)},
    {"stack": "a", "norm": "b", "top": "b"},
  ),
  "frozen": optax.partition(
    {"a": fo.sgd(0.5), "b": optax.set_to_zero()},
    lambda params: {name: "ba"[name == "stack"] for name in params},
  ),
  "optax": optax.sgd(0.5, 0.9),
  "unused": sgd(optax.stateless(lambda u, _: (optax.tree.norm(u), u)[1])),
  "frozen after": optax.chain(
    fo.sgd(0.5), optax.freeze({"stack": True, "norm": False, "top": False})
  ),
  "compress": fo.compress(optax.adamw(1e-2)),
  "compress, no moments": fo.compress(optax.sgd(0.5)),
  "compress, lossless": fo.compress(optax.sgd(0.5, 0.9), fo.Storage(32, 32)),
  "compress, partition": fo.compress(
    optax.chain(
      optax.clip(1e-3),
      optax.partition(
        {"a": optax.inject_hyperparams(optax.lion)(1e-2), "b": optax.sgd(0.5)},
        {"stack": "a", "norm": "a", "top": "b"},
      ),
    )
  ),
}
WHOLE_LEAF_CHAINS = {
  "block rms": sgd(optax.clip_by_block_rms(1e-4)),
  "adaptive": sgd(optax.adaptive_grad_clip(1e-3)),
  "noise": sgd(optax.add_noise(1e-3, 0.5, 0)),
  "compress": fo.compress(
    optax.chain(optax.clip_by_block_rms(1e-4), optax.sgd(2.0**-3))
  ),
}


@pytest.mark.parametrize("name", slow_but(CHAINS, "clip", "compress"))
def test_chains_of_leafwise_transformations(name):
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    assert_small_equals_ordinary(CHAINS[name])


@pytest.mark.parametrize("name", slow_but(WHOLE_LEAF_CHAINS))
def test_what_takes_a_stack_as_a_whole_is_held(name):
  with pytest.warns(UserWarning, match="'stack' as a whole"):
    assert_small_equals_ordinary(WHOLE_LEAF_CHAINS[name])


@pytest.mark.parametrize(
  ("tx", "message"),
  [
    (
      sgd(optax.clip_by_global_norm(1.0)),
      "'stack'.*clip_by_global_norm.*optax.clip",
    ),
    (sgd(optax.normalize_by_update_norm()), "all gradients at once"),
    (optax.MultiSteps(fo.adamw(1e-3), 2), "MultiSteps.*larger batches"),
    (
      optax.MultiSteps(fo.adamw(1e-3), 2).gradient_transformation(),
      "MultiSteps.*larger batches",
    ),
    (optax.apply_if_finite(fo.adamw(1e-3), 2), "apply_if_finite.*Clip each"),
    (sgd(optax.apply_if_finite(optax.clip(1.0), 2)), "apply_if_finite"),
  ],
)
def test_what_needs_all_gradients_is_refused(tx, message):
  with pytest.raises(ValueError, match=message):
    trace(small, tx)


def test_lookahead_is_refused():
  tx = optax.lookahead(optax.sgd(0.1), 2, 0.5)
  params = optax.LookaheadParams.init_synced(small_params())
  with pytest.raises(ValueError, match="two sets of parameters"):
    trace(small, tx, params)
