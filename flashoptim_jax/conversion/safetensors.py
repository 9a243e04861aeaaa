"""Full-precision parameters in safetensors files.

One file, or several with an index, as Hugging Face's libraries read them. Master
weights are put together and written a block at a time, so that a tree can be
exported that fits into memory only in its compressed form. The format:
https://huggingface.co/docs/safetensors
"""

import contextlib
import fnmatch
import functools
import itertools
import json
import math
import os
import pathlib
import re
import secrets
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from flashoptim_jax import paths
from flashoptim_jax.storage import codec, host_memory, precision

_DTYPES = {
  "float64": "F64",
  "float32": "F32",
  "float16": "F16",
  "bfloat16": "BF16",
  "int64": "I64",
  "int32": "I32",
  "int16": "I16",
  "int8": "I8",
  "uint64": "U64",
  "uint32": "U32",
  "uint16": "U16",
  "uint8": "U8",
  "bool": "BOOL",
}
_BLOCK = 2**22  # Elements that are put together at once.
_METADATA = "__metadata__"  # The header's key that is no tensor's.
_MAX_HEADER = 100_000_000  # Bytes; the library reads no more.
# The key, in metadata, of what tells one export's files from another's.
_EXPORT = "flashoptim_export"

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
    path: The file, ``DIRECTORY/NAME.safetensors``. It appears when it is complete,
      and takes the place of an older export, of one file or several. One that is
      interrupted leaves the older export whole.
    params: The parameters, in arrays that this process can read.
    opt_state: The state of the transformation that trains them.
    rename: Gives a tensor's name for a parameter's path, its keys joined by
      slashes. By default the slashes become dots: ``layers.0.kernel``.
    max_shard_bytes: Write several files of at most this size (a larger leaf gets
      its own), ``NAME-00001-of-00003.safetensors`` and so on, and
      ``NAME.safetensors.index.json``, which says what is where. The names differ,
      by a tag, from those of an older export. By default one file.

  Raises:
    ValueError: If there is no flash state, it does not match ``params``, two
      parameters get one name or one gets a name that the format lacks, or an array
      is not addressable or of a dtype that the format lacks.
  """
  path = _checked(path)
  corrections = precision.corrections(params, opt_state)
  names = _names(params, rename)
  tensors = {
    names[key]: _Tensor(paths.name(key), jnp.asarray(leaf), corrections.get(key))
    for key, leaf in jax.tree.leaves_with_path(params)
  }
  index_path = _index_path(path)
  for file in (path, index_path):
    if os.path.lexists(file):
      _require_regular(file)
  older = _older_shards(path)
  if max_shard_bytes is None:
    _write(path, tensors, {})
    # From here on the new file is what is read.
    index_path.unlink(missing_ok=True)
  else:
    files = _write_shards(path, _shards(tensors, max_shard_bytes))
    # From here on the new files are what is read.
    path.unlink(missing_ok=True)
    older = [file for file in older if file not in files]
  for file in older:
    file.unlink(missing_ok=True)


def import_safetensors(
  path: str | os.PathLike,
  like: optax.Params,
  *,
  rename: Rename | None = None,
  ignore_patterns: Sequence[str] = (),
) -> optax.Params:
  """Reads full-precision parameters, for :func:`flashoptim_jax.from_fp32`.

  Args:
    path: The file, or, of several, the name that their index is called after:
      ``DIRECTORY/NAME.safetensors``, as for :func:`export_safetensors`.
    like: The parameters to read: a tree of arrays or ``jax.ShapeDtypeStruct``s,
      of which structure, shapes, dtypes and shardings count. All floats are read
      as float32 (float64 for float64); other dtypes must be the file's.
    rename: As for :func:`export_safetensors`.
    ignore_patterns: Glob patterns (as in :mod:`fnmatch`) on the names of tensors
      in the file that ``like`` lacks, such as ``"lm_head.*"`` where the embedding
      is the head as well. Any other tensor that is left over is an error.

  Returns:
    The parameters, 16-bit floats widened to float32, with the shardings of
    ``like`` if it has any.

  Raises:
    FileNotFoundError: If a file is missing.
    ValueError: If a file is damaged, files are of different exports, there is one
      file and an index of others, or tensors are missing, left over, or of other
      shapes or dtypes. Nothing is loaded then.
  """
  from safetensors import SafetensorError, safe_open

  path = _checked(path)
  names = _names(like, rename)
  where, export = _locate(path)
  files = {}
  found: dict[str, tuple[tuple[int, ...], str]] = {}
  for file in dict.fromkeys(where.values()):
    try:
      files[file] = safe_open(file, framework="numpy")
      metadata = files[file].metadata() or {}
      for name in files[file].keys():  # noqa: SIM118
        if where.get(name) == file:
          stored = files[file].get_slice(name)
          found[name] = tuple(stored.get_shape()), stored.get_dtype()
    except SafetensorError as error:
      raise ValueError(f"{file} is damaged: {error}") from error
    if export is not None and metadata.get(_EXPORT) != export:
      raise ValueError(
        f"{file} is of another export than {_index_path(path)}: found"
        f" {metadata.get(_EXPORT)!r}, expected {export!r}. Export, or copy, all of"
        " the files again."
      )
  dtypes = {}
  for key, leaf in jax.tree.leaves_with_path(like):
    name, shape = names[key], tuple(jnp.shape(leaf))
    dtypes[name], readable = _readable(jnp.result_type(leaf))
    stored_shape, stored_dtype = found.get(name, ("none", None))
    if stored_shape != shape:
      raise ValueError(
        f"Tensor {name!r} of {path} has shape {stored_shape}; expected {shape}."
      )
    if stored_dtype not in readable:
      raise ValueError(
        f"Tensor {name!r} of {path} has dtype {stored_dtype}; expected"
        f" {' or '.join(readable) or 'none'}, for a leaf of"
        f" {jnp.result_type(leaf).name}."
      )
  ignored = precision.patterns(ignore_patterns)
  for name in where:
    if name not in dtypes and not any(fnmatch.fnmatchcase(name, p) for p in ignored):
      raise ValueError(
        f"Tensor {name!r} of {path} has shape {found.get(name, ('none',))[0]};"
        " expected no such tensor. Pass ignore_patterns to leave it out."
      )

  def read(key, leaf):
    name = names[key]
    tensor = files[where[name]].get_tensor(name)
    tensor = tensor.astype(dtypes[name], copy=False)
    return jax.device_put(tensor, getattr(leaf, "sharding", None))

  return jax.tree.map_with_path(read, like)


def _readable(dtype: Any) -> tuple[Any, tuple[str, ...]]:
  """What a leaf of a dtype is read as, and from which of the format's dtypes."""
  stored = _DTYPES.get(_wide(dtype).name)
  if stored is None or not jnp.issubdtype(dtype, jnp.floating):
    return dtype, () if stored is None else (stored,)
  return _wide(dtype), ("F32", "BF16", "F16", *["F64"] * (stored == "F64"))


