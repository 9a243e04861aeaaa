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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend import core

from flashoptim_jax.jaxprs import interpret
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
  program = split_conditionals(interpret.inline(traced))
  passes = _Passes(program, groups, overwritten)
  return jax.tree.unflatten(
    jax.tree.structure(shapes), passes.run(jax.tree.leaves(args))
  )


class _Place(NamedTuple):
  """Where a value is computed.

  Attributes:
    group: The group that it belongs to, or None.
    stage: The number of joint equations on the way to it.
  """

  group: int | None
  stage: int


class _Passes:
  """A program, and which group each of its values belongs to.

  A value belongs to a group if it is computed from that group's arguments and no
  other's. An equation that reads values of several groups is a joint one.
  """

  def __init__(
    self,
    closed: core.ClosedJaxpr,
    groups: Sequence[int | None],
    overwritten: Sequence[bool],
  ):
    self._closed = closed
    self._program = Program(closed.jaxpr.eqns)
    self._overwritten = set(
      itertools.compress(
        closed.jaxpr.invars,
        (g is not None and o for g, o in zip(groups, overwritten, strict=True)),
      )
    )
    # By stage: equations whose results are kept, and the values of each group
    # that joint equations read.
    self._kept: dict[int, list[core.JaxprEqn]] = {}
    self._read_jointly: dict[int, dict[int | None, dict[Any, None]]] = {}
    self._places = interpret.environment(
      closed, (_Place(group, 0) for group in groups), _of_no_group
    )
    interpret.walk(closed.jaxpr.eqns, self._places, self._place, _of_no_group)

  def _place(self, eqn: core.JaxprEqn, places: Sequence[_Place]) -> list[_Place]:
    """The place of an equation's results, given those of its operands."""
    owned = {
      var: place
      for var, place in zip(eqn.invars, places, strict=True)
      if place.group is not None
    }
    found = {place.group for place in owned.values()}
    from_joint = any(place.stage for place in places if place.group is None)
    # A sum over groups goes on from one joint equation to the next.
    partial = from_joint and all(size(var) == 1 for var in (*owned, *eqn.outvars))
    joint = len(found) > 1 or bool(found and partial)
    stage = max((place.stage for place in places), default=0) + joint
    for var, place in owned.items() if joint else ():
      by_group = self._read_jointly.setdefault(place.stage, {})
      by_group.setdefault(place.group, {})[var] = None
    if joint or (not found and all(size(v) <= SMALL for v in eqn.outvars)):
      self._kept.setdefault(stage, []).append(eqn)
    group = None if joint or not found else found.pop()
    return [_Place(group, stage)] * len(eqn.outvars)

  def run(self, args: Sequence[Any]) -> list[Any]:
    """The program's results."""
    outvars, program = self._closed.jaxpr.outvars, self._program
    self._env = interpret.environment(self._closed, args)
    self._last: list[Any] = []
    for stage in range(max(self._kept, default=0) + 1):
      for eqn in self._kept.get(stage, ()):
        kept = [var for var in eqn.outvars if not isinstance(var, core.DropVar)]
        values = program.part(kept, self._env).of(self._env)
        self._env.update(zip(kept, values, strict=True))
      for wanted in self._read_jointly.get(stage, {}).values():
        self._pass(list(wanted), overwritten=())
    by_group: dict[int | None, list[Any]] = {}
    for var in outvars:
      if not isinstance(var, core.Literal) and var not in self._env:
        by_group.setdefault(self._places[var].group, []).append(var)
    for group, results in by_group.items():
      if group is not None:
        self._pass(results, self._overwritten)
    return program.part(outvars, self._env).of(self._env)

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


def _of_no_group(constant: Any) -> _Place:
  del constant
  return _Place(None, 0)


def _after(values: list[Any], others: list[Any]) -> list[Any]:
  """Values that are not known before others are."""
  waiting = iter(
    lax.optimization_barrier(
      [value for value in (*values, *others) if not _is_key(value)]
    )
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
  return _outlined(
    step.evaluate,
    [
      _outlined(_copy, value, zero) if copy else value
      for value, copy in zip(values, copied, strict=True)
    ],
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
