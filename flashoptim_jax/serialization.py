"""Lets :mod:`jax.export` write down programs that take or give optimizer states.

JAX serializes only pytree nodes that it is told how to. Optax does not tell it about
its states, so this does: they are inside those of chains and of ``compress``, and
``MaskedNode`` is in every state.
"""

import dataclasses
import functools
import json
from typing import Any

import jax.export
import optax
import optax.contrib

from flashoptim_jax.storage.options import Storage
from flashoptim_jax.storage.state import CompressedState, FlashState, Format


def _serialize(state_format: Format) -> bytes:
  return json.dumps(dataclasses.asdict(state_format)).encode()


def _deserialize(serialized: bytes) -> Format:
  fields = json.loads(serialized)
  moments = tuple((name, kind) for name, kind in fields["moments"])
  return Format(fields["optimizer"], moments, Storage(**fields["storage"]))


@functools.cache
def register() -> None:
  """Registers the states of this package and of Optax, once in a process."""
  for own in (FlashState, CompressedState):
    jax.export.register_pytree_node_serialization(
      own,
      serialized_name=f"flashoptim_jax.{own.__name__}",
      serialize_auxdata=_serialize,
      deserialize_auxdata=_deserialize,
    )
  for name, node in _optax_nodes().items():
    try:
      jax.export.register_namedtuple_serialization(node, serialized_name=name)
    except ValueError:  # The user, or Optax, has done so.
      continue


def _optax_nodes() -> dict[str, Any]:
  """The named tuples that Optax's states are made of, by name."""
  public = [*vars(optax).values(), *vars(optax.contrib).values()]
  return {
    f"optax.{each.__name__}": each
    for each in public
    if isinstance(each, type) and issubclass(each, tuple)
    if each.__name__.endswith("State") or each is optax.MaskedNode
  }
