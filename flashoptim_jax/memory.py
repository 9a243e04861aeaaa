"""Planning: what parameters, state and gradients will take."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flashoptim_jax import paths
from flashoptim_jax.storage import state as state_lib


@dataclasses.dataclass(frozen=True)
class MemoryReport:
  """Bytes by component, beside ``optax.adamw`` in float32. Prints as a table.

  Attributes:
    num_params: Number of parameters.
    params: Bytes of the parameters.
    correction: Bytes of the master weights' corrections.
    moments: Bytes of the moments.
    scales: Bytes of the moments' scales.
    other: Bytes of the rest of the state: counts, what ``compress`` keeps in
      float32, and other transformations'.
    gradients: Bytes of gradients of the parameters' dtypes.
    baseline: The same components for ``optax.adamw`` on float32 parameters.
  """

  num_params: int
  params: int
  correction: int
  moments: int
  scales: int
  other: int
  gradients: int
  baseline: Mapping[str, int]

  @property
  def state(self) -> int:
    """Bytes of the optimizer state."""
    return self.correction + self.moments + self.scales + self.other

  @property
  def total(self) -> int:
    """Bytes of parameters, state and gradients."""
    return self.params + self.state + self.gradients

  @property
  def bytes_per_param(self) -> float:
    """Bytes of parameters and state (gradients left out), per parameter."""
    return (self.params + self.state) / max(self.num_params, 1)

  @property
  def total_bytes_per_param(self) -> float:
    """Bytes of parameters, state and gradients, per parameter."""
    return self.total / max(self.num_params, 1)

  def __str__(self) -> str:
    base = self.baseline
    table: list[tuple[str, int, int]] = [
      (name, getattr(self, name), base.get(name, 0))
      for name in ("params", "correction", "moments", "scales", "other")
    ]
    kept = sum(base.values()) - base["gradients"]
    table.append(("params + state", self.params + self.state, kept))
    table.append(("gradients", self.gradients, base["gradients"]))
    table.append(("total", self.total, sum(base.values())))
    count = max(self.num_params, 1)
    unit, scale = ("GiB", 2**30) if self.total >= 2**30 else ("MiB", 2**20)
    lines = [
      f"{self.num_params:,} parameters",
      f"{'':14}{'this optimizer':>24}{'optax.adamw, float32':>26}",
      f"{'':14}{unit:>14}{'B/param':>10}{unit:>16}{'B/param':>10}",
    ]
    lines += [
      f"{name:14}{size / scale:14.3f}{size / count:10.3f}"
      f"{usual / scale:16.3f}{usual / count:10.3f}"
      for name, size, usual in table
    ]
    return "\n".join(lines)


def memory_report(
  tx: optax.GradientTransformation, params: optax.Params
) -> MemoryReport:
  """Says what training with ``tx`` will keep in memory.

  Nothing is allocated: a model of any size can be planned on any machine.

  Args:
    tx: Any transformation.
    params: Arrays or ``jax.ShapeDtypeStruct``s, in the dtypes to train in.

  Returns:
    The report. Activations and the compiler's temporaries are not in it.
  """
  paths.require_arrays(params)
  params = jax.eval_shape(lambda tree: tree, params)
  opt_state = jax.eval_shape(tx.init, params)
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  sizes = dict.fromkeys(("correction", "moments", "scales"), 0)
  nodes = jax.tree.leaves(opt_state, is_leaf=state_lib.is_flash_state)
  for state in filter(state_lib.is_flash_state, nodes):
    sizes["correction"] += _nbytes(state.correction)
    for moment in state_lib.stored_moments(state):
      sizes["moments"] += _nbytes(moment.values)
      sizes["scales"] += _nbytes(moment.scales)
  float32 = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32), params)
  adamw = _nbytes(jax.eval_shape(optax.adamw(1e-3).init, float32))
  return MemoryReport(
    num_params=count,
    params=_nbytes(params),
    other=_nbytes(opt_state) - sum(sizes.values()),
    gradients=_nbytes(params),
    baseline={
      "params": 4 * count,
      "moments": 8 * count,
      "other": adamw - 8 * count,
      "gradients": 4 * count,
    },
    **sizes,
  )


def _nbytes(tree: Any) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
