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
import json
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from flashoptim_jax import paths
from flashoptim_jax import state as state_lib

# Raised when a reader of this version would misread what a later one writes.
FORMAT_VERSION = 1
# The description's key in Orbax's metadata.
KEY = "flashoptim_jax"

_ARRAY = tuple[tuple[int, ...], str]


@dataclasses.dataclass(frozen=True)
class Description:
  """What a checkpoint holds.

  Attributes:
    states: For every flash state, by its path: optimizer, moments and storage,
      as :class:`flashoptim_jax.Format` has them, in JSON's types.
    arrays: Shape and dtype of every array, by its path.
  """

  states: Mapping[str, Mapping[str, Any]]
  arrays: Mapping[str, _ARRAY]


def describe(tree: Any) -> Description:
  """Describes a tree of arrays or ``jax.ShapeDtypeStruct``s."""
  nodes = jax.tree.leaves_with_path(tree, is_leaf=state_lib.is_flash_state)
  states = {
      paths.name(path): json.loads(json.dumps(dataclasses.asdict(node.format)))
      for path, node in nodes
      if state_lib.is_flash_state(node)
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
    args = ocp.args.StandardSave(
        item, save_args, custom_metadata={KEY: _to_json(describe(item))}
    )
    return await super().async_save(directory, args=args)

  def restore(self, directory, item=None, args=None):
    """Restores a tree, if it is the one that is asked for."""
    target = item if args is None else args.item
    check(_read_description(self, directory), target)
    try:
      return super().restore(directory, args=ocp.args.StandardRestore(target))
    except Exception as error:
      raise damaged(directory, error) from error


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
  if not states:
    # Saved without a description: the storage is known by its dtypes alone.
    states = {
        path: form
        for path, form in wanted.states.items()
        if f"{path}/count".removeprefix("<root>/") in found.arrays
    }
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
      advice = (
          "Restore the state of that optimizer and call"
          " flashoptim_jax.to_optax."
      )
    elif seen["optimizer"] != expected["optimizer"]:
      advice = "There is no conversion from one to the other."
    else:
      advice = (
          "Restore the state of that optimizer and call flashoptim_jax.convert."
      )
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


def _text(form: Mapping[str, Any] | None) -> str:
  if form is None:
    return "no flash optimizer's state"
  storage = ", ".join(f"{k}={v!r}" for k, v in form["storage"].items())
  return f"the state of flashoptim_jax.{form['optimizer']} with Storage({storage})"


def _digest(content: Any) -> str:
  text = json.dumps(content, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _to_json(description: Description) -> dict[str, Any]:
  content = json.loads(json.dumps(dataclasses.asdict(description)))
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
      return Description({}, _arrays_of(metadata.tree))
    version = content.pop("format_version")
    digest = content.pop("sha256")
  except Exception as error:
    raise damaged(directory, error) from error
  if version != FORMAT_VERSION:
    raise ValueError(
        f"The checkpoint in {directory} has format version {version!r}; this"
        f" version of flashoptim_jax reads {FORMAT_VERSION}. Install a later"
        " flashoptim-optax to read it."
    )
  if digest != _digest(content):
    raise damaged(directory, "its description does not match its checksum")
  return Description(
      content["states"],
      {
          path: (tuple(shape), dtype)
          for path, (shape, dtype) in content["arrays"].items()
      },
  )


def _arrays_of(tree: Any) -> dict[str, _ARRAY]:
  """As :func:`flashoptim_jax.paths.arrays`, from Orbax's metadata."""
  return {
      paths.name(path): (tuple(leaf.shape), leaf.dtype.name)
      for path, leaf in jax.tree.leaves_with_path(tree)
      if hasattr(leaf, "shape")
  }


def damaged(directory: Any, reason: Any) -> ValueError:
  """The error for a checkpoint that can't be read."""
  return ValueError(
      f"The checkpoint in {directory} is damaged or incomplete, and nothing of"
      f" it was loaded: {reason}"
  )
