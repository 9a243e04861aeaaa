"""The storage format: companded moments and split master weights.

Every other part of the package, kernels included, either calls this module or
is tested against it. One file, since what encodes, decodes and rounds is read together.

Moments. A leaf is cut into groups of ``group_size`` along its group axis; the
last group may be shorter. A group has one scale ``s``, in bfloat16, and each
element an 8-bit code ``c``:

===========  ===========  ==================================  ==================
companding   moment       code                                value
===========  ===========  ==================================  ==================
``"root"``   first, m     sign(m)·round(127·sqrt(|m|/s))      sign(c)·(c/127)²·s
``"root"``   second, v    round(255·sqrt(sqrt(v)/s))          ((c/255)²·s)²
``"paper"``  first, m     sign(m)·round(127·2x/(1+x)),        sign(c)·y/(2-y)·s,
                          x = |m|/s                           y = |c|/127
``"paper"``  second, v    round(255·sqrt(v)/s)                (c/255·s)²
===========  ===========  ==================================  ==================

``s`` is the group's largest ``|m|`` or ``sqrt(v)``. Codes are taken against ``s``
itself, so that the largest element always has the top code and a group that only
decays keeps its codes.

Rounding. Nothing is rounded to the nearest: a change of less than half a place would
be lost, and so would every one after it. A number is cut off after a threshold between
0 and 1 place was added to it, and the thresholds move with the count of updates
(:func:`rounding_of`) such that the mean over updates is right. Scales and codes of
either kind of moment and master weights have thresholds of their own, for their errors
not to go together. ``benchmarks/quality/companding.py`` measures it.

Codes of v are at least 1 where their group has a scale: v must not decode to zero
before m does, for an update divides m by the root of v. In "root", m's level below 1 is
squared before it is rounded: there the value is right on average, not the code.

A spike must not take the codes from its neighbours. The elements of a group are in two
halves, four and four in turn. At most 4096 times the larger of two is stored, unless
both are zero: the largest |m| or sqrt(v) of the other half, and the group's old scale.
The old scale is there for neighbours whose gradients are zero: they have the smallest
codes, and must not pull down what others need. A v that overflows is stored as that
limit, or else as :data:`LARGEST_SECOND`, the largest there is.

A group whose largest magnitude is below 2⁻¹²⁶, the smallest normal float32, stores
scale 0 and decodes to zero. A group that holds a NaN, or whose m is infinite, stores a
NaN scale and decodes to NaN; other groups are not touched by it. "paper" follows arXiv
2602.23349, equations for the companded moments, with our scales and rounding.

Master weights of bfloat16 parameters. With ``b`` the bits of the float32 master
weight, ``M`` is ``b`` rounded to its top 24 bits, the parameter's bits are
``p = (M + 0x80) >> 8`` and the correction is ``M - (p << 8)``, an int8. At 32
bits ``p = (b + 0x8000) >> 16`` and the correction ``b - (p << 16)`` is an int16;
nothing is lost. Bit patterns grow with the magnitude, so this crosses binades
and covers subnormals with no special case. A magnitude that rounds past the
largest finite number of its format becomes infinite, as in any float
conversion, and a NaN stays a NaN. An update rounds the sum of a master weight and a
step to 24 bits by a threshold (:func:`advance`).

At 16 bits there is no correction: the parameter is its own master weight. An update
takes the sum with its step in float32, as Optax does, and cuts it to the parameter's
own places, float16's too, after a threshold was added to the magnitude. Every element
has a threshold of its own (:func:`dither`): with ``i`` its row-major index in the whole
leaf, ``i·k₁ + count·k₂`` in uint32 arithmetic, whose top bits are the part of a place.
A sum that needs no rounding stays as it is. Whether a leaf is whole, sharded, a slice
of a stack or joined with others, its elements have the same thresholds.

Master weights of float16 parameters, whose bits don't line up with float32's:
the correction is the rounding error in units of half the parameter's last
place, times 127 (int8) or 32767 (int16), as in the paper.

Derivatives. Parameters and master weights have the derivatives of what they stand for,
as if nothing were rounded (straight through); codes refuse to be differentiated.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType

from flashoptim_jax.storage.options import Kind, Storage

CODE_DTYPE = {"first": jnp.int8, "second": jnp.uint8}
SCALE_DTYPE = jnp.bfloat16
LEVELS = {"first": 127.0, "second": 255.0}  # the largest codes
LARGEST_SECOND = (255 / 128 * 2.0**63) ** 2  # the square of a bfloat16
# A group's halves are runs of four elements, every other one.
HALF_RUN = 4
# How far the largest of one half may stand out from that of the other, or from the
# group's old scale.
LARGEST_RATIO = {"first": 2.0**12, "second": 2.0**24}
_LARGEST_SCALE = 0x7F7FFFFF  # the bits of the largest finite float32
_HIGH_HALF = -0x10000
TINY = 2.0**-126  # the smallest normal float32
_SIGN_AND_EXPONENT = 0xFF800000
# Float32's error where a code or a scale is decoded and encoded again, with a margin:
# of the code itself, and in units of float32's last place.
_CODE_ERROR = 2.0**-20
_SCALE_ERROR = 8
# Half of float32's last place in the places of 24 bits. Sums are rounded to it first.
HALF_OF_FLOAT32 = 2.0**-9


class MomentRounding(NamedTuple):
  """What is added to the numbers of a moment before they are cut off.

  Attributes:
    scale: int32 of shape (), what is added to a scale's bits before the low half of
      them is cut off: 0x8000 rounds to the nearest bfloat16.
    code: float32 of shape (), what is added to a code before it is cut to an integer:
      0.5 rounds to the nearest.
    slack: float32 of shape (), or 1: the factor that keeps codes which were only
      decoded and encoded again on the right side of the threshold.
  """

  scale: Any
  code: Any
  slack: Any


class Rounding(NamedTuple):
  """How an update rounds what it stores.

  Attributes:
    first: First moments.
    second: Second moments.
    master: float32 of shape (), the part of a place that is added to the magnitude of
      a 24-bit master weight before it is cut off. At 16 bits, int32: the count's share
      of it, from which :func:`master_threshold` makes those of elements.
  """

  first: MomentRounding
  second: MomentRounding
  master: Any


TO_NEAREST = MomentRounding(0x8000, 0.5, 1.0)
# Multipliers of 2⁻³², of irrational numbers whose multiples, modulo 1, visit the unit
# interval evenly. All are quadratic, with small numbers in their continued fractions.
_SEQUENCES = {
  "master": round((math.sqrt(5) - 1) / 2 * 2**32) | 1,
  "first_code": round((math.sqrt(2) - 1) * 2**32) | 1,
  "second_code": round((math.sqrt(3) - 1) * 2**32) | 1,
  "first_scale": round((math.sqrt(13) - 3) / 2 * 2**32) | 1,
  "second_scale": round((math.sqrt(21) - 3) / 2 * 2**32) | 1,
  # At 16 bits, where the count's is added to that of the place in the leaf. With the
  # count's, 10,000 steps of 0.01 places make 99 to 101, wherever an element starts.
  "dither": round((math.sqrt(145) - 9) / 8 * 2**32) | 1,
  "place": round((math.sqrt(221) - 9) / 14 * 2**32) | 1,
}
PLACE = _SEQUENCES["place"]


# One call, where a step is not jitted.
@functools.partial(jax.jit, static_argnames="master_bits", inline=True)
def rounding_of(count: jax.Array, master_bits: int | None = 24) -> Rounding:
  """How an update rounds, such that over updates errors add up to nothing.

  Thresholds run through low-discrepancy sequences (Weyl's: multiples of an irrational
  number, modulo 1) in units of 2⁻¹⁶. They depend on the count alone, so that meshes and
  restarts agree, and start with the nearest. What no update touches stays as it is:
  at either end of the unit interval, thresholds leave room for float32's error.

  Args:
    count: Updates done so far, int32 of shape ().
    master_bits: As in :class:`flashoptim_jax.Storage`.
  """
  count = jnp.asarray(count, jnp.int32).astype(jnp.uint32)

  def sequence(name, count=count):
    place = count * jnp.uint32(_SEQUENCES[name]) + jnp.uint32(1 << 31)
    return (place >> 16).astype(jnp.int32)

  def between_0_and_1(place):
    return (place.astype(jnp.float32) + 0.5) * 2.0**-16

  def scale(kind):
    place = sequence(f"{kind}_scale")
    return jnp.clip(place, _SCALE_ERROR, 2**16 - _SCALE_ERROR)

  def code_margin(kind):  # The error of the largest code, in units of 2⁻¹⁶.
    return round(LEVELS[kind] * _CODE_ERROR * 2**16)

  # A first moment forgets within few updates. Every other threshold mirrors the one
  # before, so that what they have in common is gone by then.
  margin, code = code_margin("first"), sequence("first_code", count >> 1)
  code = jnp.where(count & 1 == 0, code, 2**16 - 1 - code)
  code = jnp.clip(code, margin, 2**16 - 1 - margin)
  first = MomentRounding(scale("first"), between_0_and_1(code), 1.0)
  # Second moments may change by less than such a margin in an update. In its place, at
  # either end, codes move away from the threshold by as much as float32 may err.
  margin, code = code_margin("second"), sequence("second_code")
  slack = jnp.where(code < margin, 1 + _CODE_ERROR, jnp.float32(1))
  slack = jnp.where(code >= 2**16 - margin, 1 - _CODE_ERROR, slack)
  second = MomentRounding(scale("second"), between_0_and_1(code), slack)
  if master_bits == 16:
    return Rounding(first, second, sequence("dither"))
  master = between_0_and_1(sequence("master"))
  # Above the lower end: infinite weights times zero would be NaN.
  master = jnp.clip(master, HALF_OF_FLOAT32 + 2.0**-16, 1 - HALF_OF_FLOAT32)
  return Rounding(first, second, master)


def rounding_scalars(count: jax.Array, master_bits: int | None) -> dict[str, Any]:
  """:func:`rounding_of` as scalars by name, for kernels."""
  rounding = rounding_of(count, master_bits)
  scalars = {"master_rounding": rounding.master}
  for kind in LEVELS:
    of_moment = getattr(rounding, kind)
    for part, value in of_moment._asdict().items():
      scalars[f"{kind}_{part}_rounding"] = value
  return scalars


def moment_rounding(scalars: Any, kind: Kind) -> MomentRounding:
  """The part of :func:`rounding_scalars` for a kind of moments."""
  return MomentRounding(
    *(scalars[f"{kind}_{part}_rounding"] for part in MomentRounding._fields)
  )


def group_axis(shape: tuple[int, ...], group_size: int) -> int | None:
  """The axis along which a leaf of ``shape`` is cut into groups.

  The last axis when it holds at least one whole group, else the largest axis
  (the last of them). It depends on the shape alone. None for a scalar.
  """
  if not shape:
    return None
  if shape[-1] >= group_size:
    return len(shape) - 1
  return max(range(len(shape)), key=lambda axis: (shape[axis], axis))


def scale_shape(shape: tuple[int, ...], group_size: int) -> tuple[int, ...]:
  """Shape of the scales: that of the leaf, its group axis divided, rounded up."""
  axis = group_axis(shape, group_size)
  if axis is None:
    return ()
  groups = math.ceil(shape[axis] / group_size)
  return (*shape[:axis], groups, *shape[axis + 1 :])


def encode(
  x: jax.Array,
  kind: Kind,
  storage: Storage,
  rounding: MomentRounding = TO_NEAREST,
  old_scale: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Compands a moment to 8 bits.

  Args:
    x: The moment, float32, of any shape; ``kind="second"`` needs ``x >= 0``.
    kind: ``"first"`` (signed) or ``"second"`` (a mean of squares).
    storage: Gives the group size and the companding.
    rounding: How scales and codes are rounded.
    old_scale: The scales before an update, of :func:`scale_shape`. None to encode what
      no update made, without a limit.

  Returns:
    Codes of x's shape, int8 for first and uint8 for second moments, and scales,
    bfloat16, of :func:`scale_shape`.
  """
  scale = exact_scale(x, kind, storage, old_scale)
  stored = round_scale(scale, rounding.scale).astype(SCALE_DTYPE)
  factor = encode_factor(scale, kind, storage, rounding.slack)
  return encode_codes(x, factor, kind, storage, rounding.code), stored


