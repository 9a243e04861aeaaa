"""How often a loss function uses each parameter, found before it runs.

The function is traced with a marker at each use. Walking the trace, with loops
run through on integers alone, counts the uses of each leaf or slice.
"""

import collections
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import dtypes
from jax.extend import core
from jax.extend.core import primitives
from jax.interpreters import ad, batching

from flashoptim_jax.jaxprs import interpret

_MOST_INTEGERS = 1 << 16  # Larger arrays are no lists of indices.

use_p = core.Primitive("released_call")
use_p.multiple_results = True


@use_p.def_abstract_eval
def _types(*avals, leaves: tuple[int, ...], axes: int):
  del leaves
  return list(avals[axes:])


def _refuse(why: str):
  def rule(*args, **params):
    raise ValueError(f"released_call {why}")

  return rule


batching.primitive_batchers[use_p] = _refuse(
  "was reached inside jax.vmap, where its parameters have one gradient per"
  " example. Put the jax.vmap inside the function that it calls."
)
ad.primitive_jvps[use_p] = _refuse(
  "was reached inside jax.grad, jax.jvp or the like within the loss function."
  " Put those inside the function that it calls."
)


def mark(
  values: Sequence[Any], leaves: Sequence[int], index: Sequence[Any]
) -> list[Any]:
  """The values given, with a note that leaves, or slices of them, are used.

  Args:
    values: Everything that takes part in the call.
    leaves: The leaves.
    index: Which slices of them.
  """
  return use_p.bind(*index, *values, leaves=tuple(leaves), axes=len(index))


class Uses(NamedTuple):
  """The uses of a leaf.

  Attributes:
    axes: The number of leading axes that it was indexed along.
    counts: How often each slice was used, up to the last one that was; None if
      that can't be told before the program runs.
  """

  axes: int
  counts: np.ndarray | None

  def once_each(self, shape: tuple[int, ...]) -> bool:
    """Whether every slice of a leaf of that shape is used exactly once."""
    counts = self.counts
    return (
      counts is not None
      and counts.shape == shape[: self.axes]
      and bool((counts == 1).all())
    )


def count(closed: core.ClosedJaxpr) -> dict[int, Uses]:
  """Counts the marked uses in a trace, by leaf.

  Raises:
    ValueError: For uses inside ``jax.checkpoint`` and other transformations that
      a released call can't be in.
  """
  counter = _Counter()
  with jax.ensure_compile_time_eval():
    counter.run(closed, [None] * len(closed.in_avals))
  return counter.uses


