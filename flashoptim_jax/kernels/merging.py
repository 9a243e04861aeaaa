"""Lets XLA make one GPU kernel for several leaves.

XLA's multi-output fusion merges kernels that write arrays of one shape, if they read
the same array and that array is not a scalar.
"""

import jax
import jax.numpy as jnp
from jax import lax


def shared(x: jax.Array | int | float) -> jax.Array:
  """A number of shape (), such that the kernels that read it can be merged."""
  array = lax.optimization_barrier(jnp.broadcast_to(x, (2,)))
  return lax.index_in_dim(array, 0, keepdims=False)
