"""Moving a training run: to Optax's own optimizers and back, between storages."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flashoptim_jax import paths
from flashoptim_jax.storage import aliasing, codec, moments, precision
from flashoptim_jax.storage import state as state_lib
from flashoptim_jax.storage.state import AnyState, CompressedState
from flashoptim_jax.update import optax_counterpart

# Where Optax's states keep what a flash state calls mu and nu.
_MOMENT_FIELDS = {"mu": "mu", "nu": "nu", "trace": "mu"}
_MOMENT_ARRAYS = ("mu", "mu_scale", "nu", "nu_scale")
# Hyperparameters of sgd that optax.sgd lacks.
_SGD_ONLY = ("dampening", "weight_decay")


def to_optax(
  tx: optax.GradientTransformation,
  params: optax.Params,
  opt_state: optax.OptState,
) -> optax.OptState:
  """Leaves for plain Optax, at any step.

  Together with the master weights, ``to_fp32(params, opt_state)``, the result
  goes on where ``tx`` stopped, in a transformation that has ``optax.adamw``,
  ``adam``, ``sgd`` and ``lion`` where ``tx`` has ours, with the same arguments
  and in the same chains and wrappers.

  Args:
    tx: The transformation that trained ``params``.
    params: The parameters.
    opt_state: Its state.

  Returns:
    The state that Optax's transformation would have for float32 parameters:
    moments decoded to float32, counts, and the states of other transformations
    in their places. Float arrays of those, such as hyperparameters injected as
    bfloat16 or ``optax.MultiSteps``'s gradients, are cast to the dtype that
    float32 parameters give them; a hyperparameter that is still the rounded
    initial value gets that value back. Where Optax's optimizer has no such
    option (``sgd`` with ``weight_decay``), the state is that of
    ``optax.chain(optax.trace(...), optax.add_decayed_weights(...),
    optax.scale_by_learning_rate(...))``. It shares no array with ``params`` and
    ``opt_state``.

  Raises:
    ValueError: If ``opt_state`` is not a state of ``tx`` for ``params``, or for
      an injected ``weight_decay`` or ``dampening`` of ``sgd`` other than 0,
      which ``optax.sgd`` lacks.
  """
  ours, plain = _layouts(tx, params)
  _require_state_of(opt_state, ours, "tx")
  start = _initial(lambda p: optax_counterpart.init(tx, p), _wide(params), opt_state)
  start = _without_sgd_extras(ours, start)

  def leave(node, layout, start):
    if state_lib.is_flash_state(node):
      return _fill(layout.state, node)
    if _is_injected_sgd(node):
      return jax.tree.map(
        leave,
        _drop_sgd_extras(node),
        layout,
        start,
        is_leaf=state_lib.is_flash_state,
      )
    return _cast(node, layout, start)

  result = jax.tree.map(leave, opt_state, plain, start, is_leaf=_is_unit)
  return aliasing.apart(result, params, opt_state)


def from_optax(
  tx: optax.GradientTransformation,
  params: optax.Params,
  optax_state: optax.OptState,
  *,
  params_fp32: optax.Params | None = None,
) -> optax.OptState:
  """Arrives from plain Optax, at any step.

  Args:
    tx: The transformation to go on with.
    params: The parameters to go on with, in the dtypes to train in, as for
      ``tx.init``.
    optax_state: State of the same transformation with ``optax.adamw``, ``adam``,
      ``sgd`` and ``lion`` in the place of ours, for float32 parameters, as
      :func:`to_optax` describes it.
    params_fp32: The float32 parameters that Optax trained. The corrections then
      hold what ``params`` rounds away; without them, they are zero.

  Returns:
    The state for ``tx``. The count of ``optax.sgd`` with a constant learning
    rate, which keeps none, starts at 0; nothing depends on it. The state shares no
    array with the arguments.

  Raises:
    ValueError: If ``optax_state`` is not such a state, or its optimizers have
      counted different numbers of updates.

  Examples:
    >>> import flashoptim_jax as fo, jax.numpy as jnp, optax
    >>> params_fp32 = {"w": jnp.linspace(-1.0, 1.0, 64)}
    >>> optax_state = optax.adamw(1e-3).init(params_fp32)
    >>> tx = fo.adamw(1e-3)
    >>> params, _ = fo.from_fp32(tx, params_fp32)
    >>> opt_state = fo.from_optax(
    ...     tx, params, optax_state, params_fp32=params_fp32)
  """
  ours, plain = _layouts(tx, params)
  paths.require_like(
    optax_state,
    optax_counterpart.unmarked(plain),
    "optax_state",
    "the state of tx with Optax's own optimizers",
  )
  marked = jax.tree.unflatten(jax.tree.structure(plain), jax.tree.leaves(optax_state))
  start = _initial(tx.init, params, ours)
  narrow, masters = map(state_lib.by_path, (params, params_fp32))
  if params_fp32 is not None:
    _require_masters(masters, narrow)

  def arrive(layout, node, start):
    if state_lib.is_flash_state(layout):
      return _take(layout, node.state, narrow, masters)
    if _is_injected_sgd(layout):
      known = jax.tree.map(
        arrive,
        _drop_sgd_extras(layout),
        node,
        _drop_sgd_extras(start),
        is_leaf=state_lib.is_flash_state,
      )
      return known._replace(
        hyperparams={**start.hyperparams, **known.hyperparams},
        hyperparams_states={
          **start.hyperparams_states,
          **known.hyperparams_states,
        },
      )
    return _cast(node, layout, None)

  result = jax.tree.map(arrive, ours, marked, start, is_leaf=_is_unit)
  return aliasing.apart(result, params, optax_state, params_fp32)


def convert(
  tx_from: optax.GradientTransformation,
  tx_to: optax.GradientTransformation,
  params: optax.Params,
  opt_state: optax.OptState,
) -> tuple[optax.Params, optax.OptState]:
  """Changes the storage of a run, at any step.

  Args:
    tx_from: The transformation that trained ``params``.
    tx_to: The same with other storages.
    params: The parameters.
    opt_state: State of ``tx_from``.

  Returns:
    Parameters, in their old dtypes, and a state for ``tx_to``: master weights
    and moments rounded to the new storage, everything else as it was. More bits
    lose nothing; what the storages agree on is kept bit for bit. They share no
    array with the arguments.

  Raises:
    ValueError: If ``opt_state`` is not a state of ``tx_from`` for ``params``, or
      ``tx_to`` differs from it in more than storage.
  """
  _require_state_of(opt_state, _layout(tx_from.init, params), "tx_from")
  given = params
  treedef: Any
  units, treedef = jax.tree.flatten_with_path(
    opt_state, is_leaf=state_lib.is_flash_state
  )
  targets, target_treedef = jax.tree.flatten_with_path(
    _layout(tx_to.init, params), is_leaf=state_lib.is_flash_state
  )
  pairs = itertools.zip_longest(units, targets, fillvalue=((), None))
  for (path, old), (target_path, new) in pairs:
    if path != target_path or _kind(old) != _kind(new):
      raise ValueError(
        "tx_from and tx_to differ in more than storage:"
        f" {paths.name(path)!r} is {_kind(old)} of tx_from, and"
        f" {paths.name(target_path)!r} is {_kind(new)} of tx_to."
      )
  if treedef != target_treedef:
    raise ValueError(
      f"tx_from and tx_to differ in more than storage: {treedef} against"
      f" {target_treedef}."
    )
  changed = [
    _stored(old, new) if state_lib.is_flash_state(old) else old
    for (_, old), (_, new) in zip(units, targets, strict=True)
  ]
  params, changed = precision.split_masters(
    precision.to_fp32(params, opt_state), params, treedef.unflatten(changed)
  )

  def keep(new, old):
    if not state_lib.is_flash_state(new):
      return new
    if new.format.storage.master_bits != old.format.storage.master_bits:
      return new
    return new._replace(correction=old.correction)

  kept = jax.tree.map(keep, changed, opt_state, is_leaf=state_lib.is_flash_state)
  return aliasing.apart((params, kept), given, opt_state)


def _layout(init: Callable[[Any], Any], params: optax.Params) -> Any:
  """``init(params)`` in ``jax.ShapeDtypeStruct``s."""
  paths.require_arrays(params)
  # A function of its own for each call: JAX remembers what it traced, and what
  # `init` gives depends on whether a counterpart is wanted.
  return jax.eval_shape(functools.partial(init), params)


def _layouts(tx: Any, params: optax.Params) -> tuple[Any, Any]:
  """The state of ``tx``, and Optax's for float32 parameters, marked."""
  ours = _layout(tx.init, params)
  state_lib.flash_states(ours)
  plain = _layout(lambda p: optax_counterpart.init(tx, p), _wide(params))
  return ours, _without_sgd_extras(ours, plain)


