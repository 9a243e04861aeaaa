"""The choice of a backend: what is asked for, and what is missing."""

import functools
import logging

import jax
import jax.numpy as jnp
import pytest

import flashoptim_jax as fo
from flashoptim_jax.kernels import dispatch, triton
from tests.support import cases
from tests.support.cases import arguments, update_as_on


@pytest.mark.parametrize("where", ["mesh", "no mesh"])
def test_a_kernel_asked_for_is_refused_elsewhere(where):
  tx = cases.make("adamw", implementation="triton")
  args = arguments(tx, cases.SMALL_SHAPES)
  if where == "mesh":
    mesh = jax.make_mesh((1,), ("x",), devices=jax.devices()[:1])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    args = jax.device_put(args, sharding)
  refused = pytest.raises(ValueError, match=r"'bias'.*'triton'.*runs on 'cpu'")
  with refused:
    fo.step(tx, *args)
  with refused:
    jax.jit(functools.partial(fo.step, tx))(*args)


def test_a_missing_package_is_said_once(monkeypatch, caplog):
  update_as_on("gpu", monkeypatch, devices=1)
  monkeypatch.setattr(triton.importlib.util, "find_spec", lambda name: None)
  dispatch._log_once.cache_clear()
  caplog.set_level(logging.INFO, "flashoptim_jax")
  for name in ("sgd", "lion"):
    tx = cases.make(name)
    cases.train(tx, {"w": jnp.ones(3)})
  (record,) = caplog.records
  assert record.levelno == logging.WARNING
  for part in ("'triton' is not used", "not installed", "'cuda12'", "'cuda13'"):
    assert part in record.message
  dispatch._log_once.cache_clear()
  tx = cases.make("lion", implementation="xla")
  cases.train(tx, {"w": jnp.ones(3)})
  assert len(caplog.records) == 1