def exact_scale(
  x: jax.Array, kind: Kind, storage: Storage, old_scale: jax.Array | None = None
) -> jax.Array:
  """The scales of :func:`encode`, in float32."""
  largest = group_largest(x, kind, storage.group_size, old_scale)
  return scale_of_largest(largest, kind)


def scale_of_largest(largest: jax.Array, kind: Kind) -> jax.Array:
  """The scale of a group, given its largest magnitude, both float32."""
  largest = _where(largest < TINY, 0.0, largest)
  if kind == "second":
    return jnp.sqrt(jnp.minimum(largest, LARGEST_SECOND))
  return largest + 0.0 * largest  # NaN where it is infinite.


def round_scale(scale: jax.Array, rounding: jax.Array | int) -> jax.Array:
  """Float32 scales, rounded to what bfloat16 holds. Finite ones stay finite."""
  bits = lax.bitcast_convert_type(scale, jnp.int32)
  rounded = jnp.minimum(bits + rounding, _LARGEST_SCALE) & _HIGH_HALF
  rounded = _where(lax.is_finite(scale), rounded, bits)
  return lax.bitcast_convert_type(rounded, jnp.float32)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def encode_codes(
  x: jax.Array,
  factor: jax.Array,
  kind: Kind,
  storage: Storage,
  rounding: jax.Array | float = 0.5,
) -> jax.Array:
  """The codes of :func:`encode`.

  ``factor`` is the :func:`encode_factor`, of each group or of each element.
  """
  magnitude = jnp.abs(x) if kind == "first" else x
  levels = LEVELS[kind]
  factor = group_expand(factor, x.shape, storage)
  if storage.companding == "root":
    root = jnp.sqrt(magnitude) if kind == "first" else jnp.sqrt(jnp.sqrt(x))
    level = root * factor
  elif kind == "first":
    ratio = magnitude * factor
    level = levels * (2.0 * ratio / (1.0 + ratio))
  else:
    level = levels * (jnp.sqrt(x) * factor)
  rounding = jnp.asarray(rounding, jnp.float32)
  # NaN fails the comparisons, so that no NaN meets the integer conversion.
  if kind == "second":
    code = _clamped(level + rounding, 1.0, levels)
    return _where(factor > 0, code, 0.0).astype(jnp.uint8)
  if storage.companding == "root":
    # Below the first code, the value that is right on average is the level squared.
    level = level * lax.min(level, lax.full_like(level, 1.0))
  level = _where(x < 0, -level, level)
  # Positive, for the conversion to cut off downwards.
  code = _clamped(level + (rounding + 128.0), 128.0 - levels, 128.0 + levels)
  code = _where(lax.eq(level, level), code, 128.0).astype(jnp.int32)
  return (code - 128).astype(jnp.int8)


