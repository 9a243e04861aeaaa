"""Checkpoints with Orbax: arrays, and beside them whatever JSON can hold."""

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

import flashoptim_jax as fo


def save(folder: pathlib.Path, step: int, arrays: Any, notes: Any) -> None:
  """Saves a checkpoint, then deletes the older ones.

  The older checkpoint goes only when the new one is complete, so that a process
  killed half-way leaves something to resume from.

  Args:
    folder: Where the checkpoints are.
    step: Number of the checkpoint; a folder's numbers grow.
    arrays: A pytree of arrays.
    notes: Anything that JSON can hold.
  """
  with _manager(folder) as manager:
    if manager.latest_step() != step:
      items = ocp.args.Composite(
        arrays=fo.checkpoint.Save(arrays), notes=ocp.args.JsonSave(notes)
      )
      manager.save(step, args=items)
      manager.wait_until_finished()


def restore_notes(folder: pathlib.Path) -> Any:
  """The notes of the newest checkpoint.

  Raises:
    FileNotFoundError: If there is no checkpoint.
  """
  return _restore(folder, notes=ocp.args.JsonRestore())["notes"]


def restore_arrays(folder: pathlib.Path, like: Any) -> Any:
  """The arrays of the newest checkpoint.

  Args:
    folder: Where the checkpoints are.
    like: A pytree of arrays with the structure, shapes, dtypes and shardings to
      restore to. Static parts, such as a flash state's format, come from here.

  Raises:
    FileNotFoundError: If there is no checkpoint.
    ValueError: If it holds other arrays, or another storage.
  """
  target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
  return _restore(folder, arrays=fo.checkpoint.Restore(target))["arrays"]


def _restore(folder: pathlib.Path, **items: Any) -> Any:
  if not folder.is_dir():
    raise FileNotFoundError(f"There is no checkpoint under {folder}.")
  with _manager(folder) as manager:
    step = manager.latest_step()
    if step is None:
      raise FileNotFoundError(f"There is no checkpoint under {folder}.")
    return manager.restore(step, args=ocp.args.Composite(**items))


def _manager(folder: pathlib.Path) -> ocp.CheckpointManager:
  options = ocp.CheckpointManagerOptions(max_to_keep=1)
  return ocp.CheckpointManager(folder.resolve(), options=options)
