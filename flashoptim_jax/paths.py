"""Names of leaves, and errors that name them."""

import fnmatch
from typing import Any

import jax


def name(path: jax.tree_util.KeyPath) -> str:
  """A leaf's path with slashes: ``layers/0/kernel``; ``<root>`` for a bare leaf."""
  return jax.tree_util.keystr(path, simple=True, separator="/") or "<root>"


def matches(path: jax.tree_util.KeyPath, globs: tuple[str, ...]) -> bool:
  """Whether a leaf's slash-separated path matches one of the glob patterns."""
  return any(fnmatch.fnmatchcase(name(path), glob) for glob in globs)


def leaves_like(
    tree: Any, reference: Any, what: str, expected: str
) -> list[Any]:
  """Leaves of ``tree``, one for each leaf of ``reference``.

  ``tree`` may hold whole subtrees (such as ``optax.MaskedNode()``) where
  ``reference`` has leaves.

  Raises:
    ValueError: If the trees differ, naming the first path at which they do.
  """
  treedef: Any = jax.tree.structure(reference)
  try:
    return treedef.flatten_up_to(tree)
  except (ValueError, TypeError, KeyError) as error:
    found = [name(path) for path, _ in jax.tree.leaves_with_path(tree)]
    wanted = [name(path) for path, _ in jax.tree.leaves_with_path(reference)]
    where = next((path for path in wanted if path not in found), None)
    if where is not None:
      difference = f"leaf {where!r} of {expected} has no counterpart in {what}"
    else:
      where = next((path for path in found if path not in wanted), None)
      difference = (
          f"the container types differ: {error}"
          if where is None
          else f"leaf {where!r} of {what} has no counterpart in {expected}"
      )
    raise ValueError(
        f"The tree of {what} does not match that of {expected}: {difference}."
    ) from error
