"""What an Orbax checkpoint holds, as ``python -m flashoptim_jax inspect`` says."""

import contextlib
import dataclasses
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from flashoptim_jax import paths
from flashoptim_jax.checkpoint import orbax

_COMPONENTS = {
  "count": "counts",
  "correction": "corrections",
  "mu": "moments",
  "nu": "moments",
  "mu_scale": "scales",
  "nu_scale": "scales",
  "scales": "scales",
}
_BATCH = 2**29  # Bytes that are read at once.


@dataclasses.dataclass(frozen=True)
class Array:
  """An array of a checkpoint.

  Attributes:
    path: Its path, keys joined by slashes.
    shape: Its shape.
    dtype: Its dtype.
    component: What it is for: a part of a flash state, or its path's first key.
    nonfinite: How many elements are NaN or infinite.
  """

  path: str
  shape: tuple[int, ...]
  dtype: str
  component: str
  nonfinite: int

  @property
  def nbytes(self) -> int:
    """Its size in memory."""
    return math.prod(self.shape) * _dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Inspection:
  """What a checkpoint holds. Prints as tables.

  Attributes:
    directory: Where it is.
    bytes_on_disk: Size of its files.
    states: For every flash state, by its path, what its arrays mean.
    counts: Updates done, by the flash state's path.
    arrays: Its arrays, in the tree's order.
  """

  directory: pathlib.Path
  bytes_on_disk: int
  states: Mapping[str, Mapping[str, Any]]
  counts: Mapping[str, int]
  arrays: tuple[Array, ...]

  def __str__(self) -> str:
    total = sum(array.nbytes for array in self.arrays)
    lines = [
      f"{self.directory}",
      f"{len(self.arrays)} arrays, {_size(total)} in memory,"
      f" {_size(self.bytes_on_disk)} on disk",
      "",
    ]
    if not self.states:
      lines += ["Saved without flashoptim_jax.checkpoint: storage unknown.", ""]
    for path, state_format in self.states.items():
      storage = ", ".join(f"{k}={v!r}" for k, v in state_format["storage"].items())
      lines.append(
        f"{path}: flashoptim_jax.{state_format['optimizer']}, step"
        f" {self.counts.get(path, 'unknown')}, Storage({storage})"
      )
    components: dict[str, list[Array]] = {}
    for array in self.arrays:
      components.setdefault(array.component, []).append(array)
    lines += [
      "",
      *_table(
        ("component", "arrays", "bytes", "share", "non-finite"),
        [
          (
            name,
            str(len(arrays)),
            _size(nbytes := sum(array.nbytes for array in arrays)),
            f"{nbytes / max(total, 1):.1%}",
            str(sum(array.nonfinite for array in arrays)),
          )
          for name, arrays in components.items()
        ],
      ),
    ]
    largest = sorted(self.arrays, key=lambda array: -array.nbytes)[:10]
    for title, arrays in (("largest arrays", largest), ("tree", self.arrays)):
      lines += [
        "",
        *_table(
          (title, "shape", "dtype", "bytes", "non-finite"),
          [
            (
              array.path,
              "×".join(map(str, array.shape)) or "scalar",
              array.dtype,
              _size(array.nbytes),
              str(array.nonfinite),
            )
            for array in arrays
          ],
        ),
      ]
    return "\n".join(lines)


def inspect(path: str | os.PathLike) -> Inspection:
  """Looks into a checkpoint, reading it a few arrays at a time.

  Args:
    path: Where Orbax saved a tree, one of its steps, or the directory of a
      ``CheckpointManager``, of which the last complete step is taken. Of several
      items, name one: ``DIRECTORY/STEP/ITEM``.

  Raises:
    FileNotFoundError: If there is no checkpoint.
    ValueError: If it is damaged, of a later format version, or has several items.
  """
  directory = _find(pathlib.Path(path).absolute())
  description = orbax.read_description(directory)
  try:
    nonfinite, counts = _read(directory, description.states)
    stored = orbax.stored_arrays(directory)
    arrays = {  # Random keys have their size from the numbers that make them up.
      name: stored[name] if orbax.is_key(array[1]) else array
      for name, array in description.arrays.items()
    }
  except Exception as error:
    raise orbax.damaged(directory, error) from error
  return Inspection(
    directory=directory,
    bytes_on_disk=sum(
      file.stat().st_size for file in directory.rglob("*") if file.is_file()
    ),
    states=description.states,
    counts=counts,
    arrays=tuple(
      Array(
        name,
        shape,
        dtype,
        _component(name, description.states),
        nonfinite.get(name, 0),
      )
      for name, (shape, dtype) in arrays.items()
    ),
  )


