"""One leaf's update, or a part of it, as a JAX primitive, to be carried out later.

Tracing a chain of transformations with such updates in it shows what the update
of each leaf depends on, whichever kernel carries it out, and leaves it open when,
and on how much of a leaf, that happens. The primitives have no lowering.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.sharding import NamedSharding, PartitionSpec

from flashoptim_jax.kernels.base import (
  Leaf,
  UpdatedLeaf,
  UpdateSpec,
  result_types,
  split_scalars,
)
from flashoptim_jax.kernels.resharding import Shardings
from flashoptim_jax.rules import Scalars
from flashoptim_jax.storage import codec

update_p = core.Primitive("flash_update")
update_p.multiple_results = True

# A function that treats slices of a stack alike, unless they cut groups.
call_p = core.Primitive("flash_call")
call_p.multiple_results = True


@call_p.def_abstract_eval
def _result_types(
  *avals,
  function: Callable[..., list[Any]],
  group_size: int | None,
  takes_origin: bool,
):
  del group_size, takes_origin
  return jax.make_jaxpr(function)(*avals).out_avals


def call(
  function: Callable[..., Any],
  *args: Any,
  group_size: int | None = None,
  takes_origin: bool = False,
):
  """``function(*args)``, to be carried out later.

  Args:
    function: A function of arrays of one leaf, or of its scales, and of scalars. It
      computes slices along a first axis from such slices.
    *args: Its arguments.
    group_size: Elements of the groups that it works on, if it does.
    takes_origin: Whether it takes, last of all, the place of the first element of a
      slice in the whole leaf, uint32 of shape ().
  """
  treedef: Any
  if takes_origin:
    args = (*args, jnp.uint32(0))
  flat, treedef = jax.tree.flatten(args)
  results: Any = jax.tree.structure(jax.eval_shape(function, *args))

  def function_of_arrays(*flat):
    return jax.tree.leaves(function(*treedef.unflatten(flat)))

  found = call_p.bind(
    *map(jnp.asarray, flat),
    function=function_of_arrays,
    group_size=group_size,
    takes_origin=takes_origin,
  )
  return results.unflatten(found)


class _Launch(NamedTuple):
  """What updates that :func:`run` takes together have in common."""

  spec: UpdateSpec
  numbers: tuple[tuple[str, float], ...]
  names: tuple[str, ...]


@update_p.def_abstract_eval
def _types(*avals, launch: _Launch, treedef: Any, shardings: Shardings | None):
  del shardings
  leaf = treedef.unflatten(avals[: treedef.num_leaves])
  return jax.tree.leaves(result_types(leaf, launch.spec))


def update_leaves(
  spec: UpdateSpec,
  leaves: Sequence[Leaf],
  scalars: Scalars,
  shardings: Mapping[str, Shardings],
) -> list[UpdatedLeaf]:
  """Stands for :func:`flashoptim_jax.kernels.dispatch.update_leaves`."""
  numbers, traced = split_scalars(scalars)
  launch = _Launch(spec, numbers, tuple(traced))
  updated = []
  for leaf in leaves:
    arrays, treedef = jax.tree.flatten(leaf)
    results = update_p.bind(
      *arrays,
      *traced.values(),
      launch=launch,
      treedef=treedef,
      shardings=shardings.get(leaf.path),
    )
    outputs: Any = jax.tree.structure(UpdatedLeaf(0, leaf.correction, leaf.moments))
    updated.append(outputs.unflatten(results))
  return updated


def operands(eqn: core.JaxprEqn) -> tuple[list[Any], list[Any]]:
  """The leaf's own operands, and the scalars, of a bound update or call."""
  if eqn.primitive is call_p:
    return eqn.invars, []
  count = eqn.params["treedef"].num_leaves
  return eqn.invars[:count], eqn.invars[count:]


def sliceable(eqn: core.JaxprEqn, axes: int) -> bool:
  """Whether slices along leading axes cut no groups of an update or a call."""
  if eqn.primitive is call_p:
    group_size = eqn.params["group_size"]
  else:
    treedef = eqn.params["treedef"]
    leaf: Leaf = treedef.unflatten(range(treedef.num_leaves))
    storage = eqn.params["launch"].spec.storage
    group_size = storage.group_size if leaf.quantized else None
  if group_size is None:
    return True
  shape = _shape(eqn)
  whole = codec.group_axis(shape, group_size)
  slices = codec.group_axis(shape[axes:], group_size)
  return slices is not None and whole == slices + axes


def run_call(
  eqn: core.JaxprEqn, values: Sequence[Any], index: Sequence[Any]
) -> list[Any]:
  """Carries out a bound call.

  Args:
    eqn: The call.
    values: Its operands' values: of a whole leaf, or a slice of it.
    index: The slice's, along the leading axes that it lacks.
  """
  if index and eqn.params["takes_origin"]:
    values = [*values[:-1], _origin(eqn, index)]
  return eqn.params["function"](*values)


def _origin(eqn: core.JaxprEqn, index: Sequence[Any]) -> jax.Array:
  """The place of a slice's first element in the whole leaf."""
  strides = codec.row_major(_shape(eqn))
  return codec.place_of(index, strides[: len(index)])


def _shape(eqn: core.JaxprEqn) -> tuple[int, ...]:
  """Of the whole leaf."""
  return getattr(eqn.invars[0].aval, "shape", ())


def _of_slices(sharding: NamedSharding, axes: int) -> NamedSharding:
  """The sharding of slices, which lack a stack's leading axes."""
  return sharding.update(spec=PartitionSpec(*sharding.spec[axes:]))


def run(
  update: Callable[..., list[UpdatedLeaf]],
  eqns: Sequence[core.JaxprEqn],
  values: Sequence[Sequence[Any]],
  index: Sequence[Any] = (),
) -> list[list[Any]]:
  """Carries out bound updates, as many together as can be.

  Args:
    update: :func:`flashoptim_jax.kernels.dispatch.update_leaves`.
    eqns: The updates.
    values: Their operands' values: whole leaves, or slices of them.
    index: The slices', along the leading axes that they lack.

  Returns:
    Their results' values.
  """
  groups: dict[Any, list[int]] = {}
  for i, eqn in enumerate(eqns):
    # Scalars are told apart by the variables that they come from.
    key = (eqn.params["launch"], *map(id, operands(eqn)[1]))
    groups.setdefault(key, []).append(i)
  results: list[list[Any]] = [[] for _ in eqns]
  for (launch, *_), members in groups.items():
    leaves: list[Leaf] = []
    shardings: dict[str, Shardings] = {}
    for i in members:
      treedef, given = eqns[i].params["treedef"], eqns[i].params["shardings"]
      leaf: Leaf = treedef.unflatten(values[i][: treedef.num_leaves])
      if index and launch.spec.dithers(leaf.param):
        leaf = leaf.replace(origin=_origin(eqns[i], index))
      leaves.append(leaf)
      if given is not None:
        axes = len(_shape(eqns[i])) - leaf.param.ndim
        shardings[leaf.path] = Shardings(*(_of_slices(each, axes) for each in given))
      scalars = values[i][treedef.num_leaves :]
    updated = update(
      launch.spec,
      leaves,
      dict(launch.numbers) | dict(zip(launch.names, scalars, strict=True)),
      shardings,
    )
    for i, new in zip(members, updated, strict=True):
      results[i] = jax.tree.leaves(new)
  return results
