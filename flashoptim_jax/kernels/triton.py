"""Launches the fused Triton kernel through jax-triton.

Many leaves share a launch: a tree of small leaves costs more in launches than in
memory traffic. The kernel takes every leaf's pointers as arguments and finds the
leaf that a program works on; leaves of equal dtypes are taken together, up to
``_MOST_LEAVES`` of them. Arrays are updated in place.

jax-triton comes in two lines. 0.3 passes every output to the kernel as a further
pointer, aliased to an input or not; 0.4 passes an aliased buffer once.
"""

import functools
import importlib.util
import json
import linecache
import math
import pathlib
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flashoptim_jax import rules
from flashoptim_jax.kernels import xla_fusion
from flashoptim_jax.kernels.base import (
  GROUP_SIZE,
  LEAST_GAIN,
  Leaf,
  Unavailable,
  UpdatedLeaf,
  UpdateSpec,
)
from flashoptim_jax.kernels.by_platform import Place
from flashoptim_jax.rules import LEAST_ROOT, Rule, Scalars
from flashoptim_jax.storage import codec, scale_gaps

# With twice as many, a step of 150 leaves takes 1 to 4 % less on an H100, but Triton
# takes about twice as long to compile the kernel.
_MOST_LEAVES = 32
# Small leaves with float32 moments, whose launches take longer than their work: their
# pointers fit into 4 KB, all that CUDA before 12.1 has room for.
_MOST_SMALL_LEAVES = 56
_SMALL_BELOW = 1 << 16
# Updates below this size are added to parameters in kernels for several of them.
_MERGED_BELOW = 1 << 22
_DTYPES = ("bfloat16", "float16", "float32")
_INSTALL = (
  "The extras 'cuda12' and 'cuda13' have what is missing: for JAX with CUDA 13, pip"
  " install 'flashoptim-optax[cuda13]'."
)
# Those that the kernel has a twin of.
_RULES = (
  *(rules.ADAM, rules.NADAM, rules.LION),
  *(rules.MOMENTUM, rules.NESTEROV, rules.SGD),
)


def unavailable(place: Place) -> Unavailable | None:
  """Why the kernel can't run in a place; None if it can."""
  if place.platform != "gpu":
    return Unavailable(f"it runs on {place.platform!r}, not 'gpu'")
  if not place.is_here():
    return Unavailable("jax-triton compiles for GPUs that are there, and none is")
  for module in ("triton", "jax_triton"):
    if importlib.util.find_spec(module) is None:
      return Unavailable(f"the package {module!r} is not installed", _INSTALL)
  capability = _gpu().compute_capability
  if "." in capability and float(capability) < 8.0:
    return Unavailable(f"the GPU's compute capability is {capability}, below 8.0")
  return None


def _gpu() -> jax.Device:
  """The GPU that jax-triton compiles for."""
  return jax.local_devices(backend="gpu")[0]


def is_faster(leaf: Leaf) -> bool:
  """Whether the kernel is the faster choice for a leaf."""
  del leaf
  return True


def unsupported(leaf: Leaf, spec: UpdateSpec) -> str | None:
  """Why the kernel can't update a leaf; None if it can."""
  if spec.rule not in _RULES:
    return f"it has no code for the rule {spec.rule.name!r}"
  shape = leaf.param.shape
  if leaf.quantized and spec.storage.group_size != GROUP_SIZE:
    return f"its group size is {spec.storage.group_size}, not {GROUP_SIZE}"
  for what, array in (("it", leaf.param), ("its gradient", leaf.grad)):
    if array.dtype.name not in _DTYPES:
      return f"{what} has dtype {array.dtype.name}"
  if not leaf.param.size:
    return "it is empty"
  if leaf.quantized and codec.group_axis(shape, GROUP_SIZE) != len(shape) - 1:
    return f"its groups lie along another axis than the last of {shape}"
  return None


