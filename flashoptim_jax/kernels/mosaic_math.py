"""Evaluates an update rule with cheaper divisions and square roots.

Before its sixth generation a TPU has no accurate division or square root; each
takes a dozen operations, most of them for infinities, zeros and the last bit. An
update's direction needs none of these where it is rounded to a 24-bit weight. Nor does
it need its scalar factors one by one: they are multiplied together first.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from flashoptim_jax.jaxprs import interpret
from flashoptim_jax.rules import Rule
from flashoptim_jax.storage import codec

_LARGEST = 3.0e38


class Multiples(NamedTuple):
  """What the roots of this module come multiplied by.

  Attributes:
    inverse_root: Of :func:`inverse_root`, a power of two.
    root: Of the first of :func:`roots_of_square`.
    fourth_root: Of the second.
  """

  inverse_root: float
  root: float
  fourth_root: float


# Of Newton's step for the fourth root, and what it leaves at the solution.
_STEP = float(np.float32(7 / 3))
_LEFT = _STEP - 1.0


def multiples(has_fast_roots: bool) -> Multiples:
  """Those of a TPU whose ``lax.rsqrt`` costs one operation, or many."""
  if has_fast_roots:
    return Multiples(1.0, 1.0, 1.0)
  return Multiples(2.0, _LEFT**2, _LEFT)


def inverse_root(magnitude: jax.Array, has_fast_roots: bool) -> jax.Array:
  """``magnitude ** (-1/2)``, multiplied; infinite or large where it is 0.

  Where ``lax.rsqrt`` costs many operations, this is one Newton step,
  ``2 g <- g (3 - |x| g^2)``.
  """
  if has_fast_roots:
    return lax.rsqrt(magnitude)
  guess = _power(magnitude, -0.5)
  return guess * (3.0 - magnitude * (guess * guess))


def roots_of_square(x: jax.Array, has_fast_roots: bool) -> tuple[jax.Array, jax.Array]:
  """``x ** (1/2)`` and ``x ** (1/4)`` of a mean of squares, multiplied.

  From a guess ``g = x ** (-1/4)``, ``x ** (1/4) = x g^3 (x g^4) ** (-3/4)``; the last
  power is near that of 1, ``3/4 (7/3 - x g^4)``.
  """
  if has_fast_roots:
    fourth = lax.rsqrt(lax.rsqrt(x))
  else:
    guess = _power(x, -0.25)
    squared = guess * guess
    root = x * squared
    fourth = (root * guess) * (_STEP - root * squared)
  return fourth * fourth, fourth


def _power(x: jax.Array, exponent: float) -> jax.Array:
  """A guess at ``x ** exponent``; a large finite number where x is 0."""
  x = jnp.maximum(x, codec.TINY)
  log2 = getattr(lax, "log2", None)  # JAX before 0.12 has none.
  if log2 is None:
    return jnp.exp2(jnp.log(x) * (exponent / math.log(2.0)))
  return jnp.exp2(log2(x) * exponent)


class Known(NamedTuple):
  """What is known of an argument.

  Attributes:
    array: The argument, less a factor.
    factor: The number by which it is to be multiplied.
    root: The square root of ``array``, less a factor, or None.
    root_factor: That of the root.
  """

  array: jax.Array
  factor: Any
  root: jax.Array | None
  root_factor: float


@functools.cache
def reads_old_moments(rule: Rule, scalars: tuple[str, ...]) -> bool:
  """Whether a rule's direction depends on the moments before the update.

  Args:
    rule: The rule.
    scalars: Names of its scalars.
  """
  number = jax.ShapeDtypeStruct((), jnp.float32)
  moments = [number] * len(rule.moments)
  closed = jax.make_jaxpr(rule.direction)(
    number, moments, moments, dict.fromkeys(scalars, number)
  )
  depends = [0 < i <= len(moments) for i, _ in enumerate(closed.in_avals)]
  return any(
    interpret.evaluate(
      closed,
      depends,
      lambda eqn, values: [any(values)] * len(eqn.outvars),
      lambda _: False,
    )
  )


def evaluate(
  f: Callable[..., jax.Array],
  args: Any,
  known: Sequence[Known],
  reciprocal: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, Any]:
  """``f(*args)``, cheaper, as an array and a number that it is to be multiplied by.

  Args:
    f: Computes one array from arrays and scalars.
    args: Its arguments.
    known: What is known of some of them, found by their arrays.
    reciprocal: Used in divisions by arrays.
  """
  leaves, tree = jax.tree.flatten(args)
  # What is inside calls, such as those of `jnp.where`, is to be cheaper too.
  closed = interpret.inline(
    jax.make_jaxpr(lambda *x: f(*jax.tree.unflatten(tree, x)))(*leaves)
  )
  of_arguments = {
    i: each for i, leaf in enumerate(leaves) for each in known if leaf is each.array
  }
  return _run(closed, leaves, of_arguments, reciprocal)


def _run(
  closed: Any,
  args: list[Any],
  known: dict[int, Known],
  reciprocal: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, Any]:
  jaxpr = closed.jaxpr
  values = _Values(reciprocal)
  values.read_as.update(zip(jaxpr.constvars, closed.consts, strict=True))
  for i, (variable, value) in enumerate(zip(jaxpr.invars, args, strict=True)):
    if i not in known:
      values.read_as[variable] = value
      continue
    array, factor, root, root_factor = known[i]
    values.products[variable] = array, factor
    if root is not None:
      values.roots[variable] = root, root_factor * jnp.sqrt(factor)
  # No walk: a product is multiplied out only where an equation reads it as an array.
  for eqn in jaxpr.eqns:
    values.evaluate(eqn)
  return values.parts(jaxpr.outvars[0])


class _Values:
  """What is known of the variables of a jaxpr.

  Attributes:
    read_as: Their values.
    products: Arrays and the scalars that these are to be multiplied by where they are
      needed.
    scalars: What a variable is a broadcast of.
    roots: Square roots, as products.
    magnitudes: Products of which neither part is negative.
  """

  def __init__(self, reciprocal: Callable[[jax.Array], jax.Array]):
    self.read_as: dict[Any, Any] = {}
    self.products: dict[Any, tuple[jax.Array, Any]] = {}
    self.scalars: dict[Any, Any] = {}
    self.roots: dict[Any, tuple[jax.Array, Any]] = {}
    self.magnitudes: set[Any] = set()
    self._reciprocal = reciprocal

  def evaluate(self, eqn: Any) -> None:
    """Computes what an equation gives."""
    out, name, atoms = eqn.outvars[0], eqn.primitive.name, eqn.invars
    if name == "broadcast_in_dim" and not atoms[0].aval.shape:
      self.scalars[out] = self.read(atoms[0])
    if name in ("mul", "add") and self.scalar(atoms[0]) is not None:
      atoms = atoms[::-1]
    rule = getattr(self, f"_{name}", None) if out.aval.shape else None
    if rule is None or not rule(out, *atoms):
      results = interpret.bind(eqn, map(self.read, eqn.invars))
      self.read_as.update(zip(eqn.outvars, results, strict=True))

  def read(self, atom: Any) -> Any:
    """The value of a variable, or a literal's."""
    if isinstance(atom, core.Literal):
      return atom.val
    if atom not in self.read_as:
      array, factor = self.products[atom]
      self.read_as[atom] = array * factor
    return self.read_as[atom]

  def parts(self, atom: Any) -> tuple[jax.Array, Any]:
    """The same as a product."""
    return self.products[atom] if atom in self.products else (self.read(atom), 1.0)

  def scalar(self, atom: Any) -> Any:
    """The scalar that all elements are equal to, or None."""
    if isinstance(atom, core.Literal):
      return atom.val
    if not atom.aval.shape:
      return self.read_as[atom]
    return self.scalars.get(atom)

  def root(self, atom: Any) -> tuple[jax.Array, Any] | None:
    """The square root, if it is known."""
    return self.roots.get(atom) if isinstance(atom, core.Var) else None

  # Primitives, for arrays. They say whether they have computed the result; of two
  # operands that may be interchanged, a scalar is the second.

  def _mul(self, out, x, y) -> bool:
    by, root = self.scalar(y), self.root(x)
    if by is None:
      return False
    array, factor = self.parts(x)
    self.products[out] = array, factor * by
    if root is not None:
      self.roots[out] = root[0], root[1] * jnp.sqrt(by)
    return True

  def _div(self, out, x, y) -> bool:
    array, factor = self.parts(x)
    self.products[out] = array * self._reciprocal(self.read(y)), factor
    return True

  def _sqrt(self, out, x) -> bool:
    root = self.root(x)
    if root is None:
      value = self.read(x)
      root = value * jnp.minimum(lax.rsqrt(value), _LARGEST), 1.0
    self._set_magnitude(out, *root)
    return True

  def _abs(self, out, x) -> bool:
    array, factor = self.parts(x)
    self._set_magnitude(out, jnp.abs(array), jnp.abs(factor))
    return True

  def _max(self, out, x, y) -> bool:
    if not all(isinstance(a, core.Var) and a in self.magnitudes for a in (x, y)):
      return False
    (array, factor), (other, by) = self.parts(x), self.parts(y)
    self._set_magnitude(out, jnp.maximum(array, other * (by / factor)), factor)
    return True

  def _set_magnitude(self, out, array, factor) -> None:
    self.products[out] = array, factor
    self.magnitudes.add(out)

  def _sign(self, out, x) -> bool:
    # A normal number is at least 1 when multiplied by it.
    self.read_as[out] = jnp.clip(self.read(x) * _LARGEST, -1.0, 1.0)
    return True

  def _add(self, out, x, y) -> bool:
    added, root = self.scalar(y), self.root(x)
    if added is None:
      return False
    array, factor = self.parts(x)
    if not _is_zero(added):
      self.products[out] = array + added / factor, factor
      return True
    self.products[out] = array, factor
    if root is not None:
      self.roots[out] = root
    return True


def _is_zero(number: Any) -> bool:
  """Whether a scalar is known to be zero."""
  return isinstance(number, (int, float, np.generic, np.ndarray)) and not number