class _Counter:
  """Runs a program on what integers are known; None stands for the rest."""

  def __init__(self):
    self.uses: dict[int, Uses] = {}
    # By identity of programs and equations, for loops come by again and again.
    self._relevant: dict[int, list[core.JaxprEqn]] = {}
    self._has_uses: dict[int, bool] = {}

  def run(self, closed: core.ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
    """Values of a program's results."""
    # What equations compute that are no indices is unknown.
    env: dict[core.Var, Any] = collections.defaultdict(
      lambda: None, interpret.environment(closed, args, _small_integers)
    )
    equations = self._relevant_equations(closed.jaxpr)
    interpret.walk(equations, env, self._equation, _small_integers)
    return interpret.read(closed.jaxpr.outvars, env, _small_integers)

  def _relevant_equations(self, jaxpr) -> list[core.JaxprEqn]:
    """Equations with uses in them, or that could compute indices."""
    if id(jaxpr) not in self._relevant:
      self._has_uses.update((id(eqn), _has_uses(eqn)) for eqn in jaxpr.eqns)
      self._relevant[id(jaxpr)] = [
        eqn
        for eqn in jaxpr.eqns
        if self._has_uses[id(eqn)] or all(map(_is_small_integer, eqn.outvars))
      ]
    return self._relevant[id(jaxpr)]

  def _equation(self, eqn: core.JaxprEqn, values: list[Any]) -> Sequence[Any]:
    unknown = [None] * len(eqn.outvars)
    if eqn.primitive is use_p:
      self._use(eqn, values)
      return unknown
    if eqn.primitive in interpret.CALLS:
      return self.run(interpret.called(eqn), values)
    if not self._has_uses[id(eqn)]:
      if any(value is None for value in values) or _subprograms(eqn):
        return unknown
      return interpret.bind(eqn, values)
    if eqn.primitive is primitives.scan_p:
      return self._scan(eqn, values)
    if eqn.primitive is primitives.remat_p:
      raise ValueError(
        "released_call was reached inside jax.checkpoint. It recomputes its"
        " function in the backward pass as it is: leave the jax.checkpoint out,"
        " or put it inside the function, with a policy."
      )
    raise ValueError(
      f"released_call was reached inside {eqn.primitive.name!r}, in which it"
      " can't be used. Put that inside the function that it calls."
    )

  def _use(self, eqn, values) -> None:
    axes = eqn.params["axes"]
    index = values[:axes]
    # Of a slice there is no telling the stack's shape; counts grow as needed.
    for leaf in eqn.params["leaves"]:
      before = self.uses.get(leaf, Uses(axes, np.zeros((0,) * axes, int)))
      if before.counts is None or any(value is None for value in index):
        self.uses[leaf] = Uses(axes, None)
      elif before.axes != axes:  # Slices of several kinds overlap.
        self.uses[leaf] = Uses(axes, np.full((1,) * axes, 2))
      else:
        where = tuple(int(value) for value in index)
        shape = tuple(
          max(n, i + 1) for n, i in zip(before.counts.shape, where, strict=True)
        )
        counts = np.zeros(shape, int)
        counts[tuple(map(slice, before.counts.shape))] = before.counts
        counts[where] += 1
        self.uses[leaf] = Uses(axes, counts)

  def _scan(self, eqn, values) -> list[Any]:
    params = eqn.params
    closed, length = params["jaxpr"], params["length"]
    num_consts, num_carry = _scan_sizes(params)
    consts, carry = values[:num_consts], values[num_consts:][:num_carry]
    xs = values[num_consts + num_carry :]
    order = reversed(range(length)) if params["reverse"] else range(length)
    for t in order:
      turn = [x if x is None else x[t] for x in xs]
      carry = self.run(closed, [*consts, *carry, *turn])[:num_carry]
    return [*carry, *[None] * (len(eqn.outvars) - len(carry))]


def _scan_sizes(params: dict[str, Any]) -> tuple[int, int]:
  """Numbers of a scan's constants and carried values."""
  if "num_carry" in params:
    return params["num_consts"], params["num_carry"]
  consts, carry, _ = params["ft_in"].unpack()  # from jax 0.12 on
  return len(consts), len(carry)


def _subprograms(eqn: core.JaxprEqn) -> list[core.Jaxpr]:
  return list(core.jaxprs_in_params(eqn.params))


def _has_uses(eqn: core.JaxprEqn) -> bool:
  return eqn.primitive is use_p or any(
    _has_uses(inner) for jaxpr in _subprograms(eqn) for inner in jaxpr.eqns
  )


def _is_small_integer(var) -> bool:
  return _are_indices(var.aval)


def _small_integers(value: Any) -> Any:
  """The value if it is known, and could be indices; else None."""
  if isinstance(value, (bool, int)):
    return value
  known = not isinstance(value, jax.core.Tracer) and _are_indices(value)
  return value if known else None


def _are_indices(array: Any) -> bool:
  """Whether an array, or a type, could be indices, or what they come from."""
  dtype = getattr(array, "dtype", None)
  return (
    dtype is not None
    and (dtypes.issubdtype(dtype, np.integer) or dtypes.issubdtype(dtype, np.bool_))
    and array.size <= _MOST_INTEGERS
  )
