"""Flash optimizers inside of Optax's wrappers, and a tree of parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flashoptim_jax as fo
from tests.support import cases
from tests.support.tiers import slow_but

PARAMS = {
  "embed": {"table": (40, 64)},
  "layers": [
    {"kernel": (7, 50), "norm": {"scale": (50,)}},
    {"kernel": (7, 50), "norm": {"scale": (50,)}},
  ],
  "head": {"kernel": (40, 64), "bias": ()},
}


def is_shape(x):
  return isinstance(x, tuple)


def draw(seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32),
    PARAMS,
    is_leaf=is_shape,
  )


def labels(params):
  names = {"embed": "lion", "layers": "adamw", "head": "plain"}
  return {
    key: jax.tree.map(lambda _, key=key: names[key], subtree)
    for key, subtree in params.items()
  }


def not_head(params):
  return {
    key: jax.tree.map(lambda _, key=key: key != "head", subtree)
    for key, subtree in params.items()
  }


def nestings(storage):
  adamw = fo.adamw(1e-2, storage=storage)
  return {
    "alone": adamw,
    "chain": optax.chain(optax.clip_by_global_norm(1.0), adamw),
    "masked": optax.masked(adamw, not_head),
    "inject": optax.inject_hyperparams(fo.adamw)(1e-2, storage=storage),
    "partition": optax.chain(
      optax.clip(1.0),
      optax.partition(
        {
          "adamw": optax.chain(optax.clip(0.5), adamw),
          "lion": optax.inject_hyperparams(fo.lion)(1e-3, storage=storage),
          "plain": optax.sgd(1e-2),
        },
        labels,
      ),
    ),
    "multi-steps": optax.MultiSteps(adamw, 2),
  }


# Leaves that have no flash optimizer in these.
WITHOUT = {"masked": "head", "partition": "head"}
every_nesting = pytest.mark.parametrize(
  "nesting", slow_but(nestings(cases.QUANTIZED), "partition")
)


def by_path(tree):
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree.leaves_with_path(tree)
  }
