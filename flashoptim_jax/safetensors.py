"""Full-precision parameters in safetensors files.

One file, or several with an index, as Hugging Face's libraries read them. Master
weights are put together and written a block at a time, so that a tree can be
exported that fits into memory only in its compressed form. The format:
https://huggingface.co/docs/safetensors
"""

import contextlib
import functools
import itertools
import json
import math
import os
import pathlib
import struct
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from flashoptim_jax import codec, host_memory, paths, precision

_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8",
    "bool": "BOOL",
}
_BLOCK = 2**22  # Elements that are put together at once.

Rename = Callable[[str], str]


def export_safetensors(
    path: str | os.PathLike,
    params: optax.Params,
    opt_state: optax.OptState,
    *,
    rename: Rename | None = None,
    max_shard_bytes: int | None = None,
) -> None:
  """Writes ``to_fp32(params, opt_state)`` without making it.

  Args:
    path: The file, ``DIRECTORY/NAME.safetensors``. It appears when it is complete.
    params: The parameters, in arrays that this process can read.
    opt_state: The state of the transformation that trains them.
    rename: Gives a tensor's name for a parameter's path, its keys joined by
      slashes. By default the slashes become dots: ``layers.0.kernel``.
    max_shard_bytes: Write several files of at most this size (a larger leaf gets
      its own), ``NAME-00001-of-00003.safetensors`` and so on, and
      ``NAME.safetensors.index.json``, which says what is where. By default one
      file.

  Raises:
    ValueError: If there is no flash state, it does not match ``params``, two
      parameters get one name, or an array is not addressable or of a dtype that
      the format lacks.
  """
  path = _checked(path)
  corrections = precision.corrections(params, opt_state)
  leaves = {
      paths.name(key): jnp.asarray(leaf)
      for key, leaf in jax.tree.leaves_with_path(params)
  }
  names = _names(leaves, rename)
  tensors = {
      names[leaf]: _Tensor(leaf, param, corrections.get(leaf))
      for leaf, param in leaves.items()
  }
  if max_shard_bytes is None:
    _write(path, tensors)
    return
  shards = _shards(tensors, max_shard_bytes)
  index: dict[str, str] = {}
  for i, shard in enumerate(shards, 1):
    file = path.with_name(f"{path.stem}-{i:05}-of-{len(shards):05}{path.suffix}")
    _write(file, shard)
    index |= dict.fromkeys(shard, file.name)
  total = sum(tensor.nbytes for tensor in tensors.values())
  content = {"metadata": {"total_size": total}, "weight_map": index}
  with _replacing(_index_path(path)) as file:
    file.write(json.dumps(content, indent=1).encode())


def import_safetensors(
    path: str | os.PathLike, like: optax.Params, *, rename: Rename | None = None
) -> optax.Params:
  """Reads full-precision parameters, for :func:`flashoptim_jax.from_fp32`.

  Args:
    path: The file, or, of several, the name that their index is called after:
      ``DIRECTORY/NAME.safetensors``, as for :func:`export_safetensors`.
    like: The parameters to read: a tree of arrays or ``jax.ShapeDtypeStruct``s,
      of which structure, shapes and shardings count.
    rename: As for :func:`export_safetensors`.

  Returns:
    The parameters, 16-bit floats widened to float32, with the shardings of
    ``like`` if it has any.

  Raises:
    FileNotFoundError: If a file is missing.
    ValueError: If a file is damaged, or tensors are missing, left over or of
      other shapes. Nothing is loaded then.
  """
  from safetensors import SafetensorError, safe_open

  path = _checked(path)
  leaves = {paths.name(key): leaf for key, leaf in jax.tree.leaves_with_path(like)}
  names = _names(leaves, rename)
  where = _locate(path)
  try:
    files = {
        file: safe_open(file, framework="numpy")
        for file in dict.fromkeys(where.values())
    }
    held = {file: set(opened.keys()) for file, opened in files.items()}
    found = {
        name: tuple(files[file].get_slice(name).get_shape())
        for name, file in where.items()
        if name in held[file]
    }
  except SafetensorError as error:
    raise ValueError(f"{path} is damaged: {error}") from error
  wanted = {names[leaf]: tuple(jnp.shape(array)) for leaf, array in leaves.items()}
  for name in [*wanted, *where]:
    if name not in wanted or found.get(name) != wanted.get(name):
      raise ValueError(
          f"Tensor {name!r} of {path} has shape {found.get(name, 'none')};"
          f" expected {wanted.get(name, 'no such tensor')}."
      )

  def read(key, leaf):
    name = names[paths.name(key)]
    tensor = files[where[name]].get_tensor(name)
    if tensor.dtype.itemsize == 2 and jnp.issubdtype(tensor.dtype, jnp.floating):
      tensor = tensor.astype(np.float32)
    return jax.device_put(tensor, getattr(leaf, "sharding", None))

  return jax.tree.map_with_path(read, like)


