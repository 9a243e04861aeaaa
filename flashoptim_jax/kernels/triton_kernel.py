"""The fused update as a Triton kernel; launched by :mod:`.triton`.

The twin of :mod:`flashoptim_jax.storage.codec`, :mod:`flashoptim_jax.rules` and the XLA
path: change them together. One file, since Triton takes a kernel's functions from the
globals of the module that calls them.
"""

import triton
import triton.language as tl
from jax.extend import backend


def _is_portable() -> bool:
  """Whether the kernel has to do without NVIDIA's assembly language."""
  try:
    version = backend.get_backend("gpu").platform_version
  except RuntimeError:  # Without a GPU, tests compile it for NVIDIA's.
    version = ""
  return triton.knobs.runtime.interpret or "rocm" in version


if _is_portable():
  from flashoptim_jax.kernels.triton_portable import (
    divide,
    high_half,
    merge,
    pin,
    quiet,
    round_half_up,
    saturate,
    saturate_biased,
    second_byte,
  )
else:
  from flashoptim_jax.kernels.triton_ptx import (
    divide,
    high_half,
    merge,
    pin,
    quiet,
    round_half_up,
    saturate,
    saturate_biased,
    second_byte,
  )

# Positions of the hyperparameters in the kernel's first argument.
SCALARS = (
  "learning_rate",
  "weight_decay",
  "b1",
  "one_minus_b1",
  "b2",
  "one_minus_b2",
  "eps",
  "eps_root",
  "mu_scaling",
  "mu_scaling_next",
  "nu_scaling",
  "momentum",
  "one_minus_dampening",
  "mu_carry",
  "mu_unit",
  "nu_carry_root",
  "nu_unit",
  "grad_share",
  "root_pace",
  "eps_pace",
  "scaled_eps_root",
  "scaled_least_root",
  "master_rounding",
  "first_scale_rounding",
  "first_code_rounding",
  "first_slack_rounding",
  "second_scale_rounding",
  "second_code_rounding",
  "second_slack_rounding",
)
# Arrays of a leaf, in the order in which the kernel takes them.
ARRAYS = (
  "grad",
  "param",
  "correction",
  "mu",
  "mu_scale",
  "nu",
  "nu_scale",
  "update",
)

_LEARNING_RATE = tl.constexpr(0)
_WEIGHT_DECAY = tl.constexpr(1)
_B1 = tl.constexpr(2)
_ONE_MINUS_B1 = tl.constexpr(3)
_B2 = tl.constexpr(4)
_ONE_MINUS_B2 = tl.constexpr(5)
_EPS = tl.constexpr(6)
_EPS_ROOT = tl.constexpr(7)
_MU_SCALING = tl.constexpr(8)
_MU_SCALING_NEXT = tl.constexpr(9)
_NU_SCALING = tl.constexpr(10)
_MOMENTUM = tl.constexpr(11)
_ONE_MINUS_DAMPENING = tl.constexpr(12)
# Of Adam's rules with quantised moments, see `triton.adam_scalars`.
_MU_CARRY = tl.constexpr(13)
_MU_UNIT = tl.constexpr(14)
_NU_CARRY_ROOT = tl.constexpr(15)
_NU_UNIT = tl.constexpr(16)
_GRAD_SHARE = tl.constexpr(17)
_ROOT_PACE = tl.constexpr(18)
_EPS_PACE = tl.constexpr(19)
_SCALED_EPS_ROOT = tl.constexpr(20)
_SCALED_LEAST_ROOT = tl.constexpr(21)
_MASTER_ROUNDING = tl.constexpr(22)
# Of first moments; those of second moments follow.
_SCALE_ROUNDING = tl.constexpr(23)
_CODE_ROUNDING = tl.constexpr(24)
_SLACK_ROUNDING = tl.constexpr(25)
_ROUNDINGS = tl.constexpr(3)

_TINY = tl.constexpr(2.0**-126)
_LARGEST_SECOND = tl.constexpr((255 / 128 * 2.0**63) ** 2)
_HALF_RUN = tl.constexpr(4)
_LARGEST_RATIO = tl.constexpr(2.0**12)
_HALF_OF_FLOAT32 = tl.constexpr(2.0**-9)
_PLACE = tl.constexpr(1799612389)
_GROUP = tl.constexpr(32)


