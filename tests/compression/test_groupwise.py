"""Many leaves, one group after another."""

import functools
import json
import os
import subprocess
import sys

import jax
import jax.flatten_util
import jax.numpy as jnp
import optax
import pytest
from optax import contrib

import flashoptim_jax as fo
from benchmarks.memory import compress_temporaries
from flashoptim_jax.compression import transform as compression
from tests.support import cases
from tests.support.tiers import slow_but


@pytest.mark.slow
@pytest.mark.parametrize(
  "tx",
  [
    optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)),
    contrib.prodigy(),
    optax.noisy_sgd(1e-2, key=0),
  ],
  ids=["clip", "prodigy", "noise"],
)
def test_leaf_by_leaf_is_all_at_once(tx, monkeypatch):
  """Taken apart, a computation is the same."""
  params = cases.tree({f"{i}": ((256, 512), jnp.bfloat16) for i in range(3)})
  grads = cases.grads_like(params)
  compressed = fo.compress(tx, cases.STORAGES["32/32"])
  state = compressed.init(params)
  actual = fo.to_fp32(*fo.step(compressed, grads, state, params))
  monkeypatch.setattr(compression, "_SMALL", 1 << 30)
  desired = fo.to_fp32(*fo.step(compressed, grads, state, params))
  for key, leaf in desired.items():
    cases.assert_within_units(actual[key], leaf, 1, jnp.float32, None)


# With the temporaries that a step may take, in float32 copies of the largest leaf.
@pytest.mark.parametrize(
  ("tx", "most"),
  slow_but(
    [
      (optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)), 2),
      (contrib.prodigy(), 3),
      (optax.lamb(1e-2), 2),
      (contrib.muon(1e-2), 3),
      # Random bits alone take 4.
      (optax.chain(optax.novograd(1e-2), optax.noisy_sgd(1e-2, key=0)), 5),
    ]
  ),
  ids=["clip", "prodigy", "lamb", "muon", "novograd, noise"],
)
def test_leaf_by_leaf_takes_few_temporaries(tx, most, monkeypatch):
  """Taken apart, a computation is the same, with few temporaries."""
  tx = fo.compress(tx, cases.QUANTIZED)
  params = cases.tree({name: ((64, 256), jnp.bfloat16) for name in "abc"})
  grads = cases.grads_like(params)
  state = tx.init(params)
  desired = fo.step(tx, grads, state, params)
  # With several devices, XLA's CPU backend is not told the order.
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  monkeypatch.setattr(compression, "_SMALL", 1)
  step = jax.jit(functools.partial(fo.step, tx), donate_argnums=(1, 2))
  compiled = step.lower(grads, state, params).compile()
  planned = compiled.memory_analysis().temp_size_in_bytes
  assert planned <= most * 4 * params["a"].size
  actual = compiled(grads, *jax.tree.map(lambda x: x.copy(), (state, params)))
  cases.assert_masters_close(fo.to_fp32(*actual), fo.to_fp32(*desired), params, 24, 1)
  cases.assert_same(fo.moments(actual[1]), fo.moments(desired[1]))


@pytest.mark.slow
def test_no_float32_copy_of_the_tree(tmp_path):
  """Temporaries, in float32 copies of the largest leaf, of a 12-layer model."""
  # With one device: what XLA's CPU backend needs to be told costs communication
  # with several.
  command = [sys.executable, compress_temporaries.__file__, "--output", tmp_path]
  subprocess.run(
    [*command, "--only", "clip, adamw"],
    env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    check=True,
  )
  found = json.loads((tmp_path / "compress_memory.json").read_text())
  assert found["tree"] > 30
  measured = found["optimizers"]["clip, adamw"]["compressed"]
  assert measured["all_in_place"]
  assert measured["temporaries"] <= 3
