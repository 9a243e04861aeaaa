"""What :mod:`.triton_ptx` does, in Triton's own words.

For GPUs other than NVIDIA's, and for Triton's interpreter.
"""

import triton
import triton.language as tl


@triton.jit
def divide(x, y):
  """Gives x / y."""
  return x / y


@triton.jit
def saturate(x, dtype: tl.constexpr):
  """From int32 to int8 or uint8, clamped."""
  if dtype == tl.int8:
    return tl.minimum(tl.maximum(x, -128), 127).to(tl.int8)
  else:
    return tl.minimum(tl.maximum(x, 0), 255).to(tl.uint8)


@triton.jit
def saturate_biased(x):
  """From int32, 128 more than what is meant, to int8."""
  return (tl.minimum(tl.maximum(x, 0), 255) - 128).to(tl.int8)


@triton.jit
def quiet(bits):
  """Bits of float32 numbers, as uint32: NaN becomes 0x7FC00000."""
  return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, bits)


@triton.jit
def pin(pointer, LEAF: tl.constexpr):
  """The same pointer."""
  return pointer