@encode_codes.defjvp
def _encode_codes_jvp(*args):
  raise ValueError(
    "Can't differentiate through an update of 8-bit moments: their codes are whole"
    " numbers, without a derivative. Use Storage(moment_bits=32) where steps are"
    " differentiated."
  )


def decode(
  codes: jax.Array, scale: jax.Array, kind: Kind, storage: Storage
) -> jax.Array:
  """Inverse of :func:`encode`: float32, of the codes' shape."""
  factor = decode_factor(scale.astype(jnp.float32), kind, storage)
  factor = group_expand(factor, codes.shape, storage)
  return decode_element(codes.astype(jnp.float32), factor, kind, storage)


def encode_factor(
  s: jax.Array, kind: Kind, storage: Storage, slack: jax.Array | float = 1.0
) -> jax.Array:
  """What an element's root (or, for "paper", it) is multiplied by, once a group.

  ``s`` is the :func:`exact_scale`, ``slack`` that of :class:`MomentRounding`.
  """
  if storage.companding == "root":
    # sqrt(|x| / s) · levels, with the division done once per group.
    return LEVELS[kind] * slack * _inverse(jnp.sqrt(s))
  return slack * _inverse(s)


def decode_factor(s: jax.Array, kind: Kind, storage: Storage) -> jax.Array:
  """What :func:`decode_element` takes in the scale's place, once a group."""
  if storage.companding == "root":
    return s * (1.0 / LEVELS[kind] ** 2)
  return s if kind == "first" else s * (1.0 / LEVELS[kind])


