"""Computations that are chosen by where they run.

Where that is, is known last: JAX lowers a traced function for the devices of its
arguments, or for a platform that it is told (:func:`jax.export.export`).
:func:`jax.lax.platform_dependent` leaves the choice to the lowering, but traces what
each platform would do, and kernels take long to trace. The primitive here traces it
when it is lowered, for that platform alone.
"""

import functools
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import dispatch
from jax.extend import core
from jax.interpreters import batching, mlir
from jax.sharding import AbstractMesh, Mesh

PLATFORMS = ("cpu", "gpu", "tpu")  # As `jax.Device.platform` has them.


class Place(NamedTuple):
  """Where a computation runs.

  Attributes:
    platform: One of ``PLATFORMS``; None if it is another, or unknown.
    devices: How many devices arrays may be sharded over.
    mesh: A mesh of devices of the kind that it is, if that is known.
  """

  platform: str | None
  devices: int
  mesh: AbstractMesh | None

  def is_here(self) -> bool:
    """Whether this process has such devices, beside compiling for them."""
    try:
      return bool(jax.local_devices(backend=self.platform))
    except RuntimeError:
      return False


class Computation(Hashable, Protocol):
  """What is done with arrays in a place; gives flat results."""

  def __call__(self, place: Place, *arrays: Any) -> Sequence[Any]:
    """Does it."""


call_p = core.Primitive("flash_by_platform")
call_p.multiple_results = True
# For the lowering to be told the devices.
dispatch.prim_requires_devices_during_lowering.add(call_p)


def call(
  computation: Computation, arrays: Sequence[Any], types: Sequence[Any]
) -> list[Any]:
  """``computation(place, *arrays)``, for the place where it runs.

  Args:
    computation: What to do.
    arrays: Its arguments.
    types: Types of its results, as of ``jax.typeof``.
  """
  return call_p.bind(*arrays, computation=computation, types=tuple(types))


def place_of_mesh(mesh: AbstractMesh) -> Place:
  """The place of computations on a mesh."""
  device = mesh.abstract_device
  if device is None:  # It was made without devices.
    return Place(jax.default_backend(), mesh.size, None)
  return Place(device.platform, mesh.size, mesh)


def _place_of_devices(devices: Sequence[jax.Device]) -> Place:
  platforms = {device.platform for device in devices}
  if len(platforms) != 1:
    return Place(None, len(devices), None)
  mesh = Mesh(np.array(devices[:1]), ("device",)).abstract_mesh
  return Place(platforms.pop(), len(devices), mesh)


@call_p.def_impl
def _run(*arrays, computation: Computation, types):
  del types
  # Where JAX runs one operation after the other, too.
  found = [x for x in arrays if isinstance(x, jax.Array) and x.committed]
  devices = (found[0] if found else jnp.zeros(())).devices()
  return _compiled(computation, _place_of_devices(list(devices)))(*arrays)


@functools.lru_cache
def _compiled(computation: Computation, place: Place) -> Any:
  """As one program: its operations one by one would take many times as long."""
  return jax.jit(functools.partial(computation, place))


@call_p.def_abstract_eval
def _types(*_, computation: Computation, types):
  del computation
  return list(types)


def _lower(platform: str | None, ctx, *arrays, computation: Computation, types):
  del types
  context = ctx.module_context.axis_context
  place = _place_of_devices(getattr(context, "device_assignment", None) or ())
  # They are of another platform if JAX was told one.
  if place.platform != platform:
    place = Place(platform, place.devices or jax.device_count(), None)
  traced = functools.partial(computation, place)
  return mlir.lower_fun(traced, multiple_results=True)(ctx, *arrays)


for _platform in (*PLATFORMS, None):
  mlir.register_lowering(call_p, functools.partial(_lower, _platform), _platform)


class _Mapped(NamedTuple):
  """A computation under ``jax.vmap``."""

  computation: Computation
  in_axes: tuple[int | None, ...]

  def __call__(self, place: Place, *arrays):
    mapped = functools.partial(self.computation, place)
    return jax.vmap(mapped, in_axes=self.in_axes)(*arrays)


def _map(arrays, axes, *, computation: Computation, types):
  size = next(
    array.shape[axis]
    for array, axis in zip(arrays, axes, strict=True)
    if axis is not None
  )
  types = [each.update(shape=(size, *each.shape)) for each in types]
  return call(_Mapped(computation, tuple(axes)), arrays, types), [0] * len(types)


batching.primitive_batchers[call_p] = _map
