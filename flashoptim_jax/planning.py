"""What training a model will take of each device, before there is one."""

import dataclasses
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from flashoptim_jax import models, optimizers, paths, sharding
from flashoptim_jax.storage import host_memory, partition_specs
from flashoptim_jax.storage import state as state_lib
from flashoptim_jax.storage.options import Storage

_DEFAULT_STORAGE = Storage()

# GiB that a program can have: of TPUs what XLA's compiler says, of GPUs what the
# driver does. XLA takes 75 % of a GPU's unless XLA_PYTHON_CLIENT_MEM_FRACTION
# says otherwise.
DEVICES: Mapping[str, float] = {
  "a100": 79.2,
  "a100-40gb": 39.4,
  "h100": 79.2,
  "h200": 139.8,
  "v5e": 15.75,
  "v5p": 95.74,
  "v6e": 31.25,
}
# What a mesh axis divides: a role of models.Array's dimensions, or the batch.
_ROLES: Mapping[str, str | None] = {
  **dict.fromkeys(("data", "dp", "replica")),
  "fsdp": models.EMBED,
  **dict.fromkeys(("tp", "tensor", "model"), models.WIDE),
  **dict.fromkeys(("ep", "expert"), models.EXPERT),
}
_LEFT_OUT = (
  "activations, the batch and the compiler's temporaries, such as weights"
  " gathered from other devices for a layer",
  "the bf16 copy of float32 weights to compute with, 2 bytes per parameter if"
  " it is made all at once",
)


@dataclasses.dataclass(frozen=True)
class Row:
  """Bytes of one device with one optimizer.

  Attributes:
    name: The optimizer, and how it is used.
    params: Bytes of the parameters.
    state: Bytes of the optimizer state that stays on the device.
    gradients: Bytes of the gradients that exist at one time.
    in_flight: Bytes of state from host memory that are on the device for an
      update.
    host: Bytes of the optimizer state in host memory.
  """

  name: str
  params: int
  state: int
  gradients: int
  in_flight: int = 0
  host: int = 0

  @property
  def total(self) -> int:
    """Bytes on the device."""
    return self.params + self.state + self.gradients + self.in_flight


@dataclasses.dataclass(frozen=True)
class Plan:
  """Memory of one device of a mesh. Prints as a table.

  Attributes:
    model: Name of the model.
    num_params: Number of its parameters.
    mesh: Devices along each axis.
    device: The kind of device.
    device_bytes: Its memory.
    rows: One for each way to train.
    notes: What is particular about this model on this mesh.
    left_out: What the bytes do not include.
  """

  model: str
  num_params: int
  mesh: Mapping[str, int]
  device: str
  device_bytes: int
  rows: tuple[Row, ...]
  notes: tuple[str, ...]
  left_out: tuple[str, ...]

  def left(self, row: Row) -> int:
    """Bytes that a row leaves for what the plan leaves out; negative if none."""
    return self.device_bytes - row.total

  def to_json(self) -> dict[str, Any]:
    """The plan in types that JSON has, sizes in bytes."""
    rows = [
      {
        **dataclasses.asdict(row),
        "total": row.total,
        "left": self.left(row),
        "fits": self.left(row) > 0,
      }
      for row in self.rows
    ]
    return {**dataclasses.asdict(self), "rows": rows}

  def __str__(self) -> str:
    axes = ", ".join(f"{name}={size}" for name, size in self.mesh.items())
    count = math.prod(self.mesh.values())
    large = max(row.total for row in self.rows) >= 2**30
    unit, scale = ("GiB", 2**30) if large else ("MiB", 2**20)
    wide = max(32, *(len(row.name) + 1 for row in self.rows))
    lines = [
      f"{self.model}: {self.num_params:,} parameters on"
      f" {count} {'device' if count == 1 else f'devices ({axes})'}",
      f"{self.device}: {self.device_bytes / 2**30:.2f} GiB each",
      "",
      f"{f'{unit} per device':{wide}}{'params':>9}{'state':>9}{'gradients':>11}"
      f"{'in flight':>11}{'total':>9}{'left':>9}  fits",
    ]
    for row in self.rows:
      sizes = (row.params, row.state, row.gradients, row.in_flight, row.total)
      cells = [f"{size / scale:.2f}" for size in (*sizes, self.left(row))]
      widths = (9, 9, 11, 11, 9, 9)
      lines.append(
        f"{row.name:{wide}}"
        + "".join(map(str.rjust, cells, widths))
        + f"  {'yes' if self.left(row) > 0 else 'no'}"
      )
    lines += ["", *self.notes]
    lines += [f"Not counted: {what}." for what in self.left_out]
    return "\n".join(lines)