def update(
  spec: UpdateSpec, leaves: Sequence[Leaf], scalars: Scalars, place: Place
) -> list[UpdatedLeaf]:
  """Updates leaves; see :class:`flashoptim_jax.kernels.base.Backend`."""
  del place
  packed = _pack(spec.rule, scalars)
  groups: dict[_Launch, list[int]] = {}
  for i, leaf in enumerate(leaves):
    launch = _launch_of(spec, leaf, scalars)
    groups.setdefault(launch, []).append(i)
  updated: dict[int, UpdatedLeaf] = {}
  for launch, members in groups.items():
    # Leaves of one shape are neighbours, for their updates to come from few launches.
    # The largest are first: XLA, which adds the smallest updates first, then finds
    # them in the cache.
    members.sort(key=lambda i: xla_fusion.by_size(leaves[i]), reverse=True)
    most = _MOST_SMALL_LEAVES if launch.small else _MOST_LEAVES
    for start in range(0, len(members), most):
      chunk = members[start : start + most]
      results = launch([leaves[i] for i in chunk], packed)
      updated.update(zip(chunk, results, strict=True))
  results = [updated[i] for i in range(len(leaves))]
  if spec.new_params:
    return results
  small = [i for i, leaf in enumerate(leaves) if leaf.param.size < _MERGED_BELOW]
  updates = xla_fusion.mergeable([results[i].result for i in small])
  for i, update in zip(small, updates, strict=True):
    results[i] = results[i]._replace(result=update)
  return results


def _pack(rule: Rule, scalars: Scalars) -> jax.Array:
  """The kernel's first argument, see ``triton_kernel.SCALARS``."""
  from flashoptim_jax.kernels import triton_kernel

  values = dict(scalars)
  for name in ("mu_correction", "mu_correction_next", "nu_correction"):
    if name in values:
      values[name.replace("correction", "scaling")] = 1.0 / values[name]
  if LEAST_ROOT in values:
    values |= adam_scalars(values, rule.nesterov)
  return jnp.stack(
    [jnp.asarray(values.get(n, 0.0), jnp.float32) for n in triton_kernel.SCALARS]
  )


def adam_scalars(h: Scalars, nesterov: bool) -> dict[str, jax.Array]:
  """Scalars of the kernel for Adam's rules with quantised moments.

  It computes the averages in multiples of their gains, ``m' = g + mu_carry · m`` and
  ``v' = g² + (nu_carry_root · sqrt(v))²``, and the step as ``(m' + grad_share · g) /
  (root_pace · sqrt(v' + scaled_eps_root) + eps_pace)``.
  """
  gains = ("one_minus_b1", "one_minus_b2")
  mu_unit, nu_unit = (
    jnp.maximum(jnp.asarray(h[name], jnp.float32), LEAST_GAIN) for name in gains
  )
  root_unit = jnp.sqrt(nu_unit * h["nu_scaling"])
  grad_share = 0.0
  scaling = mu_unit * h["mu_scaling"]
  if nesterov:
    scaling = mu_unit * h["b1"] * h["mu_scaling_next"]
    # Without a first moment, a share that it counts for nothing beside.
    scaling = jnp.maximum(scaling, LEAST_GAIN)
    grad_share = h["one_minus_b1"] * h["mu_scaling"] / scaling
  direction_scaling = scaling / root_unit
  pace = -jnp.asarray(h["learning_rate"], jnp.float32) * direction_scaling
  # Without a learning rate a step is 0, as something over infinity.
  still = jnp.abs(pace) < codec.TINY
  root_pace = jnp.where(still, codec.TINY, 1.0 / pace)
  eps_pace = jnp.where(still, jnp.inf, h["eps"] / root_unit * root_pace)
  return {
    "mu_carry": h["b1"] / mu_unit,
    "mu_unit": mu_unit,
    "nu_carry_root": jnp.sqrt(h["b2"] / nu_unit),
    "nu_unit": nu_unit,
    "grad_share": grad_share,
    "root_pace": root_pace,
    "eps_pace": eps_pace,
    "scaled_eps_root": h["eps_root"] / root_unit**2,
    "scaled_least_root": h[LEAST_ROOT] * direction_scaling,
  }


def _launch_of(spec: UpdateSpec, leaf: Leaf, scalars: Scalars) -> "_Launch":
  arrays = leaf.named_arrays(spec.rule)
  length = _row_length(leaf)
  small = not leaf.quantized and length < _SMALL_BELOW
  # Words of 16 bytes are enough for small leaves to share launches.
  alignment = min(length & -length, 8 if small else GROUP_SIZE)
  return _Launch(
    spec,
    leaf.decay,
    not _is_zero(scalars.get("eps_root", 0.0)),
    small,
    alignment,
    _dithers(spec, leaf),
    tuple((name, array.dtype.name) for name, array in arrays.items()),
  )


def _dithers(spec: UpdateSpec, leaf: Leaf) -> int:
  """As the kernel's DITHER."""
  if not spec.dithers(leaf.param):
    return 0
  if leaf.origin is None:
    return 1
  return 2 if leaf.strides is None else 3


