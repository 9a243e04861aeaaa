"""Moments as numbers and as they are stored: of one leaf, of a tree, of a state.

A leaf's codes are :mod:`flashoptim_jax.storage.codec`'s. On explicit mesh axes shards
may cut groups. JAX does not guess how the parts of a cut group lie, so that such
moments are gathered along the axis of their groups first.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flashoptim_jax.storage import (
  aliasing,
  codec,
  flax_boxes,
  host_memory,
  partition_specs,
  scale_gaps,
)
from flashoptim_jax.storage import state as state_lib
from flashoptim_jax.storage.options import Kind, Storage
from flashoptim_jax.storage.state import CompressedState, Format


def encode_leaf(
  x: jax.Array,
  old_scale: jax.Array | None,
  rounding: codec.MomentRounding,
  *,
  kind: Kind,
  storage: Storage,
) -> tuple[jax.Array, jax.Array]:
  """:func:`flashoptim_jax.storage.codec.encode`, with gaps between scales.

  Codes are sharded as x is.
  """
  size = storage.group_size
  if old_scale is None:
    shape = scale_gaps.stored_shape(x.shape, size)
  else:
    shape = old_scale.shape
  own = jax.typeof(x).sharding
  explicit = partition_specs.is_explicit(own)
  if explicit:
    whole = partition_specs.uncut(own, x.shape, shape, size)
    x = jax.sharding.reshard(x, whole)
  if old_scale is not None:
    if explicit:
      _, old_scale = _placed(whole, x, old_scale)
    old_scale = scale_gaps.remove(old_scale, x.shape, size)
  codes, scale = codec.encode(x, kind, storage, rounding, old_scale)
  scale = scale_gaps.insert(scale, x.shape, shape, size)
  return _placed(own, codes, scale) if explicit else (codes, scale)


def decode_leaf(
  codes: jax.Array, scale: jax.Array, *, kind: Kind, storage: Storage
) -> jax.Array:
  """The inverse of :func:`encode_leaf`; moments are sharded as their codes."""
  own = jax.typeof(codes).sharding
  explicit = partition_specs.is_explicit(own)
  if explicit:
    whole = partition_specs.uncut(own, codes.shape, scale.shape, storage.group_size)
    codes, scale = _placed(whole, codes, scale)
  scale = scale_gaps.remove(scale, codes.shape, storage.group_size)
  x = codec.decode(codes, scale, kind, storage)
  return jax.sharding.reshard(x, own) if explicit else x


def _placed(
  sharding: jax.sharding.NamedSharding, codes: jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Codes with that sharding, and scales as far as it divides them."""
  spec = partition_specs.divisible(sharding.mesh, sharding.spec, scale.shape)
  return (
    jax.sharding.reshard(codes, sharding),
    jax.sharding.reshard(scale, sharding.update(spec=spec)),
  )


def _encode_tree(
  encode: Callable[[jax.Array, Any], tuple[jax.Array, jax.Array]],
  moment: Any,
  storage: Storage,
  old: tuple[Any, Any] | None = None,
) -> tuple[Any, Any]:
  """Values and scales of a moment: codes, or floats beside zeros for small leaves.

  Args:
    encode: Makes codes and scales of a leaf, in float32, and its old scales.
    moment: The moment, in floats.
    storage: How it is stored.
    old: Values and scales before, whose leaves in floats stay so. By default, shapes
      decide.
  """
  treedef: Any
  leaves, treedef = jax.tree.flatten(moment)
  if old is None:
    quantized = [storage.quantizes(jnp.shape(leaf)) for leaf in leaves]
    old_scales: list[Any] = [None] * len(leaves)
  else:
    old_values, old_scales = map(treedef.flatten_up_to, old)
    quantized = list(map(state_lib.is_quantized, old_values))
  pairs = [
    encode(jnp.asarray(leaf).astype(jnp.float32), old_scale)
    if codes
    else (leaf, state_lib.zero_scale(leaf, storage.group_size))
    for leaf, codes, old_scale in zip(leaves, quantized, old_scales, strict=True)
  ]
  values, scales = (
    treedef.unflatten([pair[part] for pair in pairs]) for part in (0, 1)
  )
  return values, flax_boxes.fitted(scales)


def _decode_tree(
  decode: Callable[..., jax.Array], values: Any, scales: Any, *rest: Any
) -> Any:
  """A moment in floats, given ``decode`` of a leaf's codes, scales and the rest."""
  return jax.tree.map(
    lambda codes, *others: (
      decode(codes, *others) if state_lib.is_quantized(codes) else codes
    ),
    values,
    scales,
    *rest,
  )


# One program for each shape, where nothing around it is jitted.
_encode_to_nearest = jax.jit(
  functools.partial(encode_leaf, rounding=codec.TO_NEAREST),
  static_argnames=("kind", "storage"),
)


