"""What follows a flash optimizer in the chains that call it.

A correction belongs to the parameter that an update leads to, so that an optimizer has
to know what becomes of its update. ``flashoptim_jax.step`` sees a whole transformation.
``tx.update`` of a chain calls one transformation after the other, and tells none about
the rest. The rest is found where the chain is called: in its frames on the stack.
Where that finds nothing, as would be with an Optax that writes its chains in another
way, everything is as if no transformation followed.
"""

import functools
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import optax

from flashoptim_jax.update.new_params import NewParam

_CHAIN = optax.chain(optax.identity()).update.__code__
_NAMED_CHAIN = optax.named_chain(("identity", optax.identity())).update.__code__


def replace_updates(updates: Any, names: Sequence[str], params: Any) -> list[bool]:
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
  marks = [
    NewParam(update, name, None, None)
    for update, name in zip(jax.tree.leaves(updates), names, strict=True)
  ]
  tree: Any = jax.tree.unflatten(jax.tree.structure(updates), marks)
  for update in _later_updates(params):
    try:
      tree = update(tree)
    except ValueError as error:
      if not any(mark.computed_with for mark in marks):
        raise
      warnings.warn(
        f"{error} As it is, master weights do not follow the parameters.", stacklevel=3
      )
      break
  arrived = set(map(id, jax.tree.leaves(tree)))
  return [id(mark) not in arrived for mark in marks]


def _later_updates(params: Any) -> Iterator[Callable[[Any], Any]]:
  """Functions of updates: those of the transformations that follow, in order."""
  own = set(map(id, jax.tree.leaves(params)))
  for frame in _callers():
    if frame.f_code not in (_CHAIN, _NAMED_CHAIN):
      continue
    known = frame.f_locals
    # Not a chain around something else, such as the training of an optimizer.
    if not own <= set(map(id, jax.tree.leaves(known["params"]))):
      continue
    if frame.f_code is _CHAIN:
      functions = dict(enumerate(known["update_fns"]))
    else:
      functions = {name: tx.update for name, tx in known["transforms"]}
    done = len(known["new_state"])
    for key, function in [*functions.items()][done + 1 :]:
      yield functools.partial(_updated, function, known["state"][key], known)


def _callers() -> Iterator[types.FrameType]:
  frame: types.FrameType | None = sys._getframe(1)
  while frame is not None:
    yield frame
    frame = frame.f_back


def _updated(function: Any, state: Any, known: Mapping[str, Any], updates: Any) -> Any:
  """What a transformation of a chain makes of updates."""
  changed, _ = function(updates, state, known["params"], **known["extra_args"])
  return changed