def decode_element(
  c: jax.Array, factor: jax.Array, kind: Kind, storage: Storage
) -> jax.Array:
  """The value of a code, given as float32, and its group's decode factor."""
  if storage.companding == "root":
    if kind == "first":
      return c * jnp.abs(c) * factor
    return lax.square(c * c * factor)
  if kind == "first":
    y = c * (1.0 / LEVELS[kind])
    return y / (2.0 - jnp.abs(y)) * factor
  return lax.square(c * factor)


def _inverse(s: jax.Array) -> jax.Array:
  """1 / s, and 0 where s is 0."""
  is_zero = s == 0
  return _where(is_zero, 0.0, 1.0 / _where(is_zero, 1.0, s))


# The CPU path compiles this module's functions into calls that XLA must not split up
# (:mod:`flashoptim_jax.kernels.xla`), so that they call nothing with a jit of its own.


def _clamped(x: jax.Array, lowest: float, highest: float) -> jax.Array:
  """``jnp.clip``, for numbers."""
  return lax.clamp(x.dtype.type(lowest), x, x.dtype.type(highest))


def _where(condition: jax.Array, x, y) -> jax.Array:
  """``jnp.where`` for same-shaped arrays and numbers."""
  array = x if isinstance(x, jax.Array) else y
  x, y = (v if isinstance(v, jax.Array) else lax.full_like(array, v) for v in (x, y))
  return lax.select(condition, x, y)


def group_largest(
  x: jax.Array,
  kind: Kind,
  group_size: int,
  old_scale: jax.Array | None = None,
) -> jax.Array:
  """Largest magnitude of each group; NaN where the group holds one.

  In an update, what stands out from the rest of its group and from its old scale is
  limited, see :data:`LARGEST_RATIO`.

  Args:
    x: The moment, float32.
    kind: Its kind.
    group_size: Elements of a group. Only multiples of 8 have halves to compare.
    old_scale: The scales before an update, of :func:`scale_shape`. None to encode what
      no update made, without a limit.
  """
  # As integers, the bits of magnitudes are in order, NaN above all others. XLA's
  # float maximum, which has to look for NaN, is many times slower on a CPU.
  bits = lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF
  axis = group_axis(x.shape, group_size)
  if axis is None or not x.shape[axis]:
    return lax.bitcast_convert_type(bits, jnp.float32)
  whole = x.shape[axis] // group_size * group_size
  parts = [lax.slice_in_dim(bits, 0, whole, axis=axis)] if whole else []
  if whole < x.shape[axis]:
    rest = lax.slice_in_dim(bits, whole, None, axis=axis)
    parts.append(with_whole_groups(rest, axis, group_size))
  grouped = [_grouped(part, axis, group_size) for part in parts]
  if group_size % (2 * HALF_RUN):
    return _joined([jnp.max(part, axis=axis + 1) for part in grouped], axis)
  of_parts = [_halves(part, axis + 1) for part in grouped]
  halves = [_joined(half, axis) for half in zip(*of_parts, strict=True)]
  if old_scale is None:
    return lax.max(*halves)
  return limited_largest(halves, old_scale.astype(jnp.float32), kind)


