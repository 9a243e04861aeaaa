"""The fused update in plain jnp: runs on every backend, and is the reference."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

from flashoptim_jax.kernels import Leaf, UpdatedLeaf, merging
from flashoptim_jax.kernels.by_platform import Place
from flashoptim_jax.rules import LEAST_ROOT, Moment, Rule, Scalars
from flashoptim_jax.storage import codec
from flashoptim_jax.storage.options import Storage

# Below this size a leaf's temporaries stay in the caches of a CPU.
_OUTLINED_FROM = 1 << 16
# On a GPU, leaves with fewer parameters are joined, at most so many of them: XLA
# splits concatenations of more arrays.
_JOINED_BELOW = 1 << 16
_MOST_JOINED = 128
# Of the others, those of one size share kernels: at most so many leaves and
# parameters, which stay in the cache between two passes.
_MOST_SHARING = 4
_MOST_CACHED = 1 << 22


class _Config(NamedTuple):
  """What is static about a leaf's update.

  Attributes:
    quantized: Whether moments are codes and scales.
    gpu: Whether it runs on a GPU.
  """

  rule: Rule
  storage: Storage
  quantized: bool
  decay: bool
  new_params: bool
  gpu: bool


class _Arrays(NamedTuple):
  """What a leaf's update reads; see :class:`flashoptim_jax.kernels.Leaf`."""

  grad: jax.Array
  param: jax.Array
  correction: jax.Array | None
  moments: tuple[tuple[jax.Array, jax.Array | None], ...]


def update(
    rule: Rule,
    storage: Storage,
    leaves: Sequence[Leaf],
    scalars: Scalars,
    new_params: bool,
    place: Place,
) -> list[UpdatedLeaf]:
  """Updates leaves; see :func:`flashoptim_jax.kernels.update_leaves`.

  Where the update runs decides in which passes, but not what comes of it.
  """
  gpu = place.platform == "gpu"
  configs = [
      _Config(rule, storage, leaf.quantized, leaf.decay, new_params, gpu)
      for leaf in leaves
  ]
  if gpu:
    return _update_in_batches(configs, leaves, scalars)
  one_cpu = place.platform == "cpu" and place.devices == 1
  return [
      _update_alone(config, _arrays(leaf), scalars, one_cpu)
      for config, leaf in zip(configs, leaves, strict=True)
  ]


def _arrays(leaf: Leaf) -> _Arrays:
  return _Arrays(leaf.grad, leaf.param, leaf.correction, leaf.moments)


def _update_alone(
    config: _Config, leaf: _Arrays, scalars: Scalars, one_cpu: bool
) -> UpdatedLeaf:
  if one_cpu and config.quantized and leaf.param.size >= _OUTLINED_FROM:
    return _update_by_output(config, leaf, scalars)
  (updated,) = _update(config, [leaf], scalars)
  return updated


def _update_in_batches(
    configs: Sequence[_Config], leaves: Sequence[Leaf], scalars: Scalars
) -> list[UpdatedLeaf]:
  """For GPUs, on which small kernels take long to launch."""
  scalars = {
      name: merging.shared(value) if name.endswith("_scale_rounding") else value
      for name, value in scalars.items()
  }
  updated: dict[int, UpdatedLeaf] = {}
  last: list[int] = []
  for batch in _batches(configs, leaves):
    arrays = [_arrays(leaves[i]) for i in batch]
    # One after the other: XLA would do the first pass of all, and the second would
    # no longer find in the cache what the first has read.
    arrays, results = lax.optimization_barrier((arrays, [updated[i] for i in last]))
    updated.update(zip(last, results, strict=True))
    results = _update_batch(configs[batch[0]], arrays, scalars)
    updated.update(zip(batch, results, strict=True))
    last = batch
  return [updated[i] for i in range(len(leaves))]


