"""Where the state of sharded parameters is, and what moves it."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flashoptim_jax as fo
from flashoptim_jax.storage.state import flash_states
from tests.support import cases
from tests.support.cases import some_cases
from tests.support.meshes import (
  COLLECTIVE,
  CUT_SHAPES,
  CUT_SPECS,
  KINDS,
  SHAPES,
  SPECS,
  make_mesh,
  shardings_on,
)
from tests.support.tiers import slow_but


@pytest.mark.slow
def test_moves_where_shards_cut_groups():
  """To Optax and back, and between storages: as on one device, sharded as before."""
  tx = fo.adamw(1e-2)
  mesh = make_mesh("4x2", AxisType.Explicit)
  names = ("sixteen", "eight")
  shardings = shardings_on(mesh, {name: CUT_SPECS[name] for name in names})
  params = cases.tree({name: CUT_SHAPES[name] for name in names})
  state = cases.random_state(tx, params)
  with pytest.warns(UserWarning, match="cut groups"):
    places = shardings, fo.state_shardings(tx, params, shardings)
  given = jax.device_put((params, state), places)
  for actual in cases.there_and_back(tx, *given):
    cases.assert_same(*jax.device_get((actual, (params, state))))
    for x, place in zip(*map(jax.tree.leaves, (actual, places)), strict=True):
      assert x.sharding.is_equivalent_to(place, x.ndim)


@pytest.mark.parametrize("kind", slow_but(KINDS))
@some_cases
def test_state_of_sharded_params_is_sharded(name, storage, kind):
  """Without a word from the user."""
  shardings = shardings_on(make_mesh("4x2", KINDS[kind]))
  params = jax.device_put(cases.tree(SHAPES), shardings)
  state = cases.make(name, storage).init(params)
  for field in ("mu", "mu_scale", "nu", "nu_scale", "correction"):
    for key, leaf in dict(getattr(state, field) or {}).items():
      if isinstance(leaf, jax.Array):
        assert leaf.sharding.is_equivalent_to(shardings[key], leaf.ndim)


def nestings():
  flash = cases.make("adamw")
  labels = {"fsdp": "a", "tensor": "a", "one_axis": "b", "mixed": "b"}
  labels |= {"replicated": "a", "with_gaps": "b"}
  return {
    "chain": optax.chain(optax.clip(1.0), optax.trace(0.9), flash),
    "partition": optax.partition({"a": flash, "b": optax.adam(0.1)}, labels),
    "partition_by_function": optax.partition(
      {"a": flash, "b": optax.adam(0.1)}, lambda params: labels
    ),
    "inject_hyperparams": optax.inject_hyperparams(fo.adamw)(0.1),
    "MultiSteps": optax.MultiSteps(flash, 2),
    "apply_if_finite": optax.apply_if_finite(flash, 2),
    "schedule_free": optax.contrib.schedule_free(flash, 0.1),
    "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=8),
  }


@pytest.mark.parametrize(
  "nesting", slow_but(nestings(), "partition", "inject_hyperparams")
)
def test_state_shardings_through_wrappers(nesting):
  tx = nestings()[nesting]
  whole = cases.tree(SHAPES)
  shardings = shardings_on(make_mesh("4x2"))
  abstract = jax.eval_shape(lambda: whole)
  placed = fo.state_shardings(tx, abstract, shardings)
  state = jax.jit(tx.init, out_shardings=placed)(whole)
  assert jax.tree.structure(state) == jax.tree.structure(placed)
  sharded = 0
  for path, leaf in jax.tree.leaves_with_path(state):
    key = getattr(path[-1], "key", None)
    if key in SHAPES and leaf.shape == SHAPES[key][0]:
      assert leaf.sharding.is_equivalent_to(shardings[key], leaf.ndim)
      sharded += 1
  assert sharded >= len(SHAPES) * (nesting != "adafactor")
  # A prefix will do, such as one sharding for all.
  replicated = NamedSharding(make_mesh("4x2"), P())
  placed = fo.state_shardings(tx, abstract, replicated)
  assert set(jax.tree.leaves(placed)) == {replicated}


def test_state_shardings_of_unusual_leaves():
  mesh = make_mesh("4x2")
  place = functools.partial(NamedSharding, mesh)
  params = {
    "w": {"mu": jnp.ones((8, 64))},  # A name that the state has, too.
    "mu": {"w": jnp.ones((64, 64))},
    "scalar": jnp.ones(()),
    "empty": jnp.ones((0, 64)),
    "long": [jnp.ones((4, 96))],  # Three groups on two devices.
    "root_like": jnp.ones((2,)),
  }
  shardings = {
    "w": {"mu": place(P("fsdp"))},
    "mu": {"w": place(P(None, "tensor"))},
    "scalar": place(P()),
    "empty": place(P(None, "tensor")),
    "long": [place(P("fsdp", "tensor"))],
    "root_like": place(P("tensor")),
  }
  tx = cases.make("adam")
  with pytest.warns(UserWarning) as caught:
    placed = fo.state_shardings(tx, params, shardings)
  assert len(caught) == 1
  assert "'long/0' (48 of 96" in str(caught[0].message)
  jax.jit(tx.init, out_shardings=placed)(params)
  assert placed.mu["w"]["mu"].spec == P("fsdp")
  assert placed.mu["mu"]["w"].spec == P(None, "tensor")
  assert placed.mu["long"][0].spec == P("fsdp", "tensor")
  assert placed.mu_scale["long"][0].spec == P("fsdp", "tensor")
  # A whole tree of one leaf, and none at all.
  bare = fo.state_shardings(tx, jnp.ones((8, 64)), place(P("fsdp")))
  assert bare.nu.spec == bare.nu_scale.spec == P("fsdp")
  assert bare.count.spec == P()
  assert jax.tree.leaves(fo.state_shardings(tx, {}, {})) == []
  # Sixteen devices for eight rows: the state does what the parameter can't.
  wide = AbstractMesh((16,), ("fsdp",), axis_types=(AxisType.Auto,))
  few = fo.state_shardings(tx, params["w"], NamedSharding(wide, P("fsdp")))
  assert few.mu["mu"].spec == P(None)


# Shape, the parameter's spec, and the state's over a `data` axis of 4 as well.
SPREAD = {
  "not along groups": ((8, 1024), P(), P("data")),
  "the longest": ((8, 16, 64), P(), P(None, "data")),
  "the first of equals": ((16, 16, 64), P(), P("data")),
  "after the parameter's axes": ((16, 256), P("fsdp"), P(("fsdp", "data"))),
  "beside the parameter's axes": ((64, 256), P(None, "fsdp"), P("data", "fsdp")),
  "along groups": ((3, 256), P(), P(None, "data")),
  "along groups, after": ((3, 512), P(None, "fsdp"), P(None, ("fsdp", "data"))),
  "the rest is too short": ((8, 512), P("fsdp"), P("fsdp", "data")),
  "a vector": ((4096,), P(), P("data")),
  "would cut groups": ((3, 64), P(), P()),
  "too short": ((3,), P(), P()),
  "a scalar": ((), P(), P()),
  "empty": ((0, 64), P(), P(None, "data")),
  "there already": ((16, 256), P("data"), P("data")),
}


@pytest.mark.parametrize("leaf", SPREAD)
def test_state_over_more_axes(leaf):
  shape, spec, expected = SPREAD[leaf]
  mesh = AbstractMesh((4, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
  param = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  tx = optax.chain(optax.trace(0.5), cases.make("adamw"))
  place = NamedSharding(mesh, spec)
  placed = fo.state_shardings(tx, param, place, over="data")
  state = jax.eval_shape(tx.init, param)
  (flash,), wanted = flash_states(placed), NamedSharding(mesh, expected)
  for field in ("mu", "nu", "correction"):
    assert getattr(flash, field).is_equivalent_to(wanted, len(shape))
  assert flash.nu_scale.is_equivalent_to(wanted, len(shape))
  assert placed[0].trace.is_equivalent_to(wanted, len(shape))
  jax.tree.map(lambda leaf, sharding: sharding.shard_shape(leaf.shape), state, placed)


def test_bad_axes_are_refused():
  tx, params = cases.make("adamw"), {"w": jnp.ones((8, 64), jnp.bfloat16)}
  single = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  for sharding, over, match in (
    (
      NamedSharding(make_mesh("4x2"), P()),
      "model",
      "over has 'model'.*'w' lacks.*fsdp",
    ),
    (NamedSharding(make_mesh("4x2"), P()), ("fsdp", "x"), "over has 'x'"),
    (single, "fsdp", "'w' is SingleDeviceSharding.*expected a jax.sharding.NamedSh"),
  ):
    for function in (fo.state_shardings, fo.with_shardings):
      with pytest.raises(ValueError, match=match):
        function(tx, params, sharding, over=over)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "kind"), [("adamw", "auto"), ("momentum", "explicit")]
)
def test_state_in_host_memory(kind, name):
  tx = optax.chain(optax.trace(0.5), cases.make(name))
  shardings = shardings_on(make_mesh("4x2", KINDS[kind]))
  params = jax.device_put(cases.tree(SHAPES), shardings)
  resident = fo.state_shardings(tx, params, shardings)
  hosted = fo.state_shardings(tx, params, shardings, memory_kind="pinned_host")
  kinds = jax.tree.map(lambda sharding: sharding.memory_kind, hosted)
  (flash,) = flash_states(kinds)
  assert set(jax.tree.leaves(flash[1:])) == {"pinned_host"}
  assert "pinned_host" not in {flash.count, *jax.tree.leaves(kinds[0])}

  results = []
  for placed in (resident, hosted):
    state = jax.device_put(tx.init(params), placed)
    grads = jax.device_put(cases.grads_like(params), shardings)
    donated = jax.tree.map(jnp.copy, params)
    step = jax.jit(functools.partial(fo.step, tx), donate_argnums=(1, 2))
    compiled = step.lower(grads, state, donated).compile()
    assert not COLLECTIVE.search(compiled.as_text())
    new_params, state = compiled(grads, state, donated)
    new_params, state = compiled(grads, state, new_params)
    jax.tree.map(
      lambda leaf, sharding: (
        leaf.sharding.memory_kind == sharding.memory_kind
        or pytest.fail(f"{leaf.sharding} instead of {sharding}")
      ),
      state,
      placed,
    )
    exported = fo.to_fp32(new_params, state), fo.moments(state)
    results.append((new_params, state, exported))
  (*first, exported), (*second, exported_second) = jax.device_get(results)
  cases.assert_equal(second, first, 2)
  cases.assert_same_types(exported_second, exported)


def test_specs_under_a_mesh():
  """Which rules on paths give, for example."""
  tx = cases.make("adamw")
  params = cases.tree(SHAPES)
  mesh = make_mesh("4x2")
  with jax.set_mesh(mesh):
    placed = fo.state_shardings(tx, params, SPECS)
  assert placed == fo.state_shardings(tx, params, shardings_on(mesh))


def test_bad_shardings_are_refused():
  tx = cases.make("adamw")
  params = cases.tree(SHAPES)
  mesh = make_mesh("4x2")
  good = shardings_on(mesh)
  for bad, match in (
    ({**good, "fsdp": P("fsdp")}, "'fsdp'.*expected a jax.sharding.Sharding"),
    ({"fsdp": good["fsdp"]}, "not a prefix"),
  ):
    for function in (fo.state_shardings, fo.with_shardings):
      with pytest.raises(ValueError, match=match):
        function(tx, params, bad)


@pytest.mark.slow
def test_with_shardings_changes_nothing_else():
  params = cases.tree(cases.TINY_SHAPES)
  tx = optax.chain(optax.clip(1.0), cases.make("adamw"))
  told = fo.with_shardings(tx, params, NamedSharding(make_mesh("4x2"), P()))
  grads, state = cases.grads_like(params), tx.init(params)
  cases.assert_same(told.init(params), state)
  cases.assert_same(
    cases.jitted_step(told, grads, state, params),
    cases.jitted_step(tx, grads, state, params),
  )