class _Tensor:
  """A parameter on its way into a file."""

  def __init__(self, leaf: str, param: jax.Array, correction: Any):
    if not param.is_fully_addressable:
      raise ValueError(
          f"Parameter {leaf!r} lies partly in other processes; expected arrays"
          " that this one can read (jax.experimental.multihost_utils"
          ".process_allgather gathers them)."
      )
    dtype = param.dtype
    if jnp.issubdtype(dtype, jnp.floating):
      dtype = codec.promote_types(dtype, jnp.float32)
    if dtype.name not in _DTYPES:
      raise ValueError(
          f"Parameter {leaf!r} has dtype {dtype.name}; expected one of"
          f" {', '.join(_DTYPES)}."
      )
    self.param, self.dtype = param, dtype
    self.correction = None if correction is None else jnp.asarray(correction)
    self.nbytes = param.size * dtype.itemsize

  def blocks(self) -> Iterator[np.ndarray]:
    """The values in C order, a block at a time."""
    param, correction = host_memory.to_device((self.param, self.correction))
    for start, sizes in _blocks(param.shape, _BLOCK):
      yield np.asarray(_master(param, correction, start, sizes))


@functools.partial(jax.jit, static_argnames="sizes")
def _master(param, correction, start, sizes):
  """A block of the master weights."""
  if param.ndim:
    param = lax.dynamic_slice(param, start, sizes)
    if correction is not None:
      correction = lax.dynamic_slice(correction, start, sizes)
  if not jnp.issubdtype(param.dtype, jnp.floating):
    return param
  return codec.merge(param, correction)


def _blocks(
    shape: tuple[int, ...], limit: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
  """Starts and sizes of blocks that make up an array, in C order."""
  if 0 in shape:
    return
  axis = next(
      (i for i in range(len(shape)) if math.prod(shape[i + 1 :]) <= limit), 0
  )
  rows = max(1, limit // max(1, math.prod(shape[axis + 1 :])))
  if not shape:
    yield (), ()
    return
  for index in itertools.product(*map(range, shape[:axis])):
    for row in range(0, shape[axis], rows):
      rest = len(shape) - axis - 1
      yield (
          (*index, row, *(0,) * rest),
          (*(1,) * axis, min(rows, shape[axis] - row), *shape[axis + 1 :]),
      )


def _write(path: pathlib.Path, tensors: dict[str, _Tensor]) -> None:
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  offset = 0
  for name, tensor in tensors.items():
    header[name] = {
        "dtype": _DTYPES[tensor.dtype.name],
        "shape": list(tensor.param.shape),
        "data_offsets": [offset, offset + tensor.nbytes],
    }
    offset += tensor.nbytes
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)
  with _replacing(path) as file:
    file.write(struct.pack("<Q", len(text)) + text)
    for tensor in tensors.values():
      for block in tensor.blocks():
        file.write(np.ascontiguousarray(block).data)


@contextlib.contextmanager
def _replacing(path: pathlib.Path) -> Iterator[Any]:
  """Opens a file that takes its name, and an older file's place, at the end."""
  partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
  try:
    with partial.open("wb") as file:
      yield file
    partial.replace(path)
  finally:
    partial.unlink(missing_ok=True)


def _shards(
    tensors: dict[str, _Tensor], max_bytes: int
) -> list[dict[str, _Tensor]]:
  if max_bytes < 1:
    raise ValueError(f"max_shard_bytes is {max_bytes}; expected 1 or more.")
  shards: list[dict[str, _Tensor]] = [{}]
  filled = 0
  for name, tensor in tensors.items():
    if filled and filled + tensor.nbytes > max_bytes:
      shards.append({})
      filled = 0
    shards[-1][name] = tensor
    filled += tensor.nbytes
  return shards


def _names(leaves: dict[str, Any], rename: Rename | None) -> dict[str, str]:
  """A tensor's name for each leaf."""
  rename = rename or (lambda leaf: leaf.replace("/", "."))
  names = {leaf: rename(leaf) for leaf in leaves}
  taken: dict[str, str] = {}
  for leaf, name in names.items():
    if name in taken:
      raise ValueError(
          f"Parameters {taken[name]!r} and {leaf!r} both become tensor"
          f" {name!r}; expected different names."
      )
    taken[name] = leaf
  return names


def _locate(path: pathlib.Path) -> dict[str, pathlib.Path]:
  """The file of every tensor."""
  from safetensors import SafetensorError, safe_open

  if path.exists():
    try:
      with safe_open(path, framework="numpy") as file:
        return dict.fromkeys(file.keys(), path)
    except SafetensorError as error:
      raise ValueError(f"{path} is damaged: {error}") from error
  index = _index_path(path)
  if not index.exists():
    raise FileNotFoundError(f"There is neither {path} nor {index}.")
  try:
    entries = json.loads(index.read_bytes())["weight_map"].items()
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(f"{index} is damaged: {error!r}") from error
  where = {name: path.with_name(file) for name, file in entries}
  for file in where.values():
    if not file.exists():
      raise FileNotFoundError(f"{file}, which {index} names, is missing.")
  return where


def _index_path(path: pathlib.Path) -> pathlib.Path:
  return path.with_name(f"{path.name}.index.json")


def _checked(path: str | os.PathLike) -> pathlib.Path:
  path = pathlib.Path(path)
  if path.suffix != ".safetensors":
    raise ValueError(f"path is {str(path)!r}; expected NAME.safetensors.")
  return path
