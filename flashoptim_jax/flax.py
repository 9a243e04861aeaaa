"""Flax: a train state (linen) and an optimizer (nnx) that use ``step``.

Stock ``flax.training.train_state.TrainState`` and ``flax.nnx.Optimizer`` work
with flash optimizers too, through ``update``; these write new parameters in one
pass instead. ``flax.serialization`` writes and reads states; import this module where
Flax is imported after the optimizer was made.
"""

from typing import Any

from flax import nnx, serialization
from flax.training import train_state

from flashoptim_jax.storage import state as state_lib
from flashoptim_jax.update import step

state_lib.register_with_flax(serialization)


class TrainState(train_state.TrainState):
  """``flax.training.train_state.TrainState`` on ``flashoptim_jax.step``."""

  def apply_gradients(self, *, grads: Any, **kwargs: Any) -> "TrainState":
    """Takes one optimizer step.

    Args:
      grads: Gradients, of the structure of ``params``.
      **kwargs: Attributes to replace in the result.

    Returns:
      The state with new ``params`` and ``opt_state``, and ``step`` counted up.
    """
    overwrite = train_state.OVERWRITE_WITH_GRADIENT
    if overwrite in grads:
      # These leaves are not optimized: their gradient is their new value.
      rest, opt_state = step.step(
        self.tx, grads["params"], self.opt_state, self.params["params"]
      )
      params = {"params": rest, overwrite: grads[overwrite]}
    else:
      params, opt_state = step.step(self.tx, grads, self.opt_state, self.params)
    return self.replace(
      step=self.step + 1, params=params, opt_state=opt_state, **kwargs
    )


class Optimizer(nnx.Optimizer):
  """``flax.nnx.Optimizer`` on ``flashoptim_jax.step``."""

  def update(self, model: Any, grads: Any, /, **kwargs: Any) -> None:
    """Takes one optimizer step, in place.

    Args:
      model: The module whose variables (those chosen by ``wrt``) to update.
      grads: Their gradients, as ``flax.nnx.grad`` returns them.
      **kwargs: Extra arguments of the transformation's ``update``.
    """
    params = nnx.as_pure(nnx.state(model, self.wrt, graph=self.graph))
    grads = nnx.as_pure(nnx.state(grads, self.wrt, graph=self.graph))
    opt_state = nnx.as_pure(self.opt_state)
    params, opt_state = step.step(
      self.tx, grads, opt_state, params, **nnx.as_pure(kwargs)
    )
    nnx.update(model, params)
    nnx.update(self.opt_state, nnx.state(opt_state, graph=self.graph))
    self.step[...] += 1