def with_whole_groups(x: jax.Array, axis: int | None, group_size: int) -> jax.Array:
  """Fills up the last groups along an axis with zeros."""
  if axis is None or not x.shape[axis] % group_size:
    return x
  padding = [(0, 0, 0)] * x.ndim
  padding[axis] = (0, -x.shape[axis] % group_size, 0)
  return lax.pad(x, np.zeros((), x.dtype), padding)


def _grouped(x: jax.Array, axis: int, size: int) -> jax.Array:
  """An array with its groups' elements along the axis after ``axis``."""
  groups = x.shape[axis] // size
  return x.reshape(*x.shape[:axis], groups, size, *x.shape[axis + 1 :])


def _joined(bits: Sequence[jax.Array], axis: int) -> jax.Array:
  """Magnitudes, given the bits of parts of them."""
  return lax.bitcast_convert_type(lax.concatenate(bits, axis), jnp.float32)


def _halves(bits: jax.Array, axis: int) -> list[jax.Array]:
  """The largest of each half along an axis."""
  # First of elements eight apart, which are in the same half.
  turns = _grouped(bits, axis, 2 * HALF_RUN)
  turn = jnp.max(turns, axis=axis)
  return [
    jnp.max(lax.slice_in_dim(turn, start, start + HALF_RUN, axis=axis), axis=axis)
    for start in (0, HALF_RUN)
  ]


def limited_largest(
  halves: Sequence[jax.Array], old_scale: jax.Array, kind: Kind
) -> jax.Array:
  """The largest magnitude of a group, given those of its halves and its old scale."""
  largest, other = lax.max(*halves), lax.min(*halves)
  old = old_scale if kind == "first" else lax.square(old_scale)
  limit = lax.max(other, old) * LARGEST_RATIO[kind]
  stands_out = (limit > 0) & (largest > limit)
  if kind == "first":  # An infinity is to be seen.
    stands_out &= lax.is_finite(largest)
  return _where(stands_out, limit, largest)


def group_expand(s: jax.Array, shape: tuple[int, ...], storage: Storage) -> jax.Array:
  """Gives every element of ``shape`` its group's value; one that has it keeps it."""
  if s.shape == shape:
    return s
  axis = group_axis(shape, storage.group_size)
  if axis is None or s.shape[axis] == 1:
    return jnp.broadcast_to(s, shape)
  grouped = (*s.shape[: axis + 1], storage.group_size, *s.shape[axis + 1 :])
  s = jnp.broadcast_to(jnp.expand_dims(s, axis + 1), grouped)
  padded = grouped[axis] * storage.group_size
  s = s.reshape((*shape[:axis], padded, *shape[axis + 1 :]))
  return lax.slice_in_dim(s, 0, shape[axis], axis=axis)


def promote_types(a: Any, b: Any) -> Any:
  """``jnp.promote_types``, also where users made JAX refuse to promote arrays."""
  with jax.numpy_dtype_promotion("standard"):
    return jnp.promote_types(a, b)


def round_to(x: jax.Array, dtype) -> jax.Array:
  """Rounds to ``dtype`` in a way that XLA does not optimise away.

  Inside one program XLA may skip the rounding of an intermediate 16-bit value.
  Codes and corrections must be taken for the value that is really stored.
  """
  info, wide = jnp.finfo(dtype), jnp.finfo(x.dtype)
  if info.bits < wide.bits:
    rounded = lax.reduce_precision(x, info.nexp, info.nmant)
    if info.nexp < 8:
      # reduce_precision flushes float16's subnormals, all multiples of 2⁻²⁴;
      # next to this number, so are the floats of x's own dtype.
      near = 1.5 * 2.0 ** (wide.nmant + info.minexp - info.nmant)
      subnormal = jnp.abs(x) < float(info.tiny)
      rounded = _where(subnormal, (x + near) - near, rounded)
    x = rounded
  return x.astype(dtype)


