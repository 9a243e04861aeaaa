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
def merge(param, correction):
  """Bits of master weights, as uint32, given those of a bfloat16, as int16."""
  p = param.to(tl.int32)
  rest = correction.to(tl.int32)
  rest = tl.where((p & 0x7FFF) == 0, tl.maximum(rest, 0), rest)
  if correction.dtype == tl.int8:
    rest <<= 8
  return ((p << 16) + rest).to(tl.uint32, bitcast=True)


@triton.jit
def high_half(bits):
  """The bfloat16 that the high half of each uint32 is."""
  return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def round_half_up(x):
  """From float32 to bfloat16; what lies halfway is rounded away from zero."""
  return high_half(quiet(x.to(tl.uint32, bitcast=True)) + 0x8000)


@triton.jit
def second_byte(x):
  """Of float32 numbers, the second-lowest byte, as int8."""
  return (x.to(tl.uint32, bitcast=True) >> 8).to(tl.int8)


@triton.jit
def pin(pointer, LEAF: tl.constexpr):
  """The same pointer."""
  return pointer
