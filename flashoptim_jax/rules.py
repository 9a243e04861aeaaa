"""Update rules: what each optimizer computes, one element at a time.

A rule is a pure elementwise function of float32 arrays of one shape. The XLA
path calls it on whole leaves and the TPU kernel on blocks; the GPU kernel has a
twin that is tested against it. Expressions follow Optax's order of operations,
so that with ``Storage(32, 32)`` the moments equal Optax's bit for bit.

To add an optimizer, write a rule and a factory in
:mod:`flashoptim_jax.optimizers`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flashoptim_jax import codec

Scalars = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Rule:
  """An optimizer's arithmetic.

  Attributes:
    name: Identifies the rule; kernels choose their code by it.
    moments: Name and kind of each moment, in the order that ``direction`` takes
      and returns them.
    direction: ``(grad, moments, scalars) -> (direction, moments)``. The master
      weight moves by ``-learning_rate · (direction + weight_decay · master)``.
    nesterov: The option that changes the arithmetic.
  """

  name: str
  moments: tuple[tuple[str, codec.Kind], ...]
  direction: Callable[..., tuple[jax.Array, tuple[jax.Array, ...]]]
  nesterov: bool = False


def _adam(grad, moments, h: Scalars, nesterov: bool):
  mu, nu = moments
  mu = h["one_minus_b1"] * grad + h["b1"] * mu
  nu = h["one_minus_b2"] * (grad * grad) + h["b2"] * nu
  if nesterov:
    mu_hat = h["b1"] * (mu / h["mu_correction_next"]) + h["one_minus_b1"] * (
        grad / h["mu_correction"]
    )
  else:
    mu_hat = mu / h["mu_correction"]
  nu_hat = nu / h["nu_correction"]
  direction = mu_hat / (jnp.sqrt(nu_hat + h["eps_root"]) + h["eps"])
  return direction, (mu, nu)


def _lion(grad, moments, h: Scalars):
  (mu,) = moments
  direction = jnp.sign(h["one_minus_b1"] * grad + h["b1"] * mu)
  return direction, (h["one_minus_b2"] * grad + h["b2"] * mu,)


def _momentum(grad, moments, h: Scalars, nesterov: bool):
  (mu,) = moments
  scaled = h["one_minus_dampening"] * grad
  mu = scaled + h["momentum"] * mu
  return (grad + h["momentum"] * mu if nesterov else mu), (mu,)


def _sgd(grad, moments, h: Scalars):
  del h
  return grad, moments


def adam(nesterov: bool) -> Rule:
  """Adam, or NAdam; scalars as :func:`flashoptim_jax.adam` makes them."""
  return Rule(
      "adam",
      (("mu", "first"), ("nu", "second")),
      functools.partial(_adam, nesterov=nesterov),
      nesterov,
  )


def lion() -> Rule:
  """Lion."""
  return Rule("lion", (("mu", "first"),), _lion)


def momentum(nesterov: bool) -> Rule:
  """SGD with heavy-ball or Nesterov momentum."""
  return Rule(
      "momentum",
      (("mu", "first"),),
      functools.partial(_momentum, nesterov=nesterov),
      nesterov,
  )


def sgd() -> Rule:
  """SGD without momentum."""
  return Rule("sgd", (), _sgd)