def _wide(params: optax.Params) -> optax.Params:
  """The master weights' shapes and dtypes."""

  def widen(param):
    dtype = jnp.result_type(param)
    if jnp.issubdtype(dtype, jnp.floating):
      dtype = codec.promote_types(dtype, jnp.float32)
    return jax.ShapeDtypeStruct(jnp.shape(param), dtype)

  return jax.tree.map(widen, params)


def _initial(init: Callable[[Any], Any], params: Any, state: Any) -> Any:
  """The scalars that ``init(params)`` makes; None in the place of other arrays.

  Compiled, so that the arrays that are not wanted take no memory. All is None
  where no optimizer in ``state`` has injected hyperparameters.
  """

  def scalars():
    zeros = jax.tree.map(lambda p: jnp.zeros(jnp.shape(p), p.dtype), params)
    return jax.tree.map(lambda x: None if jnp.ndim(x) else x, init(zeros))

  nodes = jax.tree.leaves(state, is_leaf=_is_injected)
  if any(map(_is_injected, nodes)):
    return jax.jit(scalars)()
  return jax.tree.map(lambda _: None, _layout(init, params))


def _is_injected(node: Any) -> bool:
  return isinstance(
    node, (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)
  )


def _is_injected_sgd(node: Any) -> bool:
  """Whether a node is the state of ``optax.inject_hyperparams(fo.sgd)``."""
  return (
    isinstance(node, optax.InjectStatefulHyperparamsState)
    and state_lib.is_flash_state(node.inner_state)
    and node.inner_state.format.optimizer in ("sgd", "momentum")
  )


