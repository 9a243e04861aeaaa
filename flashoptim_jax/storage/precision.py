"""Precision in and out: parameters and master weights."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flashoptim_jax import paths
from flashoptim_jax.storage import aliasing, codec, host_memory
from flashoptim_jax.storage import state as state_lib
from flashoptim_jax.storage.state import AnyState, CompressedState


def cast_params(
  params: optax.Params, dtype: Any, keep: Sequence[str] = ()
) -> optax.Params:
  """Casts floating-point parameters, but for the leaves to keep.

  Args:
    params: Any tree; leaves that are not floating point, or no arrays, are left
      alone.
    dtype: The new dtype.
    keep: Glob patterns (as in :mod:`fnmatch`) on a leaf's path, its keys joined
      by slashes: ``"*norm*"`` keeps ``layers/0/norm/scale``, ``"head/*"`` all
      of the head.

  Returns:
    The tree with its leaves cast. It shares no array with ``params``.

  Raises:
    ValueError: If ``dtype`` is not floating point.
  """
  _check_float(dtype)
  keep = patterns(keep)

  def cast(path, leaf):
    if not paths.is_array(leaf):
      return leaf
    if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
      return leaf
    return leaf if paths.matches(path, keep) else jnp.asarray(leaf).astype(dtype)

  return aliasing.apart(jax.tree.map_with_path(cast, params), params)


def from_fp32(
  tx: optax.GradientTransformation,
  params_fp32: optax.Params,
  dtype: Any = jnp.bfloat16,
  keep: Sequence[str] = (),
) -> tuple[optax.Params, optax.OptState]:
  """Starts training from float32 parameters without rounding them away.

  Args:
    tx: A transformation with flash optimizers in it.
    params_fp32: float32 parameters.
    dtype: The dtype to train in.
    keep: Leaves that stay as they are, see :func:`cast_params`.

  Returns:
    The parameters in ``dtype`` and the transformation's state, whose corrections
    hold what the cast rounded off (as far as ``Storage.master_bits`` goes). They
    share no array with ``params_fp32``, nor with each other, so that both may be
    donated.

  Raises:
    ValueError: If ``tx`` contains no flash optimizer, or for a bad dtype.
  """
  params = cast_params(params_fp32, dtype, keep)
  opt_state = _start_from_masters(tx, params_fp32, tx.init(params))
  return aliasing.apart(split_masters(params_fp32, params, opt_state), params_fp32)


def _start_from_masters(
  tx: optax.GradientTransformation, masters: optax.Params, opt_state: Any
) -> optax.OptState:
  """A state whose transformations in ``compress`` start from master weights.

  Some keep copies of the parameters, or what they computed from them.
  """

  def is_compressed(node):
    return isinstance(node, CompressedState)

  nodes = jax.tree.leaves(opt_state, is_leaf=state_lib.is_flash_state)
  if not any(map(is_compressed, nodes)):
    return opt_state
  return jax.tree.map(
    lambda node, wide: (
      wide._replace(correction=node.correction) if is_compressed(node) else node
    ),
    opt_state,
    tx.init(masters),
    is_leaf=state_lib.is_flash_state,
  )


def split_masters(
  masters: optax.Params, params: optax.Params, opt_state: optax.OptState
) -> tuple[optax.Params, optax.OptState]:
  """Puts master weights into parameters and the corrections of a state.

  Args:
    masters: The master weights, of the structure of ``params``.
    params: Parameters, of which those with a correction are replaced.
    opt_state: A state with flash states in it; its corrections are replaced and
      may be ``jax.ShapeDtypeStruct``s.

  Returns:
    The parameters and the state.

  Raises:
    ValueError: If there is no flash state.
  """
  state_lib.flash_states(opt_state)
  wide = state_lib.by_path(masters)
  rounded = state_lib.by_path(params)

  def correct(state: AnyState) -> AnyState:
    def split(path, correction):
      del correction
      master = jnp.asarray(wide[path]).astype(jnp.float32)
      bits = state.format.storage.master_bits
      # Not a cast's rounding: a tie must go where the correction can reach.
      rounded[path], rest = codec.split(master, rounded[path].dtype, bits)
      return rest

    correction = jax.tree.map_with_path(split, state.correction)
    return state._replace(correction=correction)

  opt_state = state_lib.map_flash_states(correct, opt_state)
  treedef: Any = jax.tree.structure(params)
  return treedef.unflatten(rounded.values()), opt_state


def to_fp32(params: optax.Params, opt_state: optax.OptState) -> optax.Params:
  """The master weights: parameters and corrections put together.

  Args:
    params: The parameters.
    opt_state: The state of the transformation that trains them; flash states
      are found in any nesting.

  Returns:
    ``params`` with 16-bit floating-point leaves in float32; leaves that no flash
    optimizer holds a correction for are cast, other leaves returned as they are. The
    result shares no array with ``params``. On explicit mesh axes, master weights are
    sharded as the corrections.

  Raises:
    ValueError: If there is no flash state, or it does not match ``params``.
  """
  known = corrections(params, opt_state)

  def merge(path, param):
    if not paths.is_array(param):
      return param
    param = jnp.asarray(param)
    if not jnp.issubdtype(param.dtype, jnp.floating):
      return param
    correction = host_memory.to_device(known.get(path))
    # A state brought back from a checkpoint may hold NumPy arrays.
    correction = None if correction is None else jnp.asarray(correction)
    return codec.merge(param, correction)

  return aliasing.apart(jax.tree.map_with_path(merge, params), params)


def corrections(
  params: optax.Params, opt_state: optax.OptState
) -> dict[jax.tree_util.KeyPath, jax.Array]:
  """The corrections that all flash states hold, by their parameter's path.

  Raises:
    ValueError: If there is no flash state, or it does not match ``params``.
  """
  found: dict[jax.tree_util.KeyPath, jax.Array] = {}
  for state in state_lib.flash_states(opt_state):
    found.update(state_lib.by_path(state.correction))
  known = state_lib.by_path(params)
  for path, correction in found.items():
    leaf = paths.name(path)
    if path not in known:
      raise ValueError(f"opt_state has a correction for {leaf!r}, which params lacks.")
    if correction.shape != jnp.shape(known[path]):
      raise ValueError(
        f"Parameter {leaf!r} has shape {jnp.shape(known[path])}, its"
        f" correction {correction.shape}; expected the same."
      )
  return found


def _check_float(dtype: Any) -> None:
  if not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(f"dtype is {dtype!r}; expected a floating-point dtype.")


def patterns(globs: Sequence[str]) -> tuple[str, ...]:
  """Glob patterns, of which one may be given alone."""
  return (globs,) if isinstance(globs, str) else tuple(globs)
