"""Evaluates an update rule with cheaper divisions and square roots.

Before its sixth generation a TPU has no accurate division or square root; each
takes a dozen operations, most of them for infinities, zeros and the last bit. An
update's direction needs none of these where it is rounded to a 24-bit weight.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

_LARGEST = 3.0e38
_TINY = 2.0**-126


def inverse_root(x: jax.Array) -> jax.Array:
  """1 / sqrt(x), and a large finite number where x is 0."""
  return jnp.minimum(lax.rsqrt(x), _LARGEST)


def roots_of_square(x: jax.Array, has_fast_roots: bool) -> tuple[jax.Array, jax.Array]:
  """``x ** (1/2)`` and ``x ** (1/4)`` of a mean of squares.

  Where ``lax.rsqrt`` costs many operations, one Newton step for
  ``g = x ** (-1/4)``, ``g <- g (5 - x g^4) / 4``, gives both roots for less.
  """
  if has_fast_roots:
    fourth = lax.rsqrt(lax.rsqrt(x))
    return fourth * fourth, fourth
  guess = jnp.exp2(jnp.log(jnp.maximum(x, _TINY)) * (-0.25 / math.log(2.0)))
  squared = guess * guess
  guess = guess * (1.25 - 0.25 * (x * (squared * squared)))
  root = x * (guess * guess)
  return root, root * guess


def evaluate(
    f: Callable[..., jax.Array],
    args: Any,
    roots: list[tuple[jax.Array, jax.Array]],
    reciprocal: Callable[[jax.Array], jax.Array],
) -> jax.Array:
  """``f(*args)``, cheaper.

  Args:
    f: Computes one array from arrays and scalars.
    args: Its arguments.
    roots: Pairs of an argument and its square root, where that is at hand. The
      root of its multiples is then a multiple of it.
    reciprocal: Used in divisions by arrays.
  """
  leaves, tree = jax.tree.flatten(args)
  closed = jax.make_jaxpr(lambda *x: f(*jax.tree.unflatten(tree, x)))(*leaves)
  known = {
      i: root
      for i, leaf in enumerate(leaves)
      for value, root in roots
      if leaf is value
  }
  return _run(closed, leaves, known, reciprocal)


def _run(
    closed: Any,
    args: list[Any],
    known: dict[int, jax.Array],
    reciprocal: Callable[[jax.Array], jax.Array],
) -> jax.Array:
  values: dict[Any, Any] = {}
  scalars: dict[Any, Any] = {}  # what a variable is a broadcast of
  roots: dict[Any, jax.Array] = {}

  def read(atom):
    return atom.val if isinstance(atom, core.Literal) else values[atom]

  def scalar(atom):
    """The scalar that all elements are equal to, or None."""
    if isinstance(atom, core.Literal):
      return atom.val
    return values[atom] if not atom.aval.shape else scalars.get(atom)

  jaxpr = closed.jaxpr
  values.update(zip(jaxpr.constvars, closed.consts, strict=True))
  values.update(zip(jaxpr.invars, args, strict=True))
  roots.update({jaxpr.invars[i]: root for i, root in known.items()})
  for eqn in jaxpr.eqns:
    (out,), name, atoms = eqn.outvars, eqn.primitive.name, eqn.invars
    root = roots.get(atoms[0]) if isinstance(atoms[0], core.Var) else None
    if name == "broadcast_in_dim" and not atoms[0].aval.shape:
      scalars[out] = read(atoms[0])
    if name == "div" and out.aval.shape:
      divisor = scalar(atoms[1])
      if divisor is None:
        values[out] = read(atoms[0]) * reciprocal(read(atoms[1]))
        continue
      inverse = 1.0 / divisor
      values[out] = read(atoms[0]) * inverse
      if root is not None:
        roots[out] = root * jnp.sqrt(inverse)
      continue
    if name == "sqrt" and out.aval.shape:
      x = read(atoms[0])
      values[out] = x * inverse_root(x) if root is None else root
      continue
    adds_zero = name == "add" and isinstance(atoms[1], core.Literal)
    if root is not None and adds_zero and atoms[1].val == 0:
      values[out], roots[out] = read(atoms[0]), root
      continue
    values[out] = eqn.primitive.bind(*map(read, atoms), **eqn.params)
  return read(jaxpr.outvars[0])
