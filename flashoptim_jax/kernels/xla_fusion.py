"""Lets XLA make one GPU kernel for several leaves.

XLA's multi-output fusion merges kernels that write arrays of one shape, if they read
the same array and that array is not a scalar.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flashoptim_jax.kernels.base import Leaf


def shared(x: jax.Array | int | bool) -> jax.Array:
  """A value of shape (), such that the kernels that read it can be merged."""
  array = lax.optimization_barrier(jnp.broadcast_to(x, (2,)))
  return lax.index_in_dim(array, 0, keepdims=False)


def by_size(leaf: Leaf) -> tuple[int, tuple[int, ...]]:
  """Sorts leaves such that those of one shape are neighbours."""
  return leaf.param.size, leaf.param.shape


def mergeable(tree: Any) -> Any:
  """Lets kernels that read arrays of one shape, of any dtypes, be merged."""
  # Always true, which XLA does not know.
  flag = shared(True)
  return jax.tree.map(lambda x: lax.select(flag, x, lax.full_like(x, 0)), tree)
