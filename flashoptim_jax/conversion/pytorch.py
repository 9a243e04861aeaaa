"""Arriving from FlashOptim for PyTorch: its state dicts, read into ours.

The format is that of ``flashoptim`` 0.1.4 (https://arxiv.org/abs/2602.23349).
Moments are cut into groups of 32 of the flattened tensor, each with a float16
scale s, and a code q decodes to n/(2-|n|)·s with n = q/127 (first moments) or
(q/255·s)² (second moments). A master weight is x + e/E·u/2, with x the 16-bit
parameter, e the error bits, E their largest value (127 or 32767) and u the
distance from |x| to the next larger number of its dtype. PyTorch casts an
optimizer's state to the parameter's dtype, so a state dict has int8 error bits
as numbers of that dtype, and int16 error bits and float16 scales as its bits.
"""

import collections
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax

from flashoptim_jax.storage import precision
from flashoptim_jax.storage import state as state_lib
from flashoptim_jax.storage.moments import encode_fields
from flashoptim_jax.storage.state import FlashState

_GROUP = 32
_FIRST = ("exp_avg", "momentum_buffer")
_SECOND = ("exp_avg_sq",)
# Mantissa bits and smallest exponent of the dtypes that have error bits.
_FLOAT16 = {"bfloat16": (7, -126), "float16": (10, -14)}


@dataclasses.dataclass(frozen=True)
class Decoded:
  """A PyTorch FlashOptim checkpoint in float32, by parameter name.

  Attributes:
    masters: Master weights.
    moments: ``{"mu": ..., "nu": ...}``, those that the optimizer keeps.
    count: Updates done so far, or None where the optimizer doesn't count.
  """

  masters: dict[str, np.ndarray]
  moments: dict[str, dict[str, np.ndarray]]
  count: int | None


def load_pytorch(path: str | os.PathLike) -> Any:
  """Reads what ``torch.save`` wrote, tensors as NumPy arrays.

  Needs PyTorch. Nothing is unpickled but tensors and plain containers
  (``weights_only=True``).

  Args:
    path: The file.

  Returns:
    The dictionaries and lists that were saved, arrays on the host.
  """
  import torch

  return _to_numpy(torch.load(path, map_location="cpu", weights_only=True))


def from_pytorch(
  tx: optax.GradientTransformation,
  model_state: Mapping[str, Any],
  optimizer_state: Mapping[str, Any],
  *,
  names: Sequence[str] | None = None,
  to_tree: Callable[[dict[str, np.ndarray]], optax.Params] | None = None,
  dtype: Any = jnp.bfloat16,
  keep: Sequence[str] = (),
  count: int | None = None,
) -> tuple[optax.Params, optax.OptState]:
  """Takes over a run of FlashOptim for PyTorch.

  Args:
    tx: The transformation to go on with: ``adamw`` or ``adam`` for ``FlashAdamW``
      and ``FlashAdam``, ``lion`` for ``FlashLion``, ``sgd`` for ``FlashSGD`` and
      ``FlashSGDW``, in any storage.
    model_state: The model's ``state_dict()``, of tensors or NumPy arrays
      (:func:`load_pytorch`).
    optimizer_state: The optimizer's ``state_dict()``, quantized or not.
    names: Names in ``model_state`` of the optimizer's parameters, in the order
      that the optimizer got them in, group by group. By default what the groups
      say (``param_names``), or all names in ``model_state``.
    to_tree: Makes a tree for JAX from arrays by PyTorch's names: renames,
      transposes, stacks. It is called for the master weights and for each moment.
      By default the tree is the dictionary.
    dtype: The dtype to train in.
    keep: Leaves that stay float32, see :func:`flashoptim_jax.cast_params`.
    count: Updates done so far. By default Adam's own; 0 for the others, which
      don't count.

  Returns:
    The parameters in ``dtype`` and the state for ``tx``: master weights and
    moments in its storage. States of other transformations are initial.

  Raises:
    ValueError: If the two state dicts don't fit together, one of them holds what
      FlashOptim does not write, or the optimizer is another than that of ``tx``.
  """
  decoded = decode(model_state, optimizer_state, names)
  to_tree = to_tree or dict
  masters = jax.tree.map(jnp.asarray, to_tree(decoded.masters))
  params, opt_state = precision.from_fp32(tx, masters, dtype, keep)
  known = {
    name: state_lib.by_path(to_tree(moment)) for name, moment in decoded.moments.items()
  }
  count = (decoded.count or 0) if count is None else _steps(count, "count")

  def fill(state: FlashState) -> FlashState:
    wanted = [name for name, _ in state.format.moments]
    if set(wanted) != set(known):
      raise ValueError(
        f"The PyTorch optimizer keeps {sorted(known) or 'no moments'};"
        f" {state.format} keeps {wanted or 'no moments'}."
      )
    moments = {
      name: jax.tree.map_with_path(
        lambda path, _, name=name: known[name][path],
        getattr(state, name),
      )
      for name in wanted
    }
    return state._replace(
      count=jnp.int32(count), **encode_fields(moments, state.format)
    )

  return params, state_lib.map_flash_states(fill, opt_state)


