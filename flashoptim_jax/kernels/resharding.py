"""Updates where the state is, which may be sharded over more mesh axes than the leaf.

So it is with ZeRO-1: each device updates the part of a parameter whose state it has.
Gradients and parameters come to the state, of which the parameters' part is there
already, and what goes back is the new parameter, in its own 16 bits.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from flashoptim_jax import paths
from flashoptim_jax.kernels.base import Leaf, UpdatedLeaf
from flashoptim_jax.storage import partition_specs, scale_gaps


class Shardings(NamedTuple):
  """How a leaf is sharded.

  Attributes:
    param: The parameter.
    state: Its correction and its moments.
  """

  param: NamedSharding
  state: NamedSharding


def given(
  params: Any, told: Mapping[Any, tuple[NamedSharding, Sequence[str]]], group_size: int
) -> list[Shardings | None]:
  """How parameters and their state are sharded, as far as the user told.

  Args:
    params: The parameters.
    told: By path, a parameter's sharding, and mesh axes that its state is sharded over
      beside.
    group_size: Elements of a group of the moments.

  Raises:
    ValueError: If a sharding does not fit its parameter.
  """

  def of_param(path, param):
    if path not in told:
      return None
    (sharding, over), shape = told[path], jnp.shape(param)
    if len(sharding.spec) > len(shape):
      raise ValueError(
        f"The sharding of {paths.name(path)!r} has the spec {sharding.spec}; expected"
        f" at most {len(shape)} entries, for shape {shape}."
      )
    if not over:
      return Shardings(sharding, sharding)
    scales = scale_gaps.stored_shape(shape, group_size)
    spread = partition_specs.spread(sharding, shape, scales, group_size, over)
    return Shardings(sharding, spread)

  return list(itertools.starmap(of_param, jax.tree.leaves_with_path(params)))


def known(
  param: jax.Array, stored: jax.Array, told: Shardings | None
) -> Shardings | None:
  """How a leaf is sharded, if that is known while tracing, and not all alike.

  Args:
    param: The parameter.
    stored: An array of its shape in the state, if there is one, else the parameter.
    told: What the user told, of :func:`given`.
  """
  if partition_specs.is_manual():
    return None
  own, other = jax.typeof(param).sharding, jax.typeof(stored).sharding
  if partition_specs.is_explicit(own):
    told = Shardings(own, other) if partition_specs.is_explicit(other) else None
  return None if told is None or told.param == told.state else told


def to_state(leaf: Leaf, shardings: Shardings | None) -> Leaf:
  """The leaf, its gradient and parameter sharded as its state."""
  grad, param = (scatter(x, shardings) for x in (leaf.grad, leaf.param))
  return leaf.replace(grad=grad, param=param)


def from_state(updated: UpdatedLeaf, shardings: Shardings | None) -> UpdatedLeaf:
  """The inverse of :func:`to_state`, for what comes of an update."""
  return updated._replace(result=gather(updated.result, shardings))


def scatter(x: jax.Array, shardings: Shardings | None) -> jax.Array:
  """An array that is sharded as the parameter, sharded as the state."""
  return x if shardings is None else partition_specs.move(x, shardings.state)


def gather(x: jax.Array, shardings: Shardings | None) -> jax.Array:
  """The inverse of :func:`scatter`.

  It moves the array as it is: not in float32, from which it may just have been
  rounded.
  """
  if shardings is None:
    return x
  of_state, of_param = shardings.state, shardings.param

  def there_and_back(x):
    return partition_specs.move(partition_specs.move(x, of_state), of_param)

  if x.dtype.itemsize != 2:
    return there_and_back(x)

  # Where XLA has no collectives for 16-bit floats, as on CPUs, it would widen them.
  @jax.custom_jvp
  def by_bits(x):
    bits = there_and_back(lax.bitcast_convert_type(x, jnp.uint16))
    return lax.bitcast_convert_type(bits, x.dtype)

  by_bits.defjvp(lambda xs, ts: (by_bits(*xs), there_and_back(*ts)))
  return by_bits(x)
