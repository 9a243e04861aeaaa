"""Gradient release: each leaf is updated inside the backward pass.

Parameters and state are held in references (``jax.new_ref``) while the loss is
differentiated. A released call is a ``jax.custom_vjp``: its backward pass reads
the parameters again, computes its function's gradients, updates the parameters
and writes them back, so that the gradients of one call are all that exist at a
time. See ``docs/gradient-release.md``.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from flashoptim_jax import paths
from flashoptim_jax.release import uses
from flashoptim_jax.release.leafwise import Leafwise
from flashoptim_jax.update.step import step as apply_step
from flashoptim_jax.update.transform import DEFERRED

# What a step returns: itself, but for reverse-mode differentiation.
_result_p = core.Primitive("released_result")
_result_p.def_impl(lambda x: x)
_result_p.def_abstract_eval(lambda aval: aval)
batching.defvectorized(_result_p)
mlir.register_lowering(_result_p, lambda _, x: [x])


def _refuse_transpose(*args: Any) -> NoReturn:
  del args
  raise ValueError(
    "A step of value_and_release was reached by jax.grad, jax.vjp or the like. It"
    " overwrites parameters, so that nothing is left to differentiate it in reverse"
    " mode. Differentiate the loss, or an ordinary step (flashoptim_jax.step)."
  )


ad.deflinear2(_result_p, _refuse_transpose)


def value_and_release(
  loss_fn: Callable[..., Any],
  tx: optax.GradientTransformation,
  has_aux: bool = False,
) -> Callable[..., tuple[Any, optax.Params, optax.OptState]]:
  """Makes a training step that never holds the gradients.

  It stands for ``jax.value_and_grad`` followed by ``flashoptim_jax.step``, and
  leaves the same parameters and state. Call it inside ``jax.jit``, with parameters
  and state donated, to have them updated in place::

    step = jax.jit(fo.value_and_release(loss_fn, tx), donate_argnums=(0, 1))
    value, params, opt_state = step(params, opt_state, batch)

  A leaf is updated inside the backward pass if each of its slices takes part in
  exactly one :func:`released_call`. The gradient of any other leaf is summed up,
  in the leaf's dtype, and the leaf updated at the end: one that several calls use
  (tied weights), whose slices are chosen by the data, or whose slices the
  transformation does not treat alike (a norm taken over a whole stacked leaf).
  Leaves that no call uses stay as they are, with a warning.

  Args:
    loss_fn: ``loss_fn(live, *args)`` returns a scalar loss, or a pair of it and
      auxiliary data. ``live`` has the parameters' structure; its leaves are
      used through :func:`released_call` alone.
    tx: The transformation: a flash optimizer, or a chain that ends in one, in
      which each leaf's update depends on that leaf's gradient alone. Elementwise
      transformations, norms of single leaves, schedules, masks and labels can
      be part of it; what needs all gradients at once can't.
    has_aux: Whether ``loss_fn`` returns auxiliary data.

  Returns:
    ``step(params, opt_state, *args)``, which returns the loss (or the pair), the
    new parameters and the new state. It traces ``loss_fn`` twice, the first time
    to see which parameters it uses how often.

  Raises:
    ValueError: From ``step``, if a leaf's update depends on other leaves, if
      :func:`released_call` is used where it can't be, or if the step itself is
      differentiated in reverse mode.

  Examples:
    >>> import flashoptim_jax as fo, jax, jax.numpy as jnp
    >>> def loss_fn(live, x):
    ...   def layer(x, i):
    ...     block = lambda w, x: x + jnp.tanh(x @ w)
    ...     return fo.released_call(block, live["layers"], x, index=i), None
    ...   x, _ = jax.lax.scan(layer, x, jnp.arange(3))
    ...   return jnp.mean(x.astype(jnp.float32) ** 2)
    >>> tx = fo.adamw(1e-2)
    >>> params, state = fo.from_fp32(tx, {"layers": jnp.full((3, 8, 8), 0.01)})
    >>> step = jax.jit(fo.value_and_release(loss_fn, tx), donate_argnums=(0, 1))
    >>> for _ in range(3):
    ...   value, params, state = step(params, state, jnp.ones((2, 8), jnp.bfloat16))
    >>> float(value) < 1.0, params["layers"].shape
    (True, (3, 8, 8))

  References:
    `FlashOptim <https://arxiv.org/abs/2602.23349>`_, 2026
  """
  if isinstance(tx, optax.MultiSteps):
    tx = tx.gradient_transformation()
  later = functools.partial(apply_step, tx, **{DEFERRED: True})

  @functools.wraps(loss_fn)
  def step(params: Any, opt_state: Any, *args: Any) -> tuple[Any, Any, Any]:
    leafwise = Leafwise(later, params, opt_state)

    def record(params):
      with _Recorder(params) as recorder:
        return loss_fn(_live(recorder, params), *args)

    found = uses.count(jax.make_jaxpr(record)(params))
    release = _Release(leafwise, params, opt_state, found)

    def loss(trigger):
      release.trigger = trigger
      with release:
        return loss_fn(_live(release, params), *args)

    # What is differentiated is a zero that every call is given: the backward
    # pass of a call happens even where none of its arguments is differentiable.
    value, _ = jax.value_and_grad(loss, has_aux=has_aux)(jnp.zeros(()))
    return jax.tree.map(_result, (value, *release.finish()))

  return step


def released_call(
  fn: Callable[..., Any], part: Any, *args: Any, index: Any = None
) -> Any:
  """Calls a function with parameters that its backward pass updates.

  The arguments are kept for the backward pass, which computes ``fn`` again, as
  ``jax.checkpoint`` would. Put ``jax.checkpoint`` with a policy inside ``fn`` for
  other trade-offs within it. ``fn`` gets everything that is to be differentiated
  through ``args``: it must not close over such values.

  Args:
    fn: ``fn(params, *args)``, a function of parameters of the structure of
      ``part``; it returns a pytree of arrays.
    part: The part of ``live`` that it uses: any subtree, or any pytree of its
      leaves.
    *args: Pytrees of arrays: activations, tokens, PRNG keys. What is no array
      (None, numbers, strings, functions) is passed on as it is.
    index: Which slice of the leaves to use, for leaves that are stacks: an int
      or an integer array of shape (), in range, along the first axis; or a
      tuple of these, along as many axes. None for the whole leaves.

  Returns:
    ``fn(params, *args)``.

  Raises:
    ValueError: For a part that does not consist of leaves of ``live``, and for
      indices that don't fit.
  """
  leaves, treedef = _flatten(part)
  if not leaves:
    return fn(part, *args)
  for leaf in leaves:
    if not isinstance(leaf, LiveLeaf) or leaf.step is not leaves[0].step:
      raise ValueError(
        "released_call takes a part of the `live` tree that value_and_release"
        f" gives the loss function; found a {type(leaf).__name__} in it."
      )
  if not leaves[0].step.running:
    raise ValueError(
      f"released_call was given leaf {leaves[0].path!r} of another step's `live`"
      " tree, kept after its loss function returned; expected a part of the one"
      " that this call of the loss function got."
    )
  where = _normalized(index, leaves)
  return leaves[0].step.call(
    fn, [leaf.position for leaf in leaves], treedef, args, where
  )


def _normalized(index: Any, leaves: Sequence["LiveLeaf"]) -> tuple[Any, ...]:
  """The index as a tuple of int32 scalars."""
  if index is None:
    return ()
  result = []
  for axis, i in enumerate(index if isinstance(index, tuple) else (index,)):
    if jnp.shape(i) or not jnp.issubdtype(jnp.result_type(i), jnp.integer):
      raise ValueError(
        f"The index of a released_call has shape {jnp.shape(i)} and dtype"
        f" {jnp.result_type(i).name}; expected an integer of shape ()."
      )
    for leaf in leaves:
      if leaf.ndim <= axis:
        raise ValueError(
          f"Leaf {leaf.path!r} has shape {leaf.shape}; a released_call with an"
          f" index of {axis + 1} axes expects a stack along as many."
        )
      if not isinstance(i, jax.core.Tracer) and not 0 <= int(i) < leaf.shape[axis]:
        raise ValueError(
          f"Index {int(i)} of a released_call is out of range for axis {axis} of"
          f" leaf {leaf.path!r}, of shape {leaf.shape}."
        )
    result.append(jnp.asarray(i, jnp.int32))
  return tuple(result)


class LiveLeaf(np.lib.mixins.NDArrayOperatorsMixin):
  """A leaf of ``live``: a parameter that may change while the loss is computed.

  It has a shape and a dtype, but no value. A leaf to JAX's tree functions.
  """

  __array_priority__ = 1000

  def __init__(self, step: Any, position: int, path: str, param: Any):
    self.step = step
    self.position = position
    self.path = path
    self.shape: tuple[int, ...] = tuple(jnp.shape(param))
    self.dtype = jnp.result_type(param)

  ndim = property(lambda self: len(self.shape))
  size = property(lambda self: int(np.prod(self.shape)))

  def __repr__(self) -> str:
    return f"LiveLeaf({self.path!r}, {self.dtype.name}{list(self.shape)})"

  def _no_value(self, *args: Any, **kwargs: Any) -> NoReturn:
    raise ValueError(
      f"Parameter {self.path!r} was used directly. In a loss function for"
      " value_and_release, parameters are used through"
      " released_call(fn, part, *args), whose function gets their values."
    )

  # Looked for, and not called, where it is given to a jitted function.
  __jax_array__ = property(_no_value)
  __array__ = __array_ufunc__ = _no_value
  __getitem__ = __iter__ = __len__ = __bool__ = __float__ = __int__ = _no_value


def _live(step: Any, params: Any) -> Any:
  """A tree of the parameters' structure with ``LiveLeaf`` objects in it."""
  leaves, treedef = _flatten(params)
  names = [paths.name(path) for path, _ in jax.tree.leaves_with_path(params)]
  return treedef.unflatten(
    LiveLeaf(step, i, name, leaf)
    for i, (name, leaf) in enumerate(zip(names, leaves, strict=True))
  )


