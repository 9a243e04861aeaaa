"""A transformation's step taken apart by leaf.

The step is traced once, on the whole tree, so that chains, masks, labels and
schedules mean what they always do. The trace shows which outputs belong to which
leaf; each leaf's part can then be carried out when its gradient is known, on the
whole leaf or, where the operations allow it, on slices of a stacked leaf.
"""

import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.extend import core
from jax.extend.core import primitives

from flashoptim_jax import paths
from flashoptim_jax.jaxprs import interpret
from flashoptim_jax.jaxprs.interpret import shape, variables
from flashoptim_jax.kernels import dispatch, primitive

_DEFERRED = (primitive.update_p, primitive.call_p)
# Of operands whose elements are all equal they make such arrays.
_UNIFORM = interpret.ELEMENTWISE | {primitives.broadcast_in_dim_p}
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


def _carry_out(
  eqn: core.JaxprEqn, values: Sequence[Any], index: Sequence[Any] = ()
) -> Sequence[Any]:
  """Carries out an equation, which may be a deferred call."""
  if eqn.primitive is primitive.call_p:
    return primitive.run_call(eqn, values, index)
  return interpret.bind(eqn, values)


class _Equation(NamedTuple):
  """An equation.

  Attributes:
    eqn: The equation.
    leaves: Those that it depends on, as a set of bits.
    updates: How many deferred updates come one after another on the way to it.
  """

  eqn: core.JaxprEqn
  leaves: int
  updates: int


