"""Moments, found in any state and decoded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flashoptim_jax as fo
from tests.support import cases
from tests.support.nestings import WITHOUT, by_path, draw, every_nesting, nestings
from tests.support.tiers import slow_but


def moment_paths(nesting):
  without = WITHOUT.get(nesting, "none")
  mu = {path for path in by_path(draw()) if not path.startswith(without)}
  nu = {p for p in mu if nesting != "partition" or p.startswith("layers")}
  return mu, nu


@every_nesting
def test_moments_are_found_in_any_nesting(nesting):
  params = draw()
  found = fo.moments(nestings(cases.QUANTIZED)[nesting].init(params))
  assert set(found) == {"mu", "nu"}
  for name, paths in zip(("mu", "nu"), moment_paths(nesting), strict=True):
    assert set(by_path(found[name])) == paths
    for path, moment in by_path(found[name]).items():
      assert moment.dtype == jnp.float32
      assert moment.shape == by_path(params)[path].shape
      assert not moment.any()


@pytest.mark.parametrize(
  "nesting", slow_but(["partition", "multi-steps"], "multi-steps")
)
def test_moments_are_decoded(nesting):
  """Against the same run with float32 moments: within the codes' steps."""
  grads = draw(1)
  found = {}
  for bits in (8, 32):
    tx = nestings(fo.Storage(moment_bits=bits, min_quantized_size=0))[nesting]
    params, state = fo.from_fp32(tx, draw())
    for _ in range(2):  # optax.MultiSteps updates at the second.
      params, state = jax.jit(lambda g, s, p, tx=tx: fo.step(tx, g, s, p))(
        grads, state, params
      )
    found[bits] = fo.moments(state)
  for name, root in (("mu", np.abs), ("nu", np.sqrt)):
    exact = by_path(found[32][name])
    for path, moment in by_path(found[8][name]).items():
      a, b = root(np.asarray(moment)), root(np.asarray(exact[path]))
      assert np.max(np.abs(a - b)) <= 0.03 * np.max(b)


def test_moments_of_sgd():
  params = draw()
  assert fo.moments(fo.sgd(0.1).init(params)) == {}
  assert set(fo.moments(fo.sgd(0.1, 0.9).init(params))) == {"mu"}
