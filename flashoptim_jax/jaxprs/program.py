"""Parts of a traced program, as functions of values that are known."""

import functools
import itertools
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend.core import primitives

from flashoptim_jax.jaxprs import interpret
from flashoptim_jax.jaxprs.interpret import size

SMALL = 64  # Elements of an array that may as well be kept.
# Primitives that XLA fuses into loops that read their results.
_CHEAP = interpret.ELEMENTWISE | {
  primitives.bitcast_convert_type_p,
  primitives.broadcast_in_dim_p,
  primitives.concatenate_p,
  primitives.iota_p,
  primitives.reshape_p,
  primitives.rev_p,
  primitives.slice_p,
  primitives.squeeze_p,
  primitives.transpose_p,
}


class Part(NamedTuple):
  """A part of a program.

  Attributes:
    read: The variables whose values it takes.
    results: The variables that it computes.
    evaluate: From the values of ``read`` to those of ``results``.
  """

  read: list[Any]
  results: list[Any]
  evaluate: Callable[[Sequence[Any]], list[Any]]

  def of(self, env: dict[Any, Any]) -> list[Any]:
    """Values of the results, given those of variables."""
    return self.evaluate([env[var] for var in self.read])


class Program:
  """The equations of a program, in order."""

  def __init__(self, equations: Sequence[core.JaxprEqn]):
    self._equations = equations
    self._producer = {var: i for i, eqn in enumerate(equations) for var in eqn.outvars}

  def part(self, wanted: Sequence[Any], known: Container[Any]) -> Part:
    """What computes the variables that are wanted from those that are known."""
    read, needed = self._trace_back(wanted, known)

    def evaluate(values):
      env = dict(zip(read, values, strict=True))
      interpret.walk(needed, env)
      return interpret.read(wanted, env)

    return Part(read, list(wanted), evaluate)

  def steps(self, wanted: Sequence[Any], known: Iterable[Any]) -> Iterator[Part]:
    """The same in steps, each of which may read what those before it computed.

    An equation that is not cheap is a step, and what is wanted the last one. What
    is cheap is computed again in each step that needs it.
    """
    known = set(known)
    for eqn in self._trace_back(wanted, known)[1]:
      sizes = [size(var) for var in (*eqn.invars, *eqn.outvars)]
      if eqn.primitive not in _CHEAP and max(sizes) > SMALL:
        yield self._step(eqn, known)
        known.update(eqn.outvars)
    yield self.part(wanted, known)

  def _step(self, eqn: core.JaxprEqn, known: Container[Any]) -> Part:
    """An equation and what it reads."""
    operands = self.part(eqn.invars, known)
    kept = [not isinstance(var, core.DropVar) for var in eqn.outvars]
    bind = _BIND.get(eqn.primitive, _bind)

    def evaluate(values):
      return list(itertools.compress(bind(eqn, operands, values), kept))

    return Part(operands.read, list(itertools.compress(eqn.outvars, kept)), evaluate)

  def _trace_back(
    self, wanted: Iterable[Any], known: Container[Any]
  ) -> tuple[list[Any], list[core.JaxprEqn]]:
    """The known variables that others are computed from, and the equations."""
    read: dict[Any, None] = {}
    needed: set[int] = set()
    waiting = [var for var in wanted if not isinstance(var, core.Literal)]
    while waiting:
      var = waiting.pop()
      if var in known:
        read[var] = None
      elif self._producer[var] not in needed:
        needed.add(self._producer[var])
        waiting += interpret.variables(self._equations[self._producer[var]])
    return list(read), [self._equations[i] for i in sorted(needed)]


def split_conditionals(closed: core.ClosedJaxpr) -> core.ClosedJaxpr:
  """The same program, with conditionals over whole trees in one for each leaf."""
  if all(eqn.primitive is not primitives.cond_p for eqn in closed.jaxpr.eqns):
    return closed

  def rule(eqn, values):
    bind = _bind_apart if eqn.primitive is primitives.cond_p else interpret.bind
    return bind(eqn, values)

  return interpret.rewrite(closed, rule)


def _bind_apart(eqn: core.JaxprEqn, operands: Sequence[Any]) -> list[Any]:
  """A conditional in several, one for results that large operands are shared by."""
  index, *taken = operands
  branches = [_Branch(closed) for closed in eqn.params["branches"]]
  components: list[tuple[set[int], list[int]]] = []
  for i, _ in enumerate(eqn.outvars):
    large = {
      j
      for branch in branches
      for j in branch.operands([i])
      if jnp.size(taken[j]) > SMALL
    }
    joined = [each for each in components if each[0] & large]
    components = [each for each in components if not each[0] & large]
    results = [*itertools.chain.from_iterable(each[1] for each in joined), i]
    components.append((large.union(*(each[0] for each in joined)), results))
  found: dict[int, Any] = {}
  for _, results in components:
    read = sorted(set().union(*(branch.operands(results) for branch in branches)))
    values = [taken[j] for j in read]
    parts = tuple(
      jax.make_jaxpr(functools.partial(branch.evaluate, results, read))(*values)
      for branch in branches
    )
    params = {**eqn.params, "branches": parts}
    found.update(
      zip(results, eqn.primitive.bind(index, *values, **params), strict=True)
    )
  return [found[i] for i, _ in enumerate(eqn.outvars)]


class _Branch:
  """A conditional's branch. Operands and results go by their positions."""

  def __init__(self, closed: core.ClosedJaxpr):
    inlined = interpret.inline(closed)
    self._jaxpr = inlined.jaxpr
    self._consts = dict(zip(inlined.jaxpr.constvars, inlined.consts, strict=True))
    self._position = {var: i for i, var in enumerate(inlined.jaxpr.invars)}
    self._program = Program(inlined.jaxpr.eqns)

  def _part(self, results: Iterable[int]) -> Part:
    known = self._consts.keys() | self._position.keys()
    return self._program.part([self._jaxpr.outvars[i] for i in results], known)

  def operands(self, results: Iterable[int]) -> set[int]:
    """What some results are computed from."""
    return {
      self._position[var] for var in self._part(results).read if var in self._position
    }

  def evaluate(
    self, results: Iterable[int], operands: Iterable[int], *values: Any
  ) -> list[Any]:
    """Some results, given the operands that are needed."""
    names = [self._jaxpr.invars[i] for i in operands]
    return self._part(results).of(self._consts | dict(zip(names, values, strict=True)))


def _bind(eqn: core.JaxprEqn, operands: Part, values: Sequence[Any]) -> Sequence[Any]:
  """Carries out an equation on what its operands are computed from."""
  return interpret.bind(eqn, operands.evaluate(values))


def _bind_scan(
  eqn: core.JaxprEqn, operands: Part, values: Sequence[Any]
) -> Sequence[Any]:
  """A loop that is not unrolled, whose iterations write in place."""
  return _bind(eqn.replace(params={**eqn.params, "unroll": 1}), operands, values)


def _bind_cond(
  eqn: core.JaxprEqn, operands: Part, values: Sequence[Any]
) -> Sequence[Any]:
  """A conditional whose branches compute what they take.

  Otherwise XLA would keep it until they end.
  """

  def branch(closed, *values):
    _, *taken = operands.evaluate(values)
    return core.jaxpr_as_fun(closed)(*taken)

  index, *_ = operands.evaluate(values)
  branches = tuple(
    jax.make_jaxpr(functools.partial(branch, closed))(*values)
    for closed in eqn.params["branches"]
  )
  return eqn.primitive.bind(index, *values, **{**eqn.params, "branches": branches})


_BIND = {primitives.scan_p: _bind_scan, primitives.cond_p: _bind_cond}
