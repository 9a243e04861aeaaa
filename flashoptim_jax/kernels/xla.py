"""The fused update in plain jnp: runs on every backend, and is the reference."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

from flashoptim_jax.kernels import gaps, xla_fusion
from flashoptim_jax.kernels.base import Leaf, Unavailable, UpdatedLeaf, UpdateSpec
from flashoptim_jax.kernels.by_platform import Place
from flashoptim_jax.rules import LEAST_ROOT, Moment, Scalars
from flashoptim_jax.storage import codec

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


def unavailable(place: Place) -> Unavailable | None:
  """None: it runs everywhere."""
  del place
  return None


def unsupported(leaf: Leaf, spec: UpdateSpec) -> str | None:
  """None: it updates every leaf."""
  del leaf, spec
  return None


def is_faster(leaf: Leaf) -> bool:
  """Whether it is the faster choice for a leaf."""
  del leaf
  return False


def update(
  spec: UpdateSpec, leaves: Sequence[Leaf], scalars: Scalars, place: Place
) -> list[UpdatedLeaf]:
  """Updates leaves; see :class:`flashoptim_jax.kernels.base.Backend`.

  Where the update runs decides in which passes, but not what comes of it.
  """
  # Leaves that differ in their names alone are treated alike.
  leaves = [leaf.replace(path="") for leaf in leaves]
  if place.platform == "gpu":
    return _update_in_batches(spec, leaves, scalars)
  one_cpu = place.platform == "cpu" and place.devices == 1
  return [_update_alone(spec, leaf, scalars, one_cpu) for leaf in leaves]


def _update_alone(
  spec: UpdateSpec, leaf: Leaf, scalars: Scalars, one_cpu: bool
) -> UpdatedLeaf:
  bare = gaps.without_gaps(leaf, spec.storage.group_size)
  if one_cpu and leaf.quantized and leaf.param.size >= _OUTLINED_FROM:
    updated = _update_by_output(spec, bare, scalars)
  else:
    (updated,) = _update(spec, [bare], scalars, gpu=False)
  return gaps.with_gaps(updated, leaf, spec.storage.group_size)


def _update_in_batches(
  spec: UpdateSpec, leaves: Sequence[Leaf], scalars: Scalars
) -> list[UpdatedLeaf]:
  """For GPUs, on which small kernels take long to launch."""
  scalars = {
    name: xla_fusion.shared(value) if name.endswith("_scale_rounding") else value
    for name, value in scalars.items()
  }
  updated: dict[int, UpdatedLeaf] = {}
  last: list[int] = []
  for batch in _batches(spec, leaves):
    members = [leaves[i] for i in batch]
    # One after the other: XLA would do the first pass of all, and the second would
    # no longer find in the cache what the first has read.
    members, results = lax.optimization_barrier((members, [updated[i] for i in last]))
    updated.update(zip(last, results, strict=True))
    results = _update_batch(spec, members, scalars)
    updated.update(zip(batch, results, strict=True))
    last = batch
  return [updated[i] for i in range(len(leaves))]


def _batches(spec: UpdateSpec, leaves: Sequence[Leaf]) -> Iterator[list[int]]:
  """Indices of leaves that are updated together.

  They are of equal dtypes, and of one size or to be joined.
  """
  alike: dict[Any, list[int]] = {}
  for i, leaf in enumerate(leaves):
    arrays, treedef = jax.tree.flatten(leaf)
    kind = "joined" if _can_join(spec, leaf) else leaf.param.size
    alike.setdefault((kind, treedef, *(x.dtype for x in arrays)), []).append(i)
  for (kind, *_), members in alike.items():
    if kind == "joined":
      # Neighbours have one shape, for XLA to make one kernel that parts them.
      members.sort(key=lambda i: xla_fusion.by_size(leaves[i]))
      most = _MOST_JOINED
    else:
      size = leaves[members[0]].param.size
      most = max(1, min(_MOST_SHARING, _MOST_CACHED // max(1, size)))
    for start in range(0, len(members), most):
      yield members[start : start + most]


def _can_join(spec: UpdateSpec, leaf: Leaf) -> bool:
  """Whether a leaf is small and has no partial group."""
  param = leaf.param
  if not 0 < param.size < _JOINED_BELOW:
    return False
  whole = bool(param.ndim) and param.shape[-1] % spec.storage.group_size == 0
  return leaf.origin is None and (whole or not leaf.quantized)


def _update_batch(
  spec: UpdateSpec, leaves: Sequence[Leaf], scalars: Scalars
) -> list[UpdatedLeaf]:
  size = spec.storage.group_size
  bare = [gaps.without_gaps(leaf, size) for leaf in leaves]
  join = len(leaves) > 1 and _can_join(spec, leaves[0])
  if join:
    (joined,) = _update(spec, [_join(bare)], scalars, gpu=True)
    # Without the barrier, the second pass would be repeated in the kernels that part
    # it.
    updated = _part(lax.optimization_barrier(joined), bare)
  else:
    updated = _update(spec, bare, scalars, gpu=True)
  updated = [
    gaps.with_gaps(new, leaf, size) for new, leaf in zip(updated, leaves, strict=True)
  ]
  return xla_fusion.mergeable(updated) if join else updated


def _update(
  spec: UpdateSpec, leaves: Sequence[Leaf], scalars: Scalars, *, gpu: bool
) -> list[UpdatedLeaf]:
  """In two passes: first the new scales, then everything else."""
  if not leaves[0].quantized:
    return [
      _second_pass(spec, leaf, (None,) * len(spec.rule.moments), scalars)
      for leaf in _sharing_kernels(leaves)
    ]
  largest = [_first_pass(spec, leaf, scalars, gpu) for leaf in _sharing_kernels(leaves)]
  # Without it a GPU keeps what the passes share in memory, or fuses them into
  # a kernel with poor access patterns: 4.9 ms instead of 1.7 for 268 M
  # parameters on an H100.
  leaves, largest = lax.optimization_barrier((leaves, largest))
  updated = [
    _second_pass(spec, leaf, _encode_factors(spec, leaf, groups, scalars, gpu), scalars)
    for leaf, groups in zip(_sharing_kernels(leaves), largest, strict=True)
  ]
  # The old scales have been read when the codes are there. XLA would copy them if new
  # ones could take their place before.
  codes = [leaf.moments for leaf in updated]
  codes, largest = lax.optimization_barrier((codes, largest))
  return [
    leaf._replace(moments=_with_scales(spec, values, groups, scalars))
    for leaf, values, groups in zip(updated, codes, largest, strict=True)
  ]


def _sharing_kernels(leaves: Sequence[Leaf]) -> Sequence[Leaf]:
  """Lets XLA make one kernel of a pass over leaves of one size.

  For each pass anew: between the passes, gradients must not be kept in memory.
  """
  if len(leaves) == 1:
    return leaves
  grads = xla_fusion.mergeable([leaf.grad for leaf in leaves])
  return [leaf.replace(grad=grad) for leaf, grad in zip(leaves, grads, strict=True)]


def _join(leaves: Sequence[Leaf]) -> Leaf:
  """Leaves as one, of flat arrays."""
  joined = jax.tree.map(
    lambda *arrays: lax.concatenate([array.reshape(-1) for array in arrays], 0),
    *leaves,
  )
  return joined.replace(joined=tuple(leaf.param.size for leaf in leaves))


def _part(joined: UpdatedLeaf, leaves: Sequence[Leaf]) -> list[UpdatedLeaf]:
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
  spec: UpdateSpec, leaf: Leaf, scalars: Scalars, gpu: bool
) -> list[jax.Array]:
  """Each moment's largest magnitude in each group."""
  largest = []
  for moment, stored in zip(spec.rule.moments, leaf.moments, strict=True):
    new = _moment(spec, moment, leaf.grad, stored, scalars)
    if gpu:
      # A reduction of partial groups of their own would be fused into what puts both
      # together, where it is slow. On a CPU padding is slower.
      axis = codec.group_axis(new.shape, spec.storage.group_size)
      new = codec.with_whole_groups(new, axis, spec.storage.group_size)
    _, scale = stored
    largest.append(
      codec.group_largest(new, moment.kind, spec.storage.group_size, scale)
    )
  return largest


