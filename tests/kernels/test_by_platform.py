"""The choice of a kernel, by where the update runs and not by what is there."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flashoptim_jax as fo
from flashoptim_jax.kernels import dispatch, mosaic_tpu, triton
from flashoptim_jax.kernels.by_platform import Place
from tests.support import cases
from tests.support.cases import arguments
from tests.support.tiers import require, slow_but

SHAPES = {name: cases.MIXED_SHAPES[name] for name in ("matrix", "bias", "norm")}
LARGE = SHAPES | {"matrix": ((64, 1024), jnp.bfloat16)}  # Enough for the TPU kernel.
FUNCTIONS = {"step": cases.step, "update": cases.update}


@pytest.fixture
def places(monkeypatch):
  """The platforms that updates were traced for."""
  found, update_at = [], dispatch._update_at

  def recorded(place, *args):
    found.append(place.platform)
    return update_at(place, *args)

  monkeypatch.setattr(dispatch, "_update_at", recorded)
  return found


def call_triton(kernel, operands, outputs, aliases, **options):
  """Stands for ``triton._triton_call``."""
  return jax.ffi.ffi_call("triton_kernel_call", outputs)(*operands)


@pytest.fixture
def gpu_machine(monkeypatch):
  """A process whose default backend is a GPU, and which has the Triton kernel."""
  gpu = types.SimpleNamespace(compute_capability="9.0")
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(Place, "is_here", lambda place: place.platform != "tpu")
  monkeypatch.setattr(triton.importlib.util, "find_spec", lambda name: name)
  monkeypatch.setattr(triton, "_gpu", lambda: gpu)
  monkeypatch.setattr(triton, "launcher", lambda *args: None)
  monkeypatch.setattr(triton, "_triton_call", call_triton)


@pytest.mark.parametrize("function", slow_but(FUNCTIONS))
@pytest.mark.parametrize("how", ["eager", "jit", "scan", "vmap", "eager vmap"])
def test_arrays_on_a_cpu_beside_a_gpu(how, function, gpu_machine, places):
  tx = cases.make("lion")
  take = functools.partial(FUNCTIONS[function], tx)
  shapes = {"bias": SHAPES["bias"]}
  args = arguments(tx, shapes)
  if "vmap" in how:
    take = jax.vmap(take)
    args = jax.tree.map(lambda x: jnp.stack([x, x]), args)
  elif how == "scan":
    once = take

    def take(grads, state, params):
      def body(carry, _):
        params, state = once(grads, *carry)
        return (state, params), None

      (state, params), _ = jax.lax.scan(body, (state, params), None, length=1)
      return params, state

  found = take(*args) if how.startswith("eager") else jax.jit(take)(*args)
  assert set(places) == {"cpu"}
  if "vmap" in how:
    found = jax.tree.map(lambda x: x[1], found)
  cases.assert_equal(found, cases.step(tx, *arguments(tx, shapes)), 1)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("platforms", "count"),
  [(["cuda"], 3), (["rocm"], 3), (["cpu"], 0), (["tpu"], 0), (["cpu", "cuda"], 3)],
)
def test_triton_is_in_programs_for_gpus_alone(platforms, count, gpu_machine):
  """A launch for each of the leaves, whose rows are aligned in different ways."""
  require("triton")
  tx = cases.make("adamw")
  traced = jax.jit(functools.partial(fo.step, tx)).trace(*arguments(tx, SHAPES))
  text = traced.lower(lowering_platforms=tuple(platforms)).as_text()
  assert text.count("@triton_kernel_call") == count


@pytest.mark.parametrize("platform", ["cpu", "cuda", "rocm", "tpu"])
def test_lowers_for_a_platform_that_is_not_there(platform, places):
  tx = cases.make("adamw")
  traced = jax.jit(functools.partial(fo.step, tx)).trace(*arguments(tx, LARGE))
  assert places == []
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  assert places == [{"cuda": "gpu", "rocm": "gpu"}.get(platform, platform)]
  # A GPU that is not there can't be asked what it is, and neither can a TPU.
  assert "custom_call" not in text


def test_one_program_for_several_platforms(places):
  tx = cases.make("adamw")
  step, args = jax.jit(functools.partial(fo.step, tx)), arguments(tx, SHAPES)
  exported = jax.export.export(step, platforms=("cpu", "cuda", "tpu"))(*args)
  assert sorted(places) == ["cpu", "gpu", "tpu"]
  cases.assert_equal(jax.jit(exported.call)(*args), step(*args), 1)


def test_kernels_are_traced_for_their_platform_alone(monkeypatch):
  def refuse(*args):
    raise AssertionError("a kernel was traced")

  monkeypatch.setattr(mosaic_tpu, "update", refuse)
  monkeypatch.setattr(triton, "update", refuse)
  tx = cases.make("lion")
  jax.jit(functools.partial(fo.step, tx)).lower(*arguments(tx, LARGE))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("implementation", [None, "mosaic_tpu"])
def test_is_differentiable(implementation, wrap):
  tx = fo.sgd(0.5, storage=fo.Storage(32, 32), implementation=implementation)
  params = {"w": jnp.ones((2, 32))}
  state = tx.init(params)

  def total(grads):
    params_, _ = fo.step(tx, grads, state, params)
    return jnp.sum(params_["w"])

  found = wrap(jax.grad(total))({"w": jnp.full((2, 32), 2.0)})
  np.testing.assert_array_equal(found["w"], np.full((2, 32), -0.5))
