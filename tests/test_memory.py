"""Reports of what parameters and states take."""

import jax
import jax.numpy as jnp
import optax
import pytest

import flashoptim_jax as fo
from benchmarks.support.leaf_sets import llama3_8b
from tests.support import cases
from tests.support.nestings import draw, every_nesting, nestings


def test_llama_3_8b_takes_5_13_bytes_per_parameter():
  params = {
    name: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    for name, shape in llama3_8b().items()
  }
  report = fo.memory_report(fo.adamw(1e-3), params)
  assert report.num_params == 8_030_261_248
  assert report.bytes_per_param <= 5.13
  assert report.params == 2 * report.num_params
  assert report.correction == report.num_params
  assert report.moments == 2 * report.num_params
  assert report.total_bytes_per_param <= 7.13
  usual = report.baseline
  assert usual["params"] + usual["moments"] == 12 * report.num_params
  text = str(report)
  for part in (
    "8,030,261,248",
    "params",
    "correction",
    "moments",
    "scales",
    "gradients",
    "total",
    "optax.adamw",
    "5.125",
  ):
    assert part in text


@pytest.mark.parametrize(
  "storage",
  [
    cases.QUANTIZED,
    fo.Storage(master_bits=32, moment_bits=32),
    fo.Storage(master_bits=None, companding="paper", min_quantized_size=0),
    fo.Storage(master_bits=16, min_quantized_size=0),
    fo.Storage(group_size=8, min_quantized_size=0),
  ],
  ids=["24-8", "32-32", "none-8", "16-8", "groups-of-8"],
)
@every_nesting
def test_report_is_what_a_real_state_takes(nesting, storage):
  tx = nestings(storage)[nesting]
  params, state = fo.from_fp32(tx, draw(), keep="*norm*")
  report = fo.memory_report(tx, params)

  def nbytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))

  assert report.params == report.gradients == nbytes(params)
  assert report.state == nbytes(state)
  assert report.total == 2 * nbytes(params) + nbytes(state)
  is_flash = lambda node: isinstance(node, fo.FlashState)  # noqa: E731
  flash = [n for n in jax.tree.leaves(state, is_leaf=is_flash) if is_flash(n)]
  assert report.correction == sum(nbytes(s.correction) for s in flash)
  assert report.moments == sum(nbytes((s.mu, s.nu)) for s in flash)
  assert report.scales == sum(nbytes((s.mu_scale, s.nu_scale)) for s in flash)
  assert report.bytes_per_param == pytest.approx(
    (nbytes(params) + nbytes(state)) / report.num_params
  )
  float32 = fo.cast_params(params, jnp.float32)
  plain = optax.adamw(1e-3).init(float32)
  assert sum(report.baseline.values()) == 2 * nbytes(float32) + nbytes(plain)


def test_report_of_any_transformation_and_of_nothing():
  params = draw()
  report = fo.memory_report(optax.adam(1e-3), params)
  assert report.correction == report.moments == 0
  assert report.other == 8 * report.num_params + 4
  empty = fo.memory_report(fo.adamw(1e-3), {})
  assert empty.num_params == 0
  assert empty.bytes_per_param == 4  # The count.
  str(empty)