def _encode_factors(
  spec: UpdateSpec,
  leaf: Leaf,
  largest: Sequence[jax.Array],
  scalars: Scalars,
  gpu: bool,
) -> list[jax.Array]:
  shape = leaf.param.shape
  if gpu and leaf.param.size <= _MOST_CACHED:
    # Each element computes its group's, which takes less than a kernel more.
    largest = [codec.group_expand(x, shape, spec.storage) for x in largest]
  return [
    _encode_factor(spec, moment, codec.scale_of_largest(x, moment.kind), scalars)
    for moment, x in zip(spec.rule.moments, largest, strict=True)
  ]


def _with_scales(spec, moments, largest, scalars):
  """Moments with their new scales, given their groups' largest magnitudes."""
  return tuple(
    (codes, _rounded(moment, codec.scale_of_largest(groups, moment.kind), scalars))
    for moment, (codes, _), groups in zip(
      spec.rule.moments, moments, largest, strict=True
    )
  )


def _second_pass(
  spec: UpdateSpec,
  leaf: Leaf,
  encode_factors: Sequence[jax.Array | None],
  scalars: Scalars,
) -> UpdatedLeaf:
  """Everything but the new scales."""
  result, correction = codec.store(
    _master(spec, leaf, scalars),
    leaf.param,
    None if spec.new_params else leaf.grad.dtype,
    spec.storage.master_bits,
  )
  moments = []
  for moment, stored, factor in zip(
    spec.rule.moments, leaf.moments, encode_factors, strict=True
  ):
    new = _moment(spec, moment, leaf.grad, stored, scalars)
    if factor is not None:
      new = _encoded(spec, moment, new, factor, scalars)
    moments.append((new, None))
  return UpdatedLeaf(result, correction, tuple(moments))


