"""A computation on whole trees, carried out one group of arrays after another.

A transformation maps over trees: each step of its arithmetic is a float32 copy of
all parameters, and XLA is free to have many of them at once. Here its trace is
taken apart. What belongs to a group of parameters alone is computed when that
group's turn comes, from its stored arrays, and waits for the group before it; so
only one group's copies are alive. Numbers that depend on several groups, such as
a global norm, are computed first, in passes of their own.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend import core

from flashoptim_jax import leafwise

_SMALL = 64  # Elements of an array that may as well be kept.


def run(
    f: Callable[..., Any],
    args: Any,
    groups: Sequence[int | None],
    overwritten: Sequence[bool],
) -> Any:
  """``f(*args)``, group by group.

  Args:
    f: A function of trees of arrays that returns such trees.
    args: Its arguments.
    groups: For each array among them the group that it belongs to, or None.
    overwritten: For each array whether a result is likely to take its place.
  """
  if len({group for group in groups if group is not None}) < 2:
    return f(*args)
  traced, shapes = jax.make_jaxpr(f, return_shape=True)(*args)
  if traced.effects:  # What happens, and in which order, must stay as it is.
    return f(*args)
  passes = _Passes(leafwise.inline(traced), groups, overwritten)
  return jax.tree.unflatten(
      jax.tree.structure(shapes), passes.run(jax.tree.leaves(args))
  )


class _Passes:
  """A program, and which group each of its values belongs to.

  A value belongs to a group if it is computed from that group's arguments and no
  other's. An equation that reads values of several groups is a joint one; a
  value's stage is the number of joint equations on the way to it.
  """

  def __init__(
      self,
      closed: core.ClosedJaxpr,
      groups: Sequence[int | None],
      overwritten: Sequence[bool],
  ):
    self._jaxpr, self._consts = closed.jaxpr, closed.consts
    self._group = dict(zip(self._jaxpr.invars, groups, strict=True))
    self._overwritten = set(
        itertools.compress(
            self._jaxpr.invars,
            (g is not None and o for g, o in zip(groups, overwritten, strict=True)),
        )
    )
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
      from_joint = any(
          stages.get(var, 0) for var in operands if self._group.get(var) is None
      )
      # A sum over groups goes on from one joint equation to the next.
      partial = from_joint and all(_size(v) == 1 for v in (*owned, *eqn.outvars))
      joint = len(found) > 1 or bool(found and partial)
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
    for group, results in by_group.items():
      compute = self._compute if group is None else self._pass
      self._env.update(zip(results, compute(results), strict=True))
    return self._compute(jaxpr.outvars)

  def _pass(self, wanted: list[Any]) -> list[Any]:
    """Values of a group, computed when those of the last pass are there."""
    read, needed = self._trace_back(wanted)

    def evaluate(values):
      return self._evaluate(dict(zip(read, values, strict=True)), needed, wanted)

    values = [self._env[var] for var in read]
    if any(isinstance(value, jax.core.Tracer) for value in values):
      values = _after(values, self._last)
      state = [var in self._overwritten for var in read]
      self._last = _in_turn(evaluate, values, state)
    else:
      self._last = evaluate(values)
    return self._last

  def _compute(self, wanted: Sequence[Any]) -> list[Any]:
    """Values that belong to no group, or are known."""
    read, needed = self._trace_back(wanted)
    return self._evaluate({var: self._env[var] for var in read}, needed, wanted)

  def _trace_back(self, wanted: Iterable[Any]) -> tuple[list[Any], list[int]]:
    """The kept values that others are computed from, and the equations."""
    read: dict[Any, None] = {}
    needed: set[int] = set()
    waiting = [var for var in wanted if not isinstance(var, core.Literal)]
    while waiting:
      var = waiting.pop()
      if var in self._env:
        read[var] = None
      elif self._producer[var] not in needed:
        needed.add(self._producer[var])
        waiting += leafwise.variables(self._jaxpr.eqns[self._producer[var]])
    return list(read), sorted(needed)

  def _evaluate(
      self, env: dict[Any, Any], equations: Iterable[int], wanted: Iterable[Any]
  ) -> list[Any]:
    for i in equations:
      eqn = self._jaxpr.eqns[i]
      values = [_value(env, var) for var in eqn.invars]
      env.update(zip(eqn.outvars, leafwise.bind(eqn, values), strict=True))
    return [_value(env, var) for var in wanted]


def _after(values: list[Any], others: list[Any]) -> list[Any]:
  """Values that are not known before others are."""
  # A barrier takes no PRNG keys.
  plain = [not jnp.issubdtype(value.dtype, jax.dtypes.extended) for value in values]
  held, _ = lax.optimization_barrier((list(itertools.compress(values, plain)), others))
  waiting = iter(held)
  return [
      next(waiting) if is_plain else value
      for value, is_plain in zip(values, plain, strict=True)
  ]


def _in_turn(
    evaluate: Callable[[list[Any]], list[Any]],
    values: list[Any],
    overwritten: list[bool],
) -> list[Any]:
  """``evaluate(values)``, with temporaries that die with it.

  XLA's CPU backend drops barriers before it schedules. It keeps to the order of
  calls that it may not inline; but it partitions across them badly, so this is
  for a process with one device.
  """
  if jax.default_backend() != "cpu" or jax.device_count() > 1:
    return evaluate(values)

  def call(values, zero):
    # Once what will be overwritten is copied, results are written in place;
    # otherwise they wait in temporaries for the whole step's end.
    return evaluate([
        _outlined(_copy, value, zero) if over else value
        for value, over in zip(values, overwritten, strict=True)
    ])

  return lax.platform_dependent(
      values,
      lax.optimization_barrier(jnp.uint8(0)),
      cpu=functools.partial(_outlined, call),
      default=lambda values, zero: evaluate(values),
  )


def _outlined(f: Callable[..., Any], *args: Any) -> Any:
  """Calls ``f`` in a way that XLA does not inline."""
  with set_xla_metadata(inlineable="false"):
    return jax.jit(f)(*args)


def _copy(array: jax.Array, zero: jax.Array) -> jax.Array:
  """The same array elsewhere. XLA must not know that ``zero`` is zero."""
  bits = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
  copied = lax.bitcast_convert_type(array, bits) ^ zero.astype(bits)
  return lax.bitcast_convert_type(copied, array.dtype)


def _value(env: dict[Any, Any], var: Any) -> Any:
  return var.val if isinstance(var, core.Literal) else env[var]


def _size(var: Any) -> int:
  return math.prod(getattr(var.aval, "shape", ()))