def plan(
  model: models.Model,
  mesh: Mapping[str, int],
  device: str,
  storage: Storage = _DEFAULT_STORAGE,
) -> Plan:
  """Says what a model's parameters, optimizer state and gradients take.

  Nothing is allocated: the shapes are the model's, the state is that of the
  transformation's own ``init``, and each array is divided as
  :func:`flashoptim_jax.state_shardings` does. Weights are divided over ``fsdp``
  along the residual stream and over ``tp`` along heads, the MLP and the
  vocabulary, where the sizes divide; norms are replicated.

  Args:
    model: From :func:`flashoptim_jax.models.load`.
    mesh: Devices along each axis: ``fsdp``; ``tp``, ``tensor`` or ``model``;
      ``ep`` or ``expert``; ``data``, ``dp`` or ``replica``.
    device: A key of ``DEVICES``, or a size such as ``"24GiB"`` or ``"80GB"``.
    storage: How ``adamw`` stores its state.

  Returns:
    The plan: ``optax.adamw`` on float32 parameters, with float32 gradients, and
    ``adamw`` on bfloat16 parameters, with bfloat16 gradients, alone, with
    gradient release, and with its state in host memory.

  Raises:
    ValueError: For an axis or device that is not known, or a size below 1.

  Examples:
    >>> from flashoptim_jax import models, planning
    >>> found = planning.plan(models.load("gpt2"), {"fsdp": 4}, "v5e")
    >>> [row.name for row in found.rows if found.left(row) < 0]
    []
  """
  device_bytes = _device_bytes(device)
  _check_mesh(mesh)
  tx = optimizers.adamw(1e-3, storage=storage)
  name = "fo.adamw"
  if storage != _DEFAULT_STORAGE:
    name += f" {storage.master_bits}/{storage.moment_bits}".lower()

  def placed(dtype, transformation):
    layers = model.num_layers
    return _Placed(model.parts, layers, mesh, dtype, transformation)

  usual = placed(jnp.float32, optax.adamw(1e-3))
  ours = placed(jnp.bfloat16, tx)
  stacked = _Placed(model.stacked_parts, 1, mesh, jnp.bfloat16, tx)
  baseline = Row(
    "optax.adamw, float32",
    usual.params_bytes,
    usual.state_bytes,
    usual.params_bytes,
  )
  flash = Row(name, ours.params_bytes, ours.state_bytes, ours.params_bytes)
  released = dataclasses.replace(
    flash,
    name=f"{name}, gradient release",
    gradients=ours.released_gradients(model.tied),
  )
  in_flight, host = ours.hosted_bytes()
  offloaded = dataclasses.replace(
    flash,
    name=f"{name}, state on the host",
    state=flash.state - host,
    in_flight=in_flight,
    host=host,
  )
  return Plan(
    model=model.name,
    num_params=model.num_params,
    mesh=dict(mesh),
    device=device,
    device_bytes=device_bytes,
    rows=(baseline, flash, released, offloaded),
    notes=tuple(_notes(model, stacked, offloaded)),
    left_out=(*model.left_out, *_LEFT_OUT),
  )


def parse_mesh(text: str) -> dict[str, int]:
  """Reads a mesh such as ``fsdp=32,tp=8``.

  Raises:
    ValueError: If it is written in another way.
  """
  mesh: dict[str, int] = {}
  for part in text.split(","):
    name, _, size = part.partition("=")
    name = name.strip()
    if not re.fullmatch(r" *[0-9]{1,20} *", size) or name in mesh:
      raise ValueError(
        f"Mesh {text!r}: found {part!r}; expected axes once each, such as fsdp=32,tp=8."
      )
    mesh[name] = int(size)
  return mesh


def parse_storage(text: str) -> Storage:
  """Reads bits of master weights and of moments, such as ``16,8`` or ``none,8``.

  Raises:
    ValueError: If it is written in another way, or no storage has as many.
  """
  found = re.fullmatch(r" *(none|[0-9]{1,3}) *, *([0-9]{1,3}) *", text, re.IGNORECASE)
  if found is None:
    raise ValueError(
      f"Storage {text!r}: expected bits of master weights and of moments, such as"
      " 24,8 or none,8."
    )
  master, moment = found.groups()
  bits: Any = None if master.lower() == "none" else int(master)
  moment_bits: Any = int(moment)
  return Storage(bits, moment_bits)