def _update_by_output(spec: UpdateSpec, leaf: Leaf, scalars: Scalars) -> UpdatedLeaf:
  """The same in one pass per output, each from the stored arrays.

  On a CPU, XLA fuses into loops with one output and keeps what two of them
  share in memory, in float32. Computing it again is twice as fast and takes no
  such temporaries. Passes come in an order in which they can write in place. On
  one device alone: XLA does not partition across the calls for free.
  """
  moments = tuple(zip(spec.rule.moments, leaf.moments, strict=True))
  scales = [
    _outlined(_scale_pass, (spec, moment), leaf.grad, stored, scalars)
    for moment, stored in moments
  ]
  if spec.new_params:
    correction = _outlined(_correction_pass, (spec,), leaf, scalars)
    result = _outlined(_param_pass, (spec,), leaf, scalars, correction)
  else:
    result = _outlined(_difference_pass, (spec,), leaf, scalars)
    correction = _outlined(_residual_pass, (spec,), leaf, scalars, result)
  last = result if spec.new_params or correction is None else correction
  zero = _zero_after(last)
  codes = [
    _outlined(
      _codes_pass,
      (spec, moment),
      leaf.grad,
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
  return UpdatedLeaf(result, correction, tuple(zip(codes, rounded, strict=True)))


def _scale_pass(spec, moment, grad, stored, scalars):
  new = _moment(spec, moment, grad, stored, scalars)
  _, scale = stored
  return codec.exact_scale(new, moment.kind, spec.storage, scale)


def _encode_factor(spec, moment, scale, scalars):
  slack = codec.moment_rounding(scalars, moment.kind).slack
  return codec.encode_factor(scale, moment.kind, spec.storage, slack)


def _encoded(spec, moment, new, factor, scalars):
  rounding = codec.moment_rounding(scalars, moment.kind).code
  return codec.encode_codes(new, factor, moment.kind, spec.storage, rounding)


def _rounded(moment: Moment, scale: jax.Array, scalars: Scalars) -> jax.Array:
  rounding = codec.moment_rounding(scalars, moment.kind).scale
  return codec.round_scale(scale, rounding).astype(codec.SCALE_DTYPE)


def _correction_pass(spec, leaf, scalars):
  master = _master(spec, leaf, scalars)
  bits = spec.storage.master_bits
  return codec.split_correction(master, leaf.param.dtype, bits)


def _param_pass(spec, leaf, scalars, correction):
  master = _master(spec, leaf, scalars)
  return codec.split_param(master, correction, leaf.param.dtype)


def _difference_pass(spec, leaf, scalars):
  """The update that takes the parameter to its new value."""
  master = _master(spec, leaf, scalars)
  bits = spec.storage.master_bits
  return codec.difference(master, leaf.param, leaf.grad.dtype, bits)


def _residual_pass(spec, leaf, scalars, result):
  master = _master(spec, leaf, scalars)
  bits = spec.storage.master_bits
  return codec.residual_of_update(master, leaf.param, result, bits)


def _codes_pass(spec, moment, grad, stored, scalars, scale, zero):
  # Adding zero makes this pass wait for the array that zero was taken from.
  codes, old_scale = stored
  stored = (codes + zero.astype(codes.dtype), old_scale)
  new = _moment(spec, moment, grad, stored, scalars)
  factor = _encode_factor(spec, moment, scale, scalars)
  return _encoded(spec, moment, new, factor, scalars)


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


def _decoded(spec: UpdateSpec, moment: Moment, stored) -> jax.Array:
  values, scale = stored
  if scale is None:
    return values
  return codec.decode(values, scale, moment.kind, spec.storage)


def _moment(spec, moment: Moment, grad, stored, scalars) -> jax.Array:
  """A moment's new value, float32."""
  old = _decoded(spec, moment, stored)
  return moment.update(grad.astype(jnp.float32), old, _as_float32(scalars))


def _master(spec: UpdateSpec, leaf: Leaf, scalars: Scalars) -> jax.Array:
  """The new master weights, float32 or float64."""
  hyperparams = _as_float32(scalars)
  if not leaf.quantized:
    hyperparams = {n: value for n, value in hyperparams.items() if n != LEAST_ROOT}
  grad = leaf.grad.astype(jnp.float32)
  pairs = list(zip(spec.rule.moments, leaf.moments, strict=True))
  old = [_decoded(spec, moment, stored) for moment, stored in pairs]
  new = [_moment(spec, moment, grad, stored, scalars) for moment, stored in pairs]
  direction = spec.rule.direction(grad, old, new, hyperparams)

  master = codec.merge(leaf.param, leaf.correction)
  direction = direction.astype(master.dtype)
  if leaf.decay:
    direction = direction + _like(scalars["weight_decay"], master) * master
  step = -_like(scalars["learning_rate"], master) * direction
  threshold = _threshold(spec, leaf, scalars["master_rounding"])
  return codec.advance(leaf.param, leaf.correction, step, threshold)


def _threshold(spec: UpdateSpec, leaf: Leaf, rounding) -> jax.Array:
  """By which master weights are rounded."""
  if leaf.joined and spec.dithers(leaf.param):
    parts = [codec.dither(rounding, (size,)) for size in leaf.joined]
    return lax.concatenate(parts, 0)
  return codec.master_threshold(
    rounding, leaf.param, spec.storage.master_bits, leaf.origin, leaf.strides
  )


def _as_float32(scalars: Scalars) -> Scalars:
  # Python numbers stay weakly typed, for the sake of float64 masters.
  return {
    name: value.astype(jnp.float32) if hasattr(value, "astype") else value
    for name, value in scalars.items()
  }


def _like(value, master: jax.Array):
  return value.astype(master.dtype) if hasattr(value, "astype") else value
