"""Runs the Triton kernel in Triton's interpreter, beside the XLA path.

Usage: triton_worker.py

Prints JSON: by case, how many numbers of each array of the state differ, and by how
many units of its format, at the leaf's largest, a master weight does.

It is a process of its own, since Triton reads TRITON_INTERPRET when it is imported,
and XLA its flags once: without fused multiply-adds both round alike. jax-triton needs
a GPU, so its one function that is used is replaced.
"""

import functools
import json
import os

os.environ |= {"TRITON_INTERPRET": "1", "XLA_FLAGS": "--xla_cpu_max_isa=AVX"}

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
from triton.runtime import interpreter, jit

import flashoptim_jax as fo
from flashoptim_jax.kernels import triton as launches
from flashoptim_jax.kernels import triton_kernel

SHAPES = {"rows": (8, 64), "ragged": (3, 50), "stack": (2, 3, 32), "vector": (33,)}
BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32
STEPS = 2
CASES = [
    *((name, storage, BF16, BF16, "step") for name, storage in cases.SOME),
    *(("adamw", "root", *dtypes, "step") for dtypes in ((F32, BF16), (F16, F16))),
    *((name, "root", BF16, F32, "update") for name in ("adamw", "lion")),
]
_TYPES = {
    "bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "int8": "i8",
    "uint8": "u8", "int16": "i16", "int32": "i32",
}


def _text(part):
  return part if isinstance(part, str) else part.__name__


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
  triton_kernel._pin = lambda pointer, LEAF: pointer  # It is PTX.
  launches._triton_call = call
  launches._aliased_outputs_are_arguments = lambda: False
  launches.unavailable = lambda: None
  launches._tuning = lambda: {"block_groups": 16, "num_warps": 4}


def take_step(tx, via, grads, state, params):
  if via == "step":
    return fo.step(tx, grads, state, params)
  updates, state = tx.update(grads, state, params)
  return optax.apply_updates(params, updates), state


@jax.jit
def to_fp32(params, state):
  return fo.to_fp32(params, state)


def unit(dtype, master_bits):
  """Relative spacing of master weights."""
  kept = {24: 8, 32: 16, None: 0}[master_bits]
  return 2.0 ** -min(jnp.finfo(dtype).nmant + kept, 23)


def measure(name, storage, dtype, grad_dtype, via):
  """The most that differs after a step from the same state."""
  fused = cases.make(name, storage, implementation="triton")
  plain = cases.make(name, storage, implementation="xla")
  params = cases.tree({key: (shape, dtype) for key, shape in SHAPES.items()})
  state = plain.init(params)
  kernel = jax.jit(functools.partial(take_step, fused, via))
  reference = jax.jit(functools.partial(take_step, plain, via))
  rng = np.random.default_rng(0)
  found = {}
  for _ in range(STEPS):
    grads = {
        key: rng.standard_normal(shape).astype(grad_dtype)
        for key, shape in SHAPES.items()
    }
    ours = kernel(grads, state, params)
    params, state = reference(grads, state, params)
    for field in ("mu", "mu_scale", "nu", "nu_scale"):
      pairs = zip(
          jax.tree.leaves(getattr(ours[1], field)),
          jax.tree.leaves(getattr(state, field)),
          strict=True,
      )
      differ = sum(int(np.sum(np.not_equal(*pair))) for pair in pairs)
      found[field] = max(found.get(field, 0), differ)
    masters = zip(
        jax.tree.leaves(to_fp32(*ours)),
        jax.tree.leaves(to_fp32(params, state)),
        strict=True,
    )
    gap = max(float(np.max(np.abs(a - b)) / np.max(np.abs(b))) for a, b in masters)
    units = gap / unit(dtype, cases.STORAGES[storage].master_bits)
    found["masters"] = max(found.get("masters", 0.0), units)
  return found


if __name__ == "__main__":
  run_in_interpreter()
  print(json.dumps({" ".join(map(_text, case)): measure(*case) for case in CASES}))
