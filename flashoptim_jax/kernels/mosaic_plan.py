"""What is decided about a leaf before the kernel is traced."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from flashoptim_jax.kernels.base import GROUP_SIZE
from flashoptim_jax.kernels.mosaic_layout import GROUPS, LANES, SCALE_COLUMNS, Blocks
from flashoptim_jax.kernels.mosaic_math import reads_old_moments
from flashoptim_jax.kernels.mosaic_words import WORD_ROWS
from flashoptim_jax.rules import Rule
from flashoptim_jax.storage.options import Storage


class Field(NamedTuple):
  """An array that the kernel reads, and where it finds it.

  Attributes:
    name: ``"grad"``, ``"param"``, ``"correction"`` or a moment's name.
    dtype: Its dtype.
  """

  name: str
  dtype: Any

  @property
  def itemsize(self) -> int:
    """Bytes of one of its numbers."""
    return jnp.dtype(self.dtype).itemsize


class Plan(NamedTuple):
  """How a leaf is updated. All static.

  Attributes:
    rule: The optimizer's arithmetic.
    storage: The state's storage.
    compressed: Whether moments are codes and scales.
    decay: Whether weight decay applies.
    new_params: Whether parameters or updates are written.
    hyperparameters: Names of the scalars, in the order in which they are passed.
    zeros: Names of the scalars that are known to be 0.
    blocks: How the leaf is cut into blocks.
    has_fast_roots: Whether the TPU has accurate square roots.
    interpret: Whether to run in interpret mode.
  """

  rule: Rule
  storage: Storage
  compressed: bool
  decay: bool
  new_params: bool
  hyperparameters: tuple[str, ...]
  zeros: tuple[str, ...]
  blocks: Blocks
  has_fast_roots: bool
  interpret: bool

  @property
  def words(self) -> int:
    """Words of 8-bit numbers in a column of a block."""
    return self.blocks.block_rows // WORD_ROWS

  @property
  def tiles(self) -> int:
    """Tiles of 128 columns in a unit."""
    return LANES // self.words

  @property
  def steps(self) -> int:
    """Blocks along the columns."""
    return pl.cdiv(self.blocks.columns, self.blocks.block_columns)

  @property
  def steps_per_scale_block(self) -> int:
    """Blocks along the columns that share a block of scales."""
    return SCALE_COLUMNS // self.blocks.block_columns

  @property
  def ragged(self) -> bool:
    """Whether the last group of moments is a partial one."""
    axis = self.blocks.rows if self.blocks.along_rows else self.blocks.columns
    return self.compressed and axis % GROUP_SIZE != 0

  @property
  def units_of_gain(self) -> bool:
    """Whether moments are computed in units of their gain, see `Scales.units`."""
    names = (*self.hyperparameters, *self.zeros)
    return self.compressed and not reads_old_moments(self.rule, names)

  @property
  def turned(self) -> bool:
    """Whether units are transposed."""
    return self.compressed and not self.blocks.along_rows


def scratch_shapes(plan: Plan, dtypes, written) -> dict[str, Any]:
  """Scratch memory by name."""
  names = [n for n in dtypes if not n.endswith("_scale")]
  shapes: dict[str, Any] = {}
  for name in names:
    size = jnp.dtype(dtypes[name]).itemsize
    shapes[name] = shapes[f"{name}_next"] = ((size, LANES, LANES), jnp.int32)
    if size > 1:
      shapes[f"{name}_stage"] = ((size * LANES, LANES), jnp.int32)
      shapes[f"{name}_written"] = shapes[f"{name}_stage"]
  if "update" in written:
    shapes["update"] = shapes["grad"]
    shapes["update_written"] = shapes["grad_stage"]
  shapes["stage"] = ((4 * LANES, LANES), jnp.int32)
  if plan.compressed:
    for moment in plan.rule.moments:
      if plan.turned:
        kept = (2, LANES // GROUPS, GROUPS, LANES)
        shapes[f"{moment.name}_scale"] = (kept, jnp.int32)
      shapes |= {
          f"{moment.name}_decoder": ((WORD_ROWS * GROUPS, LANES), jnp.float32),
          f"{moment.name}_encoder": ((WORD_ROWS * GROUPS, LANES), jnp.float32),
          f"{moment.name}_old_scale": ((WORD_ROWS * GROUPS, LANES), jnp.float32),
          f"{moment.name}_max": ((8 * WORD_ROWS * GROUPS, LANES), jnp.float32),
          f"{moment.name}_codes": ((1, LANES, LANES), jnp.int32),
          f"{moment.name}_root": ((WORD_ROWS * LANES, LANES), jnp.float32),
      }
      # What only one kind has.
      if moment.kind == "first":
        shapes[f"{moment.name}_value"] = shapes[f"{moment.name}_root"]
      else:
        shapes[f"{moment.name}_last"] = shapes[f"{moment.name}_encoder"]
  return shapes
