"""Shardings of the optimizer state, derived from those of the parameters."""

import types
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from flashoptim_jax import paths
from flashoptim_jax.storage import codec, partition_specs, scale_gaps
from flashoptim_jax.storage import state as state_lib
from flashoptim_jax.update.transform import PARAM_SHARDINGS

# Arrays whose shards may cut groups.
_CODES = tuple(codec.CODE_DTYPE.values())
_NAMED_AT_MOST = 8  # parameters in a warning


class _Param(NamedTuple):
  """What a parameter's sharding says about the state's arrays."""

  shape: tuple[int, ...]
  sharding: Sharding


def state_shardings(
  tx: optax.GradientTransformation,
  params: optax.Params,
  param_shardings: Any,
  memory_kind: str | None = None,
) -> Any:
  """Shardings for every array of a transformation's state.

  For ``jax.jit``'s ``in_shardings`` and ``out_shardings``, ``jax.device_put`` and
  restoring checkpoints::

    shardings = fo.state_shardings(tx, params, param_shardings)
    opt_state = jax.jit(tx.init, out_shardings=shardings)(params)

  An array that belongs to a parameter (it lies at the parameter's path, in any
  nesting of transformations, and has its rank) is sharded as the parameter is,
  less the mesh axes that don't divide it; all others are replicated.

  Args:
    tx: The transformation.
    params: The parameters: arrays or ``jax.ShapeDtypeStruct``s.
    param_shardings: Their shardings (``jax.sharding.Sharding``), in a tree that
      ``params``' structure extends: one sharding may stand for a whole subtree.
    memory_kind: Where flash optimizers keep the arrays that belong to a
      parameter, such as ``"pinned_host"``; by default with the parameter.
      ``update`` and ``step`` bring a leaf that is kept on the host to the device
      and send it back, a few leaves at a time.

  Returns:
    A tree of the state's structure, of shardings.

  Raises:
    ValueError: If ``param_shardings`` is not a prefix of ``params`` or holds
      something other than shardings.

  Warns:
    UserWarning: Once, naming the parameters whose shards cut a group of their
      moments. Their update is as exact as any other's, but has to communicate;
      under ``jax.jit`` with auto axes, give these shardings as
      ``out_shardings`` or through :func:`with_shardings`, or else XLA chooses
      how their scales are sharded.
  """
  shardings = _broadcast(param_shardings, params)
  known = {
    path: _Param(jnp.shape(leaf), _fitted(sharding, jnp.shape(leaf)))
    for (path, leaf), sharding in zip(
      jax.tree.leaves_with_path(params), shardings, strict=True
    )
  }
  state = jax.eval_shape(tx.init, params)
  replicated = _replicated(shardings)
  cut: dict[jax.tree_util.KeyPath, str] = {}

  def place(path, leaf, group_size=None):
    param_path = paths.param_path(path, known)
    param = known.get(param_path)
    if param is None or len(param.shape) != leaf.ndim:
      return replicated
    if group_size is not None and leaf.dtype in _CODES:
      scales = scale_gaps.stored_shape(param.shape, group_size)
      local = param.sharding.shard_shape(param.shape)
      if why := partition_specs.cut_groups(param.shape, scales, local, group_size):
        cut[param_path] = why
    return _fitted(param.sharding, leaf.shape)

  def place_node(path, node):
    if not state_lib.is_flash_state(node):
      return place(path, node)
    storage = node.format.storage
    size = storage.group_size if storage.quantizes_moments else None
    placed = jax.tree.map_with_path(
      lambda inner, leaf: place((*path, *inner), leaf, size), node
    )
    if memory_kind is None:
      return placed
    return state_lib.map_stored(
      lambda sharding: sharding.with_memory_kind(memory_kind), placed
    )

  result = jax.tree.map_with_path(place_node, state, is_leaf=state_lib.is_flash_state)
  if cut:
    named = [f"{paths.name(path)!r} ({why})" for path, why in cut.items()]
    if len(named) > _NAMED_AT_MOST:
      named[_NAMED_AT_MOST:] = [f"{len(named) - _NAMED_AT_MOST} more"]
    warnings.warn(
      f"Shards cut groups of the moments of {', '.join(named)}. Updating these"
      " parameters has to communicate; to avoid it, shard them along another"
      " axis or over fewer devices.",
      stacklevel=2,
    )
  return result


def with_shardings(
  tx: optax.GradientTransformation, params: optax.Params, param_shardings: Any
) -> optax.GradientTransformationExtraArgs:
  """Tells a transformation how its parameters are sharded.

  Under ``jax.jit`` with auto axes, shardings are not known while tracing, and
  kernels learn them from XLA later. Compiling ahead of time for TPUs, XLA has no
  way to say, and a kernel needs this. Explicit and manual axes never do.

  Args:
    tx: The transformation.
    params: The parameters: arrays or ``jax.ShapeDtypeStruct``s.
    param_shardings: Their shardings, as for :func:`state_shardings`; those that
      are no ``jax.sharding.NamedSharding`` are ignored.

  Returns:
    The transformation, with the same state.

  Raises:
    ValueError: As for :func:`state_shardings`.
  """
  shardings = _broadcast(param_shardings, params)
  # Not a tree, which Optax's masks would mask, or fail to: paths have no order.
  by_path = types.MappingProxyType(
    {
      path: sharding
      for (path, _), sharding in zip(
        jax.tree.leaves_with_path(params), shardings, strict=True
      )
      if isinstance(sharding, NamedSharding)
    }
  )
  inner = optax.with_extra_args_support(tx)

  def update_fn(updates, state, params=None, **extra_args):
    extra_args[PARAM_SHARDINGS] = by_path
    return inner.update(updates, state, params, **extra_args)

  return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def _broadcast(param_shardings: Any, params: Any) -> list[Sharding]:
  """One sharding for each leaf of params."""
  paths.require_arrays(params)
  try:
    tree = jax.tree.broadcast(param_shardings, params)
  except ValueError as error:
    raise ValueError(
      "param_shardings is not a prefix of params:"
      f" {jax.tree.structure(param_shardings)} against"
      f" {jax.tree.structure(params)}."
    ) from error
  for path, sharding in jax.tree.leaves_with_path(tree):
    if not isinstance(sharding, Sharding):
      raise ValueError(
        f"The sharding of {paths.name(path)!r} is {sharding!r}; expected a"
        " jax.sharding.Sharding, such as NamedSharding(mesh, spec)."
      )
  return jax.tree.leaves(tree)


def _fitted(sharding: Sharding, shape: tuple[int, ...]) -> Sharding:
  """A sharding, less the mesh axes that don't divide a shape."""
  if not isinstance(sharding, NamedSharding):
    return sharding
  return sharding.update(
    spec=partition_specs.divisible(sharding.mesh, sharding.spec, shape)
  )


def _replicated(shardings: list[Sharding]) -> Sharding | None:
  """A sharding for the arrays that no parameter decides about."""
  for sharding in shardings:
    if isinstance(sharding, NamedSharding):
      return NamedSharding(sharding.mesh, PartitionSpec())
  return shardings[0] if shardings else None
