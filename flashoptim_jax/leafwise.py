"""A transformation's step taken apart by leaf.

The step is traced once, on the whole tree, so that chains, masks, labels and
schedules mean what they always do. The trace shows which outputs belong to which
leaf; each leaf's part can then be carried out when its gradient is known, on the
whole leaf or, where the operations allow it, on slices of a stacked leaf.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.extend import core

from flashoptim_jax import paths
from flashoptim_jax.kernels import primitive
from flashoptim_jax.update import step
from flashoptim_jax.update.transform import DEFERRED

# Primitives that compute each element from the elements at the same place.
ELEMENTWISE = frozenset([
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan",
    "atan2", "atanh", "cbrt", "ceil", "clamp", "convert_element_type", "copy",
    "cos", "cosh", "digamma", "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2",
    "expm1", "floor", "ge", "gt", "integer_pow", "is_finite", "le", "lgamma", "log",
    "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg", "nextafter", "not",
    "or", "population_count", "pow", "reduce_precision", "rem", "round", "rsqrt",
    "select_n", "shift_left", "shift_right_arithmetic", "shift_right_logical",
    "sign", "sin", "sinh", "sqrt", "square", "sub", "tan", "tanh", "xor",
])
_DEFERRED = (primitive.update_p, primitive.call_p)
CALLS = ("jit", "pjit", "closed_call", "core_call")
_CUSTOM_CALLS = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
_INSTEAD = (
    "Take the ordinary step (jax.grad and flashoptim_jax.step), or use"
    " transformations that treat each leaf by itself, such as optax.clip,"
    " optax.clip_by_block_rms and optax.adaptive_grad_clip."
)
_REFUSED = {
    optax.MultiStepsState: (
        "optax.MultiSteps keeps a sum of gradients as large as the parameters,"
        " which is what gradient release does away with. Use larger batches,"
        " summed over in the loss function, or the ordinary step"
        " (flashoptim_jax.step)."
    ),
    optax.ApplyIfFiniteState: (
        "optax.apply_if_finite looks at all gradients before it updates any"
        " parameter; with gradient release, some are updated before others are"
        " known. Clip each leaf (optax.clip), or use the ordinary step"
        " (flashoptim_jax.step)."
    ),
    optax.LookaheadState: (
        "optax.lookahead updates two sets of parameters, of which the loss takes"
        " one. Use the ordinary step."
    ),
}


def inline(closed: core.ClosedJaxpr) -> core.ClosedJaxpr:
  """The same program without calls of other programs in it."""

  def evaluate(closed: core.ClosedJaxpr, *args):
    jaxpr = closed.jaxpr
    env = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))

    def read(var):
      return var.val if isinstance(var, core.Literal) else env[var]

    for eqn in jaxpr.eqns:
      values = map(read, eqn.invars)
      if eqn.primitive.name in (*CALLS, *_CUSTOM_CALLS):
        results = evaluate(called(eqn), *values)
      else:
        results = bind(eqn, values)
      env.update(zip(eqn.outvars, results, strict=True))
    return list(map(read, jaxpr.outvars))

  return jax.make_jaxpr(functools.partial(evaluate, closed))(*closed.in_avals)


def called(eqn: core.JaxprEqn) -> core.ClosedJaxpr:
  """The program that an equation calls."""
  return eqn.params.get("jaxpr") or eqn.params["call_jaxpr"]


def bind(eqn: core.JaxprEqn, values: Iterable[Any]) -> Sequence[Any]:
  """Carries out an equation on other values."""
  results = eqn.primitive.bind(*values, **eqn.params)
  return results if eqn.primitive.multiple_results else [results]


def _carry_out(eqn: core.JaxprEqn, values: Sequence[Any]) -> Sequence[Any]:
  """The same, where the equation may be a deferred call."""
  if eqn.primitive is primitive.call_p:
    return eqn.params["function"](*values)
  return bind(eqn, values)


class _Equation(NamedTuple):
  """An equation, and the leaves that it depends on, as a set of bits."""

  eqn: core.JaxprEqn
  leaves: int


class Leafwise:
  """``flashoptim_jax.step`` of a transformation, by leaf.

  Leaves of the parameters, and arrays of the state, go by their positions in
  the flattened trees.

  Attributes:
    names: The leaves' paths.
    owned: For each leaf, the arrays of the state that belong to it.
  """

  def __init__(
      self, tx: optax.GradientTransformation, params: Any, opt_state: Any
  ):
    """Traces the step.

    Raises:
      ValueError: If the update of some leaf needs another's gradient,
        parameter or state, or a parameter is no array.
    """
    _refuse(opt_state)
    paths.require_arrays(params)
    extra = {DEFERRED: True}
    traced = jax.make_jaxpr(
        lambda grads, state, params: step.step(tx, grads, state, params, **extra)
    )(params, opt_state, params)
    closed = inline(traced)
    self._jaxpr, self._consts = closed.jaxpr, closed.consts
    self.names = [paths.name(p) for p, _ in jax.tree.leaves_with_path(params)]
    self._state_names = [
        paths.name(p) for p, _ in jax.tree.leaves_with_path(opt_state)
    ]
    count, inputs = len(self.names), self._jaxpr.invars
    self._grads, self._params = inputs[:count], inputs[len(inputs) - count :]
    self._state = inputs[count : len(inputs) - count]
    self._new_params = self._jaxpr.outvars[:count]
    self._new_state = self._jaxpr.outvars[count:]
    self._leaves = self._find_owners()
    self.owned: list[list[int]] = [[] for _ in self.names]
    for i, var in enumerate(self._state):
      if self._leaves[var]:
        self.owned[self._leaves[var].bit_length() - 1].append(i)
    self._equations = [
        _Equation(eqn, self._union(eqn.invars)) for eqn in self._jaxpr.eqns
    ]
    self._uniform = self._find_uniform()

  def _union(self, variables: Iterable[Any]) -> int:
    result = 0
    for var in variables:
      if not isinstance(var, core.Literal):
        result |= self._leaves.get(var, 0)
    return result

  def _find_owners(self) -> dict[Any, int]:
    """The leaves that each variable depends on, as a set of bits."""
    owners = [0] * len(self._state)
    while True:
      self._leaves = {}
      for i, (grad, param) in enumerate(
          zip(self._grads, self._params, strict=True)
      ):
        self._leaves[grad] = self._leaves[param] = 1 << i
      self._leaves.update(zip(self._state, owners, strict=True))
      for eqn in self._jaxpr.eqns:
        self._leaves.update(dict.fromkeys(eqn.outvars, self._union(eqn.invars)))
      found = [self._union([var]) for var in self._new_state]
      unchanged = self._unchanged()
      found = [
          leaves or unchanged.get(var, 0)
          for leaves, var in zip(found, self._state, strict=True)
      ]
      for what, names, bits in (
          ("new value of", self.names, [self._union([v]) for v in self._new_params]),
          ("optimizer's", self._state_names, found),
      ):
        for name, leaves in zip(names, bits, strict=True):
          self._check_single(what, name, leaves)
      if found == owners:
        break
      owners = found
    for i, var in enumerate(self._new_params):
      if self._union([var]) & ~(1 << i):
        self._check_single("new value of", self.names[i], self._union([var]) | 1 << i)
    return self._leaves

  def _unchanged(self) -> dict[Any, int]:
    """Arrays that a step leaves as they are, with the leaf that alone reads them."""
    readers: dict[Any, set[int]] = {
        var: set()
        for var, new in zip(self._state, self._new_state, strict=True)
        if new is var and _shape(var)
    }
    for eqn in self._jaxpr.eqns if readers else ():
      leaves = self._union(eqn.invars)
      for var in variables(eqn):
        if var in readers:
          readers[var].add(leaves)
    found = {var: bits.pop() for var, bits in readers.items() if len(bits) == 1}
    return {
        var: leaves
        for var, leaves in found.items()
        if leaves.bit_count() == 1
        and _shape(var) == _shape(self._params[leaves.bit_length() - 1])
    }

  def _check_single(self, what: str, name: str, leaves: int) -> None:
    if leaves.bit_count() < 2:
      return
    needs = [n for i, n in enumerate(self.names) if leaves >> i & 1]
    raise ValueError(
        f"The {what} {name!r} depends on the gradients or parameters of several"
        f" leaves: {', '.join(map(repr, needs[:3]))}{', ...' * (len(needs) > 3)}."
        " Gradient release updates each leaf as soon as its gradient is known,"
        " so nothing in the chain may need all gradients at once, as"
        f" optax.clip_by_global_norm does. {_INSTEAD}"
    )

  def _find_uniform(self) -> set[Any]:
    """Arrays that no leaf is needed for, and whose elements are all equal."""
    uniform: set[Any] = set()
    for eqn, leaves in self._equations:
      name = eqn.primitive.name
      if (
          not leaves
          and _shape(eqn.outvars[0])
          and (name == "broadcast_in_dim" or name in ELEMENTWISE)
          and all(v in uniform or not _shape(v) for v in variables(eqn))
      ):
        uniform.update(eqn.outvars)
    return uniform

  def groups_within_slices(self, leaf: int, axes: int) -> bool:
    """Whether no group of the state's format reaches across a stack's slices."""
    return all(
        primitive.sliceable(eqn, axes)
        for eqn, leaves in self._equations
        if leaves == 1 << leaf and eqn.primitive in _DEFERRED
    )

  def taken_whole(self, leaf: int, axes: int) -> str | None:
    """What takes a stacked leaf as a whole, so that slices can't be updated alone.

    Args:
      leaf: Which leaf.
      axes: How many leading axes make up the stack.

    Returns:
      None if nothing does, else a primitive's name.
    """
    stack = _shape(self._params[leaf])[:axes]
    state = [self._state[i] for i in self.owned[leaf]]
    sliced = {
        var
        for var in (self._grads[leaf], self._params[leaf], *state)
        if _shape(var)[:axes] == stack
    }

    def fits(var) -> bool:
      if isinstance(var, core.Literal) or not self._leaves.get(var, 0):
        return not _shape(var) or var in self._uniform
      return var in sliced

    first = None
    for eqn, leaves in self._equations:
      if leaves != 1 << leaf:
        continue
      if eqn.primitive in _DEFERRED:
        arrays, scalars = primitive.operands(eqn)
        apart = not self._union(scalars) and primitive.sliceable(eqn, axes)
      else:
        arrays, apart = eqn.invars, eqn.primitive.name in ELEMENTWISE
      if apart and all(map(fits, arrays)):
        sliced.update(eqn.outvars)
      else:
        first = first or eqn.primitive.name
    results = [self._new_params[leaf], *(self._new_state[i] for i in self.owned[leaf])]
    if all(var in sliced for var in results):
      return None
    return first or "the state's shape"

  def shared(self, state: Sequence[Any]) -> dict[Any, Any]:
    """What no leaf is needed for: counts, schedules, hyperparameters.

    Args:
      state: The state's arrays.

    Returns:
      Values by variable; uniform arrays are held as scalars.
    """
    env = dict(zip(self._jaxpr.constvars, self._consts, strict=True))
    env.update(
        (var, value)
        for var, value in zip(self._state, state, strict=True)
        if not self._leaves[var]
    )
    for eqn, leaves in self._equations:
      if leaves:
        continue
      if eqn.outvars[0] not in self._uniform:
        values = [self._read(env, var) for var in eqn.invars]
        env.update(zip(eqn.outvars, _carry_out(eqn, values), strict=True))
        continue
      values = [v.val if isinstance(v, core.Literal) else env[v] for v in eqn.invars]
      if eqn.primitive.name == "broadcast_in_dim":
        env[eqn.outvars[0]] = values[0]
      else:
        env[eqn.outvars[0]] = bind(eqn, values)[0]
    return env

  def needed(self, leaves: Sequence[int], shared: dict[Any, Any]) -> dict[Any, Any]:
    """The part of ``shared`` that the update of some leaves reads."""
    bits = {1 << leaf for leaf in leaves}
    read = {
        var
        for eqn, depends in self._equations
        if depends in bits
        for var in variables(eqn)
    }
    for leaf in leaves:  # Results that need no equation.
      read.update(self._results(leaf))
    return {var: value for var, value in shared.items() if var in read}

  def _results(self, leaf: int) -> list[Any]:
    new_state = [self._new_state[i] for i in self.owned[leaf]]
    return [
        var
        for var in (self._new_params[leaf], *new_state)
        if not isinstance(var, core.Literal)
    ]

  def update(
      self,
      leaves: Sequence[int],
      grads: Sequence[Any],
      params: Sequence[Any],
      state: Sequence[Sequence[Any]],
      shared: dict[Any, Any],
      axes: int = 0,
  ) -> tuple[list[Any], list[list[Any]]]:
    """Updates some leaves.

    Args:
      leaves: Which ones.
      grads: Their gradients.
      params: Their parameters.
      state: For each, the arrays of the state that it owns.
      shared: Values of :meth:`shared`; :meth:`needed` ones are enough.
      axes: How many leading axes the arrays given lack, being slices of leaves
        that nothing takes as a whole.

    Returns:
      The new parameters and the new arrays of the state, as given.
    """
    env = dict(shared)
    for leaf, grad, param, arrays in zip(leaves, grads, params, state, strict=True):
      env[self._grads[leaf]], env[self._params[leaf]] = grad, param
      names = (self._state[i] for i in self.owned[leaf])
      env.update(zip(names, arrays, strict=True))
    bits = {1 << leaf for leaf in leaves}
    waiting = [eqn for eqn, depends in self._equations if depends in bits]
    while waiting:
      later, updates = [], []
      for eqn in waiting:
        if any(var not in env for var in variables(eqn)):
          later.append(eqn)
        elif eqn.primitive is primitive.update_p:
          updates.append(eqn)
        else:
          values = [self._read(env, var, axes) for var in eqn.invars]
          env.update(zip(eqn.outvars, _carry_out(eqn, values), strict=True))
      values = [[self._read(env, v, axes) for v in eqn.invars] for eqn in updates]
      for eqn, results in zip(updates, primitive.run(updates, values), strict=True):
        env.update(zip(eqn.outvars, results, strict=True))
      waiting = later

    def read(var):
      return self._read(env, var, axes)

    return (
        [read(self._new_params[leaf]) for leaf in leaves],
        [[read(self._new_state[i]) for i in self.owned[leaf]] for leaf in leaves],
    )

  def new_shared_state(self, shared: dict[Any, Any]) -> dict[int, Any]:
    """New values of the arrays of the state that belong to no leaf."""
    return {
        i: self._read(shared, self._new_state[i])
        for i, var in enumerate(self._state)
        if not self._leaves[var]
    }

  def _read(self, env: dict[Any, Any], var: Any, axes: int = 0) -> Any:
    if isinstance(var, core.Literal):
      return var.val
    if var in self._uniform:
      return jnp.broadcast_to(env[var], _shape(var)[axes:])
    return env[var]


def _shape(var: Any) -> tuple[int, ...]:
  """A variable's shape, empty for what is no array."""
  return getattr(var.aval, "shape", ())


def variables(eqn: core.JaxprEqn) -> list[Any]:
  """The variables that an equation reads."""
  return [var for var in eqn.invars if not isinstance(var, core.Literal)]


def _refuse(opt_state: Any) -> None:
  """Raises a ValueError for wrappers that can't work leaf by leaf."""

  def refused(node) -> bool:
    return isinstance(node, tuple(_REFUSED))

  for node in jax.tree.leaves(opt_state, is_leaf=refused):
    if refused(node):
      raise ValueError(
          f"Gradient release does not support a {type(node).__name__}:"
          f" {_REFUSED[type(node)]}"
      )
