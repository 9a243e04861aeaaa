"""Orbax checkpoints that say what their arrays mean.

A state's arrays are ordinary arrays, which Orbax saves, reshards and restores.
What they mean, the storage, is static, so it is not among them. :class:`Save`
and :class:`Restore` stand for Orbax's ``StandardSave`` and ``StandardRestore``
in any ``CheckpointManager`` or ``Checkpointer``: they write a description beside
the arrays and compare it with what is asked for, before anything is loaded::

  manager.save(step, args=fo.checkpoint.Save(state))
  abstract = jax.eval_shape(make_state)           # with shardings, if sharded
  state = manager.restore(step, args=fo.checkpoint.Restore(abstract))
"""

import dataclasses
import hashlib
import itertools
import json
import operator
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from flashoptim_jax import paths
from flashoptim_jax.storage import scale_gaps
from flashoptim_jax.storage import state as state_lib

# Raised when a reader of this version would misread what a later one writes.
FORMAT_VERSION = 1
# The description's key in Orbax's metadata.
KEY = "flashoptim_jax"

# Dtypes of Python's numbers and of NumPy's arrays by default, which JAX narrows.
_64_BITS = ("int64", "uint64", "float64")

_ARRAY = tuple[tuple[int, ...], str]


# Options of a storage that older descriptions lack, as they had them.
_LATER_OPTIONS = {"min_quantized_size": 0}


@dataclasses.dataclass(frozen=True)
class Description:
  """What a checkpoint holds.

  Attributes:
    states: For every flash state, by its path: optimizer, moments and storage,
      as :class:`flashoptim_jax.Format` has them, in JSON's types.
    arrays: Shape and dtype of every array, by its path.
    described: Whether it was saved with :class:`Save`. If not, the arrays are those
      that Orbax keeps.
  """

  states: Mapping[str, Mapping[str, Any]]
  arrays: Mapping[str, _ARRAY]
  described: bool = True


def describe(tree: Any) -> Description:
  """Describes a tree of arrays or ``jax.ShapeDtypeStruct``s."""
  nodes = jax.tree.leaves_with_path(tree, is_leaf=state_lib.is_flash_state)
  formats = [(p, node.format) for p, node in nodes if state_lib.is_flash_state(node)]
  paths.require_distinct(((p, paths.name(p)) for p, _ in formats), "optimizer state")
  states = {
    paths.name(path): json.loads(json.dumps(dataclasses.asdict(state_format)))
    for path, state_format in formats
  }
  return Description(states, paths.arrays(tree))


def read_description(directory: Any) -> Description:
  """The description of the tree that Orbax saved in a directory.

  Args:
    directory: The item's own directory: ``STEP/default`` under that of a
      ``CheckpointManager`` which was given no item names.

  Returns:
    The description; without states, and with Orbax's own idea of the arrays, if
    the tree was not saved with :class:`Save`.

  Raises:
    ValueError: If it is damaged, or of a later format version.
  """
  return _read_description(ocp.StandardCheckpointHandler(), directory)


class Handler(ocp.StandardCheckpointHandler):
  """Orbax's handler of pytrees, with a description. See :class:`Save`."""

  async def async_save(self, directory, item=None, save_args=None, args=None):
    """Saves a tree; see ``ocp.StandardCheckpointHandler``."""
    if args is not None:
      item, save_args = args.item, args.save_args
    # Of two arrays under one name, Orbax would keep one.
    paths.require_distinct(
      ((path, state_lib.dotted(path)) for path, _ in jax.tree.leaves_with_path(item)),
      "Orbax's array",
    )
    args = ocp.args.StandardSave(
      item, save_args, custom_metadata={KEY: _to_json(describe(item))}
    )
    return await super().async_save(directory, args=args)

  def restore(self, directory, item=None, args=None):
    """Restores a tree, if it is the one that is asked for."""
    wanted = item if args is None else args.item
    description = _read_description(self, directory)
    target = _with_gaps_as_in(description, wanted)
    check(description, target)
    _check_shardings(wanted)
    try:
      stored = self.metadata(directory).tree
      request = _request(target, stored)
      restored = super().restore(directory, args=ocp.args.StandardRestore(request))
      restored = _like(target, restored)
    except Exception as error:
      raise ValueError(
        f"Nothing of the checkpoint in {directory} was loaded: {error} Either it is"
        " damaged or incomplete, or what was asked for can't be made here: before"
        " giving it up, ask for arrays without shardings, as jax.eval_shape returns"
        " them."
      ) from error
    restored = jax.tree.map_with_path(_as_asked, target, restored)
    return _with_gaps_of(wanted, restored)