def dithers(dtype, master_bits: int | None) -> bool:
  """Whether parameters of a dtype are rounded by thresholds of their elements."""
  return master_bits == 16 and jnp.dtype(dtype).itemsize == 2


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
  """Along each axis, how many places an element is from the next."""
  return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def place_of(
  index: Sequence[Any], strides: Sequence[int], origin: jax.Array | None = None
) -> jax.Array:
  """The place of an element in a whole leaf, uint32 of shape ().

  Args:
    index: Its index, along leading axes.
    strides: How far apart elements are along these.
    origin: The place from which the index counts, uint32 of shape (); by default 0.
  """
  place = jnp.uint32(0) if origin is None else origin
  for i, stride in zip(index, strides, strict=True):
    place = place + jnp.asarray(i).astype(jnp.uint32) * jnp.uint32(stride % 2**32)
  return place


def dither(
  rounding: jax.Array,
  shape: tuple[int, ...],
  origin: jax.Array | None = None,
  strides: tuple[int, ...] | None = None,
) -> jax.Array:
  """The parts of a place that are added to elements before they are cut off.

  Args:
    rounding: The count's share, ``Rounding.master`` at 16 bits.
    shape: The leaf's shape, or that of a part of a leaf.
    origin: The part's first element's place in the whole leaf, uint32 of shape ().
    strides: How far apart elements are in the whole leaf, by axis; by default as in
      one of this shape.

  Returns:
    uint32 of that shape, in units of 2⁻³² places.
  """
  word = rounding.astype(jnp.uint32) << 16
  if origin is not None:
    word = word + origin * jnp.uint32(PLACE)
  word = jnp.broadcast_to(word, shape)
  for axis, stride in enumerate(row_major(shape) if strides is None else strides):
    if shape[axis] > 1:
      index = lax.broadcasted_iota(jnp.uint32, shape, axis)
      word = word + index * jnp.uint32(stride * PLACE % 2**32)
  return word


def master_threshold(
  rounding: jax.Array,
  param: jax.Array,
  master_bits: int | None,
  origin: jax.Array | None = None,
  strides: tuple[int, ...] | None = None,
) -> jax.Array:
  """What :func:`advance` takes to round a parameter's master weights.

  Args:
    rounding: ``Rounding.master``.
    param: The parameter.
    master_bits: As in :class:`flashoptim_jax.Storage`.
    origin: As for :func:`dither`.
    strides: As for :func:`dither`.
  """
  if not dithers(param.dtype, master_bits):
    return rounding
  return dither(rounding, param.shape, origin, strides)


def correction_dtype(dtype, master_bits: int | None):
  """The dtype of a leaf's correction, or None where it has none."""
  if master_bits not in (24, 32) or jnp.dtype(dtype).itemsize != 2:
    return None
  return jnp.dtype(jnp.int8 if master_bits == 24 else jnp.int16)


def split(
  master: jax.Array, dtype, master_bits: int | None
) -> tuple[jax.Array, jax.Array | None]:
  """Splits master weights into parameters and corrections.

  Args:
    master: float32 (or, for float64 parameters, float64), of any shape.
    dtype: The parameter's dtype.
    master_bits: 16, 24, 32 or None.

  Returns:
    The parameter, ``master`` rounded to ``dtype``, and the correction: int8 at
    24 bits, int16 at 32, None where ``dtype`` needs none.
  """
  correction = split_correction(master, dtype, master_bits)
  return split_param(master, correction, dtype), correction


def split_correction(
  master: jax.Array, dtype, master_bits: int | None
) -> jax.Array | None:
  """The correction of :func:`split`."""
  corrects = correction_dtype(dtype, master_bits)
  if master_bits is None or corrects is None:
    return None
  if dtype == jnp.float16:
    return _residual_float16(master, round_to(master, dtype), master_bits)
  # The bits below the parameter's, as a signed number.
  unsigned = jnp.uint8 if master_bits == 24 else jnp.uint16
  low = lax.bitcast_convert_type(
    _top_bits(master, master_bits).astype(unsigned), corrects
  )
  return _where(jnp.isnan(master), 0, low)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def split_param(master: jax.Array, correction: jax.Array | None, dtype) -> jax.Array:
  """The parameter of :func:`split`, given its correction.

  Reads the correction, so that the two belong together even where ``master`` was
  computed twice and came out one unit apart.
  """
  if correction is None or dtype == jnp.float16:
    return round_to(master, dtype)
  master_bits = 24 if correction.dtype == jnp.int8 else 32
  discarded = master_bits - 16
  top = _top_bits(master, master_bits) - correction.astype(jnp.uint32)
  param = (top + (1 << (discarded - 1))) >> discarded
  # A NaN keeps its sign and the quiet bit; rounding must not carry it away.
  param = _where(jnp.isnan(master), _bits(master) >> 16 | 0x40, param)
  return lax.bitcast_convert_type(param.astype(jnp.uint16), jnp.bfloat16)


@split_param.defjvp
def _split_param_jvp(dtype, primals, tangents):
  return split_param(*primals, dtype), tangents[0].astype(dtype)


def _beside(x: jax.Array, other: jax.Array) -> jax.Array:
  """The array, on explicit mesh axes sharded as the other."""
  there = jax.typeof(other).sharding
  if there == jax.typeof(x).sharding or AxisType.Explicit not in there.mesh.axis_types:
    return x
  return jax.sharding.reshard(x, there)