def decode(
  model_state: Mapping[str, Any],
  optimizer_state: Mapping[str, Any],
  names: Sequence[str] | None = None,
) -> Decoded:
  """Decodes a checkpoint, see :func:`from_pytorch`."""
  groups, states = _parts(optimizer_state)
  indices = [index for group in groups for index in group["params"]]
  names = _names(model_state, groups, names)
  widths = [
    group.get("master_bytewidth", 0) for group in groups for _ in group["params"]
  ]
  masters = {name: _numbers(value, name) for name, value in model_state.items()}
  found: dict[str, dict[str, np.ndarray]] = {"mu": {}, "nu": {}}
  counts = set()
  with_state = set()
  for name, index, width in zip(names, indices, widths, strict=True):
    if name not in masters:
      raise ValueError(f"The model's state has no parameter {name!r}.")
    param = masters[name]
    state = {
      key: _to_numpy(value)
      for key, value in states.get(index, {}).items()
      if value is not None
    }
    for moment, keys in (("mu", _FIRST), ("nu", _SECOND)):
      values = _moment(state, keys, param, name)
      if values is not None:
        found[moment][name] = values
    if state:
      with_state.add(name)
    if "step" in state:
      counts.add(_steps(state["step"], f"step of {name!r}"))
    masters[name] = _master(param, state.get("error_bits"), width, name)
  for name, value in masters.items():
    if jnp.issubdtype(value.dtype, jnp.floating) and value.dtype.itemsize == 2:
      masters[name] = value.astype(np.float32)
  if len(counts) > 1:
    raise ValueError(f"Parameters have done different numbers of steps: {counts}.")
  moments = {moment: values for moment, values in found.items() if values}
  for moment, kept in moments.items():
    for name, master in masters.items():
      if name not in kept and name in with_state:
        raise ValueError(
          f"The optimizer's state of {name!r} has no {moment}, and other"
          " parameters' have one; expected the same of all."
        )
      # A parameter that has had no gradient has no state.
      kept.setdefault(name, np.zeros(master.shape, np.float32))
  return Decoded(masters, moments, counts.pop() if counts else None)


def _parts(optimizer_state: Mapping[str, Any]) -> tuple[Any, Mapping[Any, Any]]:
  """The groups of an optimizer's state dict, and the states of its parameters."""
  for key in ("param_groups", "state"):
    if key not in optimizer_state:
      raise ValueError(
        f"The optimizer's state has no {key!r}; expected an optimizer's state_dict()."
      )
  groups, states = optimizer_state["param_groups"], optimizer_state["state"]
  indices = [index for group in groups for index in group["params"]]
  _require_unique("the parameters of the optimizer's groups", indices)
  if unknown := states.keys() - set(indices):
    raise ValueError(
      f"The optimizer has a state for parameter {unknown.pop()!r}, which none of"
      " its groups has."
    )
  return groups, states


def _numbers(value: Any, name: str) -> np.ndarray:
  array = np.asarray(_to_numpy(value))
  if not jnp.issubdtype(array.dtype, jnp.number) and array.dtype != bool:
    raise ValueError(
      f"The model's {name!r} is an array of {array.dtype}; expected numbers."
    )
  return array


def _require_unique(what: str, values: Sequence[Any]) -> None:
  counted = collections.Counter(values)
  if twice := [value for value, count in counted.items() if count > 1]:
    raise ValueError(
      f"{twice[0]!r} is {counted[twice[0]]} times among {what}; expected each once."
    )


def _steps(value: Any, what: str) -> int:
  """A number of steps, as the state's count can be."""
  if np.ndim(value) == 0 and 0 <= value <= np.iinfo(np.int32).max and value % 1 == 0:
    return int(value)
  raise ValueError(
    f"The {what} is {value}; expected a whole number, at least 0 and at most"
    f" {np.iinfo(np.int32).max}."
  )


