"""Precision in and out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flashoptim_jax as fo
from tests.support import cases
from tests.support.nestings import WITHOUT, by_path, draw, every_nesting, nestings
from tests.support.tiers import slow_but


@every_nesting
@pytest.mark.parametrize("bits", slow_but([24, 32, None]))
def test_master_weights_survive_the_cast(nesting, bits):
  tx = nestings(fo.Storage(master_bits=bits, min_quantized_size=0))[nesting]
  masters = draw()
  params, state = fo.from_fp32(tx, masters)
  assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))
  back = by_path(fo.to_fp32(params, state))
  for path, master in by_path(masters).items():
    x = np.asarray(master)
    assert by_path(params)[path].dtype == jnp.bfloat16
    assert back[path].dtype == jnp.float32
    corrected = bits and not path.startswith(WITHOUT.get(nesting, "none"))
    unit = {24: 2.0**-16, 32: 0.0}[bits] if corrected else 2.0**-8
    assert (np.abs(np.asarray(back[path]) - x) <= unit * np.abs(x)).all()


@pytest.mark.parametrize("bits", [24, 32])
def test_the_cast_keeps_ties(bits):
  """A tie goes where the correction can reach, not where a cast rounds it."""
  b = np.arange(0x3F800000, 0x3F840000, 0x80, dtype=np.uint32)
  x = np.concatenate([b, b - 1, b + 1]).view(np.float32)
  tx = fo.adamw(1e-2, storage=fo.Storage(master_bits=bits, min_quantized_size=0))
  back = np.asarray(fo.to_fp32(*fo.from_fp32(tx, {"w": x}))["w"])
  unit = 2.0**-16 if bits == 24 else 0.0
  assert (np.abs(np.float64(back) - x) <= unit * x).all()


@cases.every_twin
def test_leaves_of_one_name_are_told_apart(twin):
  tx = fo.adamw(1e-3)
  x, y = draw()["layers"][0]["kernel"], 100 * draw(1)["layers"][0]["kernel"]
  for bits, group_size in ((24, 32), (32, 16)):
    tx = fo.adamw(1e-3, storage=fo.Storage(bits, group_size=group_size))
    params, state = fo.from_fp32(tx, twin(x, y))
    alone = [fo.from_fp32(tx, leaf) for leaf in (x, y)]
    back = jax.tree.leaves(fo.to_fp32(params, state))
    for found, (param, own) in zip(back, alone, strict=True):
      np.testing.assert_array_equal(found, fo.to_fp32(param, own))
    rate = fo.check_numerics(*alone[1], 0.0)[0].smallest_learning_rate * 0.9
    (leaf,) = fo.check_numerics(params, state, rate)
    assert leaf.largest == float(jnp.abs(back[1]).max())


@every_nesting
def test_steps_go_on_from_the_master_weights(nesting):
  """The state that from_fp32 makes is one to train with."""
  tx = nestings(cases.QUANTIZED)[nesting]
  masters = draw()
  params, state = fo.from_fp32(tx, masters)
  grads = jax.tree.map(jnp.ones_like, params)
  step = jax.jit(lambda g, s, p: fo.step(tx, g, s, p))
  for _ in range(2):
    params, state = step(grads, state, params)
  after = by_path(fo.to_fp32(params, state))
  for path, master in by_path(masters).items():
    assert (np.asarray(after[path]) != np.asarray(master)).any() or (
      nesting == "masked" and path.startswith("head")
    )


def test_keep_leaves_in_float32():
  tx = fo.adamw(1e-2, storage=cases.QUANTIZED)
  masters = draw()
  params, state = fo.from_fp32(tx, masters, keep=("*norm*", "head/*"))
  kept = {path for path, p in by_path(params).items() if p.dtype == jnp.float32}
  assert kept == {
    "layers/0/norm/scale",
    "layers/1/norm/scale",
    "head/kernel",
    "head/bias",
  }
  assert set(by_path(state.correction)) == set(by_path(params)) - kept
  for path in kept:
    np.testing.assert_array_equal(by_path(params)[path], by_path(masters)[path])
    back = by_path(fo.to_fp32(params, state))[path]
    np.testing.assert_array_equal(back, by_path(masters)[path])


@pytest.mark.parametrize(
  ("keep", "kept"),
  [
    ((), set()),
    ("embed/*", {"embed/table"}),
    (["*/kernel"], {"layers/0/kernel", "layers/1/kernel", "head/kernel"}),
    (("layers/[0]/*",), {"layers/0/kernel", "layers/0/norm/scale"}),
    (("kernel", "Embed/*"), set()),  # Whole paths, case and all.
  ],
)
def test_cast_params_globs(keep, kept):
  params = fo.cast_params(draw(), jnp.float16, keep=keep)
  found = {path for path, p in by_path(params).items() if p.dtype == jnp.float32}
  assert found == kept


def test_cast_params_leaves_other_dtypes_alone():
  params = {"w": jnp.ones(3), "ids": jnp.arange(3), "flag": np.bool_(True)}
  cast = fo.cast_params(params, jnp.bfloat16)
  assert cast["w"].dtype == jnp.bfloat16
  np.testing.assert_array_equal(cast["ids"], params["ids"])
  assert cast["flag"] is params["flag"]
  with pytest.raises(ValueError, match="floating-point"):
    fo.cast_params(params, jnp.int8)


KEEPERS = {
  "adamw": lambda: fo.adamw(1e-2, storage=fo.Storage(moment_bits=32)),
  "injected": lambda: optax.inject_hyperparams(fo.adamw)(1e-2),
  "schedule_free": lambda: optax.contrib.schedule_free(fo.sgd(1e-2), 1e-2),
  "compressed": lambda: fo.compress(optax.contrib.prodigy()),
}


@pytest.mark.parametrize("name", slow_but(KEEPERS))
def test_nothing_that_is_returned_dies_with_what_was_given(name):
  """Arrays that a step donates are held nowhere else."""
  tx = KEEPERS[name]()
  masters = jax.tree.map(jnp.asarray, draw())
  held = [masters]
  params, state = fo.from_fp32(tx, masters, keep=("*norm*", "head/*"))
  held += [
    fo.cast_params(params, jnp.bfloat16, keep="*norm*"),
    fo.to_fp32(params, state),
    fo.moments(state),
    fo.to_optax(tx, params, state),
    fo.convert(tx, tx, params, state),
    tx.init(params) if name == "compressed" else (),
  ]
  plain = held[-3]
  held.append(fo.from_optax(tx, params, plain, params_fp32=held[2]))
  # Everything is donated in turn; none of it twice.
  everything = [*held, (params, state)]
  while everything:
    donated = jax.tree.leaves(everything.pop())
    assert len(set(map(id, donated))) == len(donated)
    for leaf in donated:
      leaf.delete()
    assert not [x for x in jax.tree.leaves(everything) if x.is_deleted()]


@pytest.mark.slow
def test_float16_round_trip():
  tx = fo.adamw(1e-2, storage=cases.QUANTIZED)
  masters = draw()
  params, state = fo.from_fp32(tx, masters, jnp.float16)
  for path, back in by_path(fo.to_fp32(params, state)).items():
    x = np.asarray(by_path(masters)[path])
    error = np.abs(np.asarray(back) - x)
    assert (error <= np.maximum(2.0**-18 * np.abs(x), 2.0**-32)).all()


@pytest.mark.parametrize(
  "function",
  [
    lambda state, params: fo.to_fp32(params, state),
    lambda state, params: fo.moments(state),
    lambda state, params: fo.check_numerics(params, state, 1e-3),
    lambda state, params: fo.from_fp32(optax.adam(1e-3), params),
  ],
)
def test_no_flash_state_is_an_error(function):
  params = draw()
  with pytest.raises(ValueError, match="No flash optimizer"):
    function(optax.adam(1e-3).init(params), params)


def test_a_state_of_other_parameters_is_an_error():
  params = fo.cast_params(draw(), jnp.bfloat16)
  state = fo.adamw(1e-3, storage=cases.QUANTIZED).init(params)
  other = {**params, "embed": {"table": params["embed"]["table"][:3]}}
  with pytest.raises(ValueError, match="embed/table"):
    fo.to_fp32(other, state)
  del other["embed"]
  with pytest.raises(ValueError, match="embed/table"):
    fo.to_fp32(other, state)