@jax.custom_jvp
def merge(param: jax.Array, correction: jax.Array | None) -> jax.Array:
  """Inverse of :func:`split`: the master weights.

  Args:
    param: The parameter, in any supported dtype.
    correction: int8 or int16 of the same shape, or None.

  Returns:
    float32, or float64 for float64 parameters, sharded as the correction. A zero
    parameter whose correction points to the other side of zero (it was set to zero
    from outside, by pruning say) is zero.
  """
  if param.dtype.itemsize >= 4:
    return param
  if correction is None:
    return param.astype(jnp.float32)
  param = _beside(param, correction)
  if param.dtype == jnp.float16:
    unit = _unit_float16(param, correction.dtype)
    return param.astype(jnp.float32) + correction.astype(jnp.float32) * unit
  shift = 8 if correction.dtype == jnp.int8 else 0
  p = lax.bitcast_convert_type(param, jnp.uint16).astype(jnp.int32)
  rest = correction.astype(jnp.int32)
  rest = _where(p & 0x7FFF == 0, jnp.maximum(rest, 0), rest)
  return lax.bitcast_convert_type((p << 16) + (rest << shift), jnp.float32)


@jax.custom_jvp
def advance(
  param: jax.Array,
  correction: jax.Array | None,
  step: jax.Array,
  threshold: jax.Array | float,
) -> jax.Array:
  """Master weights after a step, rounded to what is kept of them.

  At 24 bits a magnitude is cut off after ``threshold`` places were added to it: over
  updates, steps of a small part of a place add up to what they should. At 16 bits so is
  float32's sum, each element by a threshold of its own. Elsewhere the sum is float32's
  (or float64's), as in Optax.

  Args:
    param: The parameter.
    correction: Its correction, or None.
    step: What to add, of the dtype of :func:`merge`'s result and ``param``'s shape.
    threshold: :func:`master_threshold`: a part of a place, between 0 and 1, for all
      elements, or :func:`dither`'s, uint32, for each.

  Returns:
    The new master weights, which :func:`split` stores without loss where they have
    16 or 24 bits.
  """
  master = merge(param, correction)
  if isinstance(threshold, jax.Array) and threshold.dtype == jnp.uint32:
    return _dithered(master + step, param.dtype, threshold)
  if correction is None or correction.dtype != jnp.int8:
    return master + step
  threshold = jnp.asarray(threshold, jnp.float32)
  if param.dtype == jnp.float16:
    # In units of the correction, whole numbers; float32's places are too coarse.
    unit = _unit_float16(param, correction.dtype)
    units = jnp.floor(correction.astype(jnp.float32) + step / unit + threshold)
    return param.astype(jnp.float32) + units * unit
  # The sum is computed twice, so that a step is not rounded to float32's places before
  # the threshold is added: first to know how far apart the sum's places are.
  binade = lax.bitcast_convert_type(
    _bits(master + step) & jnp.uint32(_SIGN_AND_EXPONENT), jnp.float32
  )
  moved = master + (step + binade * ((threshold - HALF_OF_FLOAT32) * 2.0**-15))
  # Arithmetic makes quiet NaNs, which have a bit that is kept.
  return lax.bitcast_convert_type(_bits(moved) & jnp.uint32(0xFFFFFF00), jnp.float32)


def _dithered(x: jax.Array, dtype, dither: jax.Array) -> jax.Array:
  """Float32 numbers, cut to the places of ``dtype`` after parts of one were added."""
  bits, offset = _bits(x), None
  discarded = 23 - jnp.finfo(dtype).nmant
  if dtype == jnp.float16:
    # Its subnormals have the places of its smallest normal numbers.
    smallest = float(jnp.finfo(dtype).tiny)
    offset = _where(jnp.abs(x) < smallest, lax.full_like(x, smallest), 0.0)
    bits = _bits(jnp.abs(x) + offset)
  bits = bits + (dither >> jnp.uint32(32 - discarded))
  bits = bits & jnp.uint32(2**32 - (1 << discarded))
  if offset is not None:
    magnitude = lax.bitcast_convert_type(bits, jnp.float32) - offset
    bits = _bits(magnitude) | (_bits(x) & jnp.uint32(1 << 31))
  # What is added must not carry a NaN away.
  return _where(jnp.isnan(x), x, lax.bitcast_convert_type(bits, jnp.float32))


@advance.defjvp
def _advance_jvp(primals, tangents):
  master = advance(*primals)
  param, _, step, _ = tangents
  return master, param.astype(master.dtype) + step.astype(master.dtype)


@merge.defjvp
def _merge_jvp(primals, tangents):
  master = merge(*primals)
  return master, tangents[0].astype(master.dtype)


