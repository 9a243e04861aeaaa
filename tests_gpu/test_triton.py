"""The Triton kernel against the XLA path, on a GPU.

    python -m pytest tests_gpu -n 0

Both update the same state with the same gradients at every step, so that one
step's difference is not carried into the next. Equal means: scales bit for bit;
codes bit for bit but for one step of the code, where a float32 rounding differs,
in less than one of 10,000; master weights within one unit of their format at the
leaf's largest weight, or through ``update``, whose result is rounded to the wider
dtype of gradient and parameter, within one unit of that; float32 moments bit for bit.
"""

import functools
import re

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flashoptim_jax as fo
from flashoptim_jax.kernels import triton as launches
from flashoptim_jax.kernels.by_platform import Place
from tests.support import cases
from tests.support.cases import OPTIMIZERS, QUANTIZED, STORAGES

STEPS = 50
SHARE_OF_CODES = 1e-4
SHAPES = {
  "matrix": (64, 96),
  "ragged": (7, 50),
  "odd": (129, 37),
  "vector": (33,),
  "conv": (3, 3, 16, 40),
  "wide": (257, 768),
  "eighth": (100, 1000),
  "other axis": (64, 5),
  "scalar": (),
  "empty": (0, 64),
}
BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32

CASES = [
  *((name, storage, BF16, BF16, "step") for name in OPTIMIZERS for storage in STORAGES),
  *((name, "root", BF16, BF16, "update") for name in OPTIMIZERS),
  *(
    ("adamw", storage, param, grad, via)
    for storage in ("root", "32/32", "none/8", "16/8")
    for param, grad in ((F16, F32), (F32, BF16), (BF16, F32), (F16, F16))
    for via in ("step", "update")
  ),
]


@pytest.fixture(scope="module", autouse=True)
def available():
  reason = launches.unavailable(Place("gpu", 1, None))
  assert reason is None, f"This suite needs a GPU and jax-triton: {reason}."


@functools.partial(jax.jit, static_argnums=(1, 2))
def random_tree(seed, dtype, scale):
  keys = jax.random.split(jax.random.key(seed), len(SHAPES))
  return {
    name: (scale * jax.random.normal(key, shape)).astype(dtype)
    for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)
  }


VIA = {"step": cases.step, "update": cases.update}


def in_a_scan(step):
  """A step as the only one of a scan."""

  def scanned(grads, state, params):
    def body(carry, _):
      params, state = step(grads, *carry)
      return (state, params), None

    (state, params), _ = jax.lax.scan(body, (state, params), None, length=1)
    return params, state

  return scanned


def differences(ours, reference, dtype, storage, rounding=None):
  """How far two pairs of params and state are apart, by kind of array.

  ``rounding``: the parameters before an update, and the update's dtype.
  """
  (params, state), (params_ref, state_ref) = ours, reference
  found = {}
  for name in ("mu", "nu", "mu_scale", "nu_scale"):
    pairs = list(
      zip(
        jax.tree.leaves(getattr(state, name)),
        jax.tree.leaves(getattr(state_ref, name)),
        strict=True,
      )
    )
    pairs = [(a.astype(F32), b.astype(F32)) for a, b in pairs if a.size]
    if not pairs:
      continue
    found[f"{name} differing"] = sum(jnp.sum(a != b) for a, b in pairs)
    gaps = [jnp.max(jnp.abs(a - b)) for a, b in pairs]
    found[f"{name} gap"] = jnp.max(jnp.stack(gaps))
  gaps = []
  masters = fo.to_fp32(params, state), fo.to_fp32(params_ref, state_ref)
  old = masters[1] if rounding is None else rounding[0]
  for a, b, before in zip(*map(jax.tree.leaves, (*masters, old)), strict=True):
    if a.size:
      exponent = jnp.floor(jnp.log2(jnp.max(jnp.abs(b))))
      spacing = 2.0**exponent * cases.spacing(1.0, dtype, storage.master_bits)
      if rounding is not None:
        moved = jnp.max(jnp.abs(b - before.astype(F32)))
        spacing = jnp.maximum(spacing, moved * jnp.finfo(rounding[1]).eps)
      gaps.append(jnp.max(jnp.abs(a - b)) / spacing)
  found["master gap"] = jnp.max(jnp.stack(gaps))
  return found


