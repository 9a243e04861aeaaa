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
_ROUND_HALF_UP = tl.constexpr("""{
  .reg .b32 low, high;
  prmt.b32 low, $1, $1, 0x3211;
  prmt.b32 high, $2, $2, 0x3211;
  cvt.rn.bf16x2.f32 $0, high, low;
}""")
_SECOND_BYTE = tl.constexpr("""{
  .reg .b32 low, high;
  prmt.b32 low, $1, $2, 0x0051;
  prmt.b32 high, $3, $4, 0x0051;
  prmt.b32 $0, low, high, 0x5410;
}""")
# For four elements: their parameters are in $4 and $5, their corrections in $6. First
# corrections are taken from zeros which they would take to the other side of zero. What
# is zero as bfloat16 is so as float16, which older GPUs compare, too. A digit of prmt's
# last operand picks a byte of the others, or (8 more) a byte full of its sign.
_MERGE_INT8 = tl.constexpr("""{
  .reg .b32 low, high, zero, negative, rest;
  mov.b32 zero, 0;
  set.eq.u32.f16x2 low, $4, zero;
  set.eq.u32.f16x2 high, $5, zero;
  prmt.b32 zero, low, high, 0x7531;
  prmt.b32 negative, $6, 0, 0xba98;
  lop3.b32 rest, $6, zero, negative, 0x70;
  prmt.b32 low, rest, 0, 0x8804;
  mad.lo.u32 $0, $4, 0x10000, low;
  prmt.b32 high, rest, 0, 0x9914;
  and.b32 low, $4, 0xffff0000;
  add.u32 $1, low, high;
  prmt.b32 low, rest, 0, 0xaa24;
  mad.lo.u32 $2, $5, 0x10000, low;
  prmt.b32 high, rest, 0, 0xbb34;
  and.b32 low, $5, 0xffff0000;
  add.u32 $3, low, high;
}""")


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
def merge(param, correction):
  """Bits of master weights, as uint32, given those of a bfloat16, as int16."""
  if correction.dtype == tl.int8:
    bits = tl.inline_asm_elementwise(
      _MERGE_INT8,
      "=r,=r,=r,=r,r,r,r",
      [param, correction],
      dtype=tl.uint32,
      is_pure=True,
      pack=4,
    )
  else:
    p = param.to(tl.int32)
    rest = correction.to(tl.int32)
    rest = tl.where((p & 0x7FFF) == 0, tl.maximum(rest, 0), rest)
    bits = ((p << 16) + rest).to(tl.uint32, bitcast=True)
  return bits


@triton.jit
def round_half_up(x):
  """From float32 to bfloat16; what lies halfway is rounded away from zero.

  NVIDIA's conversion rounds it to even. It is given the second byte in place of the
  lowest: half a place (0x8000) becomes more than that, what is less stays less, and
  infinity, whose second byte is 0, stays infinity.
  """
  return tl.inline_asm_elementwise(
    _ROUND_HALF_UP, "=r,r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2
  )


@triton.jit
def high_half(bits):
  """The bfloat16 that the high half of each uint32 is."""
  return tl.inline_asm_elementwise(
    "prmt.b32 $0, $1, $2, 0x7632;",
    "=r,r,r",
    [bits],
    dtype=tl.bfloat16,
    is_pure=True,
    pack=2,
  )


@triton.jit
def second_byte(x):
  """Of float32 numbers, the second-lowest byte, as int8."""
  return tl.inline_asm_elementwise(
    _SECOND_BYTE, "=r,r,r,r,r", [x], dtype=tl.int8, is_pure=True, pack=4
  )


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
