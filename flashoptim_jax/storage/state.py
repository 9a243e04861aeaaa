"""The optimizer state: trees that mirror the parameters, and what they mean."""

import dataclasses
import functools
import json
import operator
import sys
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import NamedSharding

from flashoptim_jax import paths
from flashoptim_jax.storage import codec, flax_boxes, partition_specs, scale_gaps
from flashoptim_jax.storage.options import Kind, Storage

SUPPORTED_DTYPES = ("bfloat16", "float16", "float32", "float64")

# Libraries that walk dataclasses look for this mark before they take a field for a
# child.
_STATIC = {"static": True}


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Format:
  """What a state's arrays mean: static data of the state.

  Attributes:
    optimizer: Name of the update rule, see :mod:`flashoptim_jax.rules`, or
      ``"compress"``.
    moments: Name and kind of the moments that the state keeps.
    storage: How they are stored.
  """

  optimizer: str = dataclasses.field(metadata=_STATIC)
  moments: tuple[tuple[str, Kind], ...] = dataclasses.field(metadata=_STATIC)
  storage: Storage = dataclasses.field(metadata=_STATIC)

  def __post_init__(self):
    # Flax is optional; whoever has imported it may serialise states with it.
    register_with_flax(sys.modules.get("flax.serialization"))

  def __str__(self) -> str:
    return f"flashoptim_jax.{self.optimizer} with {self.storage}"


def register_with_flax(serialization: Any) -> None:
  """Teaches Flax's state dicts, and so its msgpack files, about formats.

  Args:
    serialization: The module ``flax.serialization``; None does nothing.
  """
  if serialization is None or serialization.is_serializable(Format):
    return

  def to_state_dict(state_format: Format) -> dict[str, Any]:
    # A key, not a value: it stays a node without leaves.
    return {json.dumps(dataclasses.asdict(state_format)): {}}

  def from_state_dict(state_format: Format, state: Any) -> Format:
    found = _format_in(state)
    if found != state_format:
      raise ValueError(
        f"The state dict at {serialization.current_path()!r} was made by"
        f" {_with_moments(found)}; this state is of {_with_moments(state_format)}."
      )
    return state_format

  serialization.register_serialization_state(Format, to_state_dict, from_state_dict)


def _format_in(state: Any) -> Any:
  """The format that a state dict describes; the dict itself if it does not."""
  try:
    (text,) = state
    fields = json.loads(text)
    moments = tuple(map(tuple, fields["moments"]))
    return Format(fields["optimizer"], moments, Storage(**fields["storage"]))
  except (KeyError, TypeError, ValueError):
    return state


def _with_moments(state_format: Any) -> str:
  if not isinstance(state_format, Format):
    return f"{state_format!r}"
  return f"{state_format} and the moments {state_format.moments}"


def _format_is_static(cls: Any) -> Any:
  """Makes the format of a named tuple the node's own data instead of a child."""
  names = [name for name in cls._fields if name != "format"]
  keys = [jax.tree_util.GetAttrKey(name) for name in names]
  arrays = operator.attrgetter(*names)
  jax.tree_util.register_pytree_with_keys(
    cls,
    lambda state: (tuple(zip(keys, arrays(state), strict=True)), state.format),
    lambda state_format, children: cls(*children, format=state_format),
    lambda state: (arrays(state), state.format),
  )
  return cls


@_format_is_static
class FlashState(NamedTuple):
  """State of a flash optimizer.

  The trees have the parameters' structure, with one array per leaf, of the
  leaf's rank; ``optax.MaskedNode()`` stands for an array that a leaf, or the
  whole state, does not need, and for the box that it would be in.

  Attributes:
    count: Updates done so far, int32 of shape ().
    mu: First moment: int8 codes of the leaf's shape, or float32.
    mu_scale: Its scales, bfloat16, the leaf's shape with the group axis divided
      by the group size (rounded up). Zeros for small leaves, whose moments are
      float32.
    nu: Second moment: uint8 codes, or float32.
    nu_scale: Its scales, as for ``mu_scale``.
    correction: int8 or int16 of the leaf's shape, for 16-bit leaves.
    format: What the arrays mean. Static.
  """

  count: Any
  mu: Any
  mu_scale: Any
  nu: Any
  nu_scale: Any
  correction: Any
  format: Format