@pytest.mark.parametrize(
  ("name", "storage", "dtype", "grad_dtype", "via"),
  CASES,
  ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_equals_xla(name, storage, dtype, grad_dtype, via):
  case, storage = OPTIMIZERS[name], STORAGES[storage]
  make = functools.partial(case.flash, 2.0**-7, storage=storage, **case.kwargs)
  fused, plain = make(), make(implementation="xla")

  @jax.jit
  def both(grads, state, params):
    ours = VIA[via](fused, grads, state, params)
    reference = VIA[via](plain, grads, state, params)
    update_dtype = jnp.promote_types(grad_dtype, dtype)
    rounding = (params, update_dtype) if via == "update" else None
    return ours, differences(ours, reference, dtype, storage, rounding)

  params, state = fo.from_fp32(fused, random_tree(0, F32, 1.0), dtype)
  total = {}
  for step in range(STEPS):
    scale = float(10.0 ** -(step % 7))
    grads = random_tree(step + 1, grad_dtype, scale)
    (params, state), found = both(grads, state, params)
    for kind, value in found.items():
      combine = max if kind.endswith("gap") else sum
      total[kind] = combine((total.get(kind, 0.0), float(value)))
  elements = STEPS * sum(int(np.prod(shape)) for shape in SHAPES.values())
  for kind, value in total.items():
    if kind.endswith(" differing") and storage.moment_bits == 8:
      # Of the scales, too: the kernel computes Adam's moments in another order.
      assert value <= SHARE_OF_CODES * elements, total
    elif kind.endswith("differing"):
      assert value == 0, total
    else:
      assert value <= 1.0, total


@pytest.mark.parametrize("via", ["step", "update"])
def test_odd_shapes(via):
  """One step: small enough for compute-sanitizer, see README."""
  tx = fo.adamw(1e-2, storage=QUANTIZED)
  params, state = fo.from_fp32(tx, random_tree(0, F32, 1.0))
  grads = random_tree(1, BF16, 1.0)
  params, state = jax.jit(functools.partial(VIA[via], tx))(grads, state, params)
  assert all(jnp.all(jnp.isfinite(p)) for p in jax.tree.leaves(params))


@pytest.mark.parametrize(
  ("count", "storage"),
  [*((count, QUANTIZED) for count in (1, 2, 15, 16, 17, 40)), (60, fo.Storage())],
)
def test_many_leaves_share_launches(count, storage):
  shapes = [(i % 5 + 1, 32 * (i % 3 + 1)) for i in range(count)]
  keys = jax.random.split(jax.random.key(0), count)
  params = [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]
  fused = fo.adamw(1e-2, storage=storage, implementation="triton")
  plain = fo.adamw(1e-2, storage=storage, implementation="xla")
  params, state = fo.from_fp32(fused, params)
  grads = jax.tree.map(lambda p: p * 2, params)
  ours = jax.jit(functools.partial(fo.step, fused))(grads, state, params)
  reference = jax.jit(functools.partial(fo.step, plain))(grads, state, params)
  found = differences(ours, reference, BF16, storage)
  assert {kind: float(value) for kind, value in found.items() if value > 1} == {}


def compiled_for_small_leaves(implementation, via):
  """A step of many small leaves of two shapes, compiled with donation."""
  tx = fo.adamw(1e-3, storage=QUANTIZED, implementation=implementation)
  params = [jnp.ones(shape, BF16) for shape in ((64,), (32, 64)) for _ in range(16)]
  step = jax.jit(functools.partial(VIA[via], tx), donate_argnums=(1, 2))
  return len(params), step.lower(params, tx.init(params), params).compile().as_text()


def test_small_updates_are_added_in_few_kernels():
  count, program = compiled_for_small_leaves("triton", "update")
  assert 0 < program.count(" fusion(") < count / 2


@pytest.mark.parametrize("via", ["step", "update"])
def test_xla_updates_small_leaves_in_few_kernels(via):
  count, program = compiled_for_small_leaves("xla", via)
  assert 0 < program.count(" fusion(") < 1.5 * count
  # Of the state's arrays; the count of steps may be copied.
  assert not re.findall(r"\w+\[\d[\d,]*\]\S* copy\(", program)


def test_vmap():
  params = {"w": jnp.ones((3, 4, 64), BF16)}
  grads = {"w": jax.random.normal(jax.random.key(0), (3, 4, 64)).astype(BF16)}
  results = []
  for implementation in ("triton", "xla"):
    tx = fo.adamw(1e-2, storage=QUANTIZED, implementation=implementation)
    state = jax.vmap(tx.init)(params)
    step = jax.jit(jax.vmap(functools.partial(fo.step, tx)))
    results.append(step(grads, state, params))
  found = differences(*results, BF16, QUANTIZED)
  assert {kind: float(value) for kind, value in found.items() if value > 1} == {}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("storage", ["root", "paper", "none/8", "16/8"])
def test_bad_gradients_as_in_xla(bad, storage):
  params = {"w": jnp.ones((4, 96))}
  grads = {"w": jnp.ones((4, 96), BF16).at[1, 40].set(bad)}
  results = []
  for implementation in ("triton", "xla"):
    tx = fo.adamw(1e-2, storage=STORAGES[storage], implementation=implementation)
    start, state = fo.from_fp32(tx, params)
    after, state = jax.jit(functools.partial(fo.step, tx))(grads, state, start)
    after, state = jax.jit(functools.partial(fo.step, tx))(
      jax.tree.map(jnp.ones_like, grads), state, after
    )
    finite = jax.tree.map(jnp.isfinite, (after, fo.moments(state)))
    results.append(jax.device_get(finite))
  jax.tree.map(np.testing.assert_array_equal, *results)
  assert results[0][0]["w"].sum() == 4 * 96 - 32


@pytest.mark.parametrize("storage", ["root", "32/32"])
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_zeros_set_from_outside_as_in_xla(zero, storage):
  """Their corrections, of either sign, belong to what they were before."""
  results = []
  for options in ({}, {"implementation": "xla"}):
    tx = fo.sgd(1e-3, storage=STORAGES[storage], **options)
    params, state = fo.from_fp32(tx, random_tree(0, F32, 1.0))
    params = jax.tree.map(lambda p: jnp.full_like(p, zero), params)
    grads = jax.tree.map(jnp.zeros_like, params)
    params, state = jax.jit(functools.partial(fo.step, tx))(grads, state, params)
    results.append(jax.device_get(fo.to_fp32(params, state)))
  cases.assert_same(*results)


def test_updates_in_place():
  tx = fo.adamw(1e-3, storage=QUANTIZED)
  params, state = fo.from_fp32(
    tx, [jnp.ones((512, 1024)), jnp.ones((1024, 100)), jnp.ones((1024,))]
  )
  grads = jax.tree.map(jnp.ones_like, params)
  step = jax.jit(functools.partial(fo.step, tx), donate_argnums=(1, 2))
  memory = step.lower(grads, state, params).compile().memory_analysis()
  kept = sum(leaf.nbytes for leaf in jax.tree.leaves((params, state)))
  assert memory.alias_size_in_bytes == kept
  assert memory.temp_size_in_bytes < 0.01 * kept


def test_new_learning_rate_does_not_recompile():
  tx = optax.inject_hyperparams(fo.adamw, hyperparam_dtype=jnp.float32)(1e-3)
  params, state = fo.from_fp32(tx, {"w": jnp.ones((64, 64))})
  step = jax.jit(functools.partial(fo.step, tx))
  grads = jax.tree.map(jnp.ones_like, params)
  first, state = step(grads, state, params)
  state.hyperparams["learning_rate"] = jnp.float32(1.0)
  second, _ = step(grads, state, first)
  assert step._cache_size() == 1
  assert float(jnp.max(jnp.abs(second["w"] - first["w"]))) > 0.1


@pytest.mark.parametrize(
  ("shape", "dtype", "reason"),
  [((64, 5), BF16, "another axis"), ((0, 64), BF16, "empty")],
)
def test_forced_on_a_leaf_that_it_cannot_update(shape, dtype, reason):
  tx = fo.adamw(1e-3, storage=QUANTIZED, implementation="triton")
  params = {"w": jnp.zeros(shape, dtype)}
  with pytest.raises(ValueError, match=f"'w'.*{reason}"):
    fo.step(tx, params, tx.init(params), params)


def on_cpu(tree):
  return jax.device_put(tree, jax.local_devices(backend="cpu")[0])


@pytest.mark.parametrize("how", ["committed", "default device"])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.vmap, in_a_scan])
def test_arrays_on_the_cpu_of_a_machine_with_a_gpu(how, wrap):
  tx, plain = fo.adamw(1e-2), fo.adamw(1e-2, implementation="xla")

  def check(place):
    params, state = fo.from_fp32(tx, random_tree(0, F32, 1.0))
    arrays = place((random_tree(1, BF16, 1.0), state, params))
    if wrap is jax.vmap:
      arrays = jax.tree.map(lambda x: jnp.stack([x, x]), arrays)
    ours, reference = (
      wrap(functools.partial(fo.step, each))(*arrays) for each in (tx, plain)
    )
    for leaf in jax.tree.leaves(ours):
      assert {device.platform for device in leaf.devices()} == {"cpu"}
    cases.assert_same(jax.device_get(ours), jax.device_get(reference))

  if how == "committed":
    check(on_cpu)
  else:
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
      check(lambda arrays: arrays)


