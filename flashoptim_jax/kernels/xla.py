"""The fused update in plain jnp: runs on every backend, and is the reference."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

from flashoptim_jax import codec
from flashoptim_jax.kernels import Leaf, UpdatedLeaf
from flashoptim_jax.rules import Moment, Rule, Scalars
from flashoptim_jax.storage import Storage

# Below this size a leaf's temporaries stay in the caches of a CPU.
_OUTLINED_FROM = 1 << 16
# From this size on a leaf is updated alone on a GPU, and below it in batches.
_ALONE_FROM = 1 << 18
_MOST_LEAVES = 32


class _Config(NamedTuple):
  """What is static about a leaf's update."""

  rule: Rule
  storage: Storage
  decay: bool
  new_params: bool


class _Arrays(NamedTuple):
  """What a leaf's update reads; see :class:`flashoptim_jax.kernels.Leaf`."""

  grad: jax.Array
  param: jax.Array
  correction: jax.Array | None
  moments: tuple[tuple[jax.Array, jax.Array | None], ...]


class _Scaled(NamedTuple):
  """What the second pass over a leaf reads.

  Attributes:
    arrays: What the first pass read.
    scales: The new scale of each moment; None where the moment is float32.
    encode_factors: :func:`flashoptim_jax.codec.encode_factor` of each exact scale.
  """

  arrays: _Arrays
  scales: tuple[jax.Array | None, ...]
  encode_factors: tuple[jax.Array | None, ...]


def update(
    rule: Rule,
    storage: Storage,
    leaves: Sequence[Leaf],
    scalars: Scalars,
    new_params: bool,
) -> list[UpdatedLeaf]:
  """Updates leaves; see :func:`flashoptim_jax.kernels.update_leaves`."""
  batches: dict[Any, list[int]] = {}
  for i, leaf in enumerate(leaves):
    batches.setdefault(_batch_key(leaf, storage) or i, []).append(i)
  updated: dict[int, UpdatedLeaf] = {}
  for members in batches.values():
    config = _Config(rule, storage, leaves[members[0]].decay, new_params)
    for start in range(0, len(members), _MOST_LEAVES):
      batch = members[start : start + _MOST_LEAVES]
      arrays = [_arrays(leaves[i]) for i in batch]
      results = (
          _update_batch(config, arrays, scalars)
          if len(batch) > 1
          else [_update_alone(config, arrays[0], scalars)]
      )
      updated.update(zip(batch, results, strict=True))
  return [updated[i] for i in range(len(leaves))]


def _arrays(leaf: Leaf) -> _Arrays:
  return _Arrays(leaf.grad, leaf.param, leaf.correction, leaf.moments)


def _batch_key(leaf: Leaf, storage: Storage) -> Any:
  """Leaves of equal keys can be updated in one batch, those of none alone.

  On a GPU the kernels of a small leaf take longer to launch than to run.
  """
  shape = leaf.param.shape
  if jax.default_backend() != "gpu" or not 0 < leaf.param.size < _ALONE_FROM:
    return None
  if storage.moment_bits == 8 and (not shape or shape[-1] % storage.group_size):
    return None
  return leaf.decay, *(array.dtype for array in jax.tree.leaves(_arrays(leaf)))


