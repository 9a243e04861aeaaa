"""A computation on whole trees, carried out one group of arrays after another.

A transformation maps over trees: each step of its arithmetic is a float32 copy of
all parameters, and XLA is free to have many of them at once. Here its trace is
taken apart. What belongs to a group of parameters alone is computed when that
group's turn comes, from its stored arrays, and waits for the group before it; so
only one group's copies are alive. Numbers that depend on several groups, such as
a global norm, are computed first, in passes of their own. A group's turn has steps
where one array is not computed element by element from others, such as a norm or a
product of matrices: what elements are computed from is decoded again in each.
"""

import functools
import itertools
from collections.abc import Callable, Container, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend import core

from flashoptim_jax import leafwise
from flashoptim_jax.jaxprs.program import (
  SMALL,
  Part,
  Program,
  size,
  split_conditionals,
)


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
  program = split_conditionals(leafwise.inline(traced))
  passes = _Passes(program, groups, overwritten)
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
    self._program = Program(self._jaxpr.eqns)
    self._group = dict(zip(self._jaxpr.invars, groups, strict=True))
    self._overwritten = set(
        itertools.compress(
            self._jaxpr.invars,
            (g is not None and o for g, o in zip(groups, overwritten, strict=True)),
        )
    )
    # By stage: equations whose results are kept, and the values of each group
    # that joint equations read.
    self._kept: dict[int, list[core.JaxprEqn]] = {}
    self._read_jointly: dict[int, dict[int, dict[Any, None]]] = {}
    stages: dict[Any, int] = {}
    for eqn in self._jaxpr.eqns:
      operands = leafwise.variables(eqn)
      owned = [var for var in operands if self._group.get(var) is not None]
      found = {self._group[var] for var in owned}
      from_joint = any(
          stages.get(var, 0) for var in operands if self._group.get(var) is None
      )
      # A sum over groups goes on from one joint equation to the next.
      partial = from_joint and all(size(v) == 1 for v in (*owned, *eqn.outvars))
      joint = len(found) > 1 or bool(found and partial)
      stage = max((stages.get(var, 0) for var in operands), default=0) + joint
      for var in owned if joint else ():
        by_group = self._read_jointly.setdefault(stages.get(var, 0), {})
        by_group.setdefault(self._group[var], {})[var] = None
      for var in eqn.outvars:
        self._group[var] = None if joint or not owned else self._group[owned[0]]
        stages[var] = stage
      if joint or (not found and all(size(v) <= SMALL for v in eqn.outvars)):
        self._kept.setdefault(stage, []).append(eqn)

  def run(self, args: Sequence[Any]) -> list[Any]:
    """The program's results."""
    jaxpr, program = self._jaxpr, self._program
    self._env = dict(zip(jaxpr.constvars, self._consts, strict=True))
    self._env.update(zip(jaxpr.invars, args, strict=True))
    self._last: list[Any] = []
    for stage in range(max(self._kept, default=0) + 1):
      for eqn in self._kept.get(stage, ()):
        values = program.part(eqn.invars, self._env).of(self._env)
        self._env.update(
            zip(eqn.outvars, leafwise.bind(eqn, values), strict=True)
        )
      for wanted in self._read_jointly.get(stage, {}).values():
        self._pass(list(wanted), overwritten=())
    by_group: dict[int | None, list[Any]] = {}
    for var in jaxpr.outvars:
      if not isinstance(var, core.Literal) and var not in self._env:
        by_group.setdefault(self._group[var], []).append(var)
    for group, results in by_group.items():
      if group is not None:
        self._pass(results, self._overwritten)
    return program.part(jaxpr.outvars, self._env).of(self._env)

  def _pass(self, wanted: list[Any], overwritten: Container[Any]) -> None:
    """Computes values of a group when those of the last pass are there."""
    part = self._program.part(wanted, self._env)
    values = [self._env[var] for var in part.read]
    if any(isinstance(value, jax.core.Tracer) for value in values):
      steps = list(self._program.steps(wanted, part.read))
      self._last = _in_turn(part, steps, values, self._last, overwritten)
    else:
      self._last = part.evaluate(values)
    self._env.update(zip(wanted, self._last, strict=True))


def _after(values: list[Any], others: list[Any]) -> list[Any]:
  """Values that are not known before others are."""
  waiting = iter(
      lax.optimization_barrier([
          value for value in (*values, *others) if not _is_key(value)
      ])
  )
  return [value if _is_key(value) else next(waiting) for value in values]


def _is_key(value: Any) -> bool:
  """Whether it is a PRNG key, which a barrier does not take."""
  return jnp.issubdtype(value.dtype, jax.dtypes.extended)


def _in_turn(
    part: Part,
    steps: Sequence[Part],
    values: list[Any],
    last: list[Any],
    overwritten: Container[Any],
) -> list[Any]:
  """``part.evaluate(values)`` after ``last``, with temporaries that die with steps.

  XLA's CPU backend drops barriers before it schedules. It keeps to the order of
  calls that it may not inline; but it partitions across them badly, so this is
  for a process with one device.
  """
  if jax.default_backend() != "cpu" or jax.device_count() > 1:
    return part.evaluate(_after(values, last))

  def call(values, last, zero):
    env = dict(zip(part.read, values, strict=True))
    for step in steps:
      copied = [
          step is steps[-1] and (var in overwritten or var in step.results)
          for var in step.read
      ]
      run_step = functools.partial(_run_step, step, copied)
      last = _outlined(run_step, [env[var] for var in step.read], zero, last)
      env.update(zip(step.results, last, strict=True))
    return last

  return lax.platform_dependent(
      values,
      last,
      lax.optimization_barrier(jnp.uint8(0)),
      cpu=functools.partial(_outlined, call),
      default=lambda values, last, zero: part.evaluate(_after(values, last)),
  )


def _run_step(
    step: Part,
    copied: list[bool],
    values: list[Any],
    zero: jax.Array,
    last: list[Any],
) -> list[Any]:
  """``step.evaluate(values)``, not before ``last`` is known."""
  # This keeps ``last`` among what the call takes, for which XLA has it wait.
  values = _after(values, last)
  if not any(copied):
    return step.evaluate(values)
  # Once what will be overwritten is copied, results are written in place;
  # otherwise they wait in temporaries for the whole step's end.
  return _outlined(step.evaluate, [
      _outlined(_copy, value, zero) if copy else value
      for value, copy in zip(values, copied, strict=True)
  ])


def _outlined(f: Callable[..., Any], *args: Any) -> Any:
  """Calls ``f`` in a way that XLA does not inline."""
  with set_xla_metadata(inlineable="false"):
    return jax.jit(f)(*args)


def _copy(array: jax.Array, zero: jax.Array) -> jax.Array:
  """The same array elsewhere. XLA must not know that ``zero`` is zero."""
  bits = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
  copied = lax.bitcast_convert_type(array, bits) ^ zero.astype(bits)
  return lax.bitcast_convert_type(copied, array.dtype)
