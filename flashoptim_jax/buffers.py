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

``benchmarks/compress_convergence.py`` measures what the table's choices do.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import optax

from flashoptim_jax import codec
from flashoptim_jax.state import dotted

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

_KINDS: dict[str, codec.Kind | None] = {
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


def find_moments(
    init: Callable[[Any], Any], codecs: Mapping[str, Codec]
) -> tuple[tuple[str, codec.Kind], ...]:
  """The moments of a transformation's state, and how they are companded.

  Args:
    init: The transformation's ``init``. It is called with the placeholder by
      which ``optax.tree.map_params`` finds what has the parameters' structure.
    codecs: What to do otherwise than :data:`CODECS` says.

  Returns:
    Pairs of a path in the state, with dots between its keys, and a kind. None
    where ``init`` does not take a placeholder, as that of ``optax.lbfgs``.

  Raises:
    ValueError: If ``codecs`` has a field that is not in the state.
  """
  fields = _fields(init)
  known = {name for names in fields.values() for name in names}
  for name in codecs:
    if name not in known:
      raise ValueError(
          f"codecs has {name!r}, which is not in the state; expected one of"
          f" {', '.join(map(repr, sorted(known))) or 'no fields'}."
      )
  found = []
  for path, names in fields.items():
    choices = [table[n] for table in (codecs, CODECS) for n in names if n in table]
    kind = _KINDS[choices[0]] if choices else None
    if kind is not None:
      found.append((path, kind))
  return tuple(found)


def _fields(init: Callable[[Any], Any]) -> dict[str, tuple[str, ...]]:
  """Names of the fields that hold a tree like the parameters, by dotted path.

  The longer name, with the state's, comes first.
  """
  given: list[Any] = []
  optax.tree.map_params(given.append, lambda leaf: leaf, None)
  (placeholder,) = given
  try:
    state = init(placeholder)
  except Exception:  # It looks at what only real parameters have.
    return {}

  def is_placeholder(node):
    return isinstance(node, type(placeholder))

  found: dict[str, tuple[str, ...]] = {}
  nodes = jax.tree.leaves_with_path(state, is_leaf=is_placeholder)
  for path, node in nodes:
    if path and is_placeholder(node):
      field = jax.tree_util.keystr(path[-1:], simple=True)
      owner = type(_at(state, path[:-1])).__name__
      if dotted(path) in found:
        raise ValueError(
            f"Two fields of the state have the path {dotted(path)!r}, the second at"
            f" {jax.tree_util.keystr(path)}; expected labels without dots."
        )
      found[dotted(path)] = (f"{owner}.{field}", field)
  return found


def _at(tree: Any, path: jax.tree_util.KeyPath) -> Any:
  """The node at a path."""
  nodes = jax.tree.leaves_with_path(
      tree, is_leaf=lambda at, _: at == path, is_leaf_takes_path=True
  )
  return dict(nodes)[path]