@_format_is_static
class CompressedState(NamedTuple):
  """State of :func:`flashoptim_jax.compress`.

  Attributes:
    count: Updates done so far, int32 of shape ().
    inner: State of the transformation inside, for float32 parameters, with codes
      (int8 or uint8, of the same shapes) in the place of its moments.
    scales: Their scales, bfloat16: for each moment, by its path in ``inner`` with
      dots between the keys and ``_scale`` at the end (``0.mu_scale``), a tree like
      the moment. Empty where moments are float32.
    correction: As in :class:`FlashState`.
    format: What the arrays mean. Static. Moments are named by their path in
      ``inner``.
  """

  count: Any
  inner: Any
  scales: dict[str, Any]
  correction: Any
  format: Format


AnyState: TypeAlias = FlashState | CompressedState


class StoredMoment(NamedTuple):
  """A moment as a state keeps it.

  Attributes:
    name: Its field's name: ``mu``, ``nu``, ...
    kind: How it is companded.
    values: Codes, or floats, in a tree like the parameters.
    scales: Their scales, in the same tree; None where ``values`` are floats.
  """

  name: str
  kind: Kind
  values: Any
  scales: Any


def stored_moments(state: AnyState) -> list[StoredMoment]:
  """The moments that a flash state keeps, in its format's order."""
  found = []
  quantizes = state.format.storage.quantizes_moments
  for name, kind in state.format.moments:
    if isinstance(state, CompressedState):
      values, field = subtree(state.inner, name), name.rpartition(".")[2]
      scales = state.scales.get(scale_name(name))
    else:
      values, field = getattr(state, name), name
      scales = getattr(state, f"{name}_scale") if quantizes else None
    found.append(StoredMoment(field, kind, values, scales))
  return found


def is_quantized(values: Any) -> bool:
  """Whether a moment of one leaf is codes."""
  dtype = getattr(values, "dtype", None)
  return dtype is not None and not jnp.issubdtype(dtype, jnp.floating)


def scale_name(name: str) -> str:
  """The key of a moment's scales in a :class:`CompressedState`."""
  return f"{name}_scale"


def map_stored(f: Callable[[Any], Any], state: Any) -> Any:
  """A flash state with ``f`` applied to its moments, scales and correction."""

  def mapped(tree):
    return jax.tree.map(f, tree)

  if isinstance(state, CompressedState):
    names = [name for name, _ in state.format.moments]
    return state._replace(
      inner=map_subtrees(lambda _, tree: mapped(tree), state.inner, names),
      scales=mapped(state.scales),
      correction=mapped(state.correction),
    )
  return mapped(state)._replace(count=state.count)


def map_scales(f: Callable[[Any, Any], Any], state: Any) -> Any:
  """A flash state with ``f(codes, scale)`` instead of the scales of each leaf."""
  if not state.format.storage.quantizes_moments:
    return state
  mapped = {}
  for (name, _), moment in zip(
    state.format.moments, stored_moments(state), strict=True
  ):
    # Leaf by leaf: the metadata of Flax's boxes may differ.
    scales, treedef = jax.tree.flatten(moment.scales)
    pairs = map(f, jax.tree.leaves(moment.values), scales)
    mapped[scale_name(name)] = jax.tree.unflatten(treedef, pairs)
  if isinstance(state, CompressedState):
    return state._replace(scales=mapped)
  return state._replace(**mapped)


def dotted(path: jax.tree_util.KeyPath) -> str:
  """A path in a state, with dots: ``0.mu``."""
  return jax.tree_util.keystr(path, simple=True, separator=".")


def subtree(tree: Any, name: str) -> Any:
  """The part of a tree at a dotted path."""
  nodes = jax.tree.leaves_with_path(
    tree,
    is_leaf=lambda path, _: dotted(path) == name,
    is_leaf_takes_path=True,
  )
  return next(node for path, node in nodes if dotted(path) == name)


def map_subtrees(
  f: Callable[[str, Any], Any], tree: Any, names: Collection[str]
) -> Any:
  """A tree with ``f(name, part)`` instead of its parts at dotted paths."""
  return jax.tree.map_with_path(
    lambda path, node: f(dotted(path), node) if dotted(path) in names else node,
    tree,
    is_leaf=lambda path, _: dotted(path) in names,
    is_leaf_takes_path=True,
  )