def _is_zero(number: Any) -> bool:
  """Whether a scalar is known to be 0."""
  return isinstance(number, (int, float)) and number == 0


def _row_length(leaf: Leaf) -> int:
  """Elements after which a group ends; all, where there are no groups."""
  return leaf.param.shape[-1] if leaf.quantized else leaf.param.size


class _Launch(NamedTuple):
  """What leaves that share a launch have in common.

  ``small``: Whether they have float32 moments and few parameters.
  ``dithers``: As the kernel's DITHER.
  """

  spec: UpdateSpec
  decay: bool
  has_eps_root: bool
  small: bool
  alignment: int
  dithers: int
  dtypes: tuple[tuple[str, str], ...]

  def __call__(self, leaves: list[Leaf], scalars: jax.Array) -> list[UpdatedLeaf]:
    rule, storage, _, new_params = self.spec
    tuned = _tuning()
    names = [name for name, _ in self.dtypes]
    written = self.spec.written(names)
    operands: list[Any] = [scalars, None]
    outputs: list[jax.ShapeDtypeStruct] = []
    aliases: dict[int, int] = {}
    for leaf in leaves:
      arrays = leaf.named_arrays(rule)
      for name in names:
        if name in written:
          aliases[len(operands)] = len(outputs)
          outputs.append(_struct(arrays[name]))
        operands.append(arrays[name])
    if not new_params:
      outputs += [_struct(leaf.grad) for leaf in leaves]
    blocks, layout = _layout(leaves, self.alignment, tuned["block_groups"])
    operands[1] = _with_places(layout, leaves) if self.dithers > 1 else layout
    results = iter(
      _triton_call(
        launcher(len(leaves), tuple(names), written, new_params),
        operands,
        outputs,
        aliases,
        grid=(blocks,),
        num_warps=tuned["num_warps"],
        COUNT=len(leaves),
        WIDTH=layout.shape[1],
        ALIGNMENT=self.alignment,
        RULE=rule.name,
        NESTEROV=rule.nesterov,
        DECAY=self.decay,
        MASTER_BITS=(storage.master_bits or 0) * ("correction" in names),
        COMPRESSED=any(name.endswith("_scale") for name in names),
        EPS_ROOT=self.has_eps_root,
        ROOT=storage.companding == "root",
        NEW_PARAMS=new_params,
        GAPS=bool(layout[-1].any()),
        DITHER=self.dithers,
        BLOCK_GROUPS=tuned["block_groups"],
      )
    )
    new = [{name: next(results) for name in written} for _ in leaves]
    if not new_params:
      for arrays in new:
        arrays["update"] = next(results)
    return [UpdatedLeaf.from_named(self.spec, arrays) for arrays in new]


def _struct(array: jax.Array) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _runs(leaf: Leaf) -> scale_gaps.Runs:
  """How the scales of a leaf lie; as without gaps, where it has none."""
  if not leaf.quantized:
    return scale_gaps.Runs(1, 1, 0)
  return scale_gaps.runs(leaf.param.shape, leaf.scale_shape, GROUP_SIZE)


