"""The TPU kernel against XLA, in interpret mode, and compiled for real TPUs."""

import functools
import json
import os
import pathlib
import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flashoptim_jax as fo
from flashoptim_jax.kernels import mosaic_tpu
from flashoptim_jax.kernels.by_platform import Place
from flashoptim_jax.storage.state import flash_states
from tests.support import cases
from tests.support.leaf_parts import assert_parts_equal_whole
from tests.support.tiers import require, slow_but

STEPS = 3
# Interpret mode compiles slowly, so each leaf has something that no other has:
# partial groups and rows (and many tiles of columns to a unit), leading axes that
# the grid runs over, groups along rows, several blocks of such rows, leading axes
# in another order.
SHAPES = {
  "ragged": (5, 168),
  "experts": (2, 3, 64),
  "tall experts": (2, 104, 40),
  "tall": (112, 522),
  "kernel": (4, 5, 72),
}
FUNCTIONS = {"step": fo.step, "update": cases.update}
COMBINATIONS = [
  ("adamw", "root", "ragged", "step", jnp.bfloat16),
  ("adamw", "none/8", "experts", "update", jnp.bfloat16),
  ("nesterov", "paper", "ragged", "update", jnp.bfloat16),
  ("lion", "root", "ragged", "step", jnp.float32),
  ("adam_nesterov", "32/32", "experts", "step", jnp.bfloat16),
  ("sgd", "root", "ragged", "update", jnp.bfloat16),
  ("adamw", "root", "tall experts", "step", jnp.bfloat16),
  ("lion", "paper", "tall", "update", jnp.float32),
  ("lion", "none/8", "kernel", "update", jnp.bfloat16),
  ("adamw", "16/8", "experts", "update", jnp.bfloat16),
  ("lion", "16/8", "ragged", "step", jnp.bfloat16),
  ("adamw", "16/8", "tall experts", "step", jnp.bfloat16),
  ("lion", "16/8", "kernel", "update", jnp.bfloat16),
]


def trained(tx, params, function):
  jitted = jax.jit(lambda g, s, p: function(tx, g, s, p))
  state = tx.init(params)
  for i in range(STEPS):
    params, state = jitted(cases.grads_like(params, 1 + i), state, params)
  return params, state


@pytest.mark.parametrize(
  ("name", "storage", "leaf", "function", "dtype"),
  slow_but(COMBINATIONS, COMBINATIONS[3]),
)
def test_equals_xla(name, storage, leaf, function, dtype):
  params = cases.tree({leaf: (SHAPES[leaf], dtype)})
  kernel, xla = (
    trained(
      cases.make(name, storage, implementation=implementation),
      params,
      FUNCTIONS[function],
    )
    for implementation in ("mosaic_tpu", "xla")
  )
  # The kernel folds decays and gains into the groups' factors, which changes about one
  # code in 10⁴ in each update.
  close = functools.partial(cases.assert_codes_close, share=2e-4 * STEPS)
  cases.assert_equal(kernel, xla, STEPS, close)


@pytest.mark.slow
@pytest.mark.parametrize("leaf", SHAPES)
def test_elements_have_their_own_thresholds(leaf):
  """With others, half of the parameters would be one place apart."""
  storage = fo.Storage(master_bits=16, min_quantized_size=0)
  params = cases.tree({leaf: (SHAPES[leaf], jnp.bfloat16)})
  kernel, xla = (
    trained(fo.sgd(1e-3, storage=storage, implementation=name), params, fo.step)[0]
    for name in ("mosaic_tpu", "xla")
  )
  cases.assert_same(kernel, xla)


@pytest.mark.slow
@pytest.mark.parametrize("moment_bits", [8, 32])
def test_parts_have_the_thresholds_of_the_whole(moment_bits):
  place = Place("cpu", 1, None)
  assert_parts_equal_whole(
    lambda *args: mosaic_tpu.update(*args, place=place), jnp.bfloat16, moment_bits
  )


@pytest.mark.slow
@pytest.mark.parametrize("leaf", ["ragged", "tall"])
def test_a_nan_stays_in_its_group(leaf):
  params = cases.tree({"w": (SHAPES[leaf], jnp.bfloat16)})
  tx = cases.make("adamw", implementation="mosaic_tpu")
  grads = {"w": cases.grads_like(params)["w"].at[2, 40].set(jnp.nan)}
  params, state = jax.jit(lambda g, s, p: fo.step(tx, g, s, p))(
    grads, tx.init(params), params
  )
  expected = np.zeros(SHAPES[leaf], bool)
  expected[2, 40] = True
  np.testing.assert_array_equal(np.isnan(np.asarray(params["w"], np.float32)), expected)
  (state,) = flash_states(state)
  for scale in (state.mu_scale["w"], state.nu_scale["w"]):
    expected = np.zeros(scale.shape, bool)
    expected[2, 1] = True
    np.testing.assert_array_equal(np.isnan(np.asarray(scale, np.float32)), expected)


@pytest.mark.parametrize(
  ("params", "kwargs", "reason"),
  [
    (jnp.zeros(64), {}, "it has 1 dimensions"),
    (jnp.zeros((64, 3)), {}, "another axis than the last"),
    (jnp.zeros((4, 64), jnp.float16), {}, "dtype float16"),
    (jnp.zeros((4, 64)), {"group_size": 64}, "size is 64"),
  ],
)
def test_says_why_it_cannot(params, kwargs, reason):
  storage = fo.Storage(min_quantized_size=0, **kwargs)
  tx = fo.adamw(1e-3, implementation="mosaic_tpu", storage=storage)
  params = {"leaf": params}
  with pytest.raises(ValueError, match="'leaf' can't be updated by") as error:
    tx.update(params, tx.init(params), params)
  assert reason in str(error.value)


@pytest.mark.slow
@pytest.mark.skipif(
  not (sys.platform == "linux" and platform.machine() == "x86_64"),
  reason="libtpu has no wheels for other machines",
)
def test_compiles_for_tpus():
  require("libtpu")
  # In a process of its own: libtpu is loaded by one process at a time.
  script = pathlib.Path(__file__).parents[1] / "checks" / "tpu_compile.py"
  found = subprocess.run(
    [sys.executable, script, "--quick"],
    capture_output=True,
    text=True,
    check=False,
    env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
  )
  assert found.returncode == 0, found.stderr[-4000:]
  result = json.loads(found.stdout.splitlines()[-1])
  for order in result["orders"]:
    assert order["kept"] == order["expected"], order
  rows = result["rows"]
  assert {row["chip"] for row in rows} == {"v4", "v5e", "v5p", "v6e"}
  for row in rows:
    assert row["kernels"] == row["leaves"], row
    assert row["aliased"] == row["outputs"], row
    assert row["copies"] == [], row
  found = {name: row["kernels"] for name, row in result["chosen"].items()}
  # Where shards are not known while tracing, it takes TPUs that are there.
  expected = dict.fromkeys(found, 1) | {"all, auto": 0}
  assert found == expected
