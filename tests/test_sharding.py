"""Sharded training: updates without communication, equal to unsharded ones."""

import functools
import re
import warnings

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import some_cases
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flashoptim_jax as fo
from flashoptim_jax.kernels import triton, xla
from flashoptim_jax.kernels.by_platform import Place
from flashoptim_jax.storage.state import flash_states

STEPS = 20
COLLECTIVE = re.compile(
    r"all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
)
MESHES = {
    "8": {"fsdp": 8},
    "4x2": {"fsdp": 4, "tensor": 2},
    "2x2x2": {"data": 2, "fsdp": 2, "tensor": 2},
}
# Where each parameter is split; a mesh without an axis leaves it out.
SHAPES = {
    "fsdp": ((16, 64), jnp.bfloat16),
    "tensor": ((3, 256), jnp.bfloat16),
    "one_axis": ((2, 256), jnp.bfloat16),
    "mixed": ((8, 128), jnp.bfloat16),
    "replicated": ((40,), jnp.float32),
}
SPECS = {
    "fsdp": P("fsdp"),
    "tensor": P(None, "tensor"),
    "one_axis": P(None, ("fsdp", "tensor")),
    "mixed": P("fsdp", "tensor"),
    "replicated": P(),
}
# On eight devices, with 16, 8 and 20 elements of a group's axis on each, and a
# gate with fewer rows than there are devices.
CUT_SHAPES = {
    "sixteen": ((3, 128), jnp.bfloat16),
    "eight": ((64, 5), jnp.bfloat16),
    "twenty": ((2, 160), jnp.bfloat16),
    "gate": ((4, 128), jnp.bfloat16),
}
CUT_SPECS = {
    "sixteen": P(None, ("fsdp", "tensor")),
    "eight": P(("fsdp", "tensor")),
    "twenty": P(None, ("tensor", "fsdp")),
    "gate": P("fsdp"),
}
OPTIMIZERS = ["adamw", "adam", "nesterov", "lion"]
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


def make_mesh(name: str, kind=AxisType.Auto):
  sizes = MESHES[name]
  return jax.make_mesh(
      tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes)
  )


def shardings_on(mesh, specs=None):
  """The specs, less the axes that the mesh lacks."""

  def place(spec):
    entries = []
    for entry in spec:
      names = entry if isinstance(entry, tuple) else (entry,)
      names = tuple(name for name in names if name in mesh.axis_names)
      entries.append(names[0] if len(names) == 1 else names or None)
    while entries and entries[-1] is None:
      entries.pop()
    return NamedSharding(mesh, P(*entries))

  return {name: place(spec) for name, spec in (specs or SPECS).items()}


@functools.cache
def alone(name, storage="root", shapes="SHAPES", steps=STEPS):
  """The same training on one device."""
  params = cases.tree(globals()[shapes])
  tx = cases.make(name, storage)
  return cases.train(tx, params, steps, cases.jitted_step)


def train_sharded(step, tx, shapes, shardings, steps=STEPS, out=False):
  """Trains; returns parameters, state, and the compiled step's text.

  Checks that arrays stay where they are and that every buffer is reused. With
  ``out``, the step is told where to put its results.
  """
  whole = cases.tree(shapes)
  placed = fo.state_shardings(tx, whole, shardings)
  params = jax.device_put(whole, shardings)
  state = jax.jit(tx.init, out_shardings=placed)(params)
  arrays = jax.tree.leaves((params, state))
  nbytes = sum(leaf.addressable_shards[0].data.nbytes for leaf in arrays)
  grads = [
      jax.device_put(cases.grads_like(whole, 1 + i), shardings)
      for i in range(steps)
  ]
  # The compiled step refuses arrays that are not sharded as those it was
  # compiled for, so what it returns must be sharded as what it was given.
  jitted = jax.jit(
      step,
      donate_argnums=(1, 2),
      out_shardings=(shardings, placed) if out else None,
  )
  compiled = jitted.lower(grads[0], state, params).compile()
  assert compiled.memory_analysis().alias_size_in_bytes == nbytes
  for each in grads:
    params, state = compiled(each, state, params)
  return jax.device_get((params, state)), compiled.as_text()


def with_manual_axes(step, mesh, shardings, placed):
  """The step of each shard, given the parameters' and the state's shardings."""
  specs, state_specs = jax.tree.map(lambda s: s.spec, (shardings, placed))
  return jax.shard_map(
      step,
      mesh=mesh,
      in_specs=(specs, state_specs, specs),
      out_specs=(specs, state_specs),
      check_vma=False,
  )


