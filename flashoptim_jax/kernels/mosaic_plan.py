"""What is decided about a leaf before the kernel is traced."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from flashoptim_jax.kernels.base import GROUP_SIZE, UpdateSpec
from flashoptim_jax.kernels.mosaic_layout import GROUPS, LANES, SCALE_COLUMNS, Blocks
from flashoptim_jax.kernels.mosaic_math import reads_old_moments
from flashoptim_jax.kernels.mosaic_words import WORD_ROWS
from flashoptim_jax.rules import Moment


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
    spec: What it has in common with other leaves.
    decay: Whether weight decay applies.
    dtypes: Dtypes of the arrays that are read, by name.
    written: Names of the arrays that are written.
    hyperparameters: Names of the scalars, in the order in which they are passed.
    zeros: Names of the scalars that are known to be 0.
    blocks: How the leaf is cut into blocks.
    generation: The TPU's.
    interpret: Whether to run in interpret mode.
  """

  spec: UpdateSpec
  decay: bool
  dtypes: Mapping[str, Any]
  written: tuple[str, ...]
  hyperparameters: tuple[str, ...]
  zeros: tuple[str, ...]
  blocks: Blocks
  generation: int
  interpret: bool

  @property
  def compressed(self) -> bool:
    """Whether moments are codes and scales."""
    return any(map(is_scale, self.dtypes))

  def dtype(self, name: str) -> Any:
    """The dtype of an array that is read or written."""
    return self.dtypes[like(name)]

  @property
  def has_fast_roots(self) -> bool:
    """Whether the TPU has accurate square roots."""
    return self.generation >= 6

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
    return self.compressed and not reads_old_moments(self.spec.rule, names)

  @property
  def writes_late(self) -> bool:
    """Whether a unit's results are turned around one unit later, with its codes.

    The vector unit waits for the last transposes of a unit otherwise. The codes of two
    moments would wait for these transposes in turn, and for longer. On v4 the vector
    unit has half the slots and seldom waits.
    """
    # Interpret mode stands for the later TPUs.
    waits = self.interpret or self.generation > 4
    return self.turned and waits and len(self.spec.rule.moments) == 1

  @property
  def dithers(self) -> bool:
    """Whether parameters are rounded by thresholds of their elements."""
    return self.blocks.strides is not None

  @property
  def turned(self) -> bool:
    """Whether units are transposed."""
    return self.compressed and not self.blocks.along_rows


def like(name: str) -> str:
  """The array whose shape and dtype one has: an update those of the gradient."""
  return "grad" if name == "update" else name


def is_scale(name: str) -> bool:
  """Whether an array is a moment's scales."""
  return name.endswith("_scale")


def scratch_shapes(plan: Plan) -> dict[str, Any]:
  """Scratch memory by name."""
  names = [name for name in plan.dtypes if not is_scale(name)]
  shapes: dict[str, Any] = {}
  for name in names:
    size = jnp.dtype(plan.dtypes[name]).itemsize
    if plan.turned or size == 1:
      shapes[name] = ((size, LANES, LANES), jnp.int32)
    if plan.turned:
      shapes[f"{name}_next"] = shapes[name]
    if size > 1:
      shapes[f"{name}_stage"] = ((size * LANES, LANES), jnp.int32)
      shapes[f"{name}_written"] = shapes[f"{name}_stage"]
  if "update" in plan.written:
    of_grad = {n: shape for n, shape in shapes.items() if n in ("grad", "grad_written")}
    shapes |= {n.replace("grad", "update"): shape for n, shape in of_grad.items()}
  if plan.writes_late:
    for name in plan.written:
      if not is_scale(name):
        shapes[f"{name}_new"] = shapes[name]
  if plan.dithers:
    shapes["dither"] = ((LANES, LANES), jnp.int32)
  shapes["stage"] = ((4 * LANES, LANES), jnp.int32)
  if plan.compressed:
    for moment in plan.spec.rule.moments:
      shapes |= _scratch_of_moment(plan, moment)
  return shapes


def _scratch_of_moment(plan: Plan, moment: Moment) -> dict[str, Any]:
  name, of_groups = moment.name, WORD_ROWS * GROUPS
  shapes: dict[str, Any] = {
    f"{name}_decoder": ((of_groups, LANES), jnp.float32),
    f"{name}_encoder": ((of_groups, LANES), jnp.float32),
    f"{name}_old_scale": ((of_groups, LANES), jnp.float32),
    f"{name}_max": ((8 * of_groups, LANES), jnp.float32),
    f"{name}_new": ((1, LANES, LANES), jnp.int32),
    f"{name}_root": ((WORD_ROWS * LANES, LANES), jnp.float32),
  }
  if plan.turned:
    shapes[f"{name}_scale"] = ((2, LANES // GROUPS, GROUPS, LANES), jnp.int32)
  # What only one kind has.
  if moment.kind == "first":
    shapes[f"{name}_value"] = shapes[f"{name}_root"]
  else:
    shapes[f"{name}_last"] = shapes[f"{name}_encoder"]
  return shapes