def _wide(dtype: Any) -> Any:
  """The dtype of a master weight."""
  return jnp.dtype(jnp.float32) if dtype.name in ("bfloat16", "float16") else dtype


class _Tensor:
  """A parameter on its way into a file."""

  def __init__(self, leaf: str, param: jax.Array, correction: Any):
    if not param.is_fully_addressable:
      raise ValueError(
        f"Parameter {leaf!r} lies partly in other processes; expected arrays"
        " that this one can read (jax.experimental.multihost_utils"
        ".process_allgather gathers them)."
      )
    dtype = _wide(param.dtype)
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
  axis = next((i for i in range(len(shape)) if math.prod(shape[i + 1 :]) <= limit), 0)
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


def _write(
  path: pathlib.Path, tensors: dict[str, _Tensor], metadata: dict[str, str]
) -> None:
  header: dict[str, Any] = {_METADATA: {"format": "pt", **metadata}}
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
  if len(text) > _MAX_HEADER:
    raise ValueError(
      f"The header of {path} has {len(text)} bytes, for {len(tensors)} tensors;"
      f" expected at most {_MAX_HEADER}. Pass a smaller max_shard_bytes."
    )
  with _replacing(path) as file:
    file.write(struct.pack("<Q", len(text)) + text)
    for tensor in tensors.values():
      for block in tensor.blocks():
        file.write(np.ascontiguousarray(block).data)


def _write_shards(
  path: pathlib.Path, shards: list[dict[str, _Tensor]]
) -> list[pathlib.Path]:
  """Writes several files and their index, which makes them the ones that are read."""
  export = secrets.token_hex(4)
  files = _shard_files(path, len(shards), export)
  weight_map: dict[str, str] = {}
  try:
    for file, shard in zip(files, shards, strict=True):
      _write(file, shard, {_EXPORT: export})
      weight_map |= dict.fromkeys(shard, file.name)
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    content = {
      "metadata": {"total_size": total, _EXPORT: export},
      "weight_map": weight_map,
    }
    with _replacing(_index_path(path)) as opened:
      opened.write(json.dumps(content, indent=1).encode())
  except BaseException:
    for file in set(files).difference(_older_shards(path)):
      file.unlink(missing_ok=True)
    raise
  return files


@contextlib.contextmanager
def _replacing(path: pathlib.Path) -> Iterator[Any]:
  """Opens a file that takes its name, and an older file's place, at the end."""
  partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
  try:
    with partial.open("wb") as file:
      yield file
      # Lest a crash of the machine leave the name without the content.
      file.flush()
      os.fsync(file.fileno())
    partial.replace(path)
  finally:
    partial.unlink(missing_ok=True)


def _shards(tensors: dict[str, _Tensor], max_bytes: int) -> list[dict[str, _Tensor]]:
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


