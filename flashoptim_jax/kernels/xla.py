"""The fused update in plain jnp: runs on every backend, and is the reference."""

import bisect
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

from flashoptim_jax import codec
from flashoptim_jax.kernels import Leaf, UpdatedLeaf, merging
from flashoptim_jax.rules import Moment, Rule, Scalars
from flashoptim_jax.storage import Storage

# Below this size a leaf's temporaries stay in the caches of a CPU.
_OUTLINED_FROM = 1 << 16
# On a GPU leaves are updated in batches of at most so many leaves and parameters.
_MOST_LEAVES = 128
_MOST_PARAMS = 1 << 26
# Leaves of a batch with fewer parameters are joined.
_JOINED_BELOW = 1 << 16
# Leaves of a batch with fewer parameters share kernels, if they have one shape.
_MERGED_BELOW = 1 << 19


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


class _Batch(NamedTuple):
  """Indices of leaves that are updated together.

  Attributes:
    others: Those that keep arrays of their own.
    joined: Those whose arrays become parts of one.
  """

  others: list[int]
  joined: list[int]


def update(
    rule: Rule,
    storage: Storage,
    leaves: Sequence[Leaf],
    scalars: Scalars,
    new_params: bool,
) -> list[UpdatedLeaf]:
  """Updates leaves; see :func:`flashoptim_jax.kernels.update_leaves`."""
  updated: dict[int, UpdatedLeaf] = {}
  for others, joined in _batches(leaves, storage):
    members = others + joined
    config = _Config(rule, storage, leaves[members[0]].decay, new_params)
    results = _update_batch(
        config,
        [_arrays(leaves[i]) for i in others],
        [_arrays(leaves[i]) for i in joined],
        scalars,
    )
    updated.update(zip(members, results, strict=True))
  return [updated[i] for i in range(len(leaves))]


def _arrays(leaf: Leaf) -> _Arrays:
  return _Arrays(leaf.grad, leaf.param, leaf.correction, leaf.moments)


def _batches(leaves: Sequence[Leaf], storage: Storage) -> Iterator[_Batch]:
  """Each leaf alone; on a GPU several, as small kernels take long to launch."""
  if jax.default_backend() != "gpu":
    yield from (_Batch([i], []) for i in range(len(leaves)))
    return
  alike: dict[Any, list[int]] = {}
  for i, leaf in enumerate(leaves):
    dtypes = (array.dtype for array in jax.tree.leaves(_arrays(leaf)))
    empty = None if leaf.param.size else i
    alike.setdefault((empty, leaf.decay, *dtypes), []).append(i)
  for members in alike.values():
    # Neighbours have one shape, for XLA to make one kernel for them.
    rest = sorted(members, key=lambda i: merging.by_size(leaves[i]))
    while rest:
      sizes = itertools.accumulate(leaves[i].param.size for i in rest[:_MOST_LEAVES])
      fitting = bisect.bisect(list(sizes), _MOST_PARAMS) or 1
      batch, rest = rest[:fitting], rest[fitting:]
      joined = [i for i in batch if _can_join(leaves[i].param, storage)]
      yield _Batch([i for i in batch if i not in joined], joined)


def _can_join(param: jax.Array, storage: Storage) -> bool:
  """Whether a leaf is small and has no partial group."""
  if param.size >= _JOINED_BELOW:
    return False
  whole = bool(param.ndim) and param.shape[-1] % storage.group_size == 0
  return whole or storage.moment_bits == 32


def _update_batch(
    config: _Config,
    others: Sequence[_Arrays],
    joined: Sequence[_Arrays],
    scalars: Scalars,
) -> list[UpdatedLeaf]:
  if jax.default_backend() == "cpu" and jax.device_count() == 1:
    (leaf,) = others
    if leaf.param.size >= _OUTLINED_FROM and config.storage.moment_bits == 8:
      return lax.platform_dependent(
          leaf,
          scalars,
          cpu=lambda *args: [_update_by_output(config, *args)],
          default=lambda leaf, scalars: _update(config, [leaf], [], scalars),
      )
  return _update(config, others, joined, scalars)