@ocp.args.register_with_handler(Handler, for_save=True)
@dataclasses.dataclass
class Save(ocp.args.CheckpointArgs):
  """Saves a pytree, in the place of ``ocp.args.StandardSave``.

  Attributes:
    item: The tree: a train state, or any nesting of parameters, optimizer
      states and other arrays. From an ``nnx.Optimizer`` take
      ``nnx.as_pure(optimizer.opt_state)``: ``nnx.state`` drops what is static.
    save_args: See ``ocp.args.StandardSave``.
  """

  item: Any
  save_args: Any = None


@ocp.args.register_with_handler(Handler, for_restore=True)
@dataclasses.dataclass
class Restore(ocp.args.CheckpointArgs):
  """Restores a pytree, in the place of ``ocp.args.StandardRestore``.

  Anything but the tree that was saved, in shapes, dtypes and storage, is a
  ValueError that names the first path at which they differ and the function that
  converts one to the other. The shardings may be any.

  Attributes:
    item: The tree to restore: arrays or ``jax.ShapeDtypeStruct``s with the
      shardings to restore to (:func:`flashoptim_jax.state_shardings`).
  """

  item: Any


def check(found: Description, target: Any) -> None:
  """Raises a ValueError unless a checkpoint holds the tree that is asked for.

  Args:
    found: What the checkpoint holds.
    target: Arrays or ``jax.ShapeDtypeStruct``s.
  """
  wanted = describe(target)
  states = dict(found.states)
  if not found.described:
    # As Orbax keeps arrays, and as JAX has them: the storage is known by its dtypes
    # alone.
    wanted = Description(wanted.states, paths.arrays(_as_stored(target)))
    found = Description({}, _canonical(found.arrays), described=False)
    states = {
      path: state_format
      for path, state_format in wanted.states.items()
      if f"{path}/count".removeprefix("<root>/") in found.arrays
    }
  part = wanted.states.items() <= states.items()
  if part and wanted.arrays.items() < found.arrays.items():
    missing = [path for path in found.arrays if path not in wanted.arrays]
    raise ValueError(
      f"The checkpoint holds {missing[0]!r} and {len(missing) - 1} other arrays"
      " that were not asked for. Ask for the whole tree; or, for a part of it, such"
      " as the parameters without the optimizer's state, restore with"
      " ocp.args.PyTreeRestore(part, restore_args="
      "ocp.checkpoint_utils.construct_restore_args(part), partial_restore=True)."
    )
  for path in [*wanted.states, *states]:
    seen, expected = states.get(path), wanted.states.get(path)
    if seen == expected:
      continue
    if seen is None:
      advice = (
        "Restore Optax's state and call flashoptim_jax.from_optax, or"
        " float32 parameters and call flashoptim_jax.from_fp32."
      )
    elif expected is None:
      advice = "Restore the state of that optimizer and call flashoptim_jax.to_optax."
    elif seen["optimizer"] != expected["optimizer"]:
      advice = "There is no conversion from one to the other."
    else:
      advice = "Restore the state of that optimizer and call flashoptim_jax.convert."
    raise ValueError(
      f"The checkpoint holds {_text(seen)} at {path!r}; asked for"
      f" {_text(expected)}. {advice}"
    )
  difference = paths.first_difference(found.arrays, wanted.arrays)
  if difference is not None:
    path, what = difference
    if any(path.startswith(f"{state}/") for state in states):
      advice = "Restore the storage that was saved and call flashoptim_jax.convert."
    else:
      advice = _advice(found.arrays.get(path), wanted.arrays.get(path))
    raise ValueError(
      f"The checkpoint is not the tree that was asked for: at {path!r},"
      f" {what}. {advice}"
    )


def _is_key(leaf: Any) -> bool:
  return jnp.issubdtype(getattr(leaf, "dtype", np.dtype(int)), jax.dtypes.prng_key)


def _as_stored(tree: Any) -> Any:
  """The tree with the numbers that make up its random keys."""
  return jax.tree.map(
    lambda leaf: jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf,
    tree,
  )


def _canonical(arrays: Mapping[str, _ARRAY]) -> dict[str, _ARRAY]:
  """Arrays in the dtypes that JAX takes them in: int32 for NumPy's int64."""
  return {
    path: (shape, jax.dtypes.canonicalize_dtype(dtype).name)
    for path, (shape, dtype) in arrays.items()
  }


def _check_shardings(target: Any) -> None:
  """Raises a ValueError for shardings that don't fit the arrays to restore."""
  for path, leaf in jax.tree.leaves_with_path(target):
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
      continue
    try:
      sharding.shard_shape(tuple(leaf.shape))
    except ValueError as error:
      raise ValueError(
        f"The sharding to restore {paths.name(path)!r} to, {sharding}, does not fit"
        f" its shape {tuple(leaf.shape)}; expected one that divides it. The"
        " checkpoint itself was not read."
      ) from error


