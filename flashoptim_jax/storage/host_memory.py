"""Optimizer state that is kept in host memory."""

from typing import Any

import jax

# Leaves whose state may be on its way between host and device at one time.
IN_FLIGHT = 3


def is_on_host(array: Any) -> bool:
  """Whether an array, which may be traced, is kept in host memory."""
  return jax.typeof(array).memory_space == jax.memory.Space.Host


def to_device(tree: Any) -> Any:
  """The tree with those of its arrays that are on the host on the device."""

  def move(leaf):
    if not is_on_host(leaf):
      return leaf
    return jax.device_put(leaf, jax.memory.Space.Device)

  return jax.tree.map(move, tree)


def move_like(tree: Any, reference: Any) -> Any:
  """Sends arrays to the host where the reference's arrays are there."""

  def move(leaf, other):
    if not is_on_host(other):
      return leaf
    return jax.device_put(leaf, jax.memory.Space.Host)

  return jax.tree.map(move, tree, reference)
