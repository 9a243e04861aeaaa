"""Meshes of eight devices, and parameters that are sharded over them."""

import functools
import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flashoptim_jax as fo
from tests.support import cases

STEPS = 20
COLLECTIVE = re.compile(
  r"all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
)
MESHES = {
  "8": {"fsdp": 8},
  "4x2": {"fsdp": 4, "tensor": 2},
  "2x2x2": {"data": 2, "fsdp": 2, "tensor": 2},
}
# Where each parameter is split; a mesh without an axis leaves it out.
SHAPES = {
  "fsdp": ((16, 64), jnp.bfloat16),
  "tensor": ((3, 256), jnp.bfloat16),
  "one_axis": ((2, 256), jnp.bfloat16),
  "mixed": ((8, 128), jnp.bfloat16),
  "replicated": ((40,), jnp.float32),
  "with_gaps": ((8, 192), jnp.bfloat16),  # between scales
}
SPECS = {
  "fsdp": P("fsdp"),
  "tensor": P(None, "tensor"),
  "one_axis": P(None, ("fsdp", "tensor")),
  "mixed": P("fsdp", "tensor"),
  "replicated": P(),
  "with_gaps": P("fsdp", "tensor"),
}
# On eight devices, with 16, 8 and 20 elements of a group's axis on each, and a
# gate with fewer rows than there are devices.
CUT_SHAPES = {
  "sixteen": ((3, 128), jnp.bfloat16),
  "eight": ((64, 5), jnp.bfloat16),
  "twenty": ((2, 160), jnp.bfloat16),
  "gate": ((4, 128), jnp.bfloat16),
}
CUT_SPECS = {
  "sixteen": P(None, ("fsdp", "tensor")),
  "eight": P(("fsdp", "tensor")),
  "twenty": P(None, ("tensor", "fsdp")),
  "gate": P("fsdp"),
}
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


def make_mesh(name: str, kind=AxisType.Auto):
  sizes = MESHES[name]
  return jax.make_mesh(
    tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes)
  )


def shardings_on(mesh, specs=None):
  """The specs, less the axes that the mesh lacks."""

  def place(spec):
    entries = []
    for entry in spec:
      names = entry if isinstance(entry, tuple) else (entry,)
      names = tuple(name for name in names if name in mesh.axis_names)
      entries.append(names[0] if len(names) == 1 else names or None)
    while entries and entries[-1] is None:
      entries.pop()
    return NamedSharding(mesh, P(*entries))

  return {name: place(spec) for name, spec in (specs or SPECS).items()}


@functools.cache
def alone(name, storage="root", shapes="SHAPES", steps=STEPS):
  """The same training on one device."""
  params = cases.tree(globals()[shapes])
  tx = cases.make(name, storage)
  return cases.train(tx, params, steps, cases.jitted_step)


def train_sharded(step, tx, shapes, shardings, steps=STEPS, out=False):
  """Trains; returns parameters, state, and the compiled step's text.

  Checks that arrays stay where they are and that every buffer is reused. With
  ``out``, the step is told where to put its results.
  """
  whole = cases.tree(shapes)
  placed = fo.state_shardings(tx, whole, shardings)
  params = jax.device_put(whole, shardings)
  state = jax.jit(tx.init, out_shardings=placed)(params)
  arrays = jax.tree.leaves((params, state))
  nbytes = sum(leaf.addressable_shards[0].data.nbytes for leaf in arrays)
  grads = [
    jax.device_put(cases.grads_like(whole, 1 + i), shardings) for i in range(steps)
  ]
  # The compiled step refuses arrays that are not sharded as those it was
  # compiled for, so what it returns must be sharded as what it was given.
  jitted = jax.jit(
    step,
    donate_argnums=(1, 2),
    out_shardings=(shardings, placed) if out else None,
  )
  compiled = jitted.lower(grads[0], state, params).compile()
  assert compiled.memory_analysis().alias_size_in_bytes == nbytes
  for each in grads:
    params, state = compiled(each, state, params)
  return jax.device_get((params, state)), compiled.as_text()


def with_manual_axes(step, mesh, shardings, placed):
  """The step of each shard, given the parameters' and the state's shardings."""
  specs, state_specs = jax.tree.map(lambda s: s.spec, (shardings, placed))
  return jax.shard_map(
    step,
    mesh=mesh,
    in_specs=(specs, state_specs, specs),
    out_specs=(specs, state_specs),
    check_vma=False,
  )