@triton.jit
def _bits(x):
  return x.to(tl.uint32, bitcast=True)


@triton.jit
def _larger(x, y):
  """The larger of two numbers, NaN if one is."""
  return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _group_largest(x, unit, old_scale, SIGNED: tl.constexpr):
  """Largest magnitude of each row times ``unit``, NaN where the row holds one.

  Limited where that of one half of the row stands out from the other half's and from
  the row's old scale.
  """
  if SIGNED:
    x = tl.abs(x)
  runs = tl.reshape(x, (x.shape[0], _GROUP // (2 * _HALF_RUN), 2, _HALF_RUN))
  # Of floats: the instruction takes magnitudes by itself.
  halves = tl.reduce(tl.reduce(runs, 3, _larger), 1, _larger)
  largest = tl.reduce(halves, 1, _larger) * unit
  other = tl.min(halves, axis=1) * unit  # Whatever it is beside a NaN.
  old = old_scale.to(tl.float32)
  if SIGNED:
    limit = tl.maximum(other, old) * _LARGEST_RATIO
  else:
    limit = tl.maximum(other, old * old) * (_LARGEST_RATIO * _LARGEST_RATIO)
  limit = tl.where(limit > 0, limit, float("inf"))
  limited = tl.minimum(largest, limit, propagate_nan=tl.PropagateNan.ALL)
  if SIGNED:  # NaN where the row holds an infinity, too.
    limited = tl.where(largest * 0 == 0, limited, float("nan"))
  return limited


@triton.jit
def _inverse(s):
  """1 / s, and 0 where s is 0."""
  return tl.where(s == 0, 0.0, 1.0 / s)


@triton.jit
def _inverse_root(s):
  """1 / sqrt(s), and 0 where s is 0; no root is too large or small for `divide`."""
  return tl.where(s == 0, 0.0, divide(1.0, tl.sqrt(s)))


@triton.jit
def _round_scale(scale, rounding):
  """To bfloat16; a finite scale stays finite."""
  bits = tl.minimum(_bits(scale).to(tl.int32) + rounding, 0x7F7FFFFF)
  bits = tl.where(scale * 0 == 0, bits, 0x7FC00000)
  return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _decode(codes, scale, carry, SIGNED: tl.constexpr, ROOT: tl.constexpr):
  """Signed moments times ``carry``, or roots of second moments times ``carry``.

  In two factors, for the caller to multiply: each element's and its group's.
  """
  c = codes.to(tl.float32)
  s = scale.to(tl.float32)
  if ROOT:
    if SIGNED:
      x, factor = c * tl.abs(c), s * (1.0 / 16129.0) * carry
    else:
      x, factor = c * c, s * (1.0 / 65025.0) * carry
  elif SIGNED:
    y = c * (1.0 / 127.0)
    x, factor = divide(y, 2.0 - tl.abs(y)), s * carry
  else:
    x, factor = c, s * (1.0 / 255.0) * carry
  return x, factor[:, None]


@triton.jit
def _encode(
  x, root, unit, old_scale, scalars, SIGNED: tl.constexpr, ROOT: tl.constexpr
):
  """Codes, as int32, 128 more than signed ones are, and scales, as bfloat16.

  Args:
    x: The moment, in multiples of ``unit``.
    root: The root of a second moment ``x``.
    unit: A positive number.
    old_scale: The scales before the update.
    scalars: The hyperparameters.
    SIGNED: Whether it is a first moment.
    ROOT: The companding.
  """
  roundings = scalars if SIGNED else scalars + _ROUNDINGS
  largest = _group_largest(x, unit, old_scale, SIGNED)
  largest = tl.where(largest < _TINY, 0.0, largest)
  # The same approximate root and the same order of operations as in XLA's code for
  # GPUs, so that both round alike.
  if SIGNED:
    scale = largest
  else:
    scale = tl.sqrt(
      tl.minimum(largest, _LARGEST_SECOND, propagate_nan=tl.PropagateNan.ALL)
    )
  levels: tl.constexpr = 127.0 if SIGNED else 255.0
  slack = tl.load(roundings + _SLACK_ROUNDING)
  unit = unit if SIGNED else tl.sqrt(unit)
  # A code is `level * share + threshold`, in one instruction.
  if ROOT:
    factor = (levels * slack * _inverse_root(scale) * tl.sqrt(unit))[:, None]
    if SIGNED:
      level = tl.sqrt(tl.abs(x)) * factor
      share = tl.minimum(level, 1.0)
    else:
      level, share = tl.sqrt(root), factor
  else:
    factor = (slack * _inverse(scale) * unit)[:, None]
    if SIGNED:
      ratio = tl.abs(x) * factor
      level, share = divide(2.0 * ratio, 1.0 + ratio), levels
    else:
      level, share = root * factor, levels
  threshold = tl.load(roundings + _CODE_ROUNDING)
  if SIGNED:
    level = (_bits(level) | (_bits(x) & 0x80000000)).to(tl.float32, bitcast=True)
    # Positive, for the conversion to cut off downwards.
    threshold += 128.0
    least = 1.0
  else:
    least = tl.where(factor > 0, 1.0, 0.0)
  # What is beyond the largest is left to `saturate`. A NaN gives some code or other, in
  # a group whose scale is NaN.
  code = tl.maximum(tl.fma(level, share, threshold), least).to(tl.int32)
  return code, _round_scale(scale, tl.load(roundings + _SCALE_ROUNDING).to(tl.int32))


@triton.jit
def _half_ulp_float16(param):
  bits = param.to(tl.uint16, bitcast=True).to(tl.int32)
  exponent = tl.maximum((bits >> 10) & 0x1F, 1)
  return ((exponent + 101) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _unit_float16(param, MASTER_BITS: tl.constexpr):
  """What one unit of a correction is worth."""
  levels: tl.constexpr = 127.0 if MASTER_BITS == 24 else 32767.0
  return _half_ulp_float16(param) * (1.0 / levels)


@triton.jit
def _advance(param, correction, master, step, threshold, MASTER_BITS: tl.constexpr):
  """Master weights after a step, rounded to 24 bits by a threshold.

  The bits below them are left, for those who store it to cut off.
  """
  if MASTER_BITS != 24:
    moved = master + step
  elif param.dtype == tl.float16:
    unit = _unit_float16(param, MASTER_BITS)
    units = tl.floor(correction.to(tl.float32) + step / unit + threshold)
    moved = param.to(tl.float32) + units * unit
  else:
    place = (threshold - _HALF_OF_FLOAT32) * (2.0**-15)
    binade = (_bits(master + step) & 0xFF800000).to(tl.float32, bitcast=True)
    moved = master + tl.fma(binade, place, step)
  return moved


@triton.jit
def _word(
  scalars, places, base, at, row, column, COMPRESSED: tl.constexpr, DITHER: tl.constexpr
):
  """Thresholds of elements, in units of 2^-32 places, see ``codec.dither``.

  Args:
    scalars: The hyperparameters.
    places: Of a part of a leaf, pointer to what ``update_leaves`` says.
    base: The first element's index in the leaf.
    at: The elements' indices, counted from there.
    row: Where DITHER is 3, rows of groups, or of elements where there are no groups;
      else 0.
    column: Where DITHER is 3, elements' indices in their row.
    COMPRESSED: Whether there are groups.
    DITHER: As for ``_update_groups``.
  """
  first = tl.load(scalars + _MASTER_ROUNDING).to(tl.uint32) << 16
  if DITHER > 1:  # Of the part, or of each row.
    first += tl.load(places + row).to(tl.uint32, bitcast=True)
  if DITHER < 3:
    first += base.to(tl.uint32) * _PLACE
    column = at
  elif COMPRESSED:
    first = first[:, None]
  return column.to(tl.uint32) * _PLACE + first


@triton.jit
def _dithered(x, word, dtype: tl.constexpr):
  """Float32 numbers, cut to the places of ``dtype`` after parts of one were added."""
  if dtype == tl.bfloat16:
    param = high_half(quiet(_bits(x)) + (word >> 16))
  else:
    tl.static_assert(dtype == tl.float16)
    # Its subnormals have the places of its smallest normal numbers.
    offset = tl.where(tl.abs(x) < 2.0**-14, 2.0**-14, 0.0)
    bits = quiet(_bits(tl.abs(x) + offset)) + (word >> 19)
    cut = (bits & 0xFFFFE000).to(tl.float32, bitcast=True) - offset
    cut = (_bits(cut) | (_bits(x) & 0x80000000)).to(tl.float32, bitcast=True)
    param = cut.to(dtype)
  return param


@triton.jit
def _merge(param, correction, MASTER_BITS: tl.constexpr):
  if MASTER_BITS == 0:
    master = param.to(tl.float32)
  elif param.dtype == tl.float16:
    unit = _unit_float16(param, MASTER_BITS)
    master = param.to(tl.float32) + correction.to(tl.float32) * unit
  else:
    bits = merge(param.to(tl.int16, bitcast=True), correction)
    master = bits.to(tl.float32, bitcast=True)
  return master


@triton.jit
def _residual_float16(master, param, MASTER_BITS: tl.constexpr):
  levels: tl.constexpr = 127.0 if MASTER_BITS == 24 else 32767.0
  error = master - param.to(tl.float32)
  code = error / _half_ulp_float16(param) * levels
  code = tl.where(code > levels, levels, tl.where(code < -levels, -levels, code))
  # Adding and taking away 1.5 · 2^23 rounds to the nearest integer, ties to even.
  code = (code + 12582912.0) - 12582912.0
  return tl.where(error * 0 == 0, code, 0.0).to(tl.int32)


@triton.jit
def _split(master, dtype: tl.constexpr, MASTER_BITS: tl.constexpr):
  """Parameters, and corrections as the low bits of integers."""
  if MASTER_BITS == 0:
    param = master.to(dtype)
    rest = tl.zeros_like(master).to(tl.int32)
  elif dtype == tl.float16:
    param = master.to(dtype)
    rest = _residual_float16(master, param, MASTER_BITS)
  else:
    # Beside a parameter that is NaN any correction will do.
    param = round_half_up(master)
    rest = second_byte(master) if MASTER_BITS == 24 else _bits(master)
  return param, rest


@triton.jit
def _residual(master, param, MASTER_BITS: tl.constexpr):
  """The correction that brings a given parameter closest to ``master``."""
  if MASTER_BITS == 0:
    rest = tl.zeros_like(master).to(tl.int32)
  elif param.dtype == tl.float16:
    rest = _residual_float16(master, param, MASTER_BITS)
  else:
    shift: tl.constexpr = 32 - MASTER_BITS
    largest: tl.constexpr = (1 << (MASTER_BITS - 17)) - 1
    p = param.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
    # Negative where signs differ, and far below any magnitude. Beside a parameter
    # that is NaN any correction will do.
    m = (quiet(_bits(master)) ^ (p & 0x80000000)).to(tl.int32)
    rest = (m >> shift) - ((p & 0x7FFFFFFF) >> shift).to(tl.int32)
    if MASTER_BITS == 32:  # The difference may have wrapped around.
      rest = tl.where(m < 0, -largest - 1, rest)
    if MASTER_BITS == 24:
      rest = saturate(rest, tl.int8)
    else:
      rest = tl.minimum(tl.maximum(rest, -largest - 1), largest)
  return rest


@triton.jit
def _update_groups(
  scalars,
  arrays,
  places,
  columns,
  block,
  num_groups,
  row_length,
  run_length,
  run_gaps,
  ALIGNMENT: tl.constexpr,
  RULE: tl.constexpr,
  NESTEROV: tl.constexpr,
  DECAY: tl.constexpr,
  MASTER_BITS: tl.constexpr,
  COMPRESSED: tl.constexpr,
  EPS_ROOT: tl.constexpr,
  ROOT: tl.constexpr,
  NEW_PARAMS: tl.constexpr,
  GAPS: tl.constexpr,
  DITHER: tl.constexpr,
  BLOCK_GROUPS: tl.constexpr,
):
  """Updates ``BLOCK_GROUPS`` groups of a leaf, in place.

  Args:
    scalars: Pointer to the hyperparameters, float32.
    arrays: Pointers to the leaf's arrays, in the order of ``ARRAYS``.
    places: Where DITHER is 2 or 3, pointer to the leaf's shares of thresholds, see
      :func:`update_leaves`.
    columns: Where DITHER is 3, the length of the leaf's last axis.
    block: Index of the block of groups.
    num_groups: Groups of the leaf.
    row_length: Length of the group axis, in units of ALIGNMENT; that of the whole
      leaf where moments are float32.
    run_length: Scales between two gaps, see :mod:`flashoptim_jax.storage.scale_gaps`.
    run_gaps: Gaps after them.
    ALIGNMENT: A power of two that divides every leaf's row length, at most 32.
      At 32 no row ends in a partial group.
    RULE: The rule's name.
    NESTEROV: The rule's option.
    DECAY: Whether weight decay applies.
    MASTER_BITS: 24, 32, or 0 for no correction.
    COMPRESSED: Whether moments are codes and scales, or float32.
    EPS_ROOT: Whether there is a number to add below the root of Adam's rules.
    ROOT: Companding, "root" or "paper".
    NEW_PARAMS: Whether to write the parameter, or the update.
    GAPS: Whether there are gaps between scales.
    DITHER: Whether elements are rounded by thresholds of their own: 1 in whole leaves,
      2 in parts of leaves that are in one piece there, 3 in other parts; 0 for not.
    BLOCK_GROUPS: Groups per program.
  """
  IN_UNITS: tl.constexpr = RULE == "adam" and COMPRESSED
  lanes = tl.arange(0, _GROUP)[None, :]
  first = block.to(tl.int64) * BLOCK_GROUPS
  local = tl.arange(0, BLOCK_GROUPS)
  in_leaf = first + local < num_groups
  if ALIGNMENT == _GROUP:
    # Rows follow each other with no gap between their groups.
    base = first * _GROUP
    at = local[:, None] * _GROUP + lanes
    inside = in_leaf[:, None] & (lanes < _GROUP)
  elif not COMPRESSED:
    # A single row.
    base = first * _GROUP
    at = local[:, None] * _GROUP + lanes
    inside = at < row_length.to(tl.int64) * ALIGNMENT - base
    inside = tl.max_constancy(inside, [1, ALIGNMENT])
  else:
    base = 0
    length = row_length * ALIGNMENT
    groups_per_row = (length + _GROUP - 1) // _GROUP
    row = (first + local) // groups_per_row
    column = ((first + local) % groups_per_row)[:, None] * _GROUP + lanes
    at = row[:, None] * length + column
    inside = in_leaf[:, None] & (column < length)
    inside = tl.max_constancy(inside, [1, ALIGNMENT])

  scale_at = local
  if GAPS:
    # Rows have whole runs, so that runs follow each other through the leaf.
    group = block * BLOCK_GROUPS + local
    scale_at += group // run_length * run_gaps

  grad_ptr = arrays[0] + base
  param_ptr = arrays[1] + base
  correction_ptr = arrays[2] + base
  g_stored = tl.load(grad_ptr + at, mask=inside, other=0.0)
  param = tl.load(param_ptr + at, mask=inside, other=0.0)
  if MASTER_BITS == 0:
    correction = 0
  else:
    correction = tl.load(correction_ptr + at, mask=inside, other=0)
  if RULE != "sgd":
    mu_ptr = arrays[3] + base
    mu_scale_ptr = arrays[4] + first
    mu = tl.load(mu_ptr + at, mask=inside, other=0)
    if COMPRESSED:
      mu_scale = tl.load(mu_scale_ptr + scale_at, mask=in_leaf, other=0.0)
  if RULE == "adam":
    nu_ptr = arrays[5] + base
    nu_scale_ptr = arrays[6] + first
    nu = tl.load(nu_ptr + at, mask=inside, other=0)
    if COMPRESSED:
      nu_scale = tl.load(nu_scale_ptr + scale_at, mask=in_leaf, other=0.0)
  # No load moves below a barrier. Without it the compiler puts off half of them until
  # the first have come, to save registers: memory would be waited for twice.
  tl.debug_barrier()

  g = g_stored.to(tl.float32)
  master = _merge(param, correction, MASTER_BITS)
  if RULE != "sgd" and COMPRESSED:
    mu_carry = tl.load(scalars + _MU_CARRY) if IN_UNITS else 1.0
    mu, mu_factor = _decode(mu, mu_scale, mu_carry, True, ROOT)
  if IN_UNITS:
    nu_carry = tl.load(scalars + _NU_CARRY_ROOT)
    nu, nu_factor = _decode(nu, nu_scale, nu_carry, False, ROOT)

  rate = -tl.load(scalars + _LEARNING_RATE)
  decay = rate * tl.load(scalars + _WEIGHT_DECAY)
  mu_unit = 1.0
  nu_unit = 1.0
  nu_root = 0.0
  if IN_UNITS:
    # In multiples of the gains, see `triton.adam_scalars`.
    mu_unit = tl.load(scalars + _MU_UNIT)
    nu_unit = tl.load(scalars + _NU_UNIT)
    mu = tl.fma(mu, mu_factor, g)
    nu *= nu_factor
    nu = tl.fma(g, g, nu * nu)
    nu_root = tl.sqrt(nu)
    numerator = mu
    if NESTEROV:
      numerator = tl.fma(g, tl.load(scalars + _GRAD_SHARE), mu)
    root = nu_root
    if EPS_ROOT:
      root = tl.sqrt(nu + tl.load(scalars + _SCALED_EPS_ROOT))
    root = tl.maximum(root, tl.abs(numerator) * tl.load(scalars + _SCALED_LEAST_ROOT))
    root_pace = tl.load(scalars + _ROOT_PACE)
    step = divide(numerator, tl.fma(root, root_pace, tl.load(scalars + _EPS_PACE)))
  elif RULE == "adam":
    one_minus_b1 = tl.load(scalars + _ONE_MINUS_B1)
    mu = one_minus_b1 * g + tl.load(scalars + _B1) * mu
    nu = tl.load(scalars + _ONE_MINUS_B2) * (g * g) + tl.load(scalars + _B2) * nu
    if NESTEROV:
      mu_hat = tl.load(scalars + _B1) * (
        mu * tl.load(scalars + _MU_SCALING_NEXT)
      ) + one_minus_b1 * (g * tl.load(scalars + _MU_SCALING))
    else:
      mu_hat = mu * tl.load(scalars + _MU_SCALING)
    nu_hat = nu * tl.load(scalars + _NU_SCALING) + tl.load(scalars + _EPS_ROOT)
    direction = divide(mu_hat, tl.sqrt(nu_hat) + tl.load(scalars + _EPS))
  elif RULE == "lion":
    if COMPRESSED:
      mu *= mu_factor
    c = tl.load(scalars + _ONE_MINUS_B1) * g + tl.load(scalars + _B1) * mu
    direction = tl.where(c > 0, 1.0, tl.where(c < 0, -1.0, c))
    mu = tl.load(scalars + _ONE_MINUS_B2) * g + tl.load(scalars + _B2) * mu
  elif RULE == "momentum":
    if COMPRESSED:
      mu *= mu_factor
    momentum = tl.load(scalars + _MOMENTUM)
    mu = tl.load(scalars + _ONE_MINUS_DAMPENING) * g + momentum * mu
    direction = g + momentum * mu if NESTEROV else mu
  else:
    tl.static_assert(RULE == "sgd", "unknown rule")
    direction = g

  if not IN_UNITS:
    step = rate * direction
  if DECAY:
    step = tl.fma(decay, master, step)
  threshold = tl.load(scalars + _MASTER_ROUNDING)
  master = _advance(param, correction, master, step, threshold, MASTER_BITS)

  # Parameters come last: before the moments, `update` takes far more registers.
  if RULE != "sgd":
    if COMPRESSED:
      codes, scale = _encode(mu, 0.0, mu_unit, mu_scale, scalars, True, ROOT)
      tl.store(mu_ptr + at, saturate_biased(codes), mask=inside)
      tl.store(mu_scale_ptr + scale_at, scale, mask=in_leaf)
    else:
      tl.store(mu_ptr + at, mu, mask=inside)
  if RULE == "adam":
    if COMPRESSED:
      codes, scale = _encode(nu, nu_root, nu_unit, nu_scale, scalars, False, ROOT)
      tl.store(nu_ptr + at, saturate(codes, tl.uint8), mask=inside)
      tl.store(nu_scale_ptr + scale_at, scale, mask=in_leaf)
    else:
      tl.store(nu_ptr + at, nu, mask=inside)

  if DITHER == 0:
    new_param, rest = _split(master, param.dtype, MASTER_BITS)
  else:
    rows = 0
    columns_at = at
    if DITHER == 3:
      if COMPRESSED:
        groups_in_row = (columns + _GROUP - 1) // _GROUP
        group = tl.minimum(first + local, num_groups - 1)
        rows = group // groups_in_row
        columns_at = (group % groups_in_row)[:, None] * _GROUP + lanes
      else:
        rows = tl.where(inside, base + at, 0) // columns
        columns_at = base + at - rows * columns
    word = _word(scalars, places, base, at, rows, columns_at, COMPRESSED, DITHER)
    new_param = _dithered(master, word, param.dtype)
  if NEW_PARAMS:
    tl.store(param_ptr + at, new_param, mask=inside)
  else:
    old = param.to(tl.float32)
    update = (new_param.to(tl.float32) - old).to(g_stored.dtype)
    total = old + update.to(tl.float32)
    rest = _residual(master, total.to(param.dtype), MASTER_BITS)
    tl.store(arrays[7] + base + at, update, mask=inside)
  if MASTER_BITS == 24:
    tl.store(correction_ptr + at, rest.to(tl.int8), mask=inside)
  if MASTER_BITS == 32:
    tl.store(correction_ptr + at, rest.to(tl.int16), mask=inside)


@triton.jit
def _pick(leaves, index, LOW: tl.constexpr, COUNT: tl.constexpr):
  """``leaves[index - LOW]``, for an index from LOW on and COUNT leaves.

  A binary search, unrolled: only constants can index kernel arguments.
  """
  if COUNT == 1:
    (grad, param, correction, mu, mu_scale, nu, nu_scale, update) = leaves[0]
    leaf = (
      pin(grad, LOW),
      pin(param, LOW),
      pin(correction, LOW),
      pin(mu, LOW),
      pin(mu_scale, LOW),
      pin(nu, LOW),
      pin(nu_scale, LOW),
      pin(update, LOW),
    )
  else:
    HALF: tl.constexpr = COUNT // 2
    if index < LOW + HALF:
      leaf = _pick(leaves[:HALF], index, LOW, HALF)
    else:
      leaf = _pick(leaves[HALF:], index, LOW + HALF, COUNT - HALF)
  return leaf


@triton.jit
def update_leaves(
  scalars,
  layout,
  leaves,
  COUNT: tl.constexpr,
  WIDTH: tl.constexpr,
  ALIGNMENT: tl.constexpr,
  RULE: tl.constexpr,
  NESTEROV: tl.constexpr,
  DECAY: tl.constexpr,
  MASTER_BITS: tl.constexpr,
  COMPRESSED: tl.constexpr,
  EPS_ROOT: tl.constexpr,
  ROOT: tl.constexpr,
  NEW_PARAMS: tl.constexpr,
  GAPS: tl.constexpr,
  DITHER: tl.constexpr,
  BLOCK_GROUPS: tl.constexpr,
):
  """Updates one block of one of COUNT leaves, all of the same dtypes.

  Args:
    scalars: As for :func:`_update_groups`.
    layout: Pointer to five int32 numbers for each leaf: the index of its first block,
      its number of groups, its row length, and the scales and the gaps of its runs, as
      (5, WIDTH). Where leaves are parts of leaves, two more follow: a position in this
      array, and the length of the leaf's last axis. There is its first element's share
      of the threshold, bits of a uint32, or where it isn't in one piece, that of the
      first of each row.
    leaves: A tuple of COUNT tuples of pointers, in the order of ``ARRAYS``.
    COUNT: The number of leaves.
    WIDTH: COUNT, rounded up to a power of two.
    ALIGNMENT: As for :func:`_update_groups`, as are all that follow.
  """
  block = tl.program_id(0)
  first_blocks = tl.load(layout + tl.arange(0, WIDTH))
  index = tl.sum((first_blocks <= block).to(tl.int32), axis=0) - 1
  places = layout
  columns = 0
  if DITHER > 1:
    places += tl.load(layout + 5 * WIDTH + index)
    columns = tl.load(layout + 6 * WIDTH + index)
  _update_groups(
    scalars,
    _pick(leaves, index, 0, COUNT),
    places,
    columns,
    block - tl.load(layout + index),
    tl.load(layout + WIDTH + index),
    tl.load(layout + 2 * WIDTH + index),
    tl.load(layout + 3 * WIDTH + index),
    tl.load(layout + 4 * WIDTH + index),
    ALIGNMENT,
    RULE,
    NESTEROV,
    DECAY,
    MASTER_BITS,
    COMPRESSED,
    EPS_ROOT,
    ROOT,
    NEW_PARAMS,
    GAPS,
    DITHER,
    BLOCK_GROUPS,
  )