def combinations():
  """All meshes and kinds of axes for the first, every pair for the others."""
  kinds = [*KINDS, "manual"]
  for i, name in enumerate(OPTIMIZERS):
    for j, mesh in enumerate(MESHES):
      for k, kind in enumerate(kinds):
        if i == 0 or (i + j + k) % len(kinds) == 0:
          yield name, mesh, kind


@pytest.mark.parametrize(("name", "mesh", "kind"), list(combinations()))
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


@pytest.mark.parametrize(
    ("name", "kind"), [("adamw", "auto"), ("lion", "explicit"), ("lion", "given")]
)
def test_shards_that_cut_groups(name, kind):
  mesh = make_mesh("4x2", KINDS.get(kind, AxisType.Auto))
  tx = cases.make(name)
  shardings = shardings_on(mesh, CUT_SPECS)
  if kind == "given":
    tx = fo.with_shardings(tx, cases.tree(CUT_SHAPES), shardings)
  step = functools.partial(fo.step, tx)
  with pytest.warns(UserWarning, match="cut groups") as caught:
    actual, _ = train_sharded(
        step, tx, CUT_SHAPES, shardings, out=kind == "auto"
    )
  (warning,) = caught
  for key in CUT_SHAPES:
    assert (repr(key) in str(warning.message)) == (key != "gate")
  cases.assert_equal(actual, alone(name, shapes="CUT_SHAPES"), STEPS)


def test_moves_where_shards_cut_groups():
  """To Optax and back, and between storages: as on one device, sharded as before."""
  tx, wide = fo.adamw(1e-2), fo.adamw(1e-2, storage=fo.Storage(32, 32))
  mesh = make_mesh("4x2", AxisType.Explicit)
  names = ("sixteen", "eight")
  shardings = shardings_on(mesh, {name: CUT_SPECS[name] for name in names})
  params = cases.tree({name: CUT_SHAPES[name] for name in names})
  state = cases.random_state(tx, params)
  with pytest.warns(UserWarning, match="cut groups"):
    places = shardings, fo.state_shardings(tx, params, shardings)
  given = jax.device_put((params, state), places)
  masters = fo.to_fp32(*given)
  optax_state = fo.to_optax(tx, *given)
  back = fo.from_optax(tx, given[0], optax_state, params_fp32=masters)
  for actual in (
      (given[0], back),
      fo.convert(wide, tx, *fo.convert(tx, wide, *given)),
  ):
    cases.assert_same(*jax.device_get((actual, (params, state))))
    for x, place in zip(*map(jax.tree.leaves, (actual, places)), strict=True):
      assert x.sharding.is_equivalent_to(place, x.ndim)


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


@pytest.mark.parametrize("shapes", ["SHAPES", "CUT_SHAPES"])
@pytest.mark.parametrize("kind", [*KINDS, "given"])
def test_kernels_see_shards(kernel, kind, shapes):
  mesh = make_mesh("4x2", KINDS.get(kind, AxisType.Auto))
  specs = {"SHAPES": SPECS, "CUT_SHAPES": CUT_SPECS}[shapes]
  shapes_, shardings = globals()[shapes], shardings_on(mesh, specs)
  tx = cases.make("adamw")
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
  cases.assert_equal(actual, alone("adamw", shapes=shapes, steps=3), 3)


@pytest.mark.parametrize("kind", list(KINDS))
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
  labels |= {"replicated": "a"}
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


@pytest.mark.parametrize("nesting", list(nestings()))
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
  assert placed.mu_scale["long"][0].spec == P("fsdp", None)
  # A whole tree of one leaf, and none at all.
  bare = fo.state_shardings(tx, jnp.ones((8, 64)), place(P("fsdp")))
  assert bare.nu.spec == bare.nu_scale.spec == P("fsdp")
  assert bare.count.spec == P()
  assert jax.tree.leaves(fo.state_shardings(tx, {}, {})) == []
  # Sixteen devices for eight rows: the state does what the parameter can't.
  wide = AbstractMesh((16,), ("fsdp",), axis_types=(AxisType.Auto,))
  few = fo.state_shardings(tx, params["w"], NamedSharding(wide, P("fsdp")))
  assert few.mu["mu"].spec == P(None)


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
        lambda leaf, sharding: leaf.sharding.memory_kind == sharding.memory_kind
        or pytest.fail(f"{leaf.sharding} in place of {sharding}"),
        state,
        placed,
    )
    exported = fo.to_fp32(new_params, state), fo.moments(state)
    results.append((new_params, state, exported))
  (*first, exported), (*second, exported_second) = jax.device_get(results)
  cases.assert_equal(second, first, 2)
  cases.assert_same_types(exported_second, exported)


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
      path: sharding.shard_shape(SHAPES[path][0])
      for path, sharding in shardings.items()
  }
  cases.assert_equal(step(*args), cases.train(tx, params, 1), 1)