def residual(
  master: jax.Array, param: jax.Array, master_bits: int | None
) -> jax.Array | None:
  """The correction that brings a given parameter closest to ``master``.

  Equals the correction of :func:`split` where ``param`` is ``master`` rounded;
  elsewhere the nearest that the correction's range can reach.

  Args:
    master: float32 master weights.
    param: The parameters, in their own dtype.
    master_bits: 16, 24, 32 or None.

  Returns:
    int8, int16 or None, as in :func:`split`.
  """
  dtype = correction_dtype(param.dtype, master_bits)
  if master_bits is None or dtype is None:
    return None
  param = _beside(param, master)
  if param.dtype == jnp.float16:
    return _residual_float16(master, param, master_bits)
  top = _top_bits(master, master_bits)
  sign = jnp.uint32(0x80 << (master_bits - 8))
  p = lax.bitcast_convert_type(param, jnp.uint16).astype(jnp.uint32)
  p = p << (master_bits - 16)
  distance = (top & (sign - 1)).astype(jnp.int32)
  distance -= (p & (sign - 1)).astype(jnp.int32)
  lowest, highest = jnp.iinfo(dtype).min, jnp.iinfo(dtype).max
  distance = _where((top ^ p) & sign == 0, distance, lowest)
  distance = _where(jnp.isnan(master) | jnp.isnan(param), 0, distance)
  return jnp.clip(distance, lowest, highest).astype(dtype)


def store(
  master: jax.Array, param: jax.Array, update_dtype, master_bits: int | None
) -> tuple[jax.Array, jax.Array | None]:
  """What an update leaves behind for new master weights.

  Args:
    master: The new master weights.
    param: The old parameter.
    update_dtype: The dtype of an update that ``optax.apply_updates`` will add to
      the parameter; None to get the new parameter.
    master_bits: 16, 24, 32 or None.

  Returns:
    The new parameter, or the update, and the correction that belongs to it.
  """
  if update_dtype is None:
    return split(master, param.dtype, master_bits)
  update = difference(master, param, update_dtype, master_bits)
  return update, residual_of_update(master, param, update, master_bits)


def difference(
  master: jax.Array, param: jax.Array, dtype, master_bits: int | None
) -> jax.Array:
  """The update, in ``dtype``, that takes a parameter to its new value.

  Args:
    master: The new master weights.
    param: The old parameter.
    dtype: The dtype of the update.
    master_bits: 16, 24, 32 or None.
  """
  new, _ = split(master, param.dtype, master_bits)
  return round_to(new.astype(master.dtype) - param.astype(master.dtype), dtype)


def residual_of_update(
  master: jax.Array,
  param: jax.Array,
  update: jax.Array,
  master_bits: int | None,
) -> jax.Array | None:
  """The correction relative to what ``optax.apply_updates`` will produce.

  Args:
    master: The new master weights.
    param: The old parameter.
    update: What will be added to it.
    master_bits: 16, 24, 32 or None.
  """
  dtype = promote_types(param.dtype, update.dtype)
  wide = promote_types(dtype, jnp.float32)
  total = round_to(param.astype(wide) + update.astype(wide), dtype)
  produced = round_to(total.astype(wide), param.dtype)
  return residual(master, produced, master_bits)


def _bits(x: jax.Array) -> jax.Array:
  return lax.bitcast_convert_type(x, jnp.uint32)


def _top_bits(master: jax.Array, master_bits: int) -> jax.Array:
  """The master format's bit pattern, in the low bits of a uint32."""
  bits = _bits(master)
  return bits if master_bits == 32 else (bits + 0x80) >> 8


def levels_float16(correction_dtype) -> float:
  """The correction of a float16 parameter that is worth half its last place."""
  return float(jnp.iinfo(correction_dtype).max)


def _unit_float16(param: jax.Array, correction_dtype) -> jax.Array:
  """What one unit of a float16 parameter's correction is worth."""
  return _half_ulp_float16(param) * (1.0 / levels_float16(correction_dtype))


def _half_ulp_float16(param: jax.Array) -> jax.Array:
  """Half the distance from |param| to the next larger float16, in float32."""
  bits = lax.bitcast_convert_type(param, jnp.uint16).astype(jnp.int32)
  exponent = jnp.maximum((bits >> 10) & 0x1F, 1)
  # 2^(exponent - 15 - 10 - 1), written as a float32 bit pattern.
  return lax.bitcast_convert_type((exponent - 26 + 127) << 23, jnp.float32)


def _residual_float16(master, param, master_bits) -> jax.Array:
  dtype = correction_dtype(param.dtype, master_bits)
  levels = levels_float16(dtype)
  error = master - param.astype(jnp.float32)
  code = jnp.round(error / _half_ulp_float16(param) * levels)
  code = _where(jnp.isfinite(error), jnp.clip(code, -levels, levels), 0.0)
  return code.astype(dtype)