def _find(path: pathlib.Path) -> pathlib.Path:
  """The directory of a tree."""
  if not path.is_dir():
    raise FileNotFoundError(f"There is no directory {path}.")
  if (path / "_METADATA").is_file():
    return path
  # Orbax marks steps; one without the mark was being deleted, or is very old.
  steps = sorted(
    ((path / str(step) / "_CHECKPOINT_METADATA").is_file(), step)
    for step in ocp.utils.checkpoint_steps(path)
  )
  for _, step in reversed(steps):
    with contextlib.suppress(FileNotFoundError):  # An incomplete one.
      return _find(path / str(step))
  items = [f.parent for f in sorted(path.glob("*/_METADATA")) if f.is_file()]
  if not items:
    raise FileNotFoundError(f"There is no complete checkpoint under {path}.")
  if len(items) > 1:
    raise ValueError(
      f"The checkpoint {path} has several items; expected one of"
      f" {', '.join(map(str, items))}."
    )
  return items[0]


def _component(name: str, states: Mapping[str, Mapping[str, Any]]) -> str:
  for state, state_format in states.items():
    prefix = "" if state == "<root>" else f"{state}/"
    if name.startswith(prefix):
      field, _, rest = name.removeprefix(prefix).partition("/")
      if field == "inner":  # of compress
        names = (moment for moment, _ in state_format["moments"])
        moments = tuple(moment.replace(".", "/") for moment in names)
        return "moments" if rest.startswith(moments) else "other"
      return _COMPONENTS.get(field, "other")
  return name.split("/", maxsplit=1)[0]


def _read(
  directory: pathlib.Path, states: Iterable[str]
) -> tuple[dict[str, int], dict[str, int]]:
  """Non-finite elements by array's path, and counts by flash state's path."""
  handler = ocp.PyTreeCheckpointHandler()
  metadata = handler.metadata(directory).tree
  counters = {
    "count" if state == "<root>" else f"{state}/count": state for state in states
  }
  restore_args = jax.tree.map(
    lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata
  )
  treedef: Any
  leaves, treedef = jax.tree.flatten(metadata)
  names = paths.unique_names(metadata)
  nonfinite, counts = {}, {}
  for batch in _batches(dict(zip(names, leaves, strict=True)), counters):
    wanted = treedef.unflatten(
      leaf if name in batch else ocp.PLACEHOLDER
      for name, leaf in zip(names, leaves, strict=True)
    )
    args = ocp.args.PyTreeRestore(wanted, restore_args=restore_args)
    restored = handler.restore(directory, args=args)
    for name, array in zip(names, treedef.flatten_up_to(restored), strict=True):
      if name not in batch:
        continue
      if name in counters:
        counts[counters[name]] = int(array)
      else:
        finite = np.isfinite(array.astype(np.float32, copy=False))
        nonfinite[name] = int(array.size - np.count_nonzero(finite))
  return nonfinite, counts


def _batches(leaves: Mapping[str, Any], counters: Iterable[str]) -> Iterator[set[str]]:
  """Paths of counters and of arrays of floats, a few at a time."""
  batch: set[str] = set()
  filled = 0
  for name, leaf in leaves.items():
    if not hasattr(leaf, "dtype"):  # A text, which plain Orbax saves too.
      continue
    if name not in counters and not jax.numpy.issubdtype(leaf.dtype, np.floating):
      continue
    nbytes = math.prod(leaf.shape) * leaf.dtype.itemsize
    if batch and filled + nbytes > _BATCH:
      yield batch
      batch, filled = set(), 0
    batch.add(name)
    filled += nbytes
  if batch:
    yield batch


def _dtype(name: str) -> np.dtype:
  return jax.numpy.dtype(name)


def _size(nbytes: float) -> str:
  for unit in ("B", "KiB", "MiB"):
    if nbytes < 1024:
      return f"{nbytes:.4g} {unit}"
    nbytes /= 1024
  return f"{nbytes:.4g} GiB"


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
  """Lines of a table: the first column to the left, the others to the right."""
  columns = list(zip(header, *rows, strict=True))
  first, *widths = [max(map(len, column)) for column in columns]
  return [
    "  ".join([row[0].ljust(first), *map(str.rjust, row[1:], widths)])
    for row in (header, *rows)
  ]