class _Run:
  """A run of the loss function, while which its ``live`` tree can be used.

  Attributes:
    running: Whether it is going on.
  """

  running = False

  def __enter__(self):
    self.running = True
    return self

  def __exit__(self, *exception: Any) -> None:
    self.running = False


class _Recorder(_Run):
  """Takes note of released calls."""

  def __init__(self, params: Any):
    self._params = jax.tree.leaves(params)
    self._inside = False

  def call(self, fn, leaves, treedef, args, index):
    """Calls the function on marked parameters."""
    if self._inside:
      raise ValueError(
        "released_call was reached inside the function of another one. Pass"
        " the parameters of both to the outer call."
      )
    flat, args_tree = _flatten(args)
    is_array = list(map(_is_array, flat))
    arrays = [x for x, flag in zip(flat, is_array, strict=True) if flag]
    unique = list(dict.fromkeys(leaves))
    values = [_slice(self._params[leaf], index) for leaf in unique]
    marked = uses.mark([*values, *arrays], unique, index)
    by_leaf = dict(zip(unique, marked[: len(unique)], strict=True))
    flat = _merged(is_array, marked[len(unique) :], flat)
    self._inside = True
    try:
      params = treedef.unflatten(by_leaf[leaf] for leaf in leaves)
      return fn(params, *args_tree.unflatten(flat))
    finally:
      self._inside = False


