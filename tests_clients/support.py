"""What the tests of clients share: meshes, data, and two runs' losses side by side."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

# A client's weights. What they come to is compared with the client's own optimizer on
# float32 weights.
MIXED = "bf16, float32 norms"
each_precision = pytest.mark.parametrize("weights", ["float32", MIXED])
# Devices that weights are sharded over.
each_mesh = pytest.mark.parametrize("devices", [1, 4])


def mesh(shape, names):
  """A mesh with auto axes of the first devices, as trainers make theirs."""
  devices = np.asarray(jax.devices()[: np.prod(shape)]).reshape(shape)
  return Mesh(devices, names)


def batches(steps):
  """Pairs of inputs (256, 64) and targets (256,)."""
  rng = np.random.default_rng(0)
  direction = rng.normal(size=(64,)) / 8
  for _ in range(steps):
    x = rng.normal(size=(256, 64)).astype(np.float32)
    yield jnp.asarray(x), jnp.asarray(np.sin(x @ direction), jnp.float32)


def assert_alike(ours, theirs, *, within, fallen_to=0.7):
  """Both runs have learnt, and their last losses differ by at most a share.

  Args:
    ours: Losses with a flash optimizer, step by step.
    theirs: Losses with the client's own optimizer, on the same data and seed.
    within: The largest relative difference of the last quarters' means.
    fallen_to: The largest share of their first loss that may be left.
  """
  ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
  assert ours.shape == theirs.shape
  assert theirs[-1] < fallen_to * theirs[0], theirs
  last = len(ours) // 4
  np.testing.assert_allclose(ours[-last:].mean(), theirs[-last:].mean(), rtol=within)