def encode_fields(values: dict[str, Any], state_format: Format) -> dict[str, Any]:
  """The fields of a :class:`FlashState` that hold moments, given those in floats."""
  fields: dict[str, Any] = {}
  storage = state_format.storage
  for name, kind in state_format.moments:
    moment = jax.tree.map(
      lambda leaf: jnp.asarray(leaf).astype(jnp.float32), values[name]
    )
    if storage.quantizes_moments:
      moment, fields[f"{name}_scale"] = _encode_tree(
        functools.partial(_encode_to_nearest, kind=kind, storage=storage),
        moment,
        storage,
      )
    fields[name] = moment
  return fields


def call_now(
  function: Callable[..., Any],
  *args: Any,
  group_size: int | None = None,
  takes_origin: bool = False,
):
  """Calls a function of arrays, where another ``call`` might put it off."""
  del group_size, takes_origin
  return function(*args)


def encode_inner(
  inner: Any,
  count: jax.Array,
  correction: Any,
  state_format: Format,
  rounding: codec.Rounding | None = None,
  *,
  old: CompressedState | None = None,
  call: Callable[..., Any] = call_now,
) -> CompressedState:
  """Puts the moments in a transformation's state into their storage.

  Args:
    inner: The state, its moments in floats.
    count: Updates done so far.
    correction: The corrections of the parameters.
    state_format: What to store, and how.
    rounding: How scales and codes are rounded, by default to the nearest.
    old: The state before, whose moments in floats stay so. By default, shapes decide.
    call: Calls the functions that do it for an array, as :func:`call_now` does.
  """
  kinds, storage, new_scales = dict(state_format.moments), state_format.storage, {}

  def encode(name, moment):
    kind, key = kinds[name], state_lib.scale_name(name)
    how = codec.TO_NEAREST if rounding is None else getattr(rounding, kind)
    known = None
    if old is not None and key in old.scales:
      known = state_lib.subtree(old.inner, name), old.scales[key]
    function = functools.partial(encode_leaf, kind=kind, storage=storage)
    values, new_scales[key] = _encode_tree(
      lambda x, old_scale: call(
        function, x, old_scale, how, group_size=storage.group_size
      ),
      moment,
      storage,
      known,
    )
    return values

  if storage.quantizes_moments:
    inner = state_lib.map_subtrees(encode, inner, kinds)
  return CompressedState(count, inner, new_scales, correction, state_format)


def decode_inner(
  state: CompressedState, layout: Any, call: Callable[..., Any] = call_now
) -> Any:
  """Inverse of :func:`encode_inner`: the transformation's state, in floats.

  Args:
    state: The state of ``compress``.
    layout: The transformation's state in ``jax.ShapeDtypeStruct``s.
    call: Calls the function that does it for an array, as :func:`call_now` does.
  """
  kinds, storage = dict(state.format.moments), state.format.storage

  def decode(name, moment):
    function = functools.partial(decode_leaf, kind=kinds[name], storage=storage)
    return _decode_tree(
      lambda codes, scale, like: call(
        function, codes, scale, group_size=storage.group_size
      ).astype(like.dtype),
      moment,
      state.scales[state_lib.scale_name(name)],
      state_lib.subtree(layout, name),
    )

  if storage.quantizes_moments:
    return state_lib.map_subtrees(decode, state.inner, kinds)
  return state.inner


def moments(opt_state: optax.OptState) -> dict[str, Any]:
  """The moments, decoded.

  Args:
    opt_state: A state with flash states in any nesting.

  Returns:
    ``{"mu": tree, "nu": tree}``, with the moments that the optimizers keep:
    float32 arrays of the parameters' shapes. Those of ``compress`` go by the
    names that the transformation inside has for them. Where several flash optimizers
    share the leaves out, their trees are put together; a leaf that none of them
    keeps a moment of stays an ``optax.MaskedNode()``. The result shares no array
    with ``opt_state``.

  Raises:
    ValueError: If there is no flash state.
  """
  trees: dict[str, Any] = {}
  for state in state_lib.flash_states(opt_state):
    for name, kind, stored, scales in state_lib.stored_moments(state):
      values = host_memory.to_device(stored)
      if scales is not None:
        decode = functools.partial(decode_leaf, kind=kind, storage=state.format.storage)
        values = _decode_tree(decode, values, host_memory.to_device(scales))
      trees[name] = _join(trees[name], values) if name in trees else values
  return aliasing.apart(trees, opt_state)


def _join(a: Any, b: Any) -> Any:
  """Two trees in one: either may have masked nodes where the other has leaves."""
  if isinstance(a, optax.MaskedNode):
    return b
  if isinstance(b, optax.MaskedNode) or jax.tree_util.all_leaves([a]):
    return a
  return jax.tree.map(_join, a, b, is_leaf=lambda node: node is not a)
