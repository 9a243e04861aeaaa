"""The gradient transformation that every flash optimizer is an instance of."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax._src import base

from flashoptim_jax import paths
from flashoptim_jax.kernels import dispatch, primitive, resharding
from flashoptim_jax.kernels.base import Leaf, UpdatedLeaf, UpdateSpec
from flashoptim_jax.rules import Rule, Scalars
from flashoptim_jax.storage import codec, scale_gaps
from flashoptim_jax.storage import state as state_lib
from flashoptim_jax.storage.state import FlashState, Format
from flashoptim_jax.update import followers, optax_counterpart
from flashoptim_jax.update.new_params import NewParam, new_params_request

# The extra argument by which gradient release asks for updates that are carried
# out later, see `flashoptim_jax.kernels.primitive`.
DEFERRED = "flashoptim_deferred"

# The extra argument by which `flashoptim_jax.with_shardings` says how parameters
# are sharded: a mapping from a parameter's path, as JAX gives it, to its sharding and
# the mesh axes that its state is sharded over beside.
PARAM_SHARDINGS = "flashoptim_param_shardings"


def flash_transformation(
  rule: Rule,
  state_format: Format,
  scalars: Callable[[jax.Array], Scalars],
  *,
  plain: Callable[[], optax.GradientTransformation],
  mask: Any = None,
  decay: bool,
  implementation: str | None,
) -> optax.GradientTransformationExtraArgs:
  """Makes a transformation of an update rule.

  Args:
    rule: The arithmetic.
    state_format: What the state holds.
    scalars: Gives the rule's hyperparameters, ``learning_rate`` and
      ``weight_decay`` for a count of updates done so far.
    plain: Makes the transformation of Optax's that this one stands for.
    mask: Where weight decay applies: a prefix of the params with bool leaves, a
      function of the params that returns one, or None for everywhere.
    decay: Whether there is weight decay at all.
    implementation: See :func:`flashoptim_jax.kernels.base.UpdateSpec`.
  """
  dispatch.check_implementation(implementation)
  for moment in rule.moments:
    if moment.name not in ("mu", "nu"):
      raise ValueError(
        f"The rule {rule.name!r} keeps a moment {moment.name!r}; a FlashState has"
        " fields for 'mu' and 'nu'."
      )

  def init_fn(params):
    if optax_counterpart.wanted():
      return optax_counterpart.Counterpart(plain().init(params))
    return state_lib.init(params, state_format)

  def update_fn(updates, state, params=None, **extra_args):
    if params is None:
      raise ValueError(base.NO_PARAMS_MSG)
    request = new_params_request(extra_args, params)
    leaves = _leaves(updates, state, params, state_format)
    if request is None:
      leaves = list(map(_with_update_dtype, leaves))
    flags = _decay_flags(mask, params) if decay else [False] * len(leaves)
    leaves = [
      leaf.replace(decay=bool(flag)) for leaf, flag in zip(leaves, flags, strict=True)
    ]
    deferred_update = extra_args.get(DEFERRED, False)
    update = primitive.update_leaves if deferred_update else dispatch.update_leaves
    storage = state_format.storage
    told = extra_args.get(PARAM_SHARDINGS, {})
    given = resharding.given(params, told, storage.group_size)
    updated = update(
      UpdateSpec(rule, storage, implementation, request is not None),
      leaves,
      {
        **scalars(state.count),
        **codec.rounding_scalars(state.count, storage.master_bits),
      },
      {
        leaf.path: shardings
        for leaf, shardings in zip(leaves, given, strict=True)
        if shardings is not None
      },
    )
    passed_on, corrections = followers.hand_over(
      [leaf.result for leaf in updated],
      params,
      [leaf.path for leaf in leaves],
      ([x.correction for x in leaves], [x.correction for x in updated]),
      request,
    )
    new_state = _new_state(state, params, updated, corrections, state_format)
    return passed_on, new_state

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _leaves(
  grads: Any, state: FlashState, params: Any, state_format: Format
) -> list[Leaf]:
  """Lines up gradients, parameters and state; raises a ValueError if it can't."""
  if not isinstance(state, FlashState):
    raise ValueError(
      f"The optimizer state is a {type(state).__name__}; expected a"
      f" FlashState, as {state_format.optimizer}(...).init returns."
    )
  if state.format != state_format:
    raise ValueError(
      f"The optimizer state was made by {state.format}; this transformation is"
      f" {state_format}."
    )
  state_lib.check_params(params)
  storage = state_format.storage
  # Kernels know leaves, and their shardings, by these names.
  named = [
    (name, jnp.asarray(leaf))
    for name, leaf in zip(
      paths.unique_names(params), jax.tree.leaves(params), strict=True
    )
  ]
  grads = paths.leaves_like(grads, params, "the gradients", "the parameters")

  def field(name):
    what = f"the state's {name}"
    return paths.leaves_like(getattr(state, name), params, what, "the parameters")

  corrections = field("correction")
  moments = [
    (kind, name, field(name), field(f"{name}_scale"))
    for name, kind in state_format.moments
  ]
  leaves = []
  for i, (path, param) in enumerate(named):
    grad = checked_gradient(path, grads[i], param)
    dtype = codec.correction_dtype(param.dtype, storage.master_bits)
    what = "state's correction"
    correction = _expect(what, path, corrections[i], param.shape, dtype)
    pairs = []
    for kind, name, values, scales in moments:
      # Inside shard_map, and for slices of a stack, the leaf with the codes was larger.
      has_codes = storage.quantizes_moments and state_lib.is_quantized(values[i])
      quantized = has_codes or storage.quantizes(param.shape)
      dtype = codec.CODE_DTYPE[kind] if quantized else jnp.float32
      codes = _expect(f"state's {name}", path, values[i], param.shape, dtype)
      scale_dtype = codec.SCALE_DTYPE if storage.quantizes_moments else None
      found, size = getattr(scales[i], "shape", ()), storage.group_size
      shape = scale_gaps.stored_shape(param.shape, size)
      if scale_gaps.is_stored_shape(found, param.shape, size):
        shape = found
      scale = _expect(f"state's {name}_scale", path, scales[i], shape, scale_dtype)
      pairs.append((codes, scale if quantized else None))
    leaves.append(Leaf(grad, param, correction, tuple(pairs), path, decay=False))
  return leaves


