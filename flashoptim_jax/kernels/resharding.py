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
from jax.sharding import AxisType, NamedSharding

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

  @classmethod
  def given(
    cls,
    path: str,
    shape: tuple[int, ...],
    told: tuple[NamedSharding, Sequence[str]],
    group_size: int,
  ) -> "Shardings":
    """Those that the user told.

    Args:
      path: The parameter's name.
      shape: The parameter's shape.
      told: Its sharding, and mesh axes that its state is sharded over beside.
      group_size: Elements of a group of the moments.

    Raises:
      ValueError: If the sharding does not fit the parameter.
    """
    sharding, over = told
    if len(sharding.spec) > len(shape):
      raise ValueError(
        f"The sharding of {path!r} has the spec {sharding.spec}; expected"
        f" at most {len(shape)} entries, for shape {shape}."
      )
    if not over:
      return cls(sharding, sharding)
    scales = scale_gaps.stored_shape(shape, group_size)
    return cls(
      sharding, partition_specs.spread(sharding, shape, scales, group_size, over)
    )


def known(
  param: jax.Array, stored: jax.Array, given: Shardings | None
) -> Shardings | None:
  """How a leaf is sharded, if that is known while tracing, and not all alike.

  Args:
    param: The parameter.
    stored: An array of its shape in the state, if there is one, else the parameter.
    given: What the user told.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty and all(kind == AxisType.Manual for kind in mesh.axis_types):
    return None
  own, other = jax.typeof(param).sharding, jax.typeof(stored).sharding
  if partition_specs.is_explicit(own):
    given = Shardings(own, other) if partition_specs.is_explicit(other) else None
  return None if given is None or given.param == given.state else given


def to_state(leaf: Leaf, shardings: Shardings | None) -> Leaf:
  """The leaf, its gradient and parameter sharded as its state."""
  grad, param = (scatter(x, shardings) for x in (leaf.grad, leaf.param))
  return leaf.replace(grad=grad, param=param)


def from_state(updated: UpdatedLeaf, shardings: Shardings | None) -> UpdatedLeaf:
  """The inverse of :func:`to_state`, for what comes of an update."""
  return updated._replace(result=gather(updated.result, shardings))


def scatter(x: jax.Array, shardings: Shardings | None) -> jax.Array:
  """An array that is sharded as the parameter, sharded as the state."""
  return x if shardings is None else _move(x, shardings.state)


def gather(x: jax.Array, shardings: Shardings | None) -> jax.Array:
  """The inverse of :func:`scatter`.

  It moves the array as it is: not in float32, from which it may just have been
  rounded.
  """
  if shardings is None:
    return x
  of_state, of_param = shardings.state, shardings.param

  def there_and_back(x):
    return _move(_move(x, of_state), of_param)

  if x.dtype.itemsize != 2:
    return there_and_back(x)

  # Where XLA has no collectives for 16-bit floats, as on CPUs, it would widen them.
  @jax.custom_jvp
  def by_bits(x):
    bits = there_and_back(lax.bitcast_convert_type(x, jnp.uint16))
    return lax.bitcast_convert_type(bits, x.dtype)

  by_bits.defjvp(lambda xs, ts: (by_bits(*xs), there_and_back(*ts)))
  return by_bits(x)


def _move(x: jax.Array, sharding: NamedSharding) -> jax.Array:
  if partition_specs.is_explicit(sharding):
    return jax.sharding.reshard(x, sharding)
  return lax.with_sharding_constraint(x, sharding)
