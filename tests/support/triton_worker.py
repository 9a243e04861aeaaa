"""Runs the Triton kernel in Triton's interpreter, beside the XLA path.

Usage: python -m tests.support.triton_worker

Fails unless codes, scales and float32 moments are the same bit for bit, and master
weights within a unit; prints the number of cases.

It is a process of its own, since Triton reads TRITON_INTERPRET when it is imported,
and XLA its flags once: without fused multiply-adds both round alike. jax-triton needs
a GPU, so its one function that is used is replaced.
"""

import functools
import os

os.environ |= {"TRITON_INTERPRET": "1", "XLA_FLAGS": "--xla_cpu_max_isa=AVX"}

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter, jit

import flashoptim_jax as fo
from flashoptim_jax.kernels import triton as launches
from flashoptim_jax.kernels import triton_kernel
from flashoptim_jax.storage import codec
from tests.support import cases
from tests.support.leaf_parts import assert_parts_equal_whole

SHAPES = {"rows": (8, 64), "ragged": (3, 50), "stack": (2, 3, 32), "vector": (33,)}
BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32
STEPS = 2
CASES = [
  *((name, storage, BF16, BF16, fo.step) for name, storage in cases.SOME),
  *(("adamw", "root", *dtypes, fo.step) for dtypes in ((F32, BF16), (F16, F16))),
  *(("adamw", "16/8", F16, grad, cases.update) for grad in (F32, F16)),
  *(("adamw", "root", BF16, grad, cases.update) for grad in (F32, BF16)),
  ("lion", "root", BF16, F32, cases.update),
  ("adamw", "32/32", BF16, BF16, cases.update),
]
_TYPES = {
  "bfloat16": "bf16",
  "float16": "fp16",
  "float32": "fp32",
  "int8": "i8",
  "uint8": "u8",
  "int16": "i16",
  "int32": "i32",
}


class Buffer:
  """An array in memory, as Triton's interpreter takes one."""

  def __init__(self, array):
    self.array = np.array(array)
    self.dtype = _TYPES[self.array.dtype.name]

  def data_ptr(self):
    return self.array.ctypes.data


def call(kernel, operands, outputs, aliases, *, grid, num_warps, **options):
  """In place of ``launches._triton_call``."""
  del num_warps

  def interpreted(*operands):
    arguments = [Buffer(operand) for operand in operands]
    written = {output: arguments[i] for i, output in aliases.items()}
    for i, output in enumerate(outputs):
      if i not in written:
        written[i] = Buffer(np.zeros(output.shape, output.dtype))
        arguments.append(written[i])
    kernel[grid](*arguments, **options)
    return [written[i].array for i in range(len(outputs))]

  return jax.pure_callback(interpreted, list(outputs), *operands)


def run_in_interpreter():
  """Prepares this process."""
  mangle = jit.mangle_type
  jit.mangle_type = lambda arg, *rest: (
    f"*{arg.dtype}" if isinstance(arg, Buffer) else mangle(arg, *rest)
  )
  executor: type = interpreter.GridExecutor
  executor._init_args_hst = lambda self, args, kwargs: (args, kwargs)
  executor._restore_args_dev = lambda self, *args: None
  launches._triton_call = call
  launches._aliased_outputs_are_arguments = lambda: False
  launches.unavailable = lambda place: None
  launches._tuning = lambda: {"block_groups": 16, "num_warps": 4}


def check(name, storage, dtype, grad_dtype, take_step):
  """Compares each step of a run from the same state."""
  fused = cases.make(name, storage, implementation="triton")
  plain = cases.make(name, storage, implementation="xla")
  params = cases.tree({key: (shape, dtype) for key, shape in SHAPES.items()})
  state = plain.init(params)
  kernel = jax.jit(functools.partial(take_step, fused))
  reference = jax.jit(functools.partial(take_step, plain))
  rng = np.random.default_rng(0)
  for _ in range(STEPS):
    grads = {
      key: rng.standard_normal(shape).astype(grad_dtype)
      for key, shape in SHAPES.items()
    }
    ours = kernel(grads, state, params)
    params, state = reference(grads, state, params)
    assert_moments_equal(ours[1], state)
    cases.assert_masters_close(
      *(cases.by_path(fo.to_fp32(*each)) for each in (ours, (params, state))),
      cases.by_path(params),
      state.format.storage.master_bits,
      1,
    )


def assert_moments_equal(ours, reference):
  """Scales bit for bit, and so float32 moments; few codes are off by one."""
  assert ours.count == reference.count
  for name, scales in (("mu", ours.mu_scale), ("nu", ours.nu_scale)):
    cases.assert_same(scales, getattr(reference, f"{name}_scale"))
    found, expected = (
      jax.tree.leaves(getattr(state, name)) for state in (ours, reference)
    )
    for a, b in zip(found, expected, strict=True):
      if a.dtype == jnp.float32:
        cases.assert_same(a, b)
        continue
      off = np.abs(np.asarray(a, int) - np.asarray(b, int))
      assert off.max() <= 1
      assert off.sum() <= 1


def check_bound():
  """No step is longer than exact Adam's, with gradients of all sizes."""
  steps, shape = 8, (2, 40)
  tx = fo.adam(1.0, b2=0.95, storage=cases.STORAGES["root"], implementation="triton")
  path = [jnp.zeros(shape)]
  state = tx.init(path[0])
  step = jax.jit(functools.partial(fo.step, tx))
  for grad in cases.spiky(shape, steps):
    params, state = step(grad, state, path[-1])
    path.append(params)
  found = np.abs(np.diff(np.float64(path), axis=0)).max((1, 2))
  assert (found <= 1.1 * cases.largest_steps(0.9, 0.95, False, steps)).all(), found


