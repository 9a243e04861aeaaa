"""Which arrays of Optax's states are moments, and how each is companded.

A moment is known by the name of its field, and by the name of its state where
several use one name for different things; values play no part. The table below
has the states of ``optax`` and ``optax.contrib``. What is kept as it is, and why:

* sums that never decay (``sum_of_squares``, ``grad_sum``, ``grad_sum_sq``, ``s``,
  ``acc_grads``, ``reward``, ...) and averages over tens of thousands of steps
  (AdEMAMix's ``m2``): a step adds less than half a code to them, and so nothing;
* copies of the parameters, and what is computed from their distances (``z``,
  ``x0``, ``params0``, ``init_params``, ...): 8 bits are too few for a parameter;
* step sizes (Rprop's ``step_sizes``), which are multiplied up and down, and what
  feeds back on itself (Adadelta's ``e_g`` and ``e_x``);
* what a step size or a variance is computed from by cancellation (MoMo's
  ``exp_avg``, centered RMSProp's ``mu`` and ``nu``);
* statistics that are small already (Adafactor's ``v_row`` and ``v_col``, SM3's
  ``mu``, NovoGrad's ``nu``).

``benchmarks/quality/compress_convergence.py`` measures what the table's choices do.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import KeyPath

from flashoptim_jax.paths import param_path
from flashoptim_jax.storage.options import Kind
from flashoptim_jax.storage.state import dotted

Codec = Literal["first_moment", "second_moment", "float32"]

CODECS: dict[str, Codec] = {
  # Averages of gradients, signed.
  "mu": "first_moment",
  "m": "first_moment",
  "m1": "first_moment",
  "trace": "first_moment",
  "ema": "first_moment",
  "exp_avg": "first_moment",
  "previous_gradient": "first_moment",
  "ScaleByAdanState.v": "first_moment",
  "ScaleByAdanState.g": "first_moment",
  "ScaleByRpropState.prev_updates": "first_moment",
  # Averages of second derivatives may be negative.
  "SophiaState.nu": "first_moment",
  # SM3 calls its momentum nu.
  "ScaleBySM3State.nu": "first_moment",
  "ScaleBySM3State.mu": "float32",
  # Averages and maxima of squares, never negative.
  "nu": "second_moment",
  "nu_max": "second_moment",
  "n": "second_moment",
  "exp_avg_sq": "second_moment",
  "FactoredState.v": "second_moment",
  # A step size is a difference of products with it.
  "MomoState.exp_avg": "float32",
  # A variance, the difference of nu and the square of mu.
  "ScaleByRStdDevState.mu": "float32",
  "ScaleByRStdDevState.nu": "float32",
  "ScaleByRStdDevWithCountState.mu": "float32",
  "ScaleByRStdDevWithCountState.nu": "float32",
  # One number for each parameter array.
  "ScaleByNovogradState.nu": "float32",
}

_SMALL = 64  # Elements of an array that may as well be in float32.

_KINDS: dict[str, Kind | None] = {
  "first_moment": "first",
  "second_moment": "second",
  "float32": None,
}


def check_codecs(codecs: Mapping[str, Codec] | None) -> None:
  """Raises a ValueError for a codec that there is not."""
  for name, value in (codecs or {}).items():
    if value not in _KINDS:
      raise ValueError(
        f"codecs[{name!r}] is {value!r}; expected one of"
        f" {', '.join(map(repr, _KINDS))}."
      )


class Fields(NamedTuple):
  """What of a transformation's state is laid out as the parameters are.

  Attributes:
    names: For each such field, by its dotted path, its name; the longer one, with
      its state's, comes first.
    others: Dotted paths of other large arrays, if any were looked for.
  """

  names: dict[str, tuple[str, ...]]
  others: tuple[str, ...] = ()


def find_moments(
  fields: Fields, codecs: Mapping[str, Codec]
) -> tuple[tuple[str, Kind], ...]:
  """The moments of a transformation's state, and how they are companded.

  Args:
    fields: The state's fields.
    codecs: What to do otherwise than :data:`CODECS` says.

  Returns:
    Pairs of a path in the state, with dots between its keys, and a kind.

  Raises:
    ValueError: If ``codecs`` has a field that is not in the state.
  """
  known = {name for names in fields.names.values() for name in names}
  for name in codecs:
    if name not in known:
      raise ValueError(
        f"codecs has {name!r}, which is not in the state; expected one of"
        f" {', '.join(map(repr, sorted(known))) or 'no fields'}."
      )
  return known_moments(fields, codecs)


def known_moments(
  fields: Fields, codecs: Mapping[str, Codec]
) -> tuple[tuple[str, Kind], ...]:
  """The same, where ``codecs`` may have fields that are not in the state."""
  found = []
  for path, names in fields.names.items():
    choices = [table[n] for table in (codecs, CODECS) for n in names if n in table]
    kind = _KINDS[choices[0]] if choices else None
    if kind is not None:
      found.append((path, kind))
  return tuple(found)


def general_fields(init: Callable[[Any], Any]) -> Fields | None:
  """The fields of a transformation's state, whatever the parameters.

  ``init`` is called with the placeholder by which ``optax.tree.map_params`` finds
  what has the parameters' structure.

  Returns:
    None if ``init`` looks at what only real parameters have, such as their tree or
    shapes; then :func:`fields_for` knows.
  """
  given: list[Any] = []
  optax.tree.map_params(given.append, lambda leaf: leaf, None)
  (placeholder,) = given
  try:
    state = init(placeholder)
  except Exception:  # Whatever a function of real parameters may raise.
    return None

  def is_placeholder(node):
    return isinstance(node, type(placeholder))

  nodes = jax.tree.leaves_with_path(state, is_leaf=is_placeholder)
  paths = [path for path, node in nodes if path and is_placeholder(node)]
  found: dict[str, tuple[str, ...]] = {}
  for path in paths:
    if dotted(path) in found:
      raise ValueError(
        f"Two fields of the state have the path {dotted(path)!r}, the second at"
        f" {jax.tree_util.keystr(path)}; expected labels without dots."
      )
    found[dotted(path)] = _names(state, path)
  return Fields(found)


def fields_for(params: Any, state: Any) -> Fields:
  """The fields of a transformation's state for some parameters.

  A field is like the parameters if what it holds lies at their paths, be it for some
  of them, or if it is one array of as many elements as they have together, as
  ``optax.flatten`` makes it.

  Args:
    params: The parameters.
    state: Their state: arrays, or ``jax.ShapeDtypeStruct``s.
  """
  shapes = {path: jnp.shape(leaf) for path, leaf in jax.tree.leaves_with_path(params)}
  total = sum(map(math.prod, shapes.values()))
  held: dict[KeyPath, None] = {}
  others: dict[KeyPath, int] = {}
  for path, leaf in jax.tree.leaves_with_path(state):
    if own := param_path(path, shapes):
      held[path[: len(path) - len(own)]] = None
    elif total > _SMALL and jnp.shape(leaf) in ((total,), shapes.get(())):
      held[path] = None
    elif jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
      others[path] = math.prod(jnp.shape(leaf))
  held.pop((), None)  # It has no name.
  mixed = {path[:i] for path in others for i in range(len(path))}
  return Fields(
    {dotted(path): _names(state, path) for path in held if path not in mixed},
    # Statistics that are small already are no loss.
    tuple(
      dotted(path) for path, size in others.items() if size > max(_SMALL, total // 10)
    ),
  )


def _names(state: Any, path: KeyPath) -> tuple[str, ...]:
  """The names of a field: with its state's, and alone."""
  field = jax.tree_util.keystr(path[-1:], simple=True)
  return f"{type(_at(state, path[:-1])).__name__}.{field}", field


def _at(tree: Any, path: KeyPath) -> Any:
  """The node at a path."""
  nodes = jax.tree.leaves_with_path(
    tree, is_leaf=lambda at, _: at == path, is_leaf_takes_path=True
  )
  return dict(nodes)[path]