def check_params(params: Any) -> None:
  """Raises a ValueError for leaves that a flash optimizer cannot hold."""
  paths.require_arrays(params)
  for path, leaf in jax.tree.leaves_with_path(params):
    dtype = jnp.result_type(leaf)
    if dtype.name not in SUPPORTED_DTYPES:
      hint = (
        " Wrap the optimizer in optax.contrib.split_real_and_imaginary."
        if jnp.issubdtype(dtype, jnp.complexfloating)
        else f" Leave it out with optax.masked or optax.partition. {paths.MODELS}"
      )
      raise ValueError(
        f"Parameter {paths.name(path)!r} has dtype {dtype.name}; expected one"
        f" of {', '.join(SUPPORTED_DTYPES)}.{hint}"
      )


def init(params: Any, state_format: Format) -> FlashState:
  """The state before the first update: all zeros.

  ``params`` may hold arrays, ``jax.ShapeDtypeStruct``s or Optax's placeholder.
  """
  check_params(params)
  storage = state_format.storage

  def values(param, kind):
    quantized = storage.quantizes(jnp.shape(param))
    dtype = codec.CODE_DTYPE[kind] if quantized else jnp.float32
    return jnp.zeros_like(param, dtype=dtype)

  def scales():
    return jax.tree.map(lambda p: zero_scale(p, storage.group_size), params)

  absent = optax.MaskedNode()
  fields = dict.fromkeys(("mu", "mu_scale", "nu", "nu_scale"), absent)
  for name, kind in state_format.moments:
    fields[name] = jax.tree.map(functools.partial(values, kind=kind), params)
    if storage.quantizes_moments:
      fields[f"{name}_scale"] = flax_boxes.fitted(scales())
  return FlashState(
    count=jnp.zeros([], jnp.int32),
    correction=zero_correction(params, storage),
    format=state_format,
    **fields,
  )


def zero_correction(params: Any, storage: Storage) -> Any:
  """The correction of parameters that are their own master weights."""

  def zeros(param):
    dtype = codec.correction_dtype(jnp.result_type(param), storage.master_bits)
    return None if dtype is None else jnp.zeros_like(param, dtype=dtype)

  return correction_tree(params, map(zeros, jax.tree.leaves(params)), storage)


def correction_tree(params: Any, corrections: Iterable[Any], storage: Storage) -> Any:
  """The state's correction, given one or None for each leaf of ``params``."""
  absent = optax.MaskedNode()
  if not storage.has_corrections:
    return absent
  treedef: Any = jax.tree.structure(params)
  return flax_boxes.without_empty(
    treedef.unflatten([absent if each is None else each for each in corrections])
  )


def zero_scale(param: Any, group_size: int) -> jax.Array:
  """Scales of a leaf that has seen no update, sharded as the leaf is."""
  shape = scale_gaps.stored_shape(jnp.shape(param), group_size)
  sharding = getattr(
    jax.typeof(param) if isinstance(param, jax.core.Tracer) else param,
    "sharding",
    None,
  )
  if isinstance(sharding, NamedSharding) and any(sharding.spec):
    spec = partition_specs.divisible(sharding.mesh, sharding.spec, shape)
    sharding = sharding.update(spec=spec)
  else:
    sharding = None
  return lax.full_like(
    param, 0, dtype=codec.SCALE_DTYPE, shape=shape, sharding=sharding
  )


def is_flash_state(node: Any) -> bool:
  """Whether a node of a tree is a flash optimizer's state, or ``compress``'s."""
  return isinstance(node, (FlashState, CompressedState))


def flash_states(opt_state: Any) -> list[AnyState]:
  """Every flash state in any nesting of chains, partitions and wrappers.

  Raises:
    ValueError: If there is none.
  """
  nodes = jax.tree.leaves(opt_state, is_leaf=is_flash_state)
  found = [node for node in nodes if is_flash_state(node)]
  if not found:
    raise ValueError(
      "No flash optimizer state found in opt_state, a"
      f" {type(opt_state).__name__}; expected the state of a transformation"
      " that contains flashoptim_jax.adamw, adam, sgd, lion or compress."
    )
  return found


def map_flash_states(f: Callable[[Any], AnyState], opt_state: Any) -> Any:
  """``opt_state`` with ``f`` applied to every flash state in it."""
  return jax.tree.map(
    lambda node: f(node) if is_flash_state(node) else node,
    opt_state,
    is_leaf=is_flash_state,
  )


def by_path(tree: Any) -> dict[jax.tree_util.KeyPath, Any]:
  """The arrays of a params-shaped tree of the state, by their leaf's path.

  By its keys, not its name, which two leaves may have in common.
  """
  return dict(jax.tree.leaves_with_path(tree))