def _layout(
  leaves: Sequence[Leaf], alignment: int, block_groups: int
) -> tuple[int, np.ndarray]:
  """The number of blocks, and the kernel's ``layout``."""
  first, rows = 0, []
  for leaf in leaves:
    length = _row_length(leaf)
    groups = leaf.param.size // length * math.ceil(length / GROUP_SIZE)
    run = _runs(leaf)
    rows.append((first, groups, length // alignment, run.scales, run.gaps))
    first += math.ceil(groups / block_groups)
  # No block belongs to the leaves that fill up the width.
  width = 1 << (len(rows) - 1).bit_length()
  rows += [(np.iinfo(np.int32).max, 0, 0, 1, 0)] * (width - len(rows))
  return first, np.array(rows, np.int32).T.copy()


def _with_places(layout: np.ndarray, leaves: Sequence[Leaf]) -> jax.Array:
  """The kernel's ``layout`` for parts of leaves."""
  position, rows, words = 7 * layout.shape[1], [], []
  for leaf in leaves:
    shape, strides = leaf.param.shape, leaf.strides
    if strides is None:
      shape, strides = (1,), (1,)
    count = jnp.int32(0)
    word = codec.dither(count, shape[:-1], leaf.origin, strides[:-1])
    words.append(word.reshape(-1))
    rows.append((position, leaf.param.shape[-1] if leaf.param.ndim else 1))
    position += words[-1].size
  rows += [(0, 0)] * (layout.shape[1] - len(rows))
  fixed = np.concatenate([layout, np.array(rows, np.int32).T])
  bits = jax.lax.bitcast_convert_type(jnp.concatenate(words), jnp.int32)
  return jnp.concatenate([fixed.reshape(-1), bits])


@functools.cache
def _tuning() -> dict[str, int]:
  """Block size and warps for this process's GPUs, from the recorded tuning run."""
  path = pathlib.Path(__file__).with_name("triton_tuning.json")
  recorded = json.loads(path.read_text())["tuning"]
  capability = _gpu().compute_capability
  return recorded.get(capability, recorded["default"])


def _aliased_outputs_are_arguments() -> bool:
  """Whether this is the jax-triton line that passes aliased buffers twice."""
  import jax_triton

  return jax_triton.__version_info__ < (0, 4)


def _triton_call(
  kernel: Any,
  operands: Sequence[Any],
  outputs: Sequence[jax.ShapeDtypeStruct],
  aliases: dict[int, int],
  **options: Any,
) -> Sequence[jax.Array]:
  import jax_triton

  # XLA rounds after every multiplication; so that moments agree bit for bit, the
  # kernel does too.
  if _aliased_outputs_are_arguments():
    options |= {"out_shape": tuple(outputs), "enable_fp_fusion": False}
  else:
    options |= {
      "out_type": tuple(outputs),
      "backend_options": {"enable_fp_fusion": False},
    }

  @jax.custom_batching.sequential_vmap
  def call(*operands):
    return jax_triton.triton_call(
      *operands, kernel=kernel, input_output_aliases=aliases, **options
    )

  return call(*map(jnp.asarray, operands))


@functools.cache
def launcher(
  count: int,
  names: tuple[str, ...],
  written: tuple[str, ...],
  new_params: bool,
  aliased_outputs: bool | None = None,
) -> Any:
  """The kernel's entry point for ``count`` leaves, a ``triton.JITFunction``.

  Triton kernels have a fixed list of arguments, so this writes one down: it puts
  the pointers of each leaf into a tuple and calls ``triton_kernel.update_leaves``.
  For two leaves that keep ``param`` and ``mu``::

      def update_2_leaves(scalars, layout, grad_0, param_0, mu_0, grad_1, ...):
        update_leaves(scalars, layout, ((grad_0, param_0, ...), (...)), COUNT, ...)

  Args:
    count: The number of leaves.
    names: The arrays that they have, of ``triton_kernel.ARRAYS``.
    written: Those of them that are updated in place.
    new_params: Whether the parameter is one of them, or the update is written.
    aliased_outputs: Whether aliased outputs are arguments too; by default, what
      the installed jax-triton does.
  """
  import triton

  from flashoptim_jax.kernels import triton_kernel

  if aliased_outputs is None:
    aliased_outputs = _aliased_outputs_are_arguments()
  leaves = range(count)
  arguments = ["scalars", "layout"]
  arguments += [f"{name}_{i}" for i in leaves for name in names]
  if aliased_outputs:
    arguments += [f"new_{name}_{i}" for i in leaves for name in written]
  if not new_params:
    arguments += [f"update_{i}" for i in leaves]
  constants = [
    name
    for name in triton_kernel.update_leaves.arg_names
    if name not in ("scalars", "layout", "leaves")
  ]
  present = {*names} if new_params else {*names, "update"}

  def pointers(i: int) -> str:
    # The kernel does not touch the arrays that a leaf lacks.
    fields = (n if n in present else "grad" for n in triton_kernel.ARRAYS)
    return f"({', '.join(f'{field}_{i}' for field in fields)})"

  name = f"update_{count}_leaves"
  typed = [*arguments, *(f"{constant}: tl.constexpr" for constant in constants)]
  source = (
    f"def {name}({', '.join(typed)}):\n"
    f"  update_leaves(scalars, layout, ({', '.join(map(pointers, leaves))},),"
    f" {', '.join(constants)})\n"
  )
  # Triton reads a kernel's source through linecache. The name ends up in the
  # compiled program, so it is the same in every process.
  filename = f"<flashoptim_jax {zlib.crc32(source.encode()):08x}>"
  linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
  namespace = {
    "tl": triton.language,
    "update_leaves": triton_kernel.update_leaves,
    "__name__": __name__,
  }
  exec(compile(source, filename, "exec"), namespace)
  return triton.jit(namespace[name])