def _update_batch(
    config: _Config, leaves: Sequence[_Arrays], scalars: Scalars
) -> list[UpdatedLeaf]:
  """Updates leaves without partial groups, as rows of one array.

  They part before the second pass, of which XLA makes one kernel for all leaves of a
  shape. Parted after it, each of their arrays would be copied by a kernel of its own.
  """
  compressed = config.storage.moment_bits == 8
  row = config.storage.group_size if compressed else 1
  rows = [leaf.param.size // row for leaf in leaves]
  flat = [
      jax.tree.map(lambda array, n=n: array.reshape(n, -1), leaf)
      for leaf, n in zip(leaves, rows, strict=True)
  ]
  joined = jax.tree.map(lambda *arrays: lax.concatenate(arrays, 0), *flat)
  arrays, treedef = jax.tree.flatten(_first_pass(config, joined, scalars))
  parts = zip(*(lax.split(array, rows) for array in arrays), strict=True)
  return [
      jax.tree.map(
          lambda old, new: new.reshape(old.shape),
          UpdatedLeaf(*leaf[1:]),
          _second_pass(config, jax.tree.unflatten(treedef, part), scalars),
      )
      for leaf, part in zip(leaves, parts, strict=True)
  ]


def _update_alone(
    config: _Config, arrays: _Arrays, scalars: Scalars
) -> UpdatedLeaf:
  large = arrays.param.size >= _OUTLINED_FROM and config.storage.moment_bits == 8
  if not large or jax.default_backend() != "cpu" or jax.device_count() > 1:
    return _update(config, arrays, scalars)
  return lax.platform_dependent(
      arrays,
      scalars,
      cpu=functools.partial(_update_by_output, config),
      default=functools.partial(_update, config),
  )


def _update(config: _Config, arrays: _Arrays, scalars: Scalars) -> UpdatedLeaf:
  """In two passes: first the new scales, then everything else."""
  return _second_pass(config, _first_pass(config, arrays, scalars), scalars)


def _first_pass(config: _Config, arrays: _Arrays, scalars: Scalars) -> _Scaled:
  if config.storage.moment_bits == 32:
    nothing = (None,) * len(arrays.moments)
    return _Scaled(arrays, nothing, nothing)
  moments = tuple(zip(config.rule.moments, arrays.moments, strict=True))
  exact = [
      _scale_pass(config, moment, arrays.grad, stored, scalars)
      for moment, stored in moments
  ]
  factors = tuple(
      codec.encode_factor(scale, moment.kind, config.storage)
      for (moment, _), scale in zip(moments, exact, strict=True)
  )
  # Without it a GPU keeps what the passes share in memory, or fuses them into
  # a kernel with poor access patterns: 4.9 ms in place of 1.7 for 268 M
  # parameters on an H100.
  arrays, factors = lax.optimization_barrier((arrays, factors))
  scales = tuple(_rounded(scale, scalars) for scale in exact)
  return _Scaled(arrays, scales, factors)


def _second_pass(
    config: _Config, scaled: _Scaled, scalars: Scalars
) -> UpdatedLeaf:
  arrays = scaled.arrays
  master = _master(config, arrays, scalars)
  result, correction = codec.store(
      master,
      arrays.param,
      None if config.new_params else arrays.grad.dtype,
      config.storage.master_bits,
  )
  moments: list[tuple[jax.Array, jax.Array | None]] = []
  for moment, stored, scale, factor in zip(
      config.rule.moments,
      arrays.moments,
      scaled.scales,
      scaled.encode_factors,
      strict=True,
  ):
    new = _moment(config, moment, arrays.grad, stored, scalars)
    if factor is not None:
      new = _encoded(config, moment, new, factor, scalars)
    moments.append((new, scale))
  return UpdatedLeaf(result, correction, tuple(moments))


def _update_by_output(
    config: _Config, arrays: _Arrays, scalars: Scalars
) -> UpdatedLeaf:
  """The same in one pass per output, each from the stored arrays.

  On a CPU, XLA fuses into loops with one output and keeps what two of them
  share in memory, in float32. Computing it again is twice as fast and takes no
  such temporaries. Passes come in an order in which they can write in place. On
  one device alone: XLA does not partition across the calls for free.
  """
  moments = tuple(zip(config.rule.moments, arrays.moments, strict=True))
  scales = [
      _outlined(_scale_pass, (config, moment), arrays.grad, stored, scalars)
      for moment, stored in moments
  ]
  if config.new_params:
    correction = _outlined(_correction_pass, (config,), arrays, scalars)
    result = _outlined(_param_pass, (config,), arrays, scalars, correction)
  else:
    result = _outlined(_difference_pass, (config,), arrays, scalars)
    correction = _outlined(_residual_pass, (config,), arrays, scalars, result)
  last = result if config.new_params or correction is None else correction
  zero = _zero_after(last)
  codes = [
      _outlined(
          _codes_pass,
          (config, moment),
          arrays.grad,
          stored,
          scalars,
          scale,
          zero,
      )
      for (moment, stored), scale in zip(moments, scales, strict=True)
  ]
  rounded = [_rounded(scale, scalars) for scale in scales]
  return UpdatedLeaf(
      result, correction, tuple(zip(codes, rounded, strict=True))
  )


def _scale_pass(config, moment, grad, stored, scalars):
  new = _moment(config, moment, grad, stored, scalars)
  return codec.exact_scale(new, moment.kind, config.storage)


def _encoded(config, moment, new, factor, scalars):
  rounding = scalars["code_rounding"]
  return codec.encode_codes(new, factor, moment.kind, config.storage, rounding)


def _rounded(scale: jax.Array, scalars: Scalars) -> jax.Array:
  rounded = codec.round_scale(scale, scalars["scale_rounding"])
  return rounded.astype(codec.SCALE_DTYPE)


def _correction_pass(config, arrays, scalars):
  master = _master(config, arrays, scalars)
  bits = config.storage.master_bits
  return codec.split_correction(master, arrays.param.dtype, bits)


def _param_pass(config, arrays, scalars, correction):
  master = _master(config, arrays, scalars)
  return codec.split_param(master, correction, arrays.param.dtype)


def _difference_pass(config, arrays, scalars):
  """The update that takes the parameter to its new value."""
  master = _master(config, arrays, scalars)
  bits = config.storage.master_bits
  return codec.difference(master, arrays.param, arrays.grad.dtype, bits)


def _residual_pass(config, arrays, scalars, result):
  master = _master(config, arrays, scalars)
  bits = config.storage.master_bits
  return codec.residual_of_update(master, arrays.param, result, bits)


def _codes_pass(config, moment, grad, stored, scalars, scale, zero):
  # Adding zero makes this pass wait for the array that zero was taken from.
  codes, old_scale = stored
  stored = (codes + zero.astype(codes.dtype), old_scale)
  new = _moment(config, moment, grad, stored, scalars)
  factor = codec.encode_factor(scale, moment.kind, config.storage)
  return _encoded(config, moment, new, factor, scalars)


def _zero_after(array: jax.Array) -> jax.Array:
  """A zero that XLA must wait for ``array`` to know."""
  element = lax.slice(array, (0,) * array.ndim, (1,) * array.ndim).reshape(())
  width = jnp.dtype(f"uint{8 * element.dtype.itemsize}")
  bits = lax.bitcast_convert_type(element, width).astype(jnp.uint32) & 0xFFFF
  return lax.shift_right_logical(bits, jnp.uint32(16))


def _outlined(f: Callable, static: tuple[Any, ...], *operands: Any) -> Any:
  """Calls ``f`` in a way that XLA neither inlines nor fuses across."""
  with set_xla_metadata(inlineable="false"):
    return _jitted(f, static)(*operands)


@functools.cache
def _jitted(f: Callable, static: tuple[Any, ...]) -> Callable:
  return jax.jit(functools.partial(f, *static))


def _decoded(config: _Config, moment: Moment, stored) -> jax.Array:
  values, scale = stored
  if scale is None:
    return values
  return codec.decode(values, scale, moment.kind, config.storage)


def _moment(config, moment: Moment, grad, stored, scalars) -> jax.Array:
  """A moment's new value, float32."""
  old = _decoded(config, moment, stored)
  return moment.update(grad.astype(jnp.float32), old, _as_float32(scalars))


def _master(config: _Config, arrays: _Arrays, scalars: Scalars) -> jax.Array:
  """The new master weights, float32 or float64."""
  h = _as_float32(scalars)
  grad = arrays.grad.astype(jnp.float32)
  pairs = list(zip(config.rule.moments, arrays.moments, strict=True))
  old = [_decoded(config, moment, stored) for moment, stored in pairs]
  new = [
      moment.update(grad, value, h)
      for (moment, _), value in zip(pairs, old, strict=True)
  ]
  direction = config.rule.direction(grad, old, new, h)

  master = codec.merge(arrays.param, arrays.correction)
  direction = direction.astype(master.dtype)
  if config.decay:
    direction = direction + _like(scalars["weight_decay"], master) * master
  return master + -_like(scalars["learning_rate"], master) * direction


def _as_float32(scalars: Scalars) -> Scalars:
  # Python numbers stay weakly typed, for the sake of float64 masters.
  return {
      name: value.astype(jnp.float32) if hasattr(value, "astype") else value
      for name, value in scalars.items()
  }


def _like(value, master: jax.Array):
  return value.astype(master.dtype) if hasattr(value, "astype") else value
