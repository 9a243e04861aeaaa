"""Sharding metadata of Flax's nnx, on the scales of moments.

A tree made from another with ``nnx.Variable`` objects in it has their metadata, and
nnx shards each array as that says; a scale may be too short for it.
"""

import sys
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from flashoptim_jax.storage import partition_specs

# Which metadata say how an optimizer's variable is sharded.
_NAMES = ("out_sharding", "optimizer_sharding")


def fitted(scales: Any) -> Any:
  """The tree, where variables lack the mesh axes that don't divide them.

  As with :func:`flashoptim_jax.state_shardings`. It does nothing without nnx, nor
  where no mesh is known.
  """
  # Flax is optional; without it there are no such variables.
  variable = getattr(sys.modules.get("flax.nnx"), "Variable", None)
  if variable is None:
    return scales

  def is_variable(node):
    return isinstance(node, variable)

  return jax.tree.map(
    lambda node: _fit(node) if is_variable(node) else node,
    scales,
    is_leaf=is_variable,
  )


def _fit(scale: Any) -> Any:
  metadata = scale.get_metadata()
  shape = scale.get_value().shape
  changed = {}
  for name in _NAMES:
    given = metadata.get(name)
    if isinstance(given, NamedSharding):
      spec = _fit_spec(given.spec, given.mesh, metadata, shape)
      fits = given.update(spec=spec)
    elif isinstance(given, (tuple, PartitionSpec)):
      mesh = metadata.get("mesh") or jax.sharding.get_abstract_mesh()
      fits = _fit_spec(given, mesh, metadata, shape)
    else:
      continue
    if fits != given:
      changed[name] = fits
  if not changed:
    return scale
  copied = jax.tree.map(lambda array: array, scale)
  copied.set_metadata(metadata | changed)  # A dict of its own.
  return copied


def _fit_spec(given: Any, mesh: Any, metadata: Any, shape: tuple[int, ...]) -> Any:
  """A spec, maybe in names of logical axes, that divides a shape."""
  from flax.core import spmd

  if mesh.empty:
    return given
  spec: Any = spmd.apply_rules(given, metadata.get("sharding_rules"))
  kept = partition_specs.divisible(mesh, spec, shape)
  if tuple(kept) == tuple(spec):
    return given
  return PartitionSpec(
    *(
      entry if fits == axes else None
      for entry, axes, fits in zip(given, spec, kept, strict=False)
    )
  )
