"""Updates of shards: without communication, equal to unsharded ones."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flashoptim_jax as fo
from flashoptim_jax.kernels import triton, xla
from flashoptim_jax.kernels.by_platform import Place
from tests.support import cases
from tests.support.cases import some_cases
from tests.support.meshes import (
  COLLECTIVE,
  CUT_SHAPES,
  CUT_SPECS,
  KINDS,
  MESHES,
  SHAPES,
  SPECS,
  STEPS,
  alone,
  make_mesh,
  shardings_on,
  train_sharded,
  with_manual_axes,
)
from tests.support.tiers import slow_but

OPTIMIZERS = ["adamw", "adam", "nesterov", "lion"]


def combinations():
  """All meshes and kinds of axes for the first, every pair for the others."""
  kinds = [*KINDS, "manual"]
  for i, name in enumerate(OPTIMIZERS):
    for j, mesh in enumerate(MESHES):
      for k, kind in enumerate(kinds):
        if i == 0 or (i + j + k) % len(kinds) == 0:
          yield name, mesh, kind


@pytest.mark.parametrize(
  ("name", "mesh", "kind"),
  slow_but(combinations(), ("adamw", "4x2", "explicit")),
)
def test_update_stays_on_the_shard(name, mesh, kind):
  mesh = make_mesh(mesh, KINDS.get(kind, AxisType.Auto))
  tx = cases.make(name)
  shardings = shardings_on(mesh)
  step = functools.partial(fo.step, tx)
  if kind == "manual":
    placed = fo.state_shardings(tx, cases.tree(SHAPES), shardings)
    step = with_manual_axes(step, mesh, shardings, placed)
  actual, text = train_sharded(step, tx, SHAPES, shardings)
  assert not COLLECTIVE.search(text)
  cases.assert_equal(actual, alone(name), STEPS)


@pytest.mark.slow
@some_cases
def test_every_storage(name, storage):
  """Through ``update``, whose updates are sharded as the gradients."""
  mesh = make_mesh("4x2")
  tx = cases.make(name, storage)
  shardings = shardings_on(mesh)
  params = jax.device_put(cases.tree(SHAPES), shardings)
  placed = fo.state_shardings(tx, params, shardings)
  state = jax.device_put(tx.init(params), placed)
  grads = jax.device_put(cases.grads_like(params), shardings)
  compiled = jax.jit(tx.update).lower(grads, state, params).compile()
  assert not COLLECTIVE.search(compiled.as_text())
  updates, state = compiled(grads, state, params)
  for key, sharding in shardings.items():
    assert updates[key].sharding.is_equivalent_to(sharding, updates[key].ndim)
  new_params = optax.apply_updates(cases.tree(SHAPES), jax.device_get(updates))
  actual = jax.device_get((new_params, state))
  cases.assert_equal(actual, alone(name, storage, steps=1), 1)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "kind", "storage"),
  [
    ("adamw", "auto", "root"),
    ("lion", "explicit", "root"),
    ("lion", "given", "root"),
    ("adamw", "explicit", "16/8"),
    ("lion", "auto", "16/8"),
  ],
)
def test_shards_that_cut_groups(name, kind, storage):
  mesh = make_mesh("4x2", KINDS.get(kind, AxisType.Auto))
  tx = cases.make(name, storage)
  shardings = shardings_on(mesh, CUT_SPECS)
  if kind == "given":
    tx = fo.with_shardings(tx, cases.tree(CUT_SHAPES), shardings)
  step = functools.partial(fo.step, tx)
  with pytest.warns(UserWarning, match="cut groups") as caught:
    actual, _ = train_sharded(step, tx, CUT_SHAPES, shardings, out=kind == "auto")
  (warning,) = caught
  for key in CUT_SHAPES:
    assert (repr(key) in str(warning.message)) == (key != "gate")
  expected = alone(name, storage, shapes="CUT_SHAPES")
  cases.assert_equal(actual, expected, STEPS)
  if storage == "16/8":
    cases.assert_same(actual[0], expected[0])


class Kernel:
  """Stands in for a fused kernel: an update of arrays that must be whole."""

  def __init__(self):
    self.shapes = []

  def update(self, spec, leaves, scalars, place):
    self.shapes.append({leaf.path: leaf.param.shape for leaf in leaves})
    # Kernels have tables of their own, which are constants of the program.
    table = jnp.asarray(np.zeros((2, len(leaves)), np.float32))
    rate = scalars["learning_rate"] + table[0, -1]
    scalars = dict(scalars) | {"learning_rate": rate}
    return xla.update(spec, leaves, scalars, Place("gpu", 1, None))


@pytest.fixture
def kernel(monkeypatch):
  stand_in = Kernel()
  cases.update_as_on("gpu", monkeypatch)
  monkeypatch.setattr(triton, "unavailable", lambda place: None)
  monkeypatch.setattr(triton, "update", stand_in.update)
  return stand_in


@pytest.mark.parametrize("shapes", slow_but(["SHAPES", "CUT_SHAPES"], "CUT_SHAPES"))
@pytest.mark.parametrize("kind", slow_but([*KINDS, "given"]))
@pytest.mark.parametrize("storage", slow_but(["root", "16/8"], "root", "16/8"))
def test_kernels_see_shards(kernel, kind, shapes, storage):
  mesh = make_mesh("4x2", KINDS.get(kind, AxisType.Auto))
  shapes_, specs = {"SHAPES": (SHAPES, SPECS), "CUT_SHAPES": (CUT_SHAPES, CUT_SPECS)}[
    shapes
  ]
  shardings = shardings_on(mesh, specs)
  tx = cases.make("adamw", storage)
  if kind == "given":
    tx = fo.with_shardings(tx, cases.tree(shapes_), shardings)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)
    actual, text = train_sharded(
      functools.partial(fo.step, tx),
      tx,
      shapes_,
      shardings,
      steps=3,
      out=kind == "auto" and shapes == "CUT_SHAPES",
    )
  assert bool(COLLECTIVE.search(text)) == (shapes == "CUT_SHAPES")
  seen = {path: shape for call in kernel.shapes for path, shape in call.items()}
  if kind == "auto":  # It was also traced as a whole, to learn what it returns.
    seen = kernel.shapes[-1]
  expected = {
    "SHAPES": {
      path: sharding.shard_shape(shapes_[path][0])
      for path, sharding in shardings.items()
    },
    # Gathered along the axis of the groups; XLA updates the other one.
    "CUT_SHAPES": {
      "sixteen": (3, 128),
      "twenty": (2, 160),
      "gate": (1, 128),
    },
  }[shapes]
  assert seen == expected
  expected = alone("adamw", storage, shapes=shapes, steps=3)
  cases.assert_equal(actual, expected, 3)
  if storage == "16/8":  # Each element has the threshold of its place in the whole.
    cases.assert_same(actual[0], expected[0])


@pytest.mark.parametrize("kind", slow_but([*KINDS, "given"], "auto", "explicit"))
def test_kernels_see_shards_of_the_state(kernel, kind):
  """Which is sharded over more axes than the parameters."""
  mesh = make_mesh("2x2x2", KINDS.get(kind, AxisType.Auto))
  shardings = shardings_on(mesh)
  tx, params = cases.make("adamw"), cases.tree(SHAPES)
  placed = fo.state_shardings(tx, params, shardings, over="data")
  told = tx
  if kind == "given":
    told = fo.with_shardings(tx, params, shardings, over="data")
  args = jax.device_put(
    (params, tx.init(params), params), (shardings, placed, shardings)
  )
  step = jax.jit(functools.partial(fo.step, told), out_shardings=(shardings, placed))
  text = step.lower(*args).compile().as_text()
  assert set(COLLECTIVE.findall(text)) == {"all-gather"}
  assert kernel.shapes[-1] == {
    path: placed.mu[path].shard_shape(shape) for path, (shape, _) in SHAPES.items()
  }
  expected = cases.jitted_step(tx, params, tx.init(params), params)
  cases.assert_equal(jax.device_get(step(*args)), expected, 1)


def test_given_sharding_must_fit(kernel):
  del kernel
  sharding = NamedSharding(make_mesh("4x2"), P(None, None, "fsdp"))
  params = {"w": jnp.ones((8, 64), jnp.bfloat16)}
  tx = fo.with_shardings(cases.make("adamw"), params, sharding)
  with pytest.raises(ValueError, match=r"'w' has the spec.*at most 2 entries"):
    fo.step(tx, params, tx.init(params), params)


@cases.every_twin
@pytest.mark.parametrize("masked", [False, True, "with extra args"])
def test_leaves_of_one_name_have_their_own_sharding(kernel, masked, twin):
  """Also where a mask hides one of them from the optimizer."""
  specs = P("fsdp"), P(None, "tensor")
  shardings = [NamedSharding(make_mesh("4x2"), spec) for spec in specs]
  params = twin(jnp.ones((16, 64), jnp.bfloat16), jnp.ones((3, 256), jnp.bfloat16))
  tx = cases.make("adamw")
  if masked:
    tx = optax.masked(
      tx,
      twin(True, False),
      mask_compatible_extra_args=masked == "with extra args",
    )
  tx = fo.with_shardings(tx, params, twin(*shardings))
  jax.eval_shape(functools.partial(fo.step, tx), params, tx.init(params), params)
  (seen,) = [tuple(shapes.values()) for shapes in kernel.shapes if shapes]
  assert seen == ((4, 64), (3, 128))[: 1 if masked else 2]


@pytest.mark.slow
def test_kernels_see_shards_of_arrays_that_are_yet_to_be_sharded(kernel):
  """Only the compiler knows about shards: no argument is on a mesh."""
  shardings = shardings_on(make_mesh("4x2"))
  tx, params = cases.make("adamw"), cases.tree(SHAPES)
  placed = fo.state_shardings(tx, params, shardings)
  step = jax.jit(
    functools.partial(fo.step, tx),
    in_shardings=(shardings, placed, shardings),
    out_shardings=(shardings, placed),
  )
  args = jax.device_get((cases.grads_like(params), tx.init(params), params))
  text = step.lower(*args).compile().as_text()
  assert not COLLECTIVE.search(text)
  assert kernel.shapes[-1] == {
    path: sharding.shard_shape(SHAPES[path][0]) for path, sharding in shardings.items()
  }
  cases.assert_equal(step(*args), cases.train(tx, params, 1), 1)
