"""Updates of leaves whose state is kept in host memory."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from flashoptim_jax.kernels.base import Leaf, UpdatedLeaf
from flashoptim_jax.storage import host_memory


def is_hosted(leaf: Leaf) -> bool:
  """Whether a leaf's state is in host memory."""
  return any(map(host_memory.is_on_host, jax.tree.leaves(_state_of(leaf))))


def update(
  update_resident: Callable[[Sequence[Leaf]], list[UpdatedLeaf]],
  leaves: Sequence[Leaf],
) -> list[UpdatedLeaf]:
  """Updates leaves one by one: brings the state in, and sends it back.

  Args:
    update_resident: Updates leaves whose state is on the device.
    leaves: Leaves whose state is on the host.
  """
  updated: list[UpdatedLeaf] = []
  for i, leaf in enumerate(leaves):
    state = _state_of(leaf)
    if i >= host_memory.IN_FLIGHT:
      # XLA would otherwise be free to bring in the whole state at the start.
      before = updated[i - host_memory.IN_FLIGHT].result
      state, _ = lax.optimization_barrier((state, before))
    correction, moments = host_memory.to_device(state)
    (new,) = update_resident([leaf.replace(correction=correction, moments=moments)])
    correction, moments = host_memory.move_like(_state_of(new), state)
    updated.append(UpdatedLeaf(new.result, correction, moments))
  return updated


def _state_of(leaf: Leaf | UpdatedLeaf) -> tuple[Any, Any]:
  return leaf.correction, leaf.moments