def _is_unit(node: Any) -> bool:
  return state_lib.is_flash_state(node) or _is_injected_sgd(node)


def _drop_sgd_extras(node: Any) -> Any:
  """The state of injected sgd, less the hyperparameters that Optax's lacks."""
  for name in _SGD_ONLY:
    value = node.hyperparams.get(name)
    known = value is not None and not isinstance(
      value, (jax.core.Tracer, jax.ShapeDtypeStruct)
    )
    if known and value != 0:
      raise ValueError(
        f"The injected {name} of flashoptim_jax.sgd is {value}; expected 0,"
        f" for optax.sgd has no {name}."
      )

  def rest(values):
    return {k: v for k, v in values.items() if k not in _SGD_ONLY}

  return node._replace(
    hyperparams=rest(node.hyperparams),
    hyperparams_states=rest(node.hyperparams_states),
  )


def _without_sgd_extras(ours: Any, plain: Any) -> Any:
  return jax.tree.map(
    lambda node, other: _drop_sgd_extras(other) if _is_injected_sgd(node) else other,
    ours,
    plain,
    is_leaf=_is_unit,
  )


def _require_state_of(opt_state: Any, layout: Any, name: str) -> None:
  """Raises a ValueError unless ``opt_state`` has the layout, formats included."""
  states = state_lib.flash_states(opt_state)
  for found, expected in zip(states, state_lib.flash_states(layout), strict=False):
    if found.format != expected.format:
      raise ValueError(
        f"opt_state was made by {found.format}; {name} is {expected.format}."
      )
  paths.require_like(opt_state, layout, "opt_state", f"the state of {name}")


def _require_masters(masters: dict, params: dict) -> None:
  """Raises a ValueError unless there is a master weight for every parameter."""
  for path, param in params.items():
    found = jnp.shape(masters[path]) if path in masters else "none"
    if found != jnp.shape(param):
      raise ValueError(
        f"The master weight of {paths.name(path)!r} in params_fp32 has shape"
        f" {found}; expected {jnp.shape(param)}, as in params."
      )