def _by_name(tree: Any) -> dict[str, Any]:
  return dict(zip(paths.unique_names(tree), jax.tree.leaves(tree), strict=True))


def _like(target: Any, tree: Any) -> Any:
  """The leaves of a tree in the target's structure, told by their names."""
  found = _by_name(tree)
  return jax.tree.unflatten(
    jax.tree.structure(target), [found[name] for name in paths.unique_names(target)]
  )


def _request(target: Any, stored: Any) -> Any:
  """What to ask Orbax for: the target, less what it can't restore or would truncate.

  It has the structure that was stored: Orbax minds nodes without leaves, such as those
  that states had once. Numbers of 64 bits are restored as NumPy's arrays of their own
  dtype first.
  """
  arrays = _arrays_of(stored)

  def request(name, leaf):
    dtype = arrays[name][1] if name in arrays else None
    if dtype in _64_BITS and dtype != getattr(leaf, "dtype", dtype):
      return np.broadcast_to(np.zeros([], dtype), leaf.shape)
    # It restores to arrays, not to NumPy's scalars.
    return np.asarray(leaf) if isinstance(leaf, np.generic) else leaf

  asked = _by_name(target)
  return jax.tree.unflatten(
    jax.tree.structure(stored),
    [request(name, asked[name]) for name in paths.unique_names(stored)],
  )


@dataclasses.dataclass(frozen=True)
class _Scales:
  """The scales of a leaf, in a tree of states.

  Attributes:
    of: The leaf's shape.
    group_size: Elements of a group.
    stored: What stands for the scales in the tree.
  """

  of: tuple[int, ...]
  group_size: int
  stored: Any


def _marked(tree: Any) -> Any:
  """A tree with the scales of its flash states as :class:`_Scales`."""

  def mark(state):
    size = state.format.storage.group_size
    return state_lib.map_scales(
      lambda codes, scale: _Scales(tuple(codes.shape), size, scale), state
    )

  return state_lib.map_flash_states(mark, tree)


def _with_gaps_as_in(found: Description, wanted: Any) -> Any:
  """What is asked for, with scales of the shapes that a checkpoint has them in.

  Before there were gaps between them, they were fewer.
  """
  treedef: Any
  leaves, treedef = jax.tree.flatten(_marked(wanted))

  def as_found(name, leaf):
    if not isinstance(leaf, _Scales):
      return leaf
    shape, _ = found.arrays.get(name, (leaf.stored.shape, None))
    fits = scale_gaps.is_stored_shape(shape, leaf.of, leaf.group_size)
    if shape == leaf.stored.shape or not fits:
      return leaf.stored
    # To be sharded when they have their gaps.
    return np.broadcast_to(np.zeros([], leaf.stored.dtype), shape)

  names = paths.unique_names(wanted)
  return treedef.unflatten(map(as_found, names, leaves))


def _with_gaps_of(wanted: Any, restored: Any) -> Any:
  """What was restored, with scales of the shapes and shardings that are asked for."""

  def fitted(asked, scale):
    if not isinstance(asked, _Scales) or scale.shape == asked.stored.shape:
      return scale
    scale = jnp.asarray(scale)
    scale = scale_gaps.insert(scale, asked.of, asked.stored.shape, asked.group_size)
    sharding = getattr(asked.stored, "sharding", None)
    return scale if sharding is None else jax.device_put(scale, sharding)

  return jax.tree.map(fitted, _marked(wanted), restored)


def _as_asked(path: jax.tree_util.KeyPath, leaf: Any, restored: Any) -> Any:
  """A restored array, as the type of the leaf that was asked for.

  Raises:
    ValueError: If one of them is a random key and the other is not: of that, Orbax's
      metadata says nothing, and what it restores is what was saved. Or if it has
      numbers that the leaf's dtype has not.
  """
  if not hasattr(leaf, "dtype"):
    return restored
  wanted, found = (jnp.result_type(x) for x in (leaf, restored))
  if (_is_key(leaf) or _is_key(restored)) and wanted != found:
    raise ValueError(
      f"The checkpoint holds an array of {found.name} at {paths.name(path)!r};"
      f" asked for {wanted.name}. Restore what was saved, and call"
      " jax.random.wrap_key_data or jax.random.key_data."
    )
  if restored.dtype != leaf.dtype:
    with np.errstate(over="ignore"):
      narrow = restored.astype(leaf.dtype)
    exact = np.issubdtype(narrow.dtype, np.integer)
    kept = narrow == restored if exact else np.isfinite(narrow) == np.isfinite(restored)
    if not kept.all():
      raise ValueError(
        f"The checkpoint holds numbers of {restored.dtype} at {paths.name(path)!r}"
        f" that {leaf.dtype} has not; ask for {restored.dtype}, in a NumPy array."
      )
    sharding = getattr(leaf, "sharding", None)
    restored = narrow if sharding is None else jax.device_put(narrow, sharding)
  return restored[()] if isinstance(leaf, np.generic) else restored