def test_each_device_gets_its_own_program():
  """One jitted function, called with arrays on the GPU, the CPU and the GPU again."""
  tx = fo.adamw(1e-2)
  step = jax.jit(functools.partial(fo.step, tx))
  params, state = fo.from_fp32(tx, {"w": jnp.ones((64, 96))})
  arrays = {"w": jnp.full((64, 96), 0.5, BF16)}, state, params
  gpu, cpu = step(*arrays), step(*on_cpu(arrays))
  again = step(*arrays)
  cases.assert_same(jax.device_get(again), jax.device_get(gpu))
  found = differences(jax.device_put(cpu, jax.devices()[0]), gpu, BF16, fo.Storage())
  assert float(found["master gap"]) <= 1.0
  programs = [
    step.lower(*each).compile().as_text() for each in (arrays, on_cpu(arrays))
  ]
  assert ["triton_kernel_call" in program for program in programs] == [True, False]


def test_one_lowering_for_gpu_and_cpu():
  """Each platform has its own branch, and only the GPU's has the kernel."""
  tx = fo.adamw(1e-2)
  params, state = fo.from_fp32(tx, {"w": jnp.ones((64, 96))})
  traced = jax.jit(functools.partial(fo.step, tx)).trace(params, state, params)
  version = jax.extend.backend.get_backend().platform_version
  platform = "rocm" if "rocm" in version else "cuda"
  for platforms, kernels_found in (
    ((platform,), 1),
    (("cpu",), 0),
    (("tpu",), 0),
    (("cpu", platform), 1),
  ):
    text = traced.lower(lowering_platforms=platforms).as_text()
    assert text.count("@triton_kernel_call") == kernels_found, platforms
