"""Update rules: what each optimizer computes, one element at a time.

A rule is a pure elementwise function of float32 arrays of one shape. The XLA
path calls it on whole leaves and the TPU kernel on blocks; the GPU kernel has a
twin that is tested against it. Expressions follow Optax's order of operations,
so that with ``Storage(32, 32)`` the moments equal Optax's bit for bit.

To add an optimizer, write a rule and a factory in
:mod:`flashoptim_jax.optimizers`. XLA and the TPU kernel then have it. The GPU kernel
refuses rules that it has no twin of, and XLA updates the parameters in its place, until
the rule is written down in :mod:`flashoptim_jax.kernels.triton_kernel` too and named
among those that :mod:`flashoptim_jax.kernels.triton` takes.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flashoptim_jax.storage.options import Kind

Scalars = Mapping[str, Any]
# Scalar of Adam's rules, for quantised moments alone: how small the root of the second
# moment can be beside the first, both corrected for bias.
LEAST_ROOT = "least_root"


class Moment(NamedTuple):
  """A running average of gradients, or of their squares, that a rule keeps.

  Attributes:
    name: ``"mu"`` or ``"nu"``, its field in the state.
    kind: ``"first"`` for gradients, ``"second"`` for squares; how it is companded.
    gain: Name of the scalar by which what is averaged is multiplied.
    decay: Name of the scalar by which the average is multiplied.
  """

  name: str
  kind: Kind
  gain: str
  decay: str

  def update(self, grad: jax.Array, moment: jax.Array, scalars: Scalars) -> jax.Array:
    """The average after one more gradient."""
    power = grad if self.kind == "first" else grad * grad
    return scalars[self.gain] * power + scalars[self.decay] * moment


class Rule(NamedTuple):
  """An optimizer's arithmetic.

  Attributes:
    name: Identifies the rule in states. The GPU kernel chooses its code by it, among
      the rules that it takes.
    moments: The moments.
    direction: ``(grad, old moments, new moments, scalars) -> direction``. The
      master weight moves by ``-learning_rate · (direction + weight_decay ·
      master)``.
    nesterov: The option that changes the arithmetic.
  """

  name: str
  moments: tuple[Moment, ...]
  direction: Callable[..., jax.Array]
  nesterov: bool = False


def _adam(grad, old, new, scalars: Scalars):
  del grad, old
  mu, nu = new
  mu_hat = mu * _inverse(scalars["mu_correction"])
  return mu_hat / _adam_denominator(mu_hat, nu, scalars)


def _nadam(grad, old, new, scalars: Scalars):
  del old
  mu, nu = new
  mu_hat = mu * _inverse(scalars["mu_correction_next"])
  grad_hat = grad * _inverse(scalars["mu_correction"])
  numerator = scalars["b1"] * mu_hat + scalars["one_minus_b1"] * grad_hat
  return numerator / _adam_denominator(numerator, nu, scalars)


def _adam_denominator(numerator, nu, scalars: Scalars):
  root = jnp.sqrt(nu * _inverse(scalars["nu_correction"]) + scalars["eps_root"])
  if LEAST_ROOT in scalars:
    # The errors of two quantised moments don't go together. Whatever they are, the
    # quotient stays in the bounds of exact ones.
    root = jnp.maximum(root, jnp.abs(numerator * scalars[LEAST_ROOT]))
  return root + scalars["eps"]


def _inverse(correction: Any) -> Any:
  """Once a step, instead of a division for each element."""
  return 1.0 / correction


def _lion(grad, old, new, scalars: Scalars):
  del new
  return jnp.sign(scalars["one_minus_b1"] * grad + scalars["b1"] * old[0])


def _heavy_ball(grad, old, new, scalars: Scalars):
  del grad, old, scalars
  return new[0]


def _nesterov(grad, old, new, scalars: Scalars):
  del old
  return grad + scalars["momentum"] * new[0]


def _gradient(grad, old, new, scalars: Scalars):
  del old, new, scalars
  return grad


_MU_B1 = Moment("mu", "first", "one_minus_b1", "b1")
_MU_B2 = Moment("mu", "first", "one_minus_b2", "b2")
_MU_SUM = Moment("mu", "first", "one_minus_dampening", "momentum")
_NU_B2 = Moment("nu", "second", "one_minus_b2", "b2")

ADAM = Rule("adam", (_MU_B1, _NU_B2), _adam)
NADAM = Rule("adam", (_MU_B1, _NU_B2), _nadam, nesterov=True)
LION = Rule("lion", (_MU_B2,), _lion)
MOMENTUM = Rule("momentum", (_MU_SUM,), _heavy_ball)
NESTEROV = Rule("momentum", (_MU_SUM,), _nesterov, nesterov=True)
SGD = Rule("sgd", (), _gradient)