def _kind(node: Any) -> str:
  if not state_lib.is_flash_state(node):
    return "nothing" if node is None else "an array"
  return f"the state of flashoptim_jax.{node.format.optimizer}"


def _cast(value: Any, layout: Any, start: Any) -> Any:
  """An array in the dtype of the layout.

  ``start`` is the array's initial value in that dtype, if known: where nothing
  but rounding has changed it, it is restored.
  """
  value = jnp.asarray(value)
  if value.dtype == layout.dtype:
    return value
  wide = value.astype(layout.dtype)
  if start is None:
    return wide
  return jnp.where(value == start.astype(value.dtype), start, wide)


def _is_record(node: Any) -> bool:
  fields = getattr(node, "_fields", ())
  return "count" in fields or not _MOMENT_FIELDS.keys().isdisjoint(fields)


def _fill(layout: Any, state: AnyState) -> Any:
  """A flash state's contents in the layout of Optax's state."""
  if isinstance(state, CompressedState):
    return moments.decode_inner(state, layout)
  decoded = moments.moments(state)

  def fill(node):
    if not _is_record(node):
      return node
    fields = {
      field: jax.tree.map(
        lambda x, like: x.astype(like.dtype),
        decoded[_MOMENT_FIELDS[field]],
        getattr(node, field),
      )
      for field in node._fields
      if field in _MOMENT_FIELDS
    }
    if "count" in node._fields:
      fields["count"] = state.count
    return node._replace(**fields)

  return jax.tree.map(fill, layout, is_leaf=_is_record)


def _take(layout: Any, plain: Any, params: dict, masters: dict) -> AnyState:
  """A flash state of the layout from Optax's state; parameters by path."""
  records = filter(_is_record, jax.tree.leaves(plain, is_leaf=_is_record))
  found: dict[str, Any] = {}
  counts = []
  for record in records:
    found |= {
      _MOMENT_FIELDS[field]: getattr(record, field)
      for field in record._fields
      if field in _MOMENT_FIELDS
    }
    if "count" in record._fields:
      counts.append(record.count)
  count = jnp.zeros([], jnp.int32)
  if counts:
    count = jnp.asarray(counts[0], jnp.int32)
    known = [int(c) for c in counts if not isinstance(c, jax.core.Tracer)]
    if len(set(known)) > 1:
      raise ValueError(
        "The counts of Optax's state differ, from the optimizer's to the"
        f" schedule's: {known}; expected the same."
      )

  def correct(path, correction):
    if path not in masters:
      return jnp.zeros_like(params[path], dtype=correction.dtype)
    master = jnp.asarray(masters[path]).astype(jnp.float32)
    return codec.residual(
      master, jnp.asarray(params[path]), layout.format.storage.master_bits
    )

  correction = jax.tree.map_with_path(correct, layout.correction)
  if isinstance(layout, CompressedState):
    return moments.encode_inner(plain, count, correction, layout.format)
  return layout._replace(
    count=count, correction=correction, **moments.encode_fields(found, layout.format)
  )


def _stored(state: Any, layout: Any) -> AnyState:
  """A flash state in a layout's storage, its new corrections yet to be made."""
  old, new = state.format.storage, layout.format.storage
  if isinstance(state, CompressedState):
    correction = layout.correction
    if new.master_bits == old.master_bits:
      correction = optax.MaskedNode()
    if dataclasses.replace(new, master_bits=old.master_bits) == old:
      return state._replace(correction=correction, format=layout.format)
    float32 = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.float32), state.inner
    )
    inner = moments.decode_inner(state, float32)
    return moments.encode_inner(inner, state.count, correction, layout.format)
  if dataclasses.replace(new, master_bits=old.master_bits) == old:
    fields = {name: getattr(state, name) for name in _MOMENT_ARRAYS}
  else:
    fields = moments.encode_fields(moments.moments(state), layout.format)
  if new.master_bits == old.master_bits:
    fields["correction"] = optax.MaskedNode()
  return layout._replace(count=state.count, **fields)