def _update(
    config: _Config,
    others: Sequence[_Arrays],
    joined: Sequence[_Arrays],
    scalars: Scalars,
) -> list[UpdatedLeaf]:
  """In two passes: first the new scales, then everything else.

  Work on scales is done for all leaves in one array.
  """
  units = [*others, *([_join(joined)] if joined else [])]
  if config.storage.moment_bits == 32:
    factors: tuple[Any, ...] = (None,) * len(config.rule.moments)
  else:
    largest = _first_pass(config, _sharing_kernels(units), scalars)
    factors = tuple(
        codec.encode_factor(scale, moment.kind, config.storage)
        for scale, moment in zip(
            _exact_scales(config, largest), config.rule.moments, strict=True
        )
    )
    # Without it a GPU keeps what the passes share in memory, or fuses them into
    # a kernel with poor access patterns: 4.9 ms in place of 1.7 for 268 M
    # parameters on an H100.
    units, factors = lax.optimization_barrier((units, factors))
  updated = [
      _second_pass(config, unit, unit_factors, scalars)
      for unit, unit_factors in zip(
          _sharing_kernels(units), _part(factors, _scales(units)), strict=True
      )
  ]
  if len(joined) > 1:
    # Without the barrier, the pass would be repeated in the kernels that part it.
    together = lax.optimization_barrier(updated.pop())
    parts = _part(together, [_results(leaf) for leaf in joined])
    updated += merging.mergeable(parts, _MERGED_BELOW)
  if config.storage.moment_bits == 32:
    return updated
  # The old scales have been read when the codes are there. XLA would copy them if new
  # ones could take their place before.
  codes = [tuple(values for values, _ in leaf.moments) for leaf in updated]
  codes, largest = lax.optimization_barrier((codes, largest))
  rounding = scalars["scale_rounding"]
  if len(updated) > 1:
    rounding = merging.shared(rounding)
  new_scales = [
      [_rounded(scale, rounding) for scale in _exact_scales(config, parts)]
      for parts in _part(largest, _scales([*others, *joined]))
  ]
  return [
      leaf._replace(moments=tuple(zip(values, rounded, strict=True)))
      for leaf, values, rounded in zip(updated, codes, new_scales, strict=True)
  ]


def _sharing_kernels(units: Sequence[_Arrays]) -> Sequence[_Arrays]:
  """Lets XLA make one kernel of a pass over small units of one shape.

  For each pass anew: between the passes, gradients must not be kept in memory.
  """
  if len(units) == 1:
    return units
  grads = merging.mergeable([unit.grad for unit in units], _MERGED_BELOW)
  return [
      unit._replace(grad=grad) for unit, grad in zip(units, grads, strict=True)
  ]


def _scales(leaves: Sequence[_Arrays]) -> list[tuple[jax.Array | None, ...]]:
  return [tuple(scale for _, scale in leaf.moments) for leaf in leaves]


def _results(leaf: _Arrays) -> UpdatedLeaf:
  """Arrays of the shapes of what the second pass gives for a leaf."""
  moments = tuple((values, None) for values, _ in leaf.moments)
  return UpdatedLeaf(leaf.param, leaf.correction, moments)


def _join(trees: Sequence[Any]) -> Any:
  """Trees of arrays as one tree of flat arrays; a single tree as it is."""
  if len(trees) == 1:
    return trees[0]
  return jax.tree.map(
      lambda *arrays: lax.concatenate([array.reshape(-1) for array in arrays], 0),
      *trees,
  )


def _part(joined: Any, trees: Sequence[Any]) -> list[Any]:
  """The reverse of :func:`_join`: gives trees of the shapes of ``trees``."""
  if len(trees) == 1:
    return [joined]
  arrays, treedef = jax.tree.flatten(joined)
  columns = zip(*map(jax.tree.leaves, trees), strict=True)
  parted = [
      [
          part.reshape(like.shape)
          for part, like in zip(
              lax.split(array, [like.size for like in column]), column, strict=True
          )
      ]
      for array, column in zip(arrays, columns, strict=True)
  ]
  return [
      jax.tree.unflatten(treedef, [parts[i] for parts in parted])
      for i in range(len(trees))
  ]


def _first_pass(
    config: _Config, units: Sequence[_Arrays], scalars: Scalars
) -> tuple[jax.Array, ...]:
  """Each moment's largest magnitude in each group, of all units in one array."""
  largest = [
      tuple(
          codec.group_max(
              _moment(config, moment, unit.grad, stored, scalars),
              config.storage.group_size,
          )
          for moment, stored in zip(config.rule.moments, unit.moments, strict=True)
      )
      for unit in units
  ]
  if len(units) > 1:
    # Fused into what joins them, reductions are many times slower on a GPU.
    largest = lax.optimization_barrier(largest)
  return _join(largest)


def _exact_scales(
    config: _Config, largest: Sequence[jax.Array]
) -> tuple[jax.Array, ...]:
  return tuple(
      codec.scale_of_largest(x, moment.kind)
      for x, moment in zip(largest, config.rule.moments, strict=True)
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
  rounded = [_rounded(scale, scalars["scale_rounding"]) for scale in scales]
  return UpdatedLeaf(
      result, correction, tuple(zip(codes, rounded, strict=True))
  )


def _scale_pass(config, moment, grad, stored, scalars):
  new = _moment(config, moment, grad, stored, scalars)
  return codec.exact_scale(new, moment.kind, config.storage)


def _encoded(config, moment, new, factor, scalars):
  rounding = scalars["code_rounding"]
  return codec.encode_codes(new, factor, moment.kind, config.storage, rounding)


def _rounded(scale: jax.Array, rounding: jax.Array | int) -> jax.Array:
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
