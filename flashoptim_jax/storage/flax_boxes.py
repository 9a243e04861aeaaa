"""The boxes in which Flax keeps arrays: ``nnx.Variable`` and linen's ``Partitioned``.

A tree made from another has its boxes, and their metadata with them. Flax takes it that
each holds an array, and that what a box says of its sharding fits that array.
"""

import sys
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from flashoptim_jax.storage import partition_specs

_NNX_BOX = "flax.nnx", "Variable"
_LINEN_BOX = "flax.core.meta", "AxisMetadata"
# Which metadata say how an optimizer's variable is sharded.
_NAMES = ("out_sharding", "optimizer_sharding")


def without_empty(tree: Any) -> Any:
  """A tree with ``optax.MaskedNode()`` instead of the boxes that hold one."""
  empty = optax.MaskedNode()

  def unboxed(box):
    return empty if not jax.tree.leaves(box) else box

  return _map_boxes(unboxed, tree, _NNX_BOX, _LINEN_BOX)


def fitted(scales: Any) -> Any:
  """A tree of scales, where variables lack the mesh axes that don't divide them.

  As with :func:`flashoptim_jax.state_shardings`. It does nothing without nnx, nor
  where no mesh is known.
  """
  return _map_boxes(_fit, scales, _NNX_BOX)


def _map_boxes(f: Callable[[Any], Any], tree: Any, *classes: tuple[str, str]) -> Any:
  """A tree with ``f`` applied to boxes of some classes, given by module and name."""
  # Flax is optional. What is not imported has no instances.
  found = tuple(
    getattr(sys.modules[module], name)
    for module, name in classes
    if module in sys.modules
  )

  def is_box(node):
    return isinstance(node, found)

  return jax.tree.map(
    lambda node: f(node) if is_box(node) else node, tree, is_leaf=is_box
  )


def _fit(scale: Any) -> Any:
  if not jax.tree.leaves(scale):  # Of a parameter that optax.masked leaves out.
    return scale
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