class _Placed:
  """Parameters and state of a transformation on a mesh: bytes on a device."""

  def __init__(
    self,
    arrays: Mapping[str, Mapping[str, models.Array]],
    num_layers: int,
    mesh: Mapping[str, int],
    dtype: Any,
    tx: optax.GradientTransformation,
  ):
    """Places the parameters by their roles, and the state by the parameters.

    Args:
      arrays: Parameters by part: before, in and after the layers.
      num_layers: How often those of ``"layers"`` occur.
      mesh: Devices along each axis.
      dtype: The parameters' dtype.
      tx: The transformation.
    """
    abstract = AbstractMesh(tuple(mesh.values()), tuple(mesh))
    self.uneven: list[str] = []
    placed = jax.tree.map_with_path(
      lambda path, array: self._place(path, array, abstract),
      arrays,
      is_leaf=_is_array,
    )
    types = jax.tree.map(
      lambda array: jax.ShapeDtypeStruct(array.shape, dtype),
      arrays,
      is_leaf=_is_array,
    )
    with warnings.catch_warnings(record=True) as caught:
      warnings.simplefilter("always")
      shardings = sharding.state_shardings(tx, types, placed)
    self.warnings = tuple(str(warning.message) for warning in caught)
    self._num_layers = num_layers
    self._param_sizes = jax.tree.map(_shard_bytes, types, placed)
    state = jax.eval_shape(tx.init, types)
    self._state_sizes = jax.tree.map(_shard_bytes, state, shardings)

  def _place(self, path: Any, array: models.Array, mesh: AbstractMesh) -> NamedSharding:
    axes = [
      tuple(n for n in mesh.axis_names if role and _ROLES[n] == role) or None
      for role in array.roles
    ]
    wanted = PartitionSpec(*axes)
    spec = partition_specs.divisible(mesh, wanted, array.shape)
    if spec != wanted:
      self.uneven.append(paths.name(path))
    return NamedSharding(mesh, spec)

  def _all_layers(self, sizes: Any) -> int:
    return sum(
      size * (self._num_layers if "layers" in paths.name(path).split("/") else 1)
      for path, size in jax.tree.leaves_with_path(sizes)
    )

  @property
  def params_bytes(self) -> int:
    """Bytes of the parameters."""
    return self._all_layers(self._param_sizes)

  @property
  def state_bytes(self) -> int:
    """Bytes of the state."""
    return self._all_layers(self._state_sizes)

  def released_gradients(self, tied: bool) -> int:
    """The largest call's gradients, and those of a leaf that several calls use."""
    calls = {part: dict(sizes) for part, sizes in self._param_sizes.items()}
    held = calls["embed"].pop("tokens") if tied else 0
    return held + max(sum(call.values()) for call in calls.values())

  def hosted_bytes(self) -> tuple[int, int]:
    """With state in host memory: bytes on the device at a time, and on the host."""
    (state,) = state_lib.flash_states(self._state_sizes)
    trees = [
      tree
      for moment in state_lib.stored_moments(state)
      for tree in (moment.values, moment.scales)
      if tree is not None
    ]
    if state.format.storage.has_corrections:
      trees.append(state.correction)
    # By parameter, in the order of the updates.
    parts = jax.tree.map(lambda *sizes: sum(jax.tree.leaves(sizes)), *trees)
    first, layer, last = (
      jax.tree.leaves(parts[part]) for part in ("embed", "layers", "top")
    )
    # More layers have no more kinds of neighbours.
    at_once = host_memory.IN_FLIGHT
    leaves = [*first, *layer * min(self._num_layers, at_once + 1), *last]
    windows = range(max(1, len(leaves) - at_once + 1))
    return (
      max(sum(leaves[i : i + at_once]) for i in windows),
      sum(first) + self._num_layers * sum(layer) + sum(last),
    )


def _is_array(node: Any) -> bool:
  return isinstance(node, models.Array)


def _shard_bytes(leaf: jax.ShapeDtypeStruct, placed: NamedSharding) -> int:
  return math.prod(placed.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _notes(model: models.Model, stacked: _Placed, offloaded: Row) -> Iterator[str]:
  if model.tied:
    yield (
      "The embedding is the head as well: with gradient release its whole"
      " gradient is held."
    )
  if stacked.uneven:
    yield (
      f"The mesh does not divide {', '.join(stacked.uneven)}: kept whole along"
      " the axes that don't."
    )
  yield from stacked.warnings
  in_flight, _ = stacked.hosted_bytes()
  yield (
    "With layers stacked for jax.lax.scan, state on the host has"
    f" {in_flight / 2**30:.2f} GiB in flight instead of"
    f" {offloaded.in_flight / 2**30:.2f}."
  )


def _check_mesh(mesh: Mapping[str, int]) -> None:
  for name, size in mesh.items():
    if name not in _ROLES:
      raise ValueError(
        f"Mesh axis {name!r} is not known; expected one of {', '.join(_ROLES)}."
      )
    if not 1 <= size <= models.MAX_SIZE:
      raise ValueError(
        f"Mesh axis {name!r} has size {size}; expected 1 or more, at most"
        f" {models.MAX_SIZE}."
      )
  if math.prod(mesh.values()) > models.MAX_SIZE:
    raise ValueError(
      f"The mesh {dict(mesh)} has {math.prod(mesh.values())} devices; expected at"
      f" most {models.MAX_SIZE}."
    )


def _device_bytes(device: str) -> int:
  if device.lower() in DEVICES:
    return int(DEVICES[device.lower()] * 2**30)
  found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?(Gi?B)", device)
  if found is None:
    raise ValueError(
      f"Device {device!r} is not known; expected one of {', '.join(DEVICES)}, or"
      " a size such as 24GiB."
    )
  return int(float(found[1]) * (2**30 if found[2] == "GiB" else 10**9))
