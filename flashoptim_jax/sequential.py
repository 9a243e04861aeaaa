"""A computation on whole trees, carried out one group of arrays after another.

A transformation maps over trees: each step of its arithmetic is a float32 copy of
all parameters, and XLA is free to have many of them at once. Here its trace is
taken apart. What belongs to a group of parameters alone is computed when that
group's turn comes, from its stored arrays, and waits for the group before it; so
only one group's copies are alive. Numbers that depend on several groups, such as
a global norm, are computed first, in passes of their own.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from flashoptim_jax import leafwise

_SMALL = 1024  # Elements of an array that may as well be kept.


def run(
    f: Callable[..., Any], args: Any, groups: Sequence[int | None]
) -> Any:
  """``f(*args)``, group by group.

  Args:
    f: A function of trees of arrays that returns such trees.
    args: Its arguments.
    groups: For each array among them the group that it belongs to, or None.
  """
  if len({group for group in groups if group is not None}) < 2:
    return f(*args)
  traced, shapes = jax.make_jaxpr(f, return_shape=True)(*args)
  if traced.effects:  # What happens, and in which order, must stay as it is.
    return f(*args)
  passes = _Passes(leafwise.inline(traced), groups)
  return jax.tree.unflatten(
      jax.tree.structure(shapes), passes.run(jax.tree.leaves(args))
  )


class _Passes:
  """A program, and which group each of its values belongs to.

  A value belongs to a group if it is computed from that group's arguments and no
  other's. An equation that reads values of several groups is a joint one; a
  value's stage is the number of joint equations on the way to it.
  """

  def __init__(self, closed: core.ClosedJaxpr, groups: Sequence[int | None]):
    self._jaxpr, self._consts = closed.jaxpr, closed.consts
    self._group = dict(zip(self._jaxpr.invars, groups, strict=True))
    self._producer: dict[Any, int] = {}
    # By stage: equations whose results are kept, and the values of each group
    # that joint equations read.
    self._kept: dict[int, list[core.JaxprEqn]] = {}
    self._read_jointly: dict[int, dict[int, dict[Any, None]]] = {}
    stages: dict[Any, int] = {}
    for i, eqn in enumerate(self._jaxpr.eqns):
      operands = leafwise.variables(eqn)
      owned = [var for var in operands if self._group.get(var) is not None]
      found = {self._group[var] for var in owned}
      joint = len(found) > 1
      stage = max((stages.get(var, 0) for var in operands), default=0) + joint
      for var in owned if joint else ():
        by_group = self._read_jointly.setdefault(stages.get(var, 0), {})
        by_group.setdefault(self._group[var], {})[var] = None
      for var in eqn.outvars:
        self._group[var] = None if joint or not owned else self._group[owned[0]]
        self._producer[var], stages[var] = i, stage
      if joint or (not found and all(_size(v) <= _SMALL for v in eqn.outvars)):
        self._kept.setdefault(stage, []).append(eqn)

  def run(self, args: Sequence[Any]) -> list[Any]:
    """The program's results."""
    jaxpr = self._jaxpr
    self._env = dict(zip(jaxpr.constvars, self._consts, strict=True))
    self._env.update(zip(jaxpr.invars, args, strict=True))
    self._last: list[Any] = []
    for stage in range(max(self._kept, default=0) + 1):
      for eqn in self._kept.get(stage, ()):
        values = self._compute(eqn.invars)
        self._env.update(
            zip(eqn.outvars, leafwise.bind(eqn, values), strict=True)
        )
      for wanted in self._read_jointly.get(stage, {}).values():
        self._env.update(zip(wanted, self._pass(list(wanted)), strict=True))
    by_group: dict[int | None, list[Any]] = {}
    for var in jaxpr.outvars:
      if not isinstance(var, core.Literal):
        by_group.setdefault(self._group.get(var), []).append(var)
    for group, wanted in by_group.items():
      compute = self._compute if group is None else self._pass
      self._env.update(zip(wanted, compute(wanted), strict=True))
    return self._compute(jaxpr.outvars)

  def _pass(self, wanted: list[Any]) -> list[Any]:
    """Values of a group, computed when those of the last pass are there."""
    self._last = self._compute(wanted, after=self._last)
    return self._last

  def _compute(self, wanted: Sequence[Any], after: Sequence[Any] = ()) -> list[Any]:
    """Values, from those that are kept."""
    read, needed = {}, set()
    waiting = [var for var in wanted if not isinstance(var, core.Literal)]
    while waiting:
      var = waiting.pop()
      if var in self._env:
        read[var] = self._env[var]
      elif self._producer[var] not in needed:
        needed.add(self._producer[var])
        waiting += leafwise.variables(self._jaxpr.eqns[self._producer[var]])
    env = _after(read, after)
    for i in sorted(needed):
      eqn = self._jaxpr.eqns[i]
      values = [_value(env, var) for var in eqn.invars]
      env.update(zip(eqn.outvars, leafwise.bind(eqn, values), strict=True))
    return [_value(env, var) for var in wanted]


def _after(values: dict[Any, Any], others: Sequence[Any]) -> dict[Any, Any]:
  """Values that are not known before others are."""
  if not any(isinstance(x, jax.core.Tracer) for x in others):
    return dict(values)
  plain = {
      var: value
      for var, value in values.items()
      if not jnp.issubdtype(value.dtype, jax.dtypes.extended)
  }
  held, _ = lax.optimization_barrier((list(plain.values()), others))
  return {**values, **dict(zip(plain, held, strict=True))}


def _value(env: dict[Any, Any], var: Any) -> Any:
  return var.val if isinstance(var, core.Literal) else env[var]


def _size(var: Any) -> int:
  return math.prod(getattr(var.aval, "shape", ()))
