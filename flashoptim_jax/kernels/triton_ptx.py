"""What the Triton kernel does by NVIDIA's own instructions.

The twin of :mod:`.triton_portable`, which takes their place on other GPUs.
"""

import triton
import triton.language as tl

_PACK = "{{ .reg .b32 upper; {0} upper, $4, $3, 0; {0} $0, $2, $1, upper; }}"
_PACK_INT8 = tl.constexpr(_PACK.format("cvt.pack.sat.s8.s32.b32"))
_PACK_UINT8 = tl.constexpr(_PACK.format("cvt.pack.sat.u8.s32.b32"))
# The highest bit is what 128 more or less changes.
_PACK_BIASED = tl.constexpr(
    _PACK_UINT8.value.removesuffix("}") + "xor.b32 $0, $0, 0x80808080; }"
)


@triton.jit
def divide(x, y):
  """Gives x / y, for y that is 0, infinite, or from 2^-126 to 2^126.

  Rounds as XLA's and Triton's division does, which takes six instructions more for
  the sake of other divisors.
  """
  return x * tl.inline_asm_elementwise(
      "rcp.approx.ftz.f32 $0, $1;", "=f,f", [y], dtype=tl.float32, is_pure=True, pack=1
  )


@triton.jit
def saturate(x, dtype: tl.constexpr):
  """From int32 to int8 or uint8, clamped, by two instructions for four numbers."""
  if dtype == tl.int8:
    return tl.inline_asm_elementwise(
        _PACK_INT8, "=r,r,r,r,r", [x], dtype=tl.int8, is_pure=True, pack=4
    )
  else:
    return tl.inline_asm_elementwise(
        _PACK_UINT8, "=r,r,r,r,r", [x], dtype=tl.uint8, is_pure=True, pack=4
    )


@triton.jit
def saturate_biased(x):
  """From int32, 128 more than what is meant, to int8, in the same way."""
  return tl.inline_asm_elementwise(
      _PACK_BIASED, "=r,r,r,r,r", [x], dtype=tl.int8, is_pure=True, pack=4
  )


@triton.jit
def quiet(bits):
  """Bits of float32 numbers, as uint32: NaN becomes 0x7FC00000.

  For results of arithmetic, which gives 0x7FFFFFFF for any NaN.
  """
  return tl.minimum(bits.to(tl.int32), 0x7FC00000).to(tl.uint32)


@triton.jit
def pin(pointer, LEAF: tl.constexpr):
  """The same pointer, in an instruction of its own for each leaf.

  The compiler would otherwise load the pointers of all leaves and then choose:
  hundreds of instructions, and registers that occupancy needs.
  """
  address = tl.inline_asm_elementwise(
      f"mov.b64 $0, $1; // leaf {LEAF}",
      "=l,l",
      [pointer.to(tl.int64)],
      dtype=tl.int64,
      is_pure=False,
      pack=1,
  )
  return tl.multiple_of(address.to(pointer.dtype), 16)