def _names(tree: Any, rename: Rename | None) -> dict[jax.tree_util.KeyPath, str]:
  """A tensor's name for each leaf."""
  rename = rename or (lambda leaf: leaf.replace("/", "."))
  names = {key: rename(paths.name(key)) for key, _ in jax.tree.leaves_with_path(tree)}
  for key, name in names.items():
    if not isinstance(name, str) or name == _METADATA or not _is_unicode(name):
      raise ValueError(
        f"Parameter {paths.name(key)!r} becomes tensor {name!r}; expected a text"
        f" that UTF-8 has, other than {_METADATA!r}. Pass rename to call it"
        " something else."
      )
  paths.require_distinct(names.items(), "tensor")
  return names


def _is_unicode(text: str) -> bool:
  """Whether UTF-8 has it: it has no lone surrogates."""
  return not re.search("[\ud800-\udfff]", text)


def _locate(path: pathlib.Path) -> tuple[dict[str, pathlib.Path], str | None]:
  """The file of every tensor, and the export that all files must be of, if known."""
  from safetensors import SafetensorError, safe_open

  index = _index_path(path)
  single = os.path.lexists(path)
  if not single and not os.path.lexists(index):
    raise FileNotFoundError(f"There is neither {path} nor {index}.")
  where: dict[str, pathlib.Path] = {}
  export = None
  if os.path.lexists(index):
    where, export = _read_index(path)
    if single and set(where.values()) != {path}:
      raise ValueError(
        f"There are both {path} and {index}; expected one of them. Delete the one"
        " that is out of date."
      )
  if single and not where:
    _require_regular(path)
    try:
      with safe_open(path, framework="numpy") as file:
        return dict.fromkeys(file.keys(), path), None
    except SafetensorError as error:
      raise ValueError(f"{path} is damaged: {error}") from error
  for file in dict.fromkeys(where.values()):
    if not os.path.lexists(file):
      raise FileNotFoundError(f"{file}, which {index} names, is missing.")
    _require_regular(file)
  return where, export


def _read_index(
  path: pathlib.Path,
) -> tuple[dict[str, pathlib.Path], str | None]:
  """What the index of several files says: as :func:`_locate`."""
  index = _index_path(path)
  _require_regular(index)
  try:
    content = json.loads(index.read_bytes(), object_pairs_hook=_unique)
    weight_map = dict(content["weight_map"].items())
    metadata = content.get("metadata")
  # RecursionError: lists in lists in lists.
  except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
    raise ValueError(f"{index} is damaged: {error!r}") from error
  for name, file in weight_map.items():
    is_text = isinstance(file, str) and _is_unicode(file) and "\0" not in file
    if not is_text or not file or pathlib.PurePath(file).name != file:
      raise ValueError(
        f"{index} is damaged: found {file!r} as the file of tensor {name!r};"
        " expected the name of a file beside it."
      )
  export = metadata.get(_EXPORT) if isinstance(metadata, dict) else None
  return {name: path.with_name(file) for name, file in weight_map.items()}, export


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """An object of JSON; raises a ValueError if a key is there twice."""
  found = dict(pairs)
  if len(found) < len(pairs):
    raise ValueError(f"a key of {list(found)[:3]}... is there twice")
  return found


def _require_regular(file: pathlib.Path) -> None:
  if not file.is_file():  # Opening a pipe would wait for ever.
    raise ValueError(
      f"{file} is no regular file, nor a link to one; expected one that"
      " export_safetensors wrote."
    )


def _older_shards(path: pathlib.Path) -> list[pathlib.Path]:
  """The files of an older export of several files, going by their names."""
  if not os.path.lexists(_index_path(path)):
    return []
  try:
    where, _ = _read_index(path)
  except ValueError:  # Not one of ours, then.
    return []
  pattern = re.compile(
    re.escape(path.stem) + r"(-[0-9a-f]{8})?-\d{5}-of-\d{5}\.safetensors"
  )
  return [f for f in dict.fromkeys(where.values()) if pattern.fullmatch(f.name)]


def _shard_files(path: pathlib.Path, count: int, tag: str) -> list[pathlib.Path]:
  """Names for the files of an export; with a tag where the plain ones are taken."""

  def named(stem):
    return [
      path.with_name(f"{stem}-{i:05}-of-{count:05}{path.suffix}")
      for i in range(1, count + 1)
    ]

  plain = named(path.stem)
  return named(f"{path.stem}-{tag}") if any(map(os.path.lexists, plain)) else plain


def _index_path(path: pathlib.Path) -> pathlib.Path:
  return path.with_name(f"{path.name}.index.json")


def _checked(path: str | os.PathLike) -> pathlib.Path:
  path = pathlib.Path(path)
  if path.suffix != ".safetensors":
    raise ValueError(f"path is {str(path)!r}; expected NAME.safetensors.")
  return path
