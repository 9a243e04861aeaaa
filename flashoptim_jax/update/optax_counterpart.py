"""Asking a transformation what Optax's own optimizers would keep in its place."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import optax

_wanted = contextvars.ContextVar("flashoptim_jax_counterpart", default=False)


class Counterpart(NamedTuple):
  """Marks the place of a flash state.

  Attributes:
    state: What the Optax optimizer of the same name keeps there.
  """

  state: Any


def wanted() -> bool:
  """Whether ``init`` is to return a :class:`Counterpart`."""
  return _wanted.get()


@contextlib.contextmanager
def _want() -> Iterator[None]:
  token = _wanted.set(True)
  try:
    yield
  finally:
    _wanted.reset(token)


def init(tx: optax.GradientTransformation, params: optax.Params) -> optax.OptState:
  """``tx.init`` with a :class:`Counterpart` wherever there is a flash state.

  A transformation's wrappers are closures, so only its own ``init`` knows how
  its states are nested.
  """
  with _want():
    return tx.init(params)


def is_counterpart(node: Any) -> bool:
  """Whether a node of a tree is a :class:`Counterpart`."""
  return isinstance(node, Counterpart)


def unmarked(tree: Any) -> Any:
  """``tree`` with every :class:`Counterpart` replaced by its state."""
  return jax.tree.map(
    lambda node: node.state if is_counterpart(node) else node,
    tree,
    is_leaf=is_counterpart,
  )
