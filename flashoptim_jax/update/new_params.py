"""New parameters on their way through a chain, in the place of updates."""

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import jax
import numpy as np

# The extra argument by which `flashoptim_jax.step` asks for new parameters instead
# of updates: a `NewParams`.
NEW_PARAMS = "flashoptim_new_params"
LAST = (
  "A flash optimizer must be the last transformation of a chain, since a later"
  " one changes the update that its correction was computed for"
)


class NewParam(np.lib.mixins.NDArrayOperatorsMixin):
  """A new parameter on its way through a chain, in an update's place.

  It has a shape and a dtype, which masks may look at, but no value to compute with:
  a later transformation that tries to fails, where it would silently scale a
  parameter instead of an update. Not a pytree node.

  Attributes:
    value: The new parameter.
    path: The parameter's name.
    old_correction: Its correction before the update, or None.
    correction: Its correction after the update, or None.
    computed_with: Whether something has tried to.
  """

  __array_priority__ = 1000

  def __init__(self, value: jax.Array, path: str, old_correction, correction):
    self.value = value
    self.path = path
    self.old_correction = old_correction
    self.correction = correction
    self.computed_with = False

  shape = property(lambda self: self.value.shape)
  dtype = property(lambda self: self.value.dtype)
  ndim = property(lambda self: self.value.ndim)
  size = property(lambda self: self.value.size)

  def _no_value(self, *args: Any, **kwargs: Any) -> NoReturn:
    self.computed_with = True
    raise ValueError(
      f"{LAST}; found one after it that computes with the update of leaf"
      f" {self.path!r}. Put that before the flash optimizer."
    )

  # Looked for, and not called, where it is given to a jitted function.
  __jax_array__ = property(_no_value)
  __array__ = __array_ufunc__ = _no_value
  __getitem__ = __iter__ = __len__ = __bool__ = __float__ = __int__ = _no_value
  reshape = astype = _no_value


class NewParams:
  """A request for new parameters instead of updates.

  It holds for the parameters that the request was made with. A flash optimizer
  whose wrapper hands it other arrays, such as ``optax.flatten``, returns updates.

  Attributes:
    made: What flash optimizers made on it.
  """

  def __init__(self, params: Any):
    self._params = jax.tree.leaves(params)
    self._known = set(map(id, self._params))
    self.made: list[NewParam] = []

  def concerns(self, params: Any) -> bool:
    """Whether a transformation was given parameters of the request."""
    return all(id(leaf) in self._known for leaf in jax.tree.leaves(params))

  def make(
    self,
    values: Iterable[Any],
    names: Iterable[str],
    old: Iterable[Any],
    new: Iterable[Any],
  ) -> list[Any]:
    """New parameters, given their values, names, old and new corrections."""
    results = list(map(NewParam, values, names, old, new))
    self.made += results
    return results

  def without_lost(self, results: Iterable[Any], opt_state: Any) -> Any:
    """The new state, with old corrections of parameters that did not arrive.

    A later transformation, such as ``optax.freeze``, has put its own updates in
    their place.
    """
    arrived = set(map(id, results))
    lost = {
      id(each.correction): each.old_correction
      for each in self.made
      if id(each) not in arrived and each.correction is not None
    }
    return jax.tree.map(lambda leaf: lost.get(id(leaf), leaf), opt_state)


def new_params_request(extra_args: Mapping[str, Any], params: Any) -> NewParams | None:
  """The request for these new parameters, if there is one."""
  request = extra_args.get(NEW_PARAMS)
  if isinstance(request, NewParams) and request.concerns(params):
    return request
  return None
