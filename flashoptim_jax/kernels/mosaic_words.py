"""Numbers of 8 and 16 bits in 32-bit words, and the bits of float32.

The vector unit computes with words. Row ``4 w + k`` of a block is byte ``k`` of word
``w`` of an 8-bit array and half ``k % 2`` of word ``2 w + k // 2`` of a 16-bit one, so
the second kind is read with a stride of two.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

WORD_ROWS = 4  # rows of an 8-bit array that share a word
HIGH_HALF = -0x10000
NAN = 0x7FC00000
EVERY_SIGN = 0x80808080 - 2**32
_ODD_BYTES = 0xFF00FF00 - 2**32


def as_float(bits: jax.Array) -> jax.Array:
  """The float32 numbers of which these are the bits."""
  return lax.bitcast_convert_type(bits, jnp.float32)


def as_bits(x: jax.Array) -> jax.Array:
  """The bits of float32 numbers."""
  return lax.bitcast_convert_type(x, jnp.int32)


def logical_shift(bits: jax.Array, by: int) -> jax.Array:
  """Bits shifted to the right, zeros from the left."""
  return lax.shift_right_logical(bits, jnp.full_like(bits, by)) if by else bits


def take(word: jax.Array, k: int, itemsize: int, signed: bool = True) -> jax.Array:
  """Number ``k`` of a word, as an int32."""
  bits = 8 * itemsize
  k %= WORD_ROWS // itemsize
  if not signed:
    word = logical_shift(word, bits * k)
    return word & (2**bits - 1) if bits * (k + 1) < 32 else word
  above = 32 - bits * (k + 1)
  word = word << above if above else word
  return word >> (32 - bits)


def take_high(word: jax.Array, k: int, itemsize: int) -> jax.Array:
  """Number ``k`` of a word of 16- or 32-bit numbers, in the highest bits."""
  if itemsize == 4:
    return word
  return word & HIGH_HALF if k % 2 else word << 16


def pack(numbers: Sequence[jax.Array], itemsize: int, interpret: bool) -> jax.Array:
  """A word of numbers that each lie in the lowest bits, below others."""
  if itemsize == 4:
    return numbers[0]
  if interpret:  # It has no rule for pack_elementwise.
    bits = 8 * itemsize
    parts = [(number & (2**bits - 1)) << bits * k for k, number in enumerate(numbers)]
    return functools.reduce(jnp.bitwise_or, parts)
  dtype = jnp.int8 if itemsize == 1 else jnp.int16
  packed = pltpu.pack_elementwise(numbers, packed_dtype=dtype)
  return lax.bitcast_convert_type(packed, jnp.int32)


def pack_second_bytes(numbers: Sequence[jax.Array], interpret: bool) -> jax.Array:
  """A word of the second lowest bytes of four numbers."""
  if interpret:
    return pack([logical_shift(number, 8) for number in numbers], 1, interpret)
  # Pairs are packed first, which saves half the shifts.
  pairs = [
    pltpu.bitcast(logical_shift(pack(numbers[i::2], 2, interpret), 8), jnp.int16)
    for i in range(2)
  ]
  return pltpu.bitcast(pltpu.pack_elementwise(pairs, packed_dtype=jnp.int8), jnp.int32)


def round_bfloat16(bits: jax.Array) -> jax.Array:
  """Bits of a float32, rounded to bfloat16 in their high half; no NaNs."""
  return bits + 0x7FFF + (logical_shift(bits, 16) & 1)


def quiet(x: jax.Array) -> jax.Array:
  """The bits of a float32, with one bit pattern for every NaN.

  Rounding could carry the others over into the sign.
  """
  return jnp.where(jnp.isnan(x), NAN, as_bits(x))


def merge(param: jax.Array, correction: jax.Array | None) -> jax.Array:
  """As ``codec.merge``, for a parameter in float32 and a correction of its bits."""
  if correction is None:
    return param
  master = as_float(as_bits(param) + correction)
  return jnp.where(param == 0, param, master)


def take_correction(word: jax.Array, k: int, itemsize: int) -> jax.Array:
  """Correction ``k`` of a word, as what is added to a parameter's bits."""
  if itemsize == 2:
    return take(word, k, itemsize)
  if k % 2:  # Rows 1 and 3 share the operation that masks the others.
    word &= _ODD_BYTES
    return (word << 16 if k == 1 else word) >> 16
  shifted = word << 24 - 8 * k >> 16
  return shifted & -0x100 if k else shifted


def stack(tiles: list[jax.Array]) -> jax.Array:
  """Tiles below each other."""
  return tiles[0] if len(tiles) == 1 else jnp.concatenate(tiles, axis=0)


def as_words(x: jax.Array) -> jax.Array:
  """A block's rows as rows of words."""
  if x.dtype.itemsize == 4:
    return as_bits(x)
  return pltpu.bitcast(x, jnp.int32)


def from_words(words: jax.Array, dtype) -> jax.Array:
  """The inverse of ``as_words``."""
  if jnp.dtype(dtype).itemsize == 4:
    return lax.bitcast_convert_type(words, dtype)
  return pltpu.bitcast(words, dtype)
