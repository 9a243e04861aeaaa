"""What follows a flash optimizer in the chains that call it.

A correction belongs to the parameter that an update leads to, so that an optimizer has
to know what becomes of its update. ``flashoptim_jax.step`` sees a whole transformation.
``tx.update`` of a chain calls one transformation after the other, and tells none about
the rest. The rest is found where the chain is called: in its frames on the stack.
Where that finds nothing, as would be with an Optax that writes its chains in another
way, everything is as if no transformation followed.
"""

import sys
import types
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import optax

from flashoptim_jax.update.new_params import NewParam, NewParams

_CHAIN = optax.chain(optax.identity()).update.__code__
_NAMED_CHAIN = optax.named_chain(("identity", optax.identity())).update.__code__


def hand_over(
  results: Sequence[Any],
  params: Any,
  names: Sequence[str],
  corrections: tuple[Sequence[Any], Sequence[Any]],
  request: NewParams | None,
) -> tuple[Any, Sequence[Any]]:
  """What an optimizer passes on, and the corrections that belong to it.

  Args:
    results: New parameters where they are requested, else updates.
    params: The parameters that the optimizer was given.
    names: Their names.
    corrections: The old and the new ones; None where there is none.
    request: The request for new parameters, if there is one.

  Returns:
    A tree like ``params``, and a correction for each parameter.

  Warns:
    UserWarning: As :func:`_replaced`.
  """
  treedef: Any = jax.tree.structure(params)
  old, new = corrections
  if request is not None:
    return treedef.unflatten(request.make(results, names, old, new)), new
  updates = treedef.unflatten(results)
  held = _replaced(updates, names, params)
  return updates, [
    before if hold else after
    for before, after, hold in zip(old, new, held, strict=True)
  ]


def _replaced(updates: Any, names: Sequence[str], params: Any) -> list[bool]:
  """Whether later transformations put something else in the place of updates.

  As ``optax.freeze`` does: the parameter stays as it is, and so must its correction.

  Args:
    updates: The updates, of the structure of ``params``.
    names: The parameters' names.
    params: The parameters that the optimizer was given.

  Returns:
    One bool for each parameter.

  Warns:
    UserWarning: If one computes with an update. The correction no longer fits then.
  """
  owned = jax.tree.leaves(params)
  marks = {
    id(param): NewParam(update, name, None, None)
    for param, update, name in zip(owned, jax.tree.leaves(updates), names, strict=True)
  }
  for chain, later in _chains(owned):
    # Others may share the chain's parameters.
    params, updates = chain["params"], chain["updates"]
    ids = jax.tree.map(id, params)
    tree = jax.tree.map(marks.get, ids, updates)
    for function, state in later:
      try:
        tree, _ = function(tree, state, params, **chain["extra_args"])
      except ValueError as error:
        if not any(mark.computed_with for mark in marks.values()):
          raise
        warnings.warn(
          f"{error} As it is, master weights do not follow the parameters.",
          stacklevel=4,
        )
        return [False] * len(owned)
    arrived = set(map(id, jax.tree.leaves(tree)))
    marks = {param: mark for param, mark in marks.items() if id(mark) in arrived}
  return [id(param) not in marks for param in owned]


def _chains(owned: Sequence[Any]) -> Iterator[tuple[Mapping[str, Any], list[Any]]]:
  """The chains that are calling, from the inside out, with these parameters.

  Each as the variables of its ``update``, and the functions and states of the
  transformations that follow in it.
  """
  ids = set(map(id, owned))
  for frame in _callers():
    if frame.f_code not in (_CHAIN, _NAMED_CHAIN):
      continue
    chain = frame.f_locals
    # Not one around something else, such as the training of an optimizer.
    if not ids <= set(map(id, jax.tree.leaves(chain["params"]))):
      continue
    if frame.f_code is _CHAIN:
      functions = dict(enumerate(chain["update_fns"]))
    else:
      functions = {name: tx.update for name, tx in chain["transforms"]}
    pairs = [(function, chain["state"][key]) for key, function in functions.items()]
    yield chain, pairs[len(chain["new_state"]) + 1 :]


def _callers() -> Iterator[types.FrameType]:
  """The frames around the update, up to where it is only looked at as a follower."""
  frame: types.FrameType | None = sys._getframe(1)
  asked = 0
  while frame is not None:
    asked += frame.f_code is _replaced.__code__
    if asked > 1:
      return
    yield frame
    frame = frame.f_back
