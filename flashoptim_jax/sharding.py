"""Shardings of the optimizer state, derived from those of the parameters."""

import itertools
import types
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from flashoptim_jax import paths
from flashoptim_jax.storage import codec, partition_specs, scale_gaps
from flashoptim_jax.storage import state as state_lib
from flashoptim_jax.storage.options import Storage
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
  over: str | Sequence[str] = (),
) -> Any:
  """Shardings for every array of a transformation's state.

  For ``jax.jit``'s ``in_shardings`` and ``out_shardings``, ``jax.device_put`` and
  restoring checkpoints::

    shardings = fo.state_shardings(tx, params, param_shardings)
    opt_state = jax.jit(tx.init, out_shardings=shardings)(params)

  An array that belongs to a parameter (it lies at the parameter's path, in any
  nesting of transformations, and has its rank) is sharded as the parameter is,
  less the mesh axes that don't divide it; all others are replicated. With ``over``
  (ZeRO-1) it is sharded over more mesh axes than the parameter, so that each device
  keeps a part of the state and updates that part of the parameter::

    shardings = fo.state_shardings(tx, params, param_shardings, over="data")
    tx = fo.with_shardings(tx, params, param_shardings, over="data")

  Args:
    tx: The transformation.
    params: The parameters: arrays or ``jax.ShapeDtypeStruct``s.
    param_shardings: Their shardings (``jax.sharding.Sharding``; under
      ``jax.set_mesh``, a ``PartitionSpec`` will do), in a tree that ``params``'
      structure extends: one sharding may stand for a whole subtree.
    memory_kind: Where flash optimizers keep the arrays that belong to a
      parameter, such as ``"pinned_host"``; by default with the parameter.
      ``update`` and ``step`` bring a leaf that is kept on the host to the device
      and send it back, a few leaves at a time.
    over: Mesh axes that divide the state beside those that divide the parameter.
      All of them divide one dimension, the same of every array that belongs to a
      parameter: one where they cut no groups of its moments, preferably another
      than that of the groups, and of those the longest. A parameter that has none,
      as small ones may, has its state sharded as it is itself. With auto mesh axes,
      tell :func:`with_shardings` too. With explicit ones, only the state of flash
      optimizers is divided: JAX would not let others combine it with gradients that
      are sharded in another way.

  Returns:
    A tree of the state's structure, of shardings.

  Raises:
    ValueError: If ``param_shardings`` is not a prefix of ``params`` or holds
      something other than shardings; with ``over``, something other than a
      ``jax.sharding.NamedSharding``, or one of a mesh without such an axis.

  Warns:
    UserWarning: Once, naming the parameters whose shards cut a group of their
      moments. Their update is as exact as any other's, but has to communicate;
      under ``jax.jit`` with auto axes, give these shardings as
      ``out_shardings`` or through :func:`with_shardings`, or else XLA chooses
      how their scales are sharded.
  """
  shardings = _broadcast(param_shardings, params)
  over = _checked_axes(over, params, shardings)
  known = {
    path: _Param(jnp.shape(leaf), _fitted(sharding, jnp.shape(leaf)))
    for (path, leaf), sharding in zip(
      jax.tree.leaves_with_path(params), shardings, strict=True
    )
  }
  state = jax.eval_shape(tx.init, params)
  replicated = _replicated(shardings)
  cut: dict[jax.tree_util.KeyPath, str] = {}

  def place(path, leaf, storage=None):
    param_path = paths.param_path(path, known)
    param = known.get(param_path)
    if param is None or len(param.shape) != leaf.ndim:
      return replicated
    sharding, size = param.sharding, (storage or Storage).group_size
    scales = scale_gaps.stored_shape(param.shape, size)
    # Others would combine such arrays with gradients, and JAX does not take both.
    if isinstance(sharding, NamedSharding) and (
      storage is not None or not partition_specs.is_explicit(sharding)
    ):
      sharding = partition_specs.spread(sharding, param.shape, scales, size, over)
    if storage is not None and storage.quantizes_moments and leaf.dtype in _CODES:
      local = sharding.shard_shape(param.shape)
      if why := partition_specs.cut_groups(param.shape, scales, local, size):
        cut[param_path] = why
    return _fitted(sharding, leaf.shape)

  def place_node(path, node):
    if not state_lib.is_flash_state(node):
      return place(path, node)
    storage = node.format.storage
    placed = jax.tree.map_with_path(
      lambda inner, leaf: place((*path, *inner), leaf, storage), node
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
  tx: optax.GradientTransformation,
  params: optax.Params,
  param_shardings: Any,
  over: str | Sequence[str] = (),
) -> optax.GradientTransformationExtraArgs:
  """Tells a transformation how its parameters are sharded.

  Under ``jax.jit`` with auto axes, shardings are not known while tracing, and
  kernels learn them from XLA later. Compiling ahead of time for TPUs, XLA has no
  way to say, and a kernel needs this. With ``over``, so that what is communicated are
  gradients and 16-bit parameters, once each, the plain update of XLA needs it as well.
  Explicit and manual axes never do.

  Args:
    tx: The transformation.
    params: The parameters: arrays or ``jax.ShapeDtypeStruct``s.
    param_shardings: Their shardings, as for :func:`state_shardings`; without
      ``over``, those that are no ``jax.sharding.NamedSharding`` are ignored.
    over: As given to :func:`state_shardings`.

  Returns:
    The transformation, with the same state.

  Raises:
    ValueError: As for :func:`state_shardings`.
  """
  shardings = _broadcast(param_shardings, params)
  over = _checked_axes(over, params, shardings)
  # Not a tree, which Optax's masks would mask, or fail to: paths have no order.
  by_path = types.MappingProxyType(
    {
      path: (sharding, over)
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
  mesh = jax.sharding.get_mesh()

  def checked(path, sharding):
    if isinstance(sharding, PartitionSpec) and not mesh.empty:
      return NamedSharding(mesh, sharding)
    if not isinstance(sharding, Sharding):
      raise ValueError(
        f"The sharding of {paths.name(path)!r} is {sharding!r}; expected a"
        " jax.sharding.Sharding, such as NamedSharding(mesh, spec), or, under"
        " jax.set_mesh(mesh), a PartitionSpec."
      )
    return sharding

  return list(itertools.starmap(checked, jax.tree.leaves_with_path(tree)))


def _checked_axes(
  over: str | Sequence[str], params: Any, shardings: Sequence[Sharding]
) -> tuple[str, ...]:
  """The mesh axes to shard the state over; raises a ValueError for unknown ones."""
  over = (over,) if isinstance(over, str) else tuple(over)
  if not over:
    return ()
  for (path, _), sharding in zip(
    jax.tree.leaves_with_path(params), shardings, strict=True
  ):
    if not isinstance(sharding, NamedSharding):
      raise ValueError(
        f"The sharding of {paths.name(path)!r} is {sharding!r}; expected a"
        " jax.sharding.NamedSharding, whose mesh has the axes that the state is to be"
        f" sharded over ({', '.join(map(repr, over))})."
      )
    axes = sharding.mesh.axis_names
    if unknown := [name for name in over if name not in axes]:
      raise ValueError(
        f"over has {', '.join(map(repr, unknown))}, which the mesh of"
        f" {paths.name(path)!r} lacks; expected some of {', '.join(map(repr, axes))}."
      )
  return over


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
