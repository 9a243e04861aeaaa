"""The storage of flash optimizers around any Optax transformation."""

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from optax._src import base

from flashoptim_jax import paths
from flashoptim_jax.compression import groupwise, moment_table
from flashoptim_jax.kernels import primitive, resharding
from flashoptim_jax.storage import aliasing, codec, flax_boxes, host_memory
from flashoptim_jax.storage import state as state_lib
from flashoptim_jax.storage.moments import call_now, decode_inner, encode_inner
from flashoptim_jax.storage.options import Storage
from flashoptim_jax.storage.state import CompressedState, Format
from flashoptim_jax.update import followers, optax_counterpart
from flashoptim_jax.update.new_params import NEW_PARAMS, new_params_request
from flashoptim_jax.update.transform import (
  DEFERRED,
  PARAM_SHARDINGS,
  checked_gradient,
  update_dtype,
)

_DEFAULT_STORAGE = Storage()
# Up to this size, parameters are updated all at once.
_SMALL = 1 << 16
_OWN_ARGUMENTS = (NEW_PARAMS, DEFERRED, PARAM_SHARDINGS)


def compress(
  tx: optax.GradientTransformation,
  storage: Storage = _DEFAULT_STORAGE,
  *,
  codecs: Mapping[str, moment_table.Codec] | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Companded 8-bit moments and split master weights around a transformation.

  ``tx`` computes what it always does, on float32: it is given master weights,
  gradients and a state in float32, and its updates are added to the master
  weights. What is kept between steps is what ``storage`` says: 16-bit parameters
  with a correction, and 8-bit codes with scales for the moments in the state.

  Which arrays of a state are moments, and how they are companded, is decided by
  the name of their field (``mu``, ``nu``, ``trace``, ...), see
  :mod:`flashoptim_jax.compression.moment_table`. All others stay as they are:
  counts, keys, scalars, factored statistics, copies of the parameters, sums that
  never decay, and fields that the table lacks.

  Under :func:`jax.jit` XLA fuses decoding, the transformation and encoding.
  :func:`flashoptim_jax.adamw`, ``adam``, ``lion`` and ``sgd`` do the same with
  kernels of their own, which are faster on GPUs and TPUs.

  Args:
    tx: Any transformation without flash optimizers in it: an optimizer, a chain,
      a partition, a wrapper. It must hold everything that changes updates, for
      the result must be the last transformation of a chain.
    storage: How the state is stored.
    codecs: Overrides the table: from a field's name (``"nu"``), or its state's and
      its own (``"ScaleByAdamState.nu"``), to ``"first_moment"`` (signed),
      ``"second_moment"`` (never negative), or ``"float32"`` (kept as it is).

  Returns:
    A transformation whose ``update`` needs ``params`` and returns updates of the
    dtype to which those of a gradient and its parameter promote. Extra arguments are
    passed on to ``tx``; functions among them are called with float32 parameters.

  Raises:
    ValueError: For unknown codecs, codecs of fields that the state lacks, flash
      optimizers inside ``tx``, parameters that are not real floating-point
      arrays, and states or gradients that do not match the parameters.

  Warns:
    UserWarning: Once, from ``init``, naming large arrays of the state of which it
      can't be told how they belong to the parameters; they stay in float32.

  Examples:
    >>> import flashoptim_jax as fo, jax, jax.numpy as jnp, optax
    >>> tx = fo.compress(optax.contrib.muon(0.02))
    >>> params, state = fo.from_fp32(tx, {"w": jnp.eye(64)})
    >>> grads = jax.tree.map(jnp.ones_like, params)
    >>> params, state = fo.step(tx, grads, state, params)
    >>> params["w"].dtype.name, fo.moments(state)["mu"]["w"].dtype.name
    ('bfloat16', 'float32')
    >>> fo.memory_report(tx, params).moments  # in bytes, one per parameter
    4096
  """
  if isinstance(tx, optax.MultiSteps):
    tx = tx.gradient_transformation()
  tx = optax.with_extra_args_support(tx)
  moment_table.check_codecs(codecs)

  format_of = _formats(tx, storage, codecs or {})

  def init_inner(params):
    inner = tx.init(jax.tree.map(_initial_master, params))
    _refuse_flash_states(inner)
    return inner

  def init_fn(params):
    state_lib.check_params(params)
    if optax_counterpart.wanted():
      return optax_counterpart.Counterpart(init_inner(params))
    correction = state_lib.zero_correction(params, storage)
    inner = init_inner(params)
    state_format = format_of(params, inner)
    # XLA would spend its time on encoding the zeros of whole leaves itself.
    inner = state_lib.map_subtrees(
      lambda _, moment: lax.optimization_barrier(moment),
      inner,
      dict(state_format.moments),
    )
    inner = aliasing.apart(inner, params)  # Some keep the parameters themselves.
    return encode_inner(inner, jnp.zeros([], jnp.int32), correction, state_format)

  def update_fn(updates, state, params=None, **extra_args):
    if params is None:
      raise ValueError(base.NO_PARAMS_MSG)
    state_lib.check_params(params)
    layout = jax.eval_shape(init_inner, params)
    state_format = format_of(params, layout)
    _check_state(state, params, layout, state_format)
    treedef: Any = jax.tree.structure(params)
    request = new_params_request(extra_args, params)
    passed_on = {k: v for k, v in extra_args.items() if k not in _OWN_ARGUMENTS}
    call = primitive.call if extra_args.get(DEFERRED, False) else call_now

    def update(grads, state, params):
      rounding = codec.rounding_of(state.count, storage.master_bits)
      corrections = _corrections(state, treedef.unflatten(params))
      masters = [
        call(codec.merge, *each) for each in zip(params, corrections, strict=True)
      ]
      wide = [g.astype(m.dtype) for g, m in zip(grads, masters, strict=True)]
      changes, inner = tx.update(
        treedef.unflatten(wide),
        decode_inner(state, layout, call),
        treedef.unflatten(masters),
        **passed_on,
      )
      masters = [
        # Rounded to the master weight's dtype, as by optax.apply_updates.
        call(
          functools.partial(_advance, storage.master_bits),
          *each,
          change.astype(master.dtype),
          rounding.master,
          takes_origin=codec.dithers(each[0].dtype, storage.master_bits),
        )
        for *each, change, master in zip(
          params, corrections, treedef.flatten_up_to(changes), masters, strict=True
        )
      ]
      dtypes = [
        update_dtype(grad.dtype, param.dtype) if request is None else None
        for grad, param in zip(grads, params, strict=True)
      ]
      stored = [
        call(
          functools.partial(
            codec.store, update_dtype=dtype, master_bits=storage.master_bits
          ),
          master,
          param,
        )
        for master, param, dtype in zip(masters, params, dtypes, strict=True)
      ]
      correction = state_lib.correction_tree(
        treedef.unflatten(params), [each for _, each in stored], storage
      )
      new_state = encode_inner(
        inner,
        optax.safe_increment(state.count),
        correction,
        state_format,
        rounding,
        old=state,
        call=call,
      )
      return [result for result, _ in stored], new_state

    args = (
      _gradients(updates, params),
      # A state brought back from a file may hold NumPy arrays.
      jax.tree.map(jnp.asarray, host_memory.to_device(state)),
      list(map(jnp.asarray, jax.tree.leaves(params))),
    )
    if call is primitive.call:  # The caller takes it apart.
      results, new_state = update(*args)
    else:
      told = extra_args.get(PARAM_SHARDINGS, {})
      results, new_state = _run(update, *args, params, told)
    new_state = host_memory.move_like(new_state, state)
    passed_on, corrections = followers.hand_over(
      results,
      params,
      [paths.name(path) for path, _ in jax.tree.leaves_with_path(params)],
      (_corrections(state, params), _corrections(new_state, params)),
      request,
    )
    correction = state_lib.correction_tree(params, corrections, storage)
    return passed_on, new_state._replace(correction=correction)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _advance(master_bits, param, correction, step, rounding, origin=None):
  """New master weights of a leaf, or of a slice that begins at a given place."""
  threshold = codec.master_threshold(rounding, param, master_bits, origin)
  return codec.advance(param, correction, step, threshold)


def _formats(
  tx: optax.GradientTransformation,
  storage: Storage,
  codecs: Mapping[str, moment_table.Codec],
) -> Callable[[Any, Any], Format]:
  """A function from parameters and a transformation's state to its format."""
  general_fields = functools.cache(lambda: moment_table.general_fields(tx.init))

  @functools.cache
  def warn_once(others):
    warnings.warn(
      f"compress keeps {', '.join(map(repr, others))} of the transformation's state"
      " in float32: there is no telling whether these are moments, since they"
      " neither lie at the paths of parameters, nor are one array of all of them.",
      stacklevel=4,
    )

  def format_of(params, inner):
    fields = general_fields()
    if fields is None or not moment_table.known_moments(fields, codecs):
      fields = moment_table.fields_for(params, inner)
    if fields.others:
      warn_once(fields.others)
    return Format("compress", moment_table.find_moments(fields, codecs), storage)

  return format_of


def _gradients(grads: Any, params: Any) -> list[jax.Array]:
  """A gradient for each parameter; raises a ValueError if they don't fit.

  A gradient may have axes before its parameter's, for transformations that take
  one gradient per example.
  """
  found = paths.leaves_like(grads, params, "the gradients", "the parameters")
  gradients = []
  for (path, param), grad in zip(jax.tree.leaves_with_path(params), found, strict=True):
    extra_axes = jnp.ndim(grad) - jnp.ndim(param)
    gradients.append(checked_gradient(paths.name(path), grad, param, extra_axes))
  return gradients


def _corrections(state: CompressedState, params: Any) -> list[jax.Array | None]:
  """A correction, or None, for each parameter."""
  what = "the state's correction"
  found = paths.leaves_like(state.correction, params, what, "the parameters")
  return [None if isinstance(each, optax.MaskedNode) else each for each in found]


def _run(
  update: Callable[..., tuple[list[Any], CompressedState]],
  grads: list[Any],
  state: CompressedState,
  leaves: list[Any],
  params: Any,
  told: Mapping[Any, Any],
) -> tuple[list[Any], CompressedState]:
  """``update(grads, state, leaves)``, where the state is, one group after another."""
  shardings = _shardings(state, params, told, state.format.storage.group_size)
  grads, leaves = (
    list(map(resharding.scatter, each, shardings)) for each in (grads, leaves)
  )
  groups, of_state = _groups(state, params)
  results, new_state = groupwise.run(update, (grads, state, leaves), groups, of_state)
  return list(map(resharding.gather, results, shardings)), new_state


def _shardings(
  state: CompressedState, params: Any, told: Mapping[Any, Any], group_size: int
) -> list[resharding.Shardings | None]:
  """How parameters and their state are sharded, where that differs."""
  named = dict(jax.tree.leaves_with_path(params))
  stored = dict(named)
  for path, array in jax.tree.leaves_with_path(state):
    param_path = paths.param_path(path, named)
    if param_path in named and array.shape == jnp.shape(named[param_path]):
      stored[param_path] = array
  given = resharding.given(params, told, group_size)
  return list(map(resharding.known, named.values(), stored.values(), given))


def _groups(state: CompressedState, params: Any) -> tuple[list[int | None], list[bool]]:
  """For gradients, state and parameters, who takes a turn together.

  As many parameters as have no more elements than the largest, with all that is
  theirs. Says too which arrays are the state's.
  """
  named = jax.tree.leaves_with_path(params)
  most = max([_SMALL, *(jnp.size(leaf) for _, leaf in named)])
  groups: dict[jax.tree_util.KeyPath, int] = {}
  group = filled = 0
  for path, leaf in named:
    if filled + jnp.size(leaf) > most:
      group, filled = group + 1, 0
    groups[path] = group
    filled += jnp.size(leaf)
  of_params = list(groups.values())
  of_state = [
    groups.get(paths.param_path(path, groups))
    for path, _ in jax.tree.leaves_with_path(state)
  ]
  return (
    [*of_params, *of_state, *of_params],
    [False] * len(named) + [True] * len(of_state) + [False] * len(named),
  )


def _initial_master(param: Any) -> Any:
  """The master weight of a parameter, as an array or a shape."""
  if isinstance(param, jax.ShapeDtypeStruct):
    dtype = codec.promote_types(param.dtype, jnp.float32)
    return param.update(dtype=dtype)
  return codec.merge(jnp.asarray(param), None)


def _refuse_flash_states(inner: Any) -> None:
  nodes = jax.tree.leaves(inner, is_leaf=state_lib.is_flash_state)
  for node in filter(state_lib.is_flash_state, nodes):
    raise ValueError(
      f"compress(tx) has the state of {node.format} inside tx; expected a"
      " transformation without flash optimizers in it, such as optax.adamw in"
      " the place of flashoptim_jax.adamw."
    )


def _check_state(state: Any, params: Any, layout: Any, state_format: Format) -> None:
  """Raises a ValueError unless a state is that of ``compress`` for ``params``."""
  if not isinstance(state, CompressedState):
    raise ValueError(
      f"The optimizer state is a {type(state).__name__}; expected a"
      " CompressedState, as compress(...).init returns."
    )
  if state.format != state_format:
    raise ValueError(
      f"The optimizer state was made by {state.format}, with the moments"
      f" {state.format.moments}; this transformation is {state_format}, with the"
      f" moments {state_format.moments}."
    )
  expected = jax.eval_shape(
    lambda params, inner, old: encode_inner(
      inner,
      jnp.zeros([], jnp.int32),
      state_lib.zero_correction(params, state_format.storage),
      state_format,
      old=old,
    ),
    params,
    layout,
    # Shapes alone, as the layout's.
    jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), state
    ),
  )
  paths.require_like(
    _stored_parts(state),
    _stored_parts(expected),
    "The optimizer state",
    "that of compress for these parameters",
  )


def _stored_parts(state: CompressedState) -> dict[str, Any]:
  """What ``compress`` itself puts into a state."""
  moments = {
    name: state_lib.subtree(state.inner, name) for name, _ in state.format.moments
  }
  return {
    "count": state.count,
    "inner": moments,
    "scales": state.scales,
    "correction": flax_boxes.without_empty(state.correction),
  }