def _names(model_state, groups, names) -> list[str]:
  """The optimizer's parameters, in its order."""
  if names is None and all("param_names" in group for group in groups):
    names = [name for group in groups for name in group["param_names"]]
  names = list(model_state if names is None else names)
  count = sum(len(group["params"]) for group in groups)
  if len(names) != count:
    raise ValueError(
      f"The optimizer has {count} parameters and there are {len(names)} names;"
      " expected as many. Pass names in the optimizer's order."
    )
  _require_unique("names", names)
  return names


def _to_numpy(value: Any) -> Any:
  """PyTorch tensors, in containers or alone, as NumPy arrays."""
  # Not jax.tree.map, which sorts a dictionary's keys: their order has a meaning.
  if isinstance(value, Mapping):
    return {key: _to_numpy(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return type(value)(map(_to_numpy, value))
  if type(value).__module__.split(".")[0] != "torch" or not hasattr(value, "dtype"):
    return value
  import torch

  value = value.detach().cpu()
  if value.dtype == torch.bfloat16:  # NumPy has no such type of its own.
    return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
  return value.numpy()


def _moment(state, keys, param, name) -> np.ndarray | None:
  """A moment in float32, of the parameter's shape; None if there is none."""
  for key in keys:
    if f"{key}::scales" in state and f"{key}::quantized" not in state:
      raise ValueError(f"The {key} of {name!r} has scales and no codes.")
    if key in state:
      values = np.asarray(state[key]).astype(np.float32)
    elif f"{key}::quantized" in state:
      codes = np.asarray(state[f"{key}::quantized"])
      scales = np.asarray(state.get(f"{key}::scales", ()))
      groups = -(-codes.size // _GROUP)
      if scales.size != groups:
        raise ValueError(
          f"The {key} of {name!r} has {scales.size} scales for {codes.size} codes;"
          f" expected {groups}, one for each {_GROUP}."
        )
      values = _dequantized(codes, scales, signed=keys is _FIRST)
    else:
      continue
    if values.shape != param.shape:
      raise ValueError(
        f"The {key} of {name!r} has shape {values.shape}; expected"
        f" {param.shape}. (Is the order of names the optimizer's?)"
      )
    return values
  return None


def _dequantized(codes, scales, signed: bool) -> np.ndarray:
  if scales.dtype == ml_dtypes.bfloat16:
    scales = scales.view(np.float16)
  scales = np.repeat(scales.astype(np.float32), _GROUP)[: codes.size]
  scales = scales.reshape(codes.shape)
  # The cast tells signed from unsigned codes, should PyTorch have made floats.
  if signed:
    n = codes.astype(np.int8).astype(np.float32) / _levels(np.int8)
    return n / (2 - np.abs(n)) * scales
  n = codes.astype(np.uint8).astype(np.float32) / _levels(np.uint8)
  return np.square(n * scales)


def _levels(dtype) -> np.float32:
  return np.float32(np.iinfo(dtype).max)


def _master(param, errors, width: int, name: str) -> np.ndarray:
  """The master weights of a parameter, given its error bits or None."""
  if errors is None:
    return param
  if param.dtype.name not in _FLOAT16 or width not in (3, 4):
    raise ValueError(
      f"Parameter {name!r} of dtype {param.dtype.name} has error bits for"
      f" {width} bytes; expected bfloat16 or float16, and 3 or 4."
    )
  errors = np.asarray(errors)
  # In four bytes they are the bits of numbers of two.
  fits = width == 3 or errors.dtype.itemsize == 2
  if errors.shape != param.shape or not fits:
    raise ValueError(
      f"The error bits of {name!r} have shape {errors.shape} and dtype"
      f" {errors.dtype}; expected {param.shape}, as the parameter, and"
      f" {param.dtype} or int{8 * (width - 2)}."
    )
  if width == 3:
    whole = np.rint(errors.astype(np.float32))
    if not ((whole == errors) & (np.abs(whole) <= 128)).all():
      raise ValueError(
        f"The error bits of {name!r} are not all whole numbers of one byte."
      )
    errors = errors.astype(np.int8)
  else:
    errors = errors.view(np.int16)
  mantissa, smallest = _FLOAT16[param.dtype.name]
  wide = param.astype(np.float32)
  # frexp's exponents belong to magnitudes in [0.5, 1).
  exponent = np.maximum(np.frexp(wide)[1] - 1, smallest)
  exponent = np.where(wide == 0, smallest, exponent)
  fraction = errors.astype(np.float32) / _levels(errors.dtype)
  return wide + np.ldexp(fraction, exponent - mantissa - 1)
