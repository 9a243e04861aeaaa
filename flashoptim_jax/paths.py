"""Names of leaves, and errors that name them."""

import collections
import fnmatch
import numbers
from collections.abc import Container, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

MODELS = (
  "Give a model's parameters alone: eqx.filter(model, eqx.is_inexact_array) of an"
  " Equinox model, nnx.state(model, nnx.Param) of an nnx module."
)


def name(path: jax.tree_util.KeyPath) -> str:
  """A leaf's path with slashes: ``layers/0/kernel``; ``<root>`` for a bare leaf."""
  return jax.tree_util.keystr(path, simple=True, separator="/") or "<root>"


def unique_names(tree: Any) -> list[str]:
  """A name for each leaf of a tree, no two alike.

  Where keys joined by slashes give two leaves one name, as in
  ``{"a/b": x, "a": {"b": y}}``, slashes in keys are escaped; where that is not
  enough, as for the keys ``1`` and ``"1"``, names are Python's.
  """
  found = [path for path, _ in jax.tree.leaves_with_path(tree)]
  names = list(map(name, found))
  for spell in (_escaped, jax.tree_util.keystr):
    count = collections.Counter(names)
    names = [
      spell(path) if count[taken] > 1 else taken
      for path, taken in zip(found, names, strict=True)
    ]
  return names


def _escaped(path: jax.tree_util.KeyPath) -> str:
  return "/".join(name((key,)).replace("/", "\\/") for key in path)


def require_distinct(
  names: Iterable[tuple[jax.tree_util.KeyPath, str]], what: str
) -> None:
  """Raises a ValueError if two leaves get one name.

  Args:
    names: For each leaf its path, and what it is called.
    what: What is called so: ``"tensor"``.
  """
  taken: dict[str, jax.tree_util.KeyPath] = {}
  for path, given in names:
    if given in taken:
      pair = name(taken[given]), name(path)
      if pair[0] == pair[1]:
        pair = jax.tree_util.keystr(taken[given]), jax.tree_util.keystr(path)
      raise ValueError(
        f"Leaves {pair[0]!r} and {pair[1]!r} both become {what} {given!r};"
        " expected different names."
      )
    taken[given] = path


def matches(path: jax.tree_util.KeyPath, globs: tuple[str, ...]) -> bool:
  """Whether a leaf's slash-separated path matches one of the glob patterns."""
  return any(fnmatch.fnmatchcase(name(path), glob) for glob in globs)


def param_path(
  path: jax.tree_util.KeyPath, known: Container[jax.tree_util.KeyPath]
) -> jax.tree_util.KeyPath:
  """The longest end of a path that is a parameter's path; ``()`` for none."""
  starts = range(len(path))
  return next((path[i:] for i in starts if path[i:] in known), ())


def leaves_like(tree: Any, reference: Any, what: str, expected: str) -> list[Any]:
  """Leaves of ``tree``, one for each leaf of ``reference``.

  ``tree`` may hold whole subtrees where ``reference`` has leaves. An
  ``optax.MaskedNode()`` in it stands for all leaves below.

  Raises:
    ValueError: If the trees differ, naming the first path at which they do.
  """

  def is_masked(node):
    return isinstance(node, optax.MaskedNode)

  def below(node, part):
    return jax.tree.map(lambda _: node, part) if is_masked(node) else node

  treedef: Any = jax.tree.structure(reference)
  try:
    return treedef.flatten_up_to(
      jax.tree.map(below, tree, reference, is_leaf=is_masked)
    )
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


def is_array(leaf: Any) -> bool:
  """Whether a leaf is an array, a shape that stands for one, or a number."""
  return hasattr(leaf, "dtype") or isinstance(leaf, (bool, int, float, complex))


def require_arrays(params: Any) -> None:
  """Raises a ValueError for leaves that are functions, strings and the like."""
  for path, leaf in jax.tree.leaves_with_path(params):
    if not is_array(leaf):
      raise ValueError(
        f"Parameter {name(path)!r} is a {type(leaf).__name__}; expected an array."
        f" {MODELS}"
      )


def arrays(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
  """Shape and dtype of every array of a tree, by its unique name.

  Raises:
    ValueError: If a leaf is neither an array, nor its shape, nor a number.
  """
  found = {}
  for path, leaf in zip(unique_names(tree), jax.tree.leaves(tree), strict=True):
    if not hasattr(leaf, "dtype") and not isinstance(leaf, numbers.Number):
      raise ValueError(
        f"Leaf {path!r} is a {type(leaf).__name__}; expected an array, a"
        " jax.ShapeDtypeStruct or a number."
      )
    found[path] = tuple(jnp.shape(leaf)), jnp.result_type(leaf).name
  return found


def first_difference(
  found: Mapping[str, tuple[tuple[int, ...], str]],
  expected: Mapping[str, tuple[tuple[int, ...], str]],
) -> tuple[str, str] | None:
  """The first path at which two results of :func:`arrays` differ, and how."""
  for path in [*expected, *found]:
    if found.get(path) != expected.get(path):
      seen, wanted = (
        "nothing" if spec is None else f"an array {spec[0]} of {spec[1]}"
        for spec in (found.get(path), expected.get(path))
      )
      return path, f"found {seen}, expected {wanted}"
  return None


def require_like(tree: Any, reference: Any, what: str, expected: str) -> None:
  """Raises a ValueError unless two trees agree in paths, shapes and dtypes."""
  difference = first_difference(arrays(tree), arrays(reference))
  if difference is not None:
    raise ValueError(
      f"{what} does not match {expected}: at {difference[0]!r}, {difference[1]}."
    )
  leaves_like(tree, reference, what, expected)