def check_rest():
  """Without a learning rate nothing moves, whatever the gradients."""
  tx = fo.adam(0.0, storage=cases.STORAGES["root"], implementation="triton")
  params = cases.tree({"zeros": ((2, 64), F32), "ones": ((2, 64), BF16)})
  params["zeros"] = jnp.zeros_like(params["zeros"])
  state = tx.init(params)
  before = fo.to_fp32(params, state)
  for size in (0.0, 1.0, 1e30):
    grads = {name: jnp.full_like(param, size) for name, param in params.items()}
    params, state = jax.jit(functools.partial(fo.step, tx))(grads, state, params)
    cases.assert_same(fo.to_fp32(params, state), before)


@triton.jit
def store_residual(
  master, param, result, MASTER_BITS: tl.constexpr, SIZE: tl.constexpr
):
  at = tl.arange(0, SIZE)
  loaded = tl.load(master + at), tl.load(param + at)
  rest = triton_kernel._residual(*loaded, MASTER_BITS)
  tl.store(result + at, rest)


def check_residual(master_bits):
  """Compares corrections of parameters that may lie anywhere."""
  size = 4096
  rng = np.random.default_rng(1)
  bits = rng.integers(0, 2**32, size, np.uint32)
  bits[:64] = np.array([0, 1 << 31, 0x7F800000, 0xFF800000, 0x7FC00000] * 13)[:64]
  near = (bits >> 16) + rng.integers(-2, 3, size)
  near[::3] ^= 0x8000
  near[::7] = rng.integers(0, 2**16, len(near[::7]))
  if master_bits == 24:  # As updates leave them.
    bits &= np.uint32(0xFFFFFF00)
  master = bits.view(np.float32)
  param = near.astype(np.uint16).view(jnp.bfloat16)
  expected = codec.residual(jnp.asarray(master), jnp.asarray(param), master_bits)
  result = Buffer(np.zeros(size, np.int32))
  store_residual[(1,)](
    Buffer(master), Buffer(param), result, MASTER_BITS=master_bits, SIZE=size
  )
  # Masters that are NaN make parameters NaN, beside which any correction will do.
  nan = np.isnan(param.astype(np.float32))
  numbers = ~nan & ~np.isnan(master)
  np.testing.assert_array_equal(result.array[numbers], expected[numbers])
  correction = jnp.asarray(result.array, expected.dtype)
  merged = codec.merge(jnp.asarray(param), correction)
  assert np.isnan(merged[nan]).all()


@triton.jit
def store_dithered(
  x, result, scalars, places, columns, DITHER: tl.constexpr, SIZE: tl.constexpr
):
  at = tl.arange(0, SIZE)
  base = tl.program_id(0) * SIZE
  row = (base + at) // columns if DITHER == 3 else 0
  column = (base + at) % columns
  word = triton_kernel._word(scalars, places, base, at, row, column, False, DITHER)
  loaded = tl.load(x + base + at)
  param = triton_kernel._dithered(loaded, word, result.dtype.element_ty)
  tl.store(result + base + at, param)


def check_dither(dtype):
  """Compares sums that are rounded by their elements' thresholds, bit for bit."""
  shape, size, columns = (64, 128), 4096, 128
  rng = np.random.default_rng(1)
  bits = rng.integers(0, 2**32, shape, np.uint32)
  bits[0] = np.resize([0, 1 << 31, 0x7F7FFFFF, 0xFF800000, 0x7FFFFFFF], columns)
  small = rng.normal(size=(32, columns)) * 2.0 ** rng.integers(-28, -8, (32, columns))
  bits[32:] = small.astype(np.float32).view(np.uint32)
  bits[1] &= np.uint32(0xFFFF0000)  # What needs no rounding.
  x = bits.view(np.float32)
  whole = (96, 256)
  origin, strides = jnp.uint32(5 * 256 + 128), (256, 1)
  share = codec.rounding_of(jnp.int32(7), 16).master
  scalars = np.zeros(len(triton_kernel.SCALARS), np.float32)
  scalars[triton_kernel.SCALARS.index("master_rounding")] = share
  rows = codec.dither(jnp.int32(0), shape[:1], origin, strides[:1])
  step = np.zeros(shape, np.float32)
  for kind, place, kwargs in (
    (1, np.zeros(1, np.uint32), {}),
    (2, rows[:1], {"origin": origin}),
    (3, rows, {"origin": origin, "strides": strides}),
  ):
    result = Buffer(np.zeros(shape, dtype))
    store_dithered[(x.size // size,)](
      *(Buffer(x), result, Buffer(scalars), Buffer(np.asarray(place).view(np.int32))),
      *(columns, kind, size),
    )
    words = codec.dither(share, shape, **kwargs)
    if kind == 3:  # As the part of a whole leaf that it is.
      of_whole = codec.dither(share, whole)[5:69, 128:]
      np.testing.assert_array_equal(words, of_whole)
    moved = codec._dithered(jnp.asarray(x) + step, dtype, words)
    expected, _ = codec.split(moved, dtype, 16)
    normal = ~(np.abs(x) < 2.0**-126)  # XLA flushes what is not.
    found, expected = (np.float32(a)[normal] for a in (result.array, expected))
    np.testing.assert_array_equal(found, expected)


if __name__ == "__main__":
  run_in_interpreter()
  for dtype in (BF16, F16):
    check_dither(dtype)
    for moment_bits in (8, 32):
      assert_parts_equal_whole(
        lambda *args: launches.update(*args, place=None), dtype, moment_bits
      )
  for master_bits in (24, 32):
    check_residual(master_bits)
  check_bound()
  check_rest()
  for case in CASES:
    check(*case)
  print(len(CASES))
