"""An interpreter of traced programs, JAX's jaxprs.

A walk goes through a program's equations in order. It keeps a value for each variable
in an environment, and asks a rule for the values of an equation's results, given those
of its operands. What a value is, is the rule's choice: an array or a tracer, or what is
known of an array, such as the parameters that it depends on.
"""

import math
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import Any

import jax
from jax.extend import core
from jax.extend.core import primitives

# From an equation and its operands' values to its results' values.
Rule = Callable[[core.JaxprEqn, list[Any]], Iterable[Any]]
# From a program's constant, or a literal, to the value that stands for it.
Constant = Callable[[Any], Any]
Environment = MutableMapping[core.Var, Any]

# Primitives are told apart as objects: JAX has changed their names, from "closed_call"
# to "eval_jaxpr" for one, and a name that is gone matches nothing without a word.
CALLS = frozenset([primitives.jit_p, primitives.closed_call_p, primitives.call_p])
_CUSTOM_CALLS = frozenset([primitives.custom_jvp_call_p, primitives.custom_vjp_call_p])
# Those that compute each element from the elements at the same place.
ELEMENTWISE = frozenset(
  [
    primitives.abs_p,
    primitives.acos_p,
    primitives.acosh_p,
    primitives.add_p,
    primitives.add_jaxvals_p,
    primitives.and_p,
    primitives.asin_p,
    primitives.asinh_p,
    primitives.atan_p,
    primitives.atan2_p,
    primitives.atanh_p,
    primitives.cbrt_p,
    primitives.ceil_p,
    primitives.clamp_p,
    primitives.convert_element_type_p,
    primitives.copy_p,
    primitives.cos_p,
    primitives.cosh_p,
    primitives.digamma_p,
    primitives.div_p,
    primitives.eq_p,
    primitives.erf_p,
    primitives.erf_inv_p,
    primitives.erfc_p,
    primitives.exp_p,
    primitives.exp2_p,
    primitives.expm1_p,
    primitives.floor_p,
    primitives.ge_p,
    primitives.gt_p,
    primitives.integer_pow_p,
    primitives.is_finite_p,
    primitives.le_p,
    primitives.lgamma_p,
    primitives.log_p,
    primitives.log1p_p,
    primitives.logistic_p,
    primitives.lt_p,
    primitives.max_p,
    primitives.min_p,
    primitives.mul_p,
    primitives.ne_p,
    primitives.neg_p,
    primitives.nextafter_p,
    primitives.not_p,
    primitives.or_p,
    primitives.population_count_p,
    primitives.pow_p,
    primitives.reduce_precision_p,
    primitives.rem_p,
    primitives.round_p,
    primitives.rsqrt_p,
    primitives.select_n_p,
    primitives.shift_left_p,
    primitives.shift_right_arithmetic_p,
    primitives.shift_right_logical_p,
    primitives.sign_p,
    primitives.sin_p,
    primitives.sinh_p,
    primitives.sqrt_p,
    primitives.square_p,
    primitives.sub_p,
    primitives.tan_p,
    primitives.tanh_p,
    primitives.xor_p,
  ]
)


def _itself(value: Any) -> Any:
  return value


def bind(eqn: core.JaxprEqn, values: Iterable[Any]) -> Sequence[Any]:
  """Carries out an equation as it stands, on other values."""
  # Those of calls with derivatives of their own are not what they are bound with.
  params = eqn.primitive.get_bind_params(eqn.params)
  results = eqn.primitive.bind(*values, **params)
  return results if eqn.primitive.multiple_results else [results]


def enter_calls(eqn: core.JaxprEqn, values: Iterable[Any]) -> Sequence[Any]:
  """Carries out an equation; if it calls a program, that one's equations.

  ``jax.checkpoint`` is no such call: what it recomputes would be lost.
  """
  if eqn.primitive in CALLS or eqn.primitive in _CUSTOM_CALLS:
    return evaluate(called(eqn), values, enter_calls)
  return bind(eqn, values)


def called(eqn: core.JaxprEqn) -> core.ClosedJaxpr:
  """The program that an equation calls."""
  found = eqn.params.get("jaxpr") or eqn.params["call_jaxpr"]
  # Before JAX 0.11 it may be open.
  return found if hasattr(found, "consts") else core.ClosedJaxpr(found, ())


def evaluate(
  closed: core.ClosedJaxpr,
  args: Iterable[Any],
  rule: Rule = bind,
  constant: Constant = _itself,
) -> list[Any]:
  """The values of a program's results.

  Args:
    closed: The program.
    args: The values of its arguments.
    rule: Gives the values of an equation's results.
    constant: Gives those of constants and literals, by default their own.
  """
  env = environment(closed, args, constant)
  walk(closed.jaxpr.eqns, env, rule, constant)
  return read(closed.jaxpr.outvars, env, constant)


def environment(
  closed: core.ClosedJaxpr, args: Iterable[Any], constant: Constant = _itself
) -> dict[core.Var, Any]:
  """The values of a program's constants and arguments, by variable."""
  jaxpr = closed.jaxpr
  env = dict(zip(jaxpr.constvars, map(constant, closed.consts), strict=True))
  env.update(zip(jaxpr.invars, args, strict=True))
  return env


def walk(
  equations: Iterable[core.JaxprEqn],
  env: Environment,
  rule: Rule = bind,
  constant: Constant = _itself,
) -> None:
  """Adds the values of equations' results to an environment.

  Args:
    equations: All of a program's, or some of them, in order.
    env: Values of variables. A mapping with a default answers for those of equations
      that are left out.
    rule: See :func:`evaluate`.
    constant: See :func:`evaluate`.
  """
  for eqn in equations:
    results = rule(eqn, read(eqn.invars, env, constant))
    for var, value in zip(eqn.outvars, results, strict=True):
      if not isinstance(var, core.DropVar):
        env[var] = value


def read(
  atoms: Iterable[Any], env: Environment, constant: Constant = _itself
) -> list[Any]:
  """The values of variables and literals."""
  return [
    constant(atom.val) if isinstance(atom, core.Literal) else env[atom]
    for atom in atoms
  ]


def rewrite(closed: core.ClosedJaxpr, rule: Rule) -> core.ClosedJaxpr:
  """The program that a rule makes of another, equation by equation."""
  return jax.make_jaxpr(lambda *args: evaluate(closed, args, rule))(*closed.in_avals)


def inline(closed: core.ClosedJaxpr) -> core.ClosedJaxpr:
  """The same program without calls of other programs in it."""
  return rewrite(closed, enter_calls)


def prune(closed: core.ClosedJaxpr) -> core.ClosedJaxpr:
  """The same program without equations that nothing comes of."""
  needed = {var for var in closed.jaxpr.outvars if not isinstance(var, core.Literal)}
  kept = []
  for eqn in reversed(closed.jaxpr.eqns):
    if eqn.effects or not needed.isdisjoint(eqn.outvars):
      kept.append(eqn)
      needed.update(variables(eqn))
  return closed.replace(jaxpr=closed.jaxpr.replace(eqns=kept[::-1]))


def variables(eqn: core.JaxprEqn) -> list[core.Var]:
  """The variables that an equation reads."""
  return [var for var in eqn.invars if not isinstance(var, core.Literal)]


def shape(atom: Any) -> tuple[int, ...]:
  """A variable's shape, empty for what is no array."""
  return getattr(atom.aval, "shape", ())


def size(atom: Any) -> int:
  """How many elements a variable has."""
  return math.prod(shape(atom))
