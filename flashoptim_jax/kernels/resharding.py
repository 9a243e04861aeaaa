"""Updates where the state is, which may be sharded over more mesh axes than the leaf.

So it is with ZeRO-1: each device updates the part of a parameter whose state it has.
Gradients and parameters come to the state, of which the parameters' part is there
already, and what goes back is the new parameter, in its own 16 bits.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from flashoptim_jax.kernels.base import Leaf, UpdatedLeaf
from flashoptim_jax.storage import partition_specs


class Shardings(NamedTuple):
  """How a leaf is sharded.

  Attributes:
    param: The parameter.
    state: Its correction and its moments.
  """

  param: NamedSharding
  state: NamedSharding

  @classmethod
  def given(
    cls,
    leaf: Leaf,
    told: tuple[NamedSharding, Sequence[str]],
    group_size: int,
  ) -> "Shardings":
    """Those that the user told.

    Args:
      leaf: The leaf.
      told: Its parameter's sharding, and mesh axes that its state is sharded over
        beside.
      group_size: Elements of a group of the moments.

    Raises:
      ValueError: If the sharding does not fit the leaf.
    """
    (sharding, over), shape = told, leaf.param.shape
    if len(sharding.spec) > len(shape):
      raise ValueError(
        f"The sharding of {leaf.path!r} has the spec {sharding.spec}; expected"
        f" at most {len(shape)} entries, for shape {shape}."
      )
    if not over:
      return cls(sharding, sharding)
    return cls(sharding, partition_specs.spread(sharding, shape, group_size, over))


def known(leaf: Leaf, given: Shardings | None) -> Shardings | None:
  """How a leaf is sharded, if that is known while tracing."""
  param = jax.typeof(leaf.param).sharding
  if not partition_specs.is_explicit(param):
    return given
  stored = jax.typeof(leaf.stored).sharding
  return Shardings(param, stored if partition_specs.is_explicit(stored) else param)


def to_state(leaf: Leaf, shardings: Shardings | None) -> Leaf:
  """The leaf, its gradient and parameter sharded as its state."""
  if shardings is None or shardings.param == shardings.state:
    return leaf
  grad, param = (move(x, shardings.state) for x in (leaf.grad, leaf.param))
  return leaf.replace(grad=grad, param=param)


def from_state(updated: UpdatedLeaf, shardings: Shardings | None) -> UpdatedLeaf:
  """The inverse of :func:`to_state`, for what comes of an update."""
  if shardings is None or shardings.param == shardings.state:
    return updated
  return updated._replace(result=gather(updated.result, shardings))


def move(x: jax.Array, sharding: NamedSharding) -> jax.Array:
  """The array, sharded in another way."""
  if partition_specs.is_explicit(sharding):
    return jax.sharding.reshard(x, sharding)
  return lax.with_sharding_constraint(x, sharding)


def gather(x: jax.Array, shardings: Shardings) -> jax.Array:
  """An array that is sharded as the state, sharded as the parameter.

  As it is: not in float32, from which it may just have been rounded.
  """

  def there_and_back(x):
    return move(move(x, shardings.state), shardings.param)

  if x.dtype.itemsize != 2:
    return there_and_back(x)

  # Where XLA has no collectives for 16-bit floats, as on CPUs, it would widen them.
  @jax.custom_jvp
  def by_bits(x):
    bits = there_and_back(lax.bitcast_convert_type(x, jnp.uint16))
    return lax.bitcast_convert_type(bits, x.dtype)

  by_bits.defjvp(lambda xs, ts: (by_bits(*xs), there_and_back(*ts)))
  return by_bits(x)