def _advice(found: _ARRAY | None, wanted: _ARRAY | None) -> str:
  """How to get from an array of the checkpoint to the one that is wanted."""
  if found is None or wanted is None or found[0] != wanted[0]:
    return "Restore the tree that was saved, and change it afterwards."
  if found[1] == "float32":
    return "Restore float32 and call flashoptim_jax.from_fp32 or cast_params."
  if wanted[1] == "float32":
    return (
      f"Restore {found[1]}, with the optimizer's state, and call"
      " flashoptim_jax.to_fp32."
    )
  return "Restore the dtypes that were saved and call flashoptim_jax.cast_params."


def _text(state_format: Mapping[str, Any] | None) -> str:
  if state_format is None:
    return "no flash optimizer's state"
  storage = ", ".join(f"{k}={v!r}" for k, v in state_format["storage"].items())
  optimizer = state_format["optimizer"]
  return f"the state of flashoptim_jax.{optimizer} with Storage({storage})"


def _digest(content: Any) -> str:
  text = json.dumps(content, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _to_json(description: Description) -> dict[str, Any]:
  content = {"states": description.states, "arrays": description.arrays}
  content = json.loads(json.dumps(content))
  return {
    "format_version": FORMAT_VERSION,
    "sha256": _digest(content),
    **content,
  }


def _read_description(handler: Any, directory: Any) -> Description:
  try:
    metadata = handler.metadata(directory)
    content = (metadata.custom_metadata or {}).get(KEY)
    if content is None:
      return Description({}, _arrays_of(metadata.tree), described=False)
    version = content.pop("format_version")
    digest = content.pop("sha256")
  except Exception as error:
    raise damaged(directory, error) from error
  if type(version) is not int:
    raise damaged(directory, f"its description has format version {version!r}")
  if version != FORMAT_VERSION:
    other = "a later" if version > FORMAT_VERSION else "an earlier"
    raise ValueError(
      f"The checkpoint in {directory} has format version {version!r}; this"
      f" version of flashoptim_jax reads {FORMAT_VERSION}. Install {other}"
      " flashoptim-optax to read it."
    )
  if digest != _digest(content):
    raise damaged(directory, "its description does not match its checksum")
  try:
    return _from_json(content)
  except Exception as error:
    raise damaged(directory, f"its description is malformed: {error!r}") from error


def _from_json(content: Mapping[str, Any]) -> Description:
  """A description; raises some exception if it is none."""
  states = {}
  for path, state_format in content["states"].items():
    moments = itertools.chain(*state_format["moments"])
    _require_texts(state_format["optimizer"], *moments)
    storage = dict(state_format["storage"])
    states[path] = state_format | {"storage": storage | (_LATER_OPTIONS | storage)}
  arrays = {}
  for path, (shape, dtype) in content["arrays"].items():
    _require_texts(dtype)
    arrays[path] = tuple(map(operator.index, shape)), dtype
    if min(shape, default=0) < 0 or not (is_key(dtype) or jnp.dtype(dtype)):
      raise ValueError(f"{path!r} has shape {shape} and dtype {dtype}")
  return Description(states, arrays)


def _require_texts(*values: Any) -> None:
  for value in values:
    if not isinstance(value, str):
      raise TypeError(f"found {value!r} where a name is expected")


def is_key(dtype: str) -> bool:
  """Whether a dtype's name is that of typed random keys: ``key<fry>``."""
  return dtype.startswith("key<")


def stored_arrays(directory: Any) -> dict[str, _ARRAY]:
  """Shape and dtype of every array, by its path, as Orbax keeps it."""
  return _arrays_of(ocp.StandardCheckpointHandler().metadata(directory).tree)


def _arrays_of(tree: Any) -> dict[str, _ARRAY]:
  """As :func:`flashoptim_jax.paths.arrays`, from Orbax's metadata."""
  return {
    path: (tuple(leaf.shape), leaf.dtype.name)
    for path, leaf in _by_name(tree).items()
    if hasattr(leaf, "shape")
  }


def damaged(directory: Any, reason: Any) -> ValueError:
  """The error for a checkpoint that can't be read."""
  return ValueError(
    f"The checkpoint in {directory} is damaged or incomplete, and nothing of"
    f" it was loaded: {reason}"
  )
