"""Libraries that take an Optax optimizer as an argument and run it themselves."""

import jax
import jax.numpy as jnp
import numpyro
import optax
import optimistix
import pytest
from numpyro import distributions
from numpyro.infer import SVI, Trace_ELBO, autoguide

import flashoptim_jax as fo
from tests_clients import support


def numpyro_losses(tx):
  """Stochastic variational inference: a regression with 4,160 latent weights."""
  x, y = next(support.batches(1))

  def model(x, y):
    first = numpyro.sample("first", distributions.Normal().expand([64, 64]).to_event(2))
    head = numpyro.sample("head", distributions.Normal().expand([64]).to_event(1))
    mean = jnp.tanh(x @ first / 8) @ head / 8
    numpyro.sample("y", distributions.Normal(mean, 0.1).to_event(1), obs=y)

  svi = SVI(model, autoguide.AutoNormal(model), tx, Trace_ELBO())
  return svi.run(jax.random.key(0), 60, x, y, progress_bar=False).losses


def optimistix_losses(tx):
  """Minimisation with a limit of steps, of which only the last value is seen."""
  x, y = next(support.batches(1))

  def loss(w, _):
    return jnp.mean((jnp.tanh(x @ w).sum(-1) / 8 - y) ** 2)

  solver = optimistix.OptaxMinimiser(tx, rtol=1e-12, atol=1e-12)
  start = jax.random.normal(jax.random.key(0), (64, 64)) / 8
  values = [loss(start, None)]
  for steps in 4, 8, 12, 16:
    solution = optimistix.minimise(loss, solver, start, max_steps=steps, throw=False)
    values.append(loss(solution.value, None))
  return values


@pytest.mark.parametrize("losses", [numpyro_losses, optimistix_losses])
def test_losses_beside_optax(losses):
  theirs, ours = losses(optax.adam(1e-2)), losses(fo.adam(1e-2))
  support.assert_alike(ours, theirs, within=0.01)
