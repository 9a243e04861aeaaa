"""Precision in and out, memory planning and diagnostics."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flashoptim_jax as fo
from benchmarks.support.leaf_sets import llama3_8b

PARAMS = {
    "embed": {"table": (40, 64)},
    "layers": [
        {"kernel": (7, 50), "norm": {"scale": (50,)}},
        {"kernel": (7, 50), "norm": {"scale": (50,)}},
    ],
    "head": {"kernel": (40, 64), "bias": ()},
}


def is_shape(x):
  return isinstance(x, tuple)


def draw(seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
      lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32),
      PARAMS,
      is_leaf=is_shape,
  )


def labels(params):
  names = {"embed": "lion", "layers": "adamw", "head": "plain"}
  return {
      key: jax.tree.map(lambda _, key=key: names[key], subtree)
      for key, subtree in params.items()
  }


def not_head(params):
  return {
      key: jax.tree.map(lambda _, key=key: key != "head", subtree)
      for key, subtree in params.items()
  }


def nestings(storage):
  adamw = fo.adamw(1e-2, storage=storage)
  return {
      "alone": adamw,
      "chain": optax.chain(optax.clip_by_global_norm(1.0), adamw),
      "masked": optax.masked(adamw, not_head),
      "inject": optax.inject_hyperparams(fo.adamw)(1e-2, storage=storage),
      "partition": optax.chain(
          optax.clip(1.0),
          optax.partition(
              {
                  "adamw": optax.chain(optax.clip(0.5), adamw),
                  "lion": optax.inject_hyperparams(fo.lion)(
                      1e-3, storage=storage
                  ),
                  "plain": optax.sgd(1e-2),
              },
              labels,
          ),
      ),
      "multi-steps": optax.MultiSteps(adamw, 2),
  }


# Leaves that have no flash optimizer in these.
WITHOUT = {"masked": "head", "partition": "head"}
every_nesting = pytest.mark.parametrize("nesting", nestings(cases.QUANTIZED))


def by_path(tree):
  return {
      jax.tree_util.keystr(path, simple=True, separator="/"): leaf
      for path, leaf in jax.tree.leaves_with_path(tree)
  }


@every_nesting
@pytest.mark.parametrize("bits", [24, 32, None])
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
      "layers/0/norm/scale", "layers/1/norm/scale", "head/kernel", "head/bias"
  }
  assert set(by_path(state.correction)) == set(by_path(params)) - kept
  for path in kept:
    np.testing.assert_array_equal(by_path(params)[path], by_path(masters)[path])
    back = by_path(fo.to_fp32(params, state))[path]
    np.testing.assert_array_equal(back, by_path(masters)[path])


@pytest.mark.parametrize(("keep", "kept"), [
    ((), set()),
    ("embed/*", {"embed/table"}),
    (["*/kernel"], {"layers/0/kernel", "layers/1/kernel", "head/kernel"}),
    (("layers/[0]/*",), {"layers/0/kernel", "layers/0/norm/scale"}),
    (("kernel", "Embed/*"), set()),  # Whole paths, case and all.
])
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


@pytest.mark.parametrize("name", KEEPERS)
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


def test_float16_round_trip():
  tx = fo.adamw(1e-2, storage=cases.QUANTIZED)
  masters = draw()
  params, state = fo.from_fp32(tx, masters, jnp.float16)
  for path, back in by_path(fo.to_fp32(params, state)).items():
    x = np.asarray(by_path(masters)[path])
    error = np.abs(np.asarray(back) - x)
    assert (error <= np.maximum(2.0**-18 * np.abs(x), 2.0**-32)).all()


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


@pytest.mark.parametrize("nesting", ["partition", "multi-steps"])
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


@pytest.mark.parametrize("function", [
    lambda state, params: fo.to_fp32(params, state),
    lambda state, params: fo.moments(state),
    lambda state, params: fo.check_numerics(params, state, 1e-3),
    lambda state, params: fo.from_fp32(optax.adam(1e-3), params),
])
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


# Memory.


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
  for part in ("8,030,261,248", "params", "correction", "moments", "scales",
               "gradients", "total", "optax.adamw", "5.125"):
    assert part in text


@pytest.mark.parametrize("storage", [
    cases.QUANTIZED,
    fo.Storage(master_bits=32, moment_bits=32),
    fo.Storage(master_bits=None, companding="paper", min_quantized_size=0),
    fo.Storage(group_size=8, min_quantized_size=0),
], ids=["24-8", "32-32", "none-8", "groups-of-8"])
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
