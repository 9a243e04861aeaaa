"""Applying a transformation without materialising updates."""

from collections import OrderedDict
from typing import Any

import jax
import optax

from flashoptim_jax import paths
from flashoptim_jax.storage import state as state_lib
from flashoptim_jax.update.new_params import LAST, NEW_PARAMS, NewParam, NewParams

# States of wrappers that hand updates through as they are, leaf by leaf.
_TRANSPARENT = (
  optax.InjectHyperparamsState,
  optax.InjectStatefulHyperparamsState,
  optax.MaskedState,
  optax.PartitionState,
)
_MASKING = (optax.MaskedState, optax.PartitionState)


def step(
  tx: optax.GradientTransformation,
  grads: optax.Updates,
  opt_state: optax.OptState,
  params: optax.Params,
  **extra_args: Any,
) -> tuple[optax.Params, optax.OptState]:
  """One optimizer step: new parameters and state from gradients.

  Stands for ``tx.update`` followed by ``optax.apply_updates``, and works for any
  transformation. Where a flash optimizer is reached through chains, partitions,
  masks and injected hyperparameters alone, it writes the new parameters in one
  pass, with no updates in between; elsewhere (``optax.MultiSteps``,
  ``optax.apply_if_finite`` and other wrappers that choose between updates or
  accumulate them) this calls ``update`` and ``apply_updates``.

  ``optax.freeze(mask)`` may follow a flash optimizer in a chain: frozen leaves keep
  their master weights too.

  Args:
    tx: A transformation; where flash optimizers are part of it, each must be the
      last of its chain.
    grads: Gradients, of params' structure and shapes, in any float dtype.
    opt_state: The transformation's state.
    params: The parameters.
    **extra_args: Passed to ``tx.update``.

  Returns:
    The new parameters, with the structure, shapes and dtypes of ``params``, and
    the new state.

  Raises:
    ValueError: If another transformation follows a flash optimizer in a chain, or
      if grads, state and params don't match.
  """
  update = tx.update
  if isinstance(tx, optax.GradientTransformation):  # optax.MultiSteps is not.
    update = optax.with_extra_args_support(tx).update
  _check_last(opt_state)
  if not (_has_flash_state(opt_state) and _carries_params(opt_state)):
    updates, opt_state = update(grads, opt_state, params, **extra_args)
    return optax.apply_updates(params, updates), opt_state
  request = extra_args[NEW_PARAMS] = NewParams(params)
  results, opt_state = update(grads, opt_state, params, **extra_args)
  results = paths.leaves_like(results, params, "the updates", "the parameters")
  leaves = [
    result.value if isinstance(result, NewParam) else optax.apply_updates(leaf, result)
    for leaf, result in zip(jax.tree.leaves(params), results, strict=True)
  ]
  opt_state = request.without_lost(results, opt_state)
  return jax.tree.unflatten(jax.tree.structure(params), leaves), opt_state


def _has_flash_state(tree: Any) -> bool:
  nodes = jax.tree.leaves(tree, is_leaf=state_lib.is_flash_state)
  return any(map(state_lib.is_flash_state, nodes))


def _carries_params(opt_state: Any) -> bool:
  """Whether new parameters can travel through every wrapper of a flash state."""
  if state_lib.is_flash_state(opt_state):
    return True
  if isinstance(opt_state, _TRANSPARENT):
    return _carries_params(opt_state[-1])
  if isinstance(opt_state, dict):
    return all(map(_carries_params, opt_state.values()))
  if type(opt_state) is not tuple:
    return not _has_flash_state(opt_state)
  return all(map(_carries_params, opt_state))


def _check_last(opt_state: Any) -> None:
  """Raises a ValueError if something follows a flash optimizer in some chain."""
  for node in jax.tree.leaves(opt_state, is_leaf=_is_chain):
    if not _is_chain(node):
      continue
    flash_seen = False
    for state in node.values() if isinstance(node, dict) else node:
      # Masks may share the leaves out among the transformations of a chain.
      if flash_seen and not isinstance(state, _MASKING):
        raise ValueError(f"{LAST}; found a {type(state).__name__} after it.")
      flash_seen = flash_seen or _has_flash_state(state)
      _check_last(state)


def _is_chain(node: Any) -> bool:
  """Whether a node is the state of ``optax.chain`` or ``named_chain``."""
  return type(node) is tuple or isinstance(node, OrderedDict)
