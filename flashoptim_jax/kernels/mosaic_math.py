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

from flashoptim_jax import leafwise
from flashoptim_jax.rules import Rule

_LARGEST = 3.0e38
_TINY = 2.0**-126


def inverse_root(x: jax.Array) -> jax.Array:
  """1 / sqrt(x), and a large finite number where x is 0."""
  return jnp.minimum(lax.rsqrt(x), _LARGEST)


class Multiples(NamedTuple):
  """What the roots of this module come multiplied by, powers of two.

  Attributes:
    signed_root: Of :func:`signed_root`.
    root: Of the first of :func:`roots_of_square`.
    fourth_root: Of the second.
  """

  signed_root: float
  root: float
  fourth_root: float


def multiples(has_fast_roots: bool) -> Multiples:
  """Those of a TPU whose ``lax.rsqrt`` costs one operation, or many."""
  return Multiples(1.0, 1.0, 1.0) if has_fast_roots else Multiples(2.0, 16.0, 64.0)


def signed_root(
    x: jax.Array, magnitude: jax.Array, has_fast_roots: bool
) -> jax.Array:
  """``sign(x) * |x| ** (1/2)``, multiplied.

  Where ``lax.rsqrt`` costs many operations, this is one Newton step for
  ``g = |x| ** (-1/2)``, ``2 g <- g (3 - |x| g^2)``.
  """
  if has_fast_roots:
    return x * inverse_root(magnitude)
  guess = _power(magnitude, -0.5)
  return (x * guess) * (3.0 - magnitude * (guess * guess))


def roots_of_square(x: jax.Array, has_fast_roots: bool) -> tuple[jax.Array, jax.Array]:
  """``x ** (1/2)`` and ``x ** (1/4)`` of a mean of squares, multiplied.

  The Newton step is for ``g = x ** (-1/4)``, ``4 g <- g (5 - x g^4)``.
  """
  if has_fast_roots:
    fourth = lax.rsqrt(lax.rsqrt(x))
    return fourth * fourth, fourth
  guess = _power(x, -0.25)
  squared = guess * guess
  guess = guess * (5.0 - x * (squared * squared))
  root = x * (guess * guess)
  return root, root * guess


def _power(x: jax.Array, exponent: float) -> jax.Array:
  """A guess at ``x ** exponent``; a large finite number where x is 0."""
  x = jnp.maximum(x, _TINY)
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
  jaxpr = jax.make_jaxpr(rule.direction)(
      number, moments, moments, dict.fromkeys(scalars, number)
  ).jaxpr
  read = {id(atom) for eqn in jaxpr.eqns for atom in eqn.invars}
  read |= set(map(id, jaxpr.outvars))
  return any(id(old) in read for old in jaxpr.invars[1 : 1 + len(moments)])


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
  closed = leafwise.inline(
      jax.make_jaxpr(lambda *x: f(*jax.tree.unflatten(tree, x)))(*leaves)
  )
  of_arguments = {
      i: each
      for i, leaf in enumerate(leaves)
      for each in known
      if leaf is each.array
  }
  return _run(closed, leaves, of_arguments, reciprocal)


def _run(
    closed: Any,
    args: list[Any],
    known: dict[int, Known],
    reciprocal: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, Any]:
  values: dict[Any, Any] = {}
  # Arrays times scalars, multiplied where they are needed.
  products: dict[Any, tuple[jax.Array, Any]] = {}
  scalars: dict[Any, Any] = {}  # what a variable is a broadcast of
  roots: dict[Any, tuple[jax.Array, Any]] = {}

  def read(atom):
    if isinstance(atom, core.Literal):
      return atom.val
    if atom not in values:
      array, factor = products[atom]
      values[atom] = array * factor
    return values[atom]

  def parts(atom):
    return products[atom] if atom in products else (read(atom), 1.0)

  def scalar(atom):
    """The scalar that all elements are equal to, or None."""
    if isinstance(atom, core.Literal):
      return atom.val
    if not atom.aval.shape:
      return values[atom]
    return scalars.get(atom)

  jaxpr = closed.jaxpr
  values.update(zip(jaxpr.constvars, closed.consts, strict=True))
  for i, (variable, value) in enumerate(zip(jaxpr.invars, args, strict=True)):
    if i not in known:
      values[variable] = value
      continue
    array, factor, root, root_factor = known[i]
    products[variable] = array, factor
    if root is not None:
      roots[variable] = root, root_factor * jnp.sqrt(factor)
  for eqn in jaxpr.eqns:
    out, name, atoms = eqn.outvars[0], eqn.primitive.name, eqn.invars
    if name == "broadcast_in_dim" and not atoms[0].aval.shape:
      scalars[out] = read(atoms[0])
    if name in ("mul", "add") and scalar(atoms[0]) is not None:
      atoms = atoms[::-1]
    root = roots.get(atoms[0]) if isinstance(atoms[0], core.Var) else None
    is_array = bool(out.aval.shape)
    if name == "mul" and is_array and scalar(atoms[1]) is not None:
      (array, factor), by = parts(atoms[0]), scalar(atoms[1])
      products[out] = array, factor * by
      if root is not None:
        roots[out] = root[0], root[1] * jnp.sqrt(by)
    elif name == "div" and is_array:
      array, factor = parts(atoms[0])
      products[out] = array * reciprocal(read(atoms[1])), factor
    elif name == "sqrt" and is_array:
      if root is None:
        x = read(atoms[0])
        values[out] = x * inverse_root(x)
      else:
        products[out] = root
    elif name == "abs" and is_array:
      array, factor = parts(atoms[0])
      products[out] = jnp.abs(array), jnp.abs(factor)
    elif name == "max" and is_array:
      # Roots and magnitudes, whose factors are positive.
      (array, factor), (other, by) = map(parts, atoms)
      products[out] = jnp.maximum(array, other * (by / factor)), factor
    elif name == "sign":
      # A normal number is at least 1 when multiplied by it.
      values[out] = jnp.clip(read(atoms[0]) * _LARGEST, -1.0, 1.0)
    elif name == "add" and is_array and _is_zero(scalar(atoms[1])):
      products[out] = parts(atoms[0])
      if root is not None:
        roots[out] = root
    elif name == "add" and is_array and scalar(atoms[1]) is not None:
      (array, factor), added = parts(atoms[0]), scalar(atoms[1])
      products[out] = array + added / factor, factor
    else:
      results = leafwise.bind(eqn, map(read, atoms))
      values.update(zip(eqn.outvars, results, strict=True))
  return parts(jaxpr.outvars[0])


def _is_zero(number: Any) -> bool:
  """Whether a scalar is known to be zero."""
  return isinstance(number, (int, float, np.generic, np.ndarray)) and not number
