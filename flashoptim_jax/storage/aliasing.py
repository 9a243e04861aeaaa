"""Results that share no array with what a function was given.

A step that donates its arguments deletes their arrays, wherever else these are held.
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

_Tree = TypeVar("_Tree")


def apart(result: _Tree, *given: Any) -> _Tree:
  """``result`` with copies of arrays that are in ``given``, or in it twice.

  Traced arrays stay: compiled functions return arrays of their own.
  """
  held = set(map(id, jax.tree.leaves(given)))

  def own(leaf):
    if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer):
      return leaf
    if id(leaf) in held:
      return jnp.copy(leaf)
    held.add(id(leaf))
    return leaf

  return jax.tree.map(own, result)