def _with_update_dtype(leaf: Leaf) -> Leaf:
  """A leaf whose gradient has the dtype in which its update loses nothing."""
  return leaf.replace(
    grad=leaf.grad.astype(update_dtype(leaf.grad.dtype, leaf.param.dtype))
  )


def update_dtype(grad_dtype: Any, param_dtype: Any) -> Any:
  """The dtype of the update of a parameter: the gradient's, if it is wide enough."""
  return codec.promote_types(grad_dtype, param_dtype)


def checked_gradient(
  path: str, grad: Any, param: jax.Array, extra_axes: int = 0
) -> jax.Array:
  """The gradient of a parameter; raises a ValueError if it can't be that.

  Args:
    path: The parameter's name.
    grad: The gradient.
    param: The parameter.
    extra_axes: How many leading axes the gradient may have beside those of the
      parameter.
  """
  if isinstance(grad, NewParam):
    raise ValueError(
      f"Leaf {path!r} is updated by two flash optimizers; expected masks or"
      " labels that give each leaf to one."
    )
  grad = jnp.asarray(grad)
  fits = grad.shape[max(extra_axes, 0) :] == jnp.shape(param)
  if not fits or not jnp.issubdtype(grad.dtype, jnp.floating):
    raise ValueError(
      f"The gradient of {path!r} has shape {grad.shape} and dtype"
      f" {grad.dtype.name}; expected shape {jnp.shape(param)} and a"
      " floating-point dtype."
    )
  return grad


def _expect(what: str, path: str, found: Any, shape, dtype) -> Any:
  """Returns the array found, or None where there should be none (no dtype).

  Raises:
    ValueError: If it is not what is expected.
  """
  is_array = hasattr(found, "dtype") and hasattr(found, "shape")
  if dtype is None:
    if not is_array:
      return None
    expected = "none"
  else:
    dtype = jnp.dtype(dtype)
    if is_array and (tuple(found.shape), found.dtype) == (tuple(shape), dtype):
      return found
    expected = f"shape {tuple(shape)} and dtype {dtype.name}"
  if is_array:
    seen = f"has shape {tuple(found.shape)} and dtype {found.dtype.name}"
  else:
    seen = f"is a {type(found).__name__}, not an array"
  raise ValueError(f"The {what} of {path!r} {seen}; expected {expected}.")


def _decay_flags(mask: Any, params: Any) -> list[bool]:
  """For each leaf of params, whether weight decay applies."""
  if mask is None:
    return [True] * len(jax.tree.leaves(params))
  # A mask may be a callable object that is also a tree of booleans.
  mask_leaves = jax.tree.leaves(mask)
  if mask_leaves and all(callable(leaf) for leaf in mask_leaves):
    mask = mask(params)
  try:
    return jax.tree.leaves(jax.tree.broadcast(mask, params))
  except ValueError as error:
    raise ValueError(
      "The weight decay mask is not a prefix of the parameters:"
      f" {jax.tree.structure(mask)} against {jax.tree.structure(params)}."
    ) from error


def _new_state(
  state: FlashState,
  params: Any,
  updated: list[UpdatedLeaf],
  corrections: Sequence[Any],
  state_format: Format,
) -> FlashState:
  treedef: Any = jax.tree.structure(params)
  fields = {}
  for i, (name, _) in enumerate(state_format.moments):
    fields[name] = treedef.unflatten([leaf.moments[i][0] for leaf in updated])
    if state_format.storage.quantizes_moments:
      # Leaves that are not quantised keep their zeros.
      old = treedef.flatten_up_to(getattr(state, f"{name}_scale"))
      fields[f"{name}_scale"] = treedef.unflatten(
        [
          zeros if leaf.moments[i][1] is None else leaf.moments[i][1]
          for leaf, zeros in zip(updated, old, strict=True)
        ]
      )
  fields["correction"] = state_lib.correction_tree(
    params, corrections, state_format.storage
  )
  return state._replace(count=optax.safe_increment(state.count), **fields)
