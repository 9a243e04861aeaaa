"""The fused update as a Pallas kernel for TPUs, compiled by Mosaic.

The kernel is in :mod:`flashoptim_jax.kernels.mosaic_kernel`. Here a leaf's arrays are
passed to it in blocks, and updated in place.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from flashoptim_jax.kernels import gaps
from flashoptim_jax.kernels.base import (
  GROUP_SIZE,
  Leaf,
  Unavailable,
  UpdatedLeaf,
  UpdateSpec,
)
from flashoptim_jax.kernels.by_platform import Place
from flashoptim_jax.kernels.mosaic_kernel import kernel
from flashoptim_jax.kernels.mosaic_layout import LANES, chip, cut_into_blocks
from flashoptim_jax.kernels.mosaic_plan import Plan, is_scale, like, scratch_shapes
from flashoptim_jax.rules import Scalars
from flashoptim_jax.storage import codec

_DTYPES = ("bfloat16", "float32")
_SMALLEST = 1 << 16


def unavailable(place: Place) -> Unavailable | None:
  """Why the kernel can't run in a place; None if it can.

  On a CPU it runs in interpret mode.
  """
  if place.platform not in ("tpu", "cpu"):
    return Unavailable(f"it runs on {place.platform!r}, not 'tpu' or 'cpu'")
  if place.platform == "tpu" and place.mesh is None and not place.is_here():
    return Unavailable("the kind of TPU is not known")
  return None


def is_faster(leaf: Leaf) -> bool:
  """Whether a leaf is large enough for the kernel to be the faster choice."""
  return leaf.param.size >= _SMALLEST


def unsupported(leaf: Leaf, spec: UpdateSpec) -> str | None:
  """Why the kernel can't update a leaf; None if it can."""
  shape = leaf.param.shape
  if leaf.quantized and spec.storage.group_size != GROUP_SIZE:
    return f"its group size is {spec.storage.group_size}, not {GROUP_SIZE}"
  for what, array in (("it", leaf.param), ("its gradient", leaf.grad)):
    if array.dtype.name not in _DTYPES:
      return f"{what} has dtype {array.dtype.name}"
  if not leaf.param.size:
    return "it is empty"
  if len(shape) < 2:
    return f"it has {len(shape)} dimensions, fewer than 2"
  if leaf.quantized and codec.group_axis(shape, GROUP_SIZE) != len(shape) - 1:
    return f"its groups lie along another axis than the last of {shape}"
  return None


def update(
  spec: UpdateSpec, leaves: Sequence[Leaf], scalars: Scalars, place: Place
) -> list[UpdatedLeaf]:
  """Updates leaves; see :class:`flashoptim_jax.kernels.base.Backend`."""
  # Pallas asks the mesh around it which TPU it compiles for.
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty and place.mesh is not None and place.devices == 1:
    mesh = place.mesh
  with jax.sharding.use_abstract_mesh(mesh):
    interpret = place.platform != "tpu"
    bare = [gaps.without_gaps(leaf, GROUP_SIZE) for leaf in leaves]
    updated = [_update(spec, leaf, scalars, interpret) for leaf in bare]
  return [
    gaps.with_gaps(new, leaf, GROUP_SIZE)
    for new, leaf in zip(updated, leaves, strict=True)
  ]


def _update(
  spec: UpdateSpec, leaf: Leaf, scalars: Scalars, interpret: bool
) -> UpdatedLeaf:
  zeros = tuple(
    name for name, value in scalars.items() if isinstance(value, float) and not value
  )
  hyper = tuple(name for name in scalars if name not in zeros)
  arrays = leaf.named_arrays(spec.rule)
  written = spec.written(arrays)
  if not spec.new_params:
    written = *written, "update"
  moved = [*arrays.values(), *(arrays[like(name)] for name in written)]
  param, strides = leaf.param, None
  if spec.dithers(param):
    strides = leaf.strides or codec.row_major(param.shape)
    scalars = dict(scalars) | _halves_of_word(scalars["master_rounding"], leaf.origin)
    hyper = tuple(name for name in scalars if name not in zeros)
  element_bytes = sum(a.size * a.dtype.itemsize for a in moved) / param.size
  generation, _ = chip()
  plan = Plan(
    spec,
    leaf.decay,
    {name: array.dtype for name, array in arrays.items()},
    written,
    hyper,
    zeros,
    cut_into_blocks(
      param.shape, param.dtype.itemsize, element_bytes, leaf.quantized, strides
    ),
    generation,
    interpret,
  )
  packed = jnp.stack([jnp.asarray(scalars[n], jnp.float32) for n in hyper])[None]
  return UpdatedLeaf.from_named(spec, _call(plan, packed, arrays))


def _halves_of_word(count: jax.Array, origin: jax.Array | None) -> dict[str, jax.Array]:
  """The first element's threshold, see ``codec.dither``, as numbers of 16 bits."""
  word = codec.dither(count, (), origin)
  return {"master_rounding": word >> 16, "master_rounding_low": word & 0xFFFF}


def _call(
  plan: Plan, scalars: jax.Array, arrays: dict[str, jax.Array]
) -> dict[str, jax.Array]:
  """Calls the kernel; takes and gives a leaf's arrays by name."""
  names = tuple(arrays)
  leading, rows = plan.blocks.leading, plan.blocks.rows
  block_rows, block_columns = plan.blocks.block_rows, plan.blocks.block_columns
  ordered = {n: a.transpose(plan.blocks.order) for n, a in arrays.items()}
  viewed = {n: a.reshape((*leading, -1, a.shape[-1])) for n, a in ordered.items()}
  # Where they share blocks of scales, a row's blocks come one after the other.
  columns_are = "arbitrary" if plan.turned else "parallel"
  semantics: Any = (*("parallel",) * (len(leading) + 1), columns_are)
  per = plan.steps_per_scale_block

  def block_spec(name):
    lead = (None,) * len(leading)
    if is_scale(name) and plan.blocks.along_rows:
      groups = min(block_rows // GROUP_SIZE, viewed[name].shape[-2])
      return pl.BlockSpec((*lead, groups, block_columns), lambda *i: i)
    if is_scale(name):
      lanes = min(LANES, viewed[name].shape[-1])
      return pl.BlockSpec(
        (*lead, block_rows, lanes), lambda *i: (*i[:-1], i[-1] // per)
      )
    return pl.BlockSpec((*lead, block_rows, block_columns), lambda *i: i)

  results = pl.pallas_call(
    functools.partial(kernel, plan),
    grid=(*leading, pl.cdiv(rows, block_rows), plan.steps),
    in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), *(block_spec(n) for n in names)],
    out_specs=[block_spec(like(n)) for n in plan.written],
    out_shape=[
      jax.ShapeDtypeStruct(viewed[like(n)].shape, plan.dtype(n)) for n in plan.written
    ],
    input_output_aliases={
      1 + names.index(like(n)): i for i, n in enumerate(plan.written)
    },
    scratch_shapes=[
      pltpu.VMEM(shape, dtype) for shape, dtype in scratch_shapes(plan).values()
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=semantics,
      vmem_limit_bytes=chip()[1] - (1 << 20),
    ),
    interpret=plan.interpret,
    name="flashoptim_update",
  )(scalars, *(viewed[n] for n in names))
  back = sorted(range(len(plan.blocks.order)), key=plan.blocks.order.__getitem__)
  return {
    n: a.reshape(ordered[like(n)].shape).transpose(back)
    for n, a in zip(plan.written, results, strict=True)
  }