class _Release(_Run):
  """Parameters and state on their way through one step.

  Attributes:
    trigger: A zero that the loss is differentiated by.
  """

  def __init__(
    self,
    leafwise: Leafwise,
    params: Any,
    opt_state: Any,
    found: dict[int, uses.Uses],
  ):
    param_leaves, self._params_tree = _flatten(params)
    state_leaves, self._state_tree = _flatten(opt_state)
    self.trigger: Any = None
    self._leafwise = leafwise
    self._shared = leafwise.shared(state_leaves)
    self._params = list(map(jax.new_ref, param_leaves))
    owned = {i for leaf in leafwise.owned for i in leaf}
    self._state = {i: jax.new_ref(state_leaves[i]) for i in owned}
    self._updated: set[int] = set()
    self._used = set(found)
    self._sums: dict[int, Any] = {}
    for leaf, param in enumerate(param_leaves):
      if leaf not in found:
        warnings.warn(
          f"Parameter {leafwise.names[leaf]!r} is not used in the loss"
          " function; it stays as it is, with its optimizer state.",
          stacklevel=3,
        )
      elif not self._can_release(leaf, found[leaf], jnp.shape(param)):
        self._sums[leaf] = jax.new_ref(jnp.zeros_like(param))

  def _can_release(self, leaf: int, used: uses.Uses, shape) -> bool:
    """Whether to update a leaf inside the backward pass."""
    name = self._leafwise.names[leaf]
    if used.counts is None:
      warnings.warn(
        f"How often the loss function uses which slices of {name!r} depends on"
        " its arguments; its whole gradient is held.",
        stacklevel=4,
      )
    if not used.once_each(shape):
      return False
    why = self._leafwise.taken_whole(leaf, used.axes) if used.axes else None
    if why is not None and self._leafwise.groups_within_slices(leaf, used.axes):
      warnings.warn(
        f"The transformation treats the stacked leaf {name!r} as a whole, by"
        f" {why!r} for example; its whole gradient is held.",
        stacklevel=4,
      )
    return why is None

  def call(self, fn, leaves, treedef, args, index):
    """Calls the function, and updates the parameters in its backward pass."""
    flat, args_tree = _flatten(args)
    is_array = list(map(_is_array, flat))
    arrays = [x for x, flag in zip(flat, is_array, strict=True) if flag]
    differentiable = [jnp.issubdtype(x.dtype, jnp.inexact) for x in arrays]

    # A leaf may be there twice; it is read, and updated, once.
    unique = list(dict.fromkeys(leaves))
    refs = _Refs(
      [self._params[leaf] for leaf in unique],
      [[self._state[i] for i in self._leafwise.owned[leaf]] for leaf in unique],
      [self._sums.get(leaf) for leaf in unique],
    )
    needed = self._leafwise.needed(unique, self._shared)

    def function(values, arrays):
      by_leaf = dict(zip(unique, values, strict=True))
      params = treedef.unflatten(by_leaf[leaf] for leaf in leaves)
      return fn(params, *args_tree.unflatten(_merged(is_array, arrays, flat)))

    @jax.custom_vjp
    def released(trigger, refs, shared, index, arrays):
      del trigger, shared
      return function(refs.read(index), arrays)

    def forward(trigger, refs, shared, index, arrays):
      del trigger
      return function(refs.read(index), arrays), (refs, shared, index, arrays)

    def backward(residuals, cotangents):
      refs, shared, index, arrays = residuals
      inputs = [x for x, flag in zip(arrays, differentiable, strict=True) if flag]
      # As in jax.checkpoint: lest XLA keep what the forward pass computed.
      inputs, cotangents = _barrier((inputs, cotangents))
      values = refs.read(index)
      _, vjp = jax.vjp(
        lambda values, inputs: function(
          values, _merged(differentiable, inputs, arrays)
        ),
        values,
        inputs,
      )
      # What is used is the gradient as rounded to its dtype.
      grads, inputs = vjp(cotangents)
      shared = dict(zip(needed, shared, strict=True))
      self._receive(unique, _barrier(grads), values, refs, shared, index)
      absent = [None] * len(arrays)
      return None, None, None, None, _merged(differentiable, inputs, absent)

    released.defvjp(forward, backward)
    return released(self.trigger, refs, list(needed.values()), index, arrays)

  def _receive(self, leaves, grads, params, refs, shared, index) -> None:
    """Updates leaves, or adds up the gradients of those that must wait."""
    now = []
    for i, (grad, total) in enumerate(zip(grads, refs.sums, strict=True)):
      if total is None:
        now.append(i)
      else:
        _write(total, _slice(total[...], index) + grad, index)
    new_params, new_state = self._leafwise.update(
      [leaves[i] for i in now],
      [grads[i] for i in now],
      [params[i] for i in now],
      [[_slice(ref[...], index) for ref in refs.state[i]] for i in now],
      shared,
      index,
    )
    for i, param, arrays in zip(now, new_params, new_state, strict=True):
      _write(refs.params[i], param, index)
      for ref, array in zip(refs.state[i], arrays, strict=True):
        _write(ref, array, index)
      self._updated.add(leaves[i])

  def finish(self) -> tuple[Any, Any]:
    """Updates the leaves that had to wait; the new parameters and state."""
    leafwise = self._leafwise
    # The loss does not depend on what some released calls returned.
    waiting = sorted(self._used - self._updated)
    params = [jax.freeze(ref) for ref in self._params]
    state = {i: jax.freeze(ref) for i, ref in self._state.items()}
    grads = [
      jax.freeze(self._sums[leaf])
      if leaf in self._sums
      else jnp.zeros_like(params[leaf])
      for leaf in waiting
    ]
    new_params, new_state = leafwise.update(
      waiting,
      _barrier(grads),
      [params[leaf] for leaf in waiting],
      [[state[i] for i in leafwise.owned[leaf]] for leaf in waiting],
      self._shared,
    )
    for leaf, param, arrays in zip(waiting, new_params, new_state, strict=True):
      params[leaf] = param
      state.update(zip(leafwise.owned[leaf], arrays, strict=True))
    state.update(leafwise.new_shared_state(self._shared))
    return (
      self._params_tree.unflatten(params),
      self._state_tree.unflatten(state[i] for i in range(len(state))),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class _Refs:
  """The references that a released call reads and writes.

  Attributes:
    params: Of its leaves.
    state: For each leaf, of the state's arrays that belong to it.
    sums: For each leaf, of the sum of its gradients, or None.
  """

  params: list[Any]
  state: list[list[Any]]
  sums: list[Any]

  def read(self, index: tuple[Any, ...]) -> list[Any]:
    """The parameters, or slices of them."""
    return [_slice(ref[...], index) for ref in self.params]


# Whole references are read and written, and sliced as arrays: a reference to an
# array with explicit sharding takes no integer index. XLA sees the same program.
def _slice(array: jax.Array, index: tuple[Any, ...]) -> jax.Array:
  for i in index:
    array = lax.dynamic_index_in_dim(
      array, i, keepdims=False, allow_negative_indices=False
    )
  return array


def _write(ref: Any, value: jax.Array, index: tuple[Any, ...]) -> None:
  if index:
    start = (*index, *[np.int32(0)] * value.ndim)
    value = lax.dynamic_update_slice(
      ref[...],
      lax.expand_dims(value, range(len(index))),
      start,
      allow_negative_indices=False,
    )
  ref[...] = value


def _result(x: Any) -> Any:
  """Something that a step returns."""
  return _result_p.bind(x) if isinstance(x, jax.Array) else x


def _is_array(x: Any) -> bool:
  return isinstance(x, (jax.Array, np.ndarray, np.generic))


def _flatten(tree: Any) -> tuple[list[Any], Any]:
  return jax.tree.flatten(tree)


def _merged(flags: Sequence[bool], chosen: Sequence[Any], rest: Sequence[Any]):
  """``rest``, with ``chosen`` in the places that are flagged."""
  values = iter(chosen)
  return [next(values) if f else x for f, x in zip(flags, rest, strict=True)]


def _barrier(tree: Any) -> Any:
  """``jax.lax.optimization_barrier``, past which float0 cotangents go."""
  leaves, treedef = _flatten(tree)
  real = [leaf.dtype != jax.dtypes.float0 for leaf in leaves]
  arrays = [leaf for leaf, flag in zip(leaves, real, strict=True) if flag]
  arrays = lax.optimization_barrier(arrays)
  return treedef.unflatten(_merged(real, arrays, leaves))