class Leafwise:
  """A step of an optimizer, by leaf.

  Leaves of the parameters, and arrays of the state, go by their positions in
  the flattened trees.

  Attributes:
    names: The leaves' paths.
    owned: For each leaf, the arrays of the state that belong to it.
  """

  def __init__(self, step: Callable[..., Any], params: Any, opt_state: Any):
    """Traces a step.

    Args:
      step: ``(gradients, state, parameters) -> (parameters, state)``, with updates of
        flash optimizers that are deferred.
      params: Parameters, of which only types matter, as of the state.
      opt_state: The optimizer's state.

    Raises:
      ValueError: If the update of some leaf needs another's gradient,
        parameter or state, or a parameter is no array.
    """
    _refuse(opt_state)
    paths.require_arrays(params)
    traced = jax.make_jaxpr(step)(params, opt_state, params)
    self._closed = interpret.prune(interpret.inline(traced))
    jaxpr = self._closed.jaxpr
    self.names = [paths.name(p) for p, _ in jax.tree.leaves_with_path(params)]
    self._state_names = [paths.name(p) for p, _ in jax.tree.leaves_with_path(opt_state)]
    count, inputs = len(self.names), jaxpr.invars
    self._grads, self._params = inputs[:count], inputs[len(inputs) - count :]
    self._state = inputs[count : len(inputs) - count]
    self._new_params = jaxpr.outvars[:count]
    self._new_state = jaxpr.outvars[count:]
    self._leaves = self._find_owners()
    self.owned: list[list[int]] = [[] for _ in self.names]
    for i, var in enumerate(self._state):
      if self._leaves[var]:
        self.owned[self._leaves[var].bit_length() - 1].append(i)
    self._equations = self._find_equations()
    # Variables that no leaf is needed for: whether their elements are all equal.
    self._all_equal = self._find_all_equal()
    self._uniform = {
      var for var, equal in self._all_equal.items() if equal and shape(var)
    }

  def _union(self, atoms: Iterable[Any]) -> int:
    """The leaves that some variables depend on."""
    return _join(interpret.read(atoms, self._leaves, _no_leaf))

  def _find_owners(self) -> dict[Any, int]:
    """The leaves that each variable depends on, as a set of bits."""
    owners = [0] * len(self._state)
    while True:
      readers = self._follow(owners)
      found = [self._union([var]) for var in self._new_state]
      unchanged = self._unchanged(readers)
      found = [
        leaves or unchanged.get(var, 0)
        for leaves, var in zip(found, self._state, strict=True)
      ]
      for what, names, leaves in (
        ("new value of", self.names, [self._union([v]) for v in self._new_params]),
        ("optimizer's", self._state_names, found),
      ):
        for name, each in zip(names, leaves, strict=True):
          self._check_single(what, name, each)
      if found == owners:
        break
      owners = found
    for i, var in enumerate(self._new_params):
      if self._union([var]) & ~(1 << i):
        self._check_single("new value of", self.names[i], self._union([var]) | 1 << i)
    return self._leaves

  def _follow(self, owners: Sequence[int]) -> dict[Any, set[int]]:
    """Sets the leaves of all variables, given those of the state's arrays.

    Returns:
      For each array that a step leaves as it is, the leaves of equations that read it.
    """
    bits = [1 << i for i, _ in enumerate(self.names)]
    readers: dict[Any, set[int]] = {
      var: set()
      for var, new in zip(self._state, self._new_state, strict=True)
      if new is var and shape(var)
    }

    def rule(eqn, values):
      leaves = _join(values)
      for var in readers.keys() & variables(eqn):
        readers[var].add(leaves)
      return [leaves] * len(eqn.outvars)

    self._leaves = interpret.environment(
      self._closed, [*bits, *owners, *bits], _no_leaf
    )
    interpret.walk(self._closed.jaxpr.eqns, self._leaves, rule, _no_leaf)
    return readers

  def _unchanged(self, readers: dict[Any, set[int]]) -> dict[Any, int]:
    """Arrays that a step leaves as they are, with the leaf that alone reads them."""
    found = {var: bits.pop() for var, bits in readers.items() if len(bits) == 1}
    return {
      var: leaves
      for var, leaves in found.items()
      if leaves.bit_count() == 1
      and shape(var) == shape(self._params[leaves.bit_length() - 1])
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

  def _find_equations(self) -> list[_Equation]:
    """The equations, with what is known of them."""
    found = []

    def rule(eqn, values):
      updates = max(values, default=0)
      found.append(_Equation(eqn, self._union(eqn.invars), updates))
      return [updates + (eqn.primitive is primitive.update_p)] * len(eqn.outvars)

    none = [0] * len(self._closed.in_avals)
    interpret.evaluate(self._closed, none, rule, lambda _: 0)
    return found

  def _find_all_equal(self) -> dict[Any, bool]:
    def is_scalar(value) -> bool:
      return not jnp.shape(value)

    def rule(eqn, values):
      equal = eqn.primitive in _UNIFORM and all(values)
      return [equal or not shape(var) for var in eqn.outvars]

    scalars = [not shape(var) for var in self._closed.jaxpr.invars]
    env = interpret.environment(self._closed, scalars, is_scalar)
    shared = (eqn for eqn, leaves, _ in self._equations if not leaves)
    interpret.walk(shared, env, rule, is_scalar)
    return {var: equal for var, equal in env.items() if not self._leaves[var]}

  def groups_within_slices(self, leaf: int, axes: int) -> bool:
    """Whether no group of the state's format reaches across a stack's slices."""
    return all(
      primitive.sliceable(eqn, axes)
      for eqn, leaves, _ in self._equations
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
    stack = shape(self._params[leaf])[:axes]
    state = [self._state[i] for i in self.owned[leaf]]
    # Whether a slice of a variable's value is found from the leaf's slice alone.
    env = dict(self._all_equal)
    env.update(
      (var, shape(var)[:axes] == stack)
      for var in (self._grads[leaf], self._params[leaf], *state)
    )
    whole = []

    def rule(eqn, values):
      if eqn.primitive in _DEFERRED:
        arrays, scalars = primitive.operands(eqn)
        values = values[: len(arrays)]
        apart = not self._union(scalars) and primitive.sliceable(eqn, axes)
      else:
        apart = eqn.primitive in interpret.ELEMENTWISE
      apart = apart and all(values)
      if not apart:
        whole.append(eqn.primitive.name)
      return [apart] * len(eqn.outvars)

    equations = (eqn for eqn, leaves, _ in self._equations if leaves == 1 << leaf)
    interpret.walk(equations, env, rule, lambda value: not jnp.shape(value))
    results = [self._new_params[leaf], *(self._new_state[i] for i in self.owned[leaf])]
    if all(self._union([var]) and env[var] for var in results):
      return None
    return whole[0] if whole else "the state's shape"

  def shared(self, state: Sequence[Any]) -> dict[Any, Any]:
    """What no leaf is needed for: counts, schedules, hyperparameters.

    Args:
      state: The state's arrays.

    Returns:
      Values by variable; uniform arrays are held as scalars.
    """
    jaxpr = self._closed.jaxpr
    env = dict(zip(jaxpr.constvars, self._closed.consts, strict=True))
    env.update(
      (var, value)
      for var, value in zip(self._state, state, strict=True)
      if not self._leaves[var]
    )

    def rule(eqn, values):
      if self._uniform.isdisjoint(eqn.outvars):
        return _carry_out(eqn, self._broadcast(eqn.invars, values))
      if eqn.primitive is primitives.broadcast_in_dim_p:
        return values[:1]
      return interpret.bind(eqn, values)

    interpret.walk((eqn for eqn, leaves, _ in self._equations if not leaves), env, rule)
    return env

  def needed(self, leaves: Sequence[int], shared: dict[Any, Any]) -> dict[Any, Any]:
    """The part of ``shared`` that the update of some leaves reads."""
    bits = {1 << leaf for leaf in leaves}
    read = {
      var
      for eqn, depends, _ in self._equations
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
    index: Sequence[Any] = (),
  ) -> tuple[list[Any], list[list[Any]]]:
    """Updates some leaves.

    Args:
      leaves: Which ones.
      grads: Their gradients.
      params: Their parameters.
      state: For each, the arrays of the state that it owns.
      shared: Values of :meth:`shared`; :meth:`needed` ones are enough.
      index: Along the leading axes that the arrays given lack, being slices of leaves
        that nothing takes as a whole.

    Returns:
      The new parameters and the new arrays of the state, as given.
    """
    bits = {1 << leaf for leaf in leaves}
    equations = sorted(
      (each for each in self._equations if each.leaves in bits),
      key=operator.attrgetter("updates"),
    )
    if any(each.eqn.primitive is primitive.call_p for each in equations):
      # Several calls read a slice of a stack. All have to before something is written
      # there, lest XLA copy the stack for those that come later.
      params, state = lax.optimization_barrier((list(params), list(state)))
    env, axes = dict(shared), len(index)
    for leaf, grad, param, arrays in zip(leaves, grads, params, state, strict=True):
      env[self._grads[leaf]], env[self._params[leaf]] = grad, param
      names = (self._state[i] for i in self.owned[leaf])
      env.update(zip(names, arrays, strict=True))

    def rule(eqn, values):
      return _carry_out(eqn, self._broadcast(eqn.invars, values, axes), index)

    # Updates that don't depend on each other are carried out together.
    for _, turn in itertools.groupby(equations, operator.attrgetter("updates")):
      eqns = [each.eqn for each in turn]
      updates = [eqn for eqn in eqns if eqn.primitive is primitive.update_p]
      others = (eqn for eqn in eqns if eqn.primitive is not primitive.update_p)
      interpret.walk(others, env, rule)
      values = [self._read(env, eqn.invars, axes) for eqn in updates]
      results = iter(primitive.run(dispatch.update_leaves, updates, values, index))
      interpret.walk(updates, env, lambda *_, results=results: next(results))
    return (
      self._read(env, (self._new_params[leaf] for leaf in leaves), axes),
      [
        self._read(env, (self._new_state[i] for i in self.owned[leaf]), axes)
        for leaf in leaves
      ],
    )

  def new_shared_state(self, shared: dict[Any, Any]) -> dict[int, Any]:
    """New values of the arrays of the state that belong to no leaf."""
    return {
      i: self._read(shared, [self._new_state[i]])[0]
      for i, var in enumerate(self._state)
      if not self._leaves[var]
    }

  def _read(
    self, env: dict[Any, Any], atoms: Iterable[Any], axes: int = 0
  ) -> list[Any]:
    atoms = list(atoms)
    return self._broadcast(atoms, interpret.read(atoms, env), axes)

  def _broadcast(
    self, atoms: Iterable[Any], values: Iterable[Any], axes: int = 0
  ) -> list[Any]:
    """Values as they are taken: uniform arrays are held as scalars."""
    return [
      jnp.broadcast_to(value, shape(atom)[axes:])
      if isinstance(atom, core.Var) and atom in self._uniform
      else value
      for atom, value in zip(atoms, values, strict=True)
    ]


def _join(leaves: Iterable[int]) -> int:
  return functools.reduce(operator.or_, leaves, 0)


def _no_leaf(constant: Any) -> int:
  del constant
  return 0


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