def _batches(
    configs: Sequence[_Config], leaves: Sequence[Leaf]
) -> Iterator[list[int]]:
  """Indices of leaves that are updated together.

  They are of equal dtypes, and of one size or to be joined.
  """
  alike: dict[Any, list[int]] = {}
  for i, (config, leaf) in enumerate(zip(configs, leaves, strict=True)):
    dtypes = (array.dtype for array in jax.tree.leaves(_arrays(leaf)))
    kind = "joined" if _can_join(config, leaf.param) else leaf.param.size
    alike.setdefault((kind, config, *dtypes), []).append(i)
  for (kind, *_), members in alike.items():
    if kind == "joined":
      # Neighbours have one shape, for XLA to make one kernel that parts them.
      members.sort(key=lambda i: merging.by_size(leaves[i]))
      most = _MOST_JOINED
    else:
      size = leaves[members[0]].param.size
      most = max(1, min(_MOST_SHARING, _MOST_CACHED // max(1, size)))
    for start in range(0, len(members), most):
      yield members[start : start + most]


def _can_join(config: _Config, param: jax.Array) -> bool:
  """Whether a leaf is small and has no partial group."""
  if not 0 < param.size < _JOINED_BELOW:
    return False
  whole = bool(param.ndim) and param.shape[-1] % config.storage.group_size == 0
  return whole or not config.quantized


def _update_batch(
    config: _Config, leaves: Sequence[_Arrays], scalars: Scalars
) -> list[UpdatedLeaf]:
  if len(leaves) == 1 or not _can_join(config, leaves[0].param):
    return _update(config, leaves, scalars)
  (joined,) = _update(config, [_join(leaves)], scalars)
  # Without the barrier, the second pass would be repeated in the kernels that part it.
  parts = _part(lax.optimization_barrier(joined), leaves)
  return merging.mergeable(parts)


def _update(
    config: _Config, leaves: Sequence[_Arrays], scalars: Scalars
) -> list[UpdatedLeaf]:
  """In two passes: first the new scales, then everything else."""
  if not config.quantized:
    return [
        _second_pass(config, leaf, (None,) * len(config.rule.moments), scalars)
        for leaf in _sharing_kernels(leaves)
    ]
  largest = [
      _first_pass(config, leaf, scalars) for leaf in _sharing_kernels(leaves)
  ]
  # Without it a GPU keeps what the passes share in memory, or fuses them into
  # a kernel with poor access patterns: 4.9 ms in place of 1.7 for 268 M
  # parameters on an H100.
  leaves, largest = lax.optimization_barrier((leaves, largest))
  updated = [
      _second_pass(
          config, leaf, _encode_factors(config, leaf, groups, scalars), scalars
      )
      for leaf, groups in zip(_sharing_kernels(leaves), largest, strict=True)
  ]
  # The old scales have been read when the codes are there. XLA would copy them if new
  # ones could take their place before.
  codes = [leaf.moments for leaf in updated]
  codes, largest = lax.optimization_barrier((codes, largest))
  return [
      leaf._replace(moments=_with_scales(config, values, groups, scalars))
      for leaf, values, groups in zip(updated, codes, largest, strict=True)
  ]


def _sharing_kernels(leaves: Sequence[_Arrays]) -> Sequence[_Arrays]:
  """Lets XLA make one kernel of a pass over leaves of one size.

  For each pass anew: between the passes, gradients must not be kept in memory.
  """
  if len(leaves) == 1:
    return leaves
  grads = merging.mergeable([leaf.grad for leaf in leaves])
  return [
      leaf._replace(grad=grad) for leaf, grad in zip(leaves, grads, strict=True)
  ]


def _join(leaves: Sequence[_Arrays]) -> _Arrays:
  """Leaves as one, of flat arrays."""
  return jax.tree.map(
      lambda *arrays: lax.concatenate([array.reshape(-1) for array in arrays], 0),
      *leaves,
  )


def _part(joined: UpdatedLeaf, leaves: Sequence[_Arrays]) -> list[UpdatedLeaf]:
  """The reverse of :func:`_join`, for what comes of an update."""
  parts = [UpdatedLeaf(leaf.param, leaf.correction, leaf.moments) for leaf in leaves]
  columns = [
      [
          part.reshape(like.shape)
          for part, like in zip(
              lax.split(array, [like.size for like in column]), column, strict=True
          )
      ]
      for array, *column in zip(
          jax.tree.leaves(joined), *map(jax.tree.leaves, parts), strict=True
      )
  ]
  treedef = jax.tree.structure(joined)
  return [jax.tree.unflatten(treedef, leaf) for leaf in zip(*columns, strict=True)]


def _first_pass(
    config: _Config, leaf: _Arrays, scalars: Scalars
) -> list[jax.Array]:
  """Each moment's largest magnitude in each group."""
  largest = []
  for moment, stored in zip(config.rule.moments, leaf.moments, strict=True):
    new = _moment(config, moment, leaf.grad, stored, scalars)
    if config.gpu:
      # A reduction of partial groups of their own would be fused into what puts both
      # together, where it is slow. On a CPU padding is slower.
      axis = codec.group_axis(new.shape, config.storage.group_size)
      new = codec.with_whole_groups(new, axis, config.storage.group_size)
    _, scale = stored
    largest.append(
        codec.group_largest(new, moment.kind, config.storage.group_size, scale)
    )
  return largest


def _encode_factors(
    config: _Config, leaf: _Arrays, largest: Sequence[jax.Array], scalars: Scalars
) -> list[jax.Array]:
  shape = leaf.param.shape
  if config.gpu and leaf.param.size <= _MOST_CACHED:
    # Each element computes its group's, which takes less than a kernel more.
    largest = [codec.group_expand(x, shape, config.storage) for x in largest]
  return [
      _encode_factor(config, moment, codec.scale_of_largest(x, moment.kind), scalars)
      for moment, x in zip(config.rule.moments, largest, strict=True)
  ]


def _with_scales(config, moments, largest, scalars):
  """Moments with their new scales, given their groups' largest magnitudes."""
  return tuple(
      (codes, _rounded(moment, codec.scale_of_largest(groups, moment.kind), scalars))
      for moment, (codes, _), groups in zip(
          config.rule.moments, moments, largest, strict=True
      )
  )


def _second_pass(
    config: _Config,
    arrays: _Arrays,
    encode_factors: Sequence[jax.Array | None],
    scalars: Scalars,
) -> UpdatedLeaf:
  """Everything but the new scales."""
  result, correction = codec.store(
      _master(config, arrays, scalars),
      arrays.param,
      None if config.new_params else arrays.grad.dtype,
      config.storage.master_bits,
  )
  moments = []
  for moment, stored, factor in zip(
      config.rule.moments, arrays.moments, encode_factors, strict=True
  ):
    new = _moment(config, moment, arrays.grad, stored, scalars)
    if factor is not None:
      new = _encoded(config, moment, new, factor, scalars)
    moments.append((new, None))
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
  rounded = [
      _rounded(moment, scale, scalars)
      for (moment, _), scale in zip(moments, scales, strict=True)
  ]
  return UpdatedLeaf(
      result, correction, tuple(zip(codes, rounded, strict=True))
  )


def _scale_pass(config, moment, grad, stored, scalars):
  new = _moment(config, moment, grad, stored, scalars)
  _, scale = stored
  return codec.exact_scale(new, moment.kind, config.storage, scale)


def _encode_factor(config, moment, scale, scalars):
  slack = codec.moment_rounding(scalars, moment.kind).slack
  return codec.encode_factor(scale, moment.kind, config.storage, slack)


def _encoded(config, moment, new, factor, scalars):
  rounding = codec.moment_rounding(scalars, moment.kind).code
  return codec.encode_codes(new, factor, moment.kind, config.storage, rounding)


def _rounded(moment: Moment, scale: jax.Array, scalars: Scalars) -> jax.Array:
  rounding = codec.moment_rounding(scalars, moment.kind).scale
  return codec.round_scale(scale, rounding).astype(codec.SCALE_DTYPE)


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
  factor = _encode_factor(config, moment, scale, scalars)
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
  if not config.quantized:
    h = {name: value for name, value in h.items() if name != LEAST_ROOT}
  grad = arrays.grad.astype(jnp.float32)
  pairs = list(zip(config.rule.moments, arrays.moments, strict=True))
  old = [_decoded(config, moment, stored) for moment, stored in pairs]
  new = [_moment(config, moment, grad, stored, scalars) for moment, stored in pairs]
  direction = config.rule.direction(grad, old, new, h)

  master = codec.merge(arrays.param, arrays.correction)
  direction = direction.astype(master.dtype)
  if config.decay:
    direction = direction + _like(scalars["weight_decay"], master) * master
  step = -_like(scalars["learning_rate"], master) * direction
  threshold = scalars["master_rounding"]
  return codec.advance(arrays.param, arrays.correction, step, threshold)


def _as_float32(scalars: Scalars) -> Scalars:
  # Python numbers stay weakly typed, for the sake of float64 masters.
  return {
      name: value.astype(jnp.float32) if hasattr(value, "astype") else value
      for name, value in scalars.items()
  }


def _like(value, master: jax.Array):
  return value.astype(master.dtype) if hasattr(value, "astype") else value
