"""Saving and restoring with Orbax: what comes back, and what is refused."""

import concurrent.futures
import functools
import json
import multiprocessing
import pathlib
import zipfile

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flashoptim_jax as fo
from flashoptim_jax.checkpoint import inspection, orbax
from tests.checks import checkpoint_faults
from tests.checks import checkpoint_resume as resume
from tests.support import cases
from tests.support.tiers import slow_but


@pytest.mark.parametrize(
  ("name", "storage", "container", "mesh", "saves"),
  slow_but(
    [
      ("adamw", "root", "bare", (1, 1), ("sync", "async", "manager")),
      ("lion", "root", "linen", (1, 1), ("async",)),
      ("nesterov", "paper", "nnx", (1, 1), ("sync",)),
      ("adamw_nesterov", "32/32", "bare", (4, 2), ("async",)),
      ("momentum", "none/8", "linen", (1, 1), ("manager",)),
      ("sgd", "root", "nnx", (4, 2), ("manager",)),
      ("adamw", "16/8", "bare", (4, 2), ("sync",)),
    ],
    ("lion", "root", "linen", (1, 1), ("async",)),
  ),
)
def test_a_restored_run_goes_on_bit_for_bit(
  name, storage, container, mesh, saves, tmp_path
):
  run = resume.CONTAINERS[container](
    resume.make_tx(name, storage), resume.make_mesh(mesh)
  )
  assert not resume.resumes(run, saves, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["root", "16/8"])
def test_across_meshes(storage, tmp_path):
  """4×2 → 8 → 2×4 → 1: the same arrays, and the same updates after them."""
  storage = cases.STORAGES[storage]
  tx = optax.chain(optax.clip(1.0), fo.adamw(resume.SCHEDULE, storage=storage))
  meshes = [resume.make_mesh(shape) for shape in ((4, 2), (8, 1), (2, 4), (1, 1))]
  update = jax.jit(functools.partial(fo.step, tx))

  def step(i, params, opt_state):
    # Gradients that don't depend on the mesh, as a model's sums would.
    grads = jax.tree.map(
      lambda g, p: jax.device_put(g.astype(p.dtype), p.sharding),
      resume.draw(i),
      params,
    )
    return update(grads, opt_state, params)

  straight = resume.start_on(tx, meshes[0], seed=0)
  moved = straight
  for i, mesh in enumerate(meshes):
    straight = step(i, *straight)
    if i:
      resume.SAVES["sync"](tmp_path / str(i), moved)
      target = resume.abstract(resume.start_on(tx, mesh, seed=1))
      saved, moved = moved, resume.restore(tmp_path / str(i), target)
      cases.assert_same(moved, saved)
      assert resume.abstract(moved) == target
    moved = step(i, *moved)
  cases.assert_equal(moved, straight, steps=len(meshes))
  if storage.master_bits == 16:
    cases.assert_same(moved[0], straight[0])


def make_tree(tx, params=None):
  params = cases.tree(cases.TINY_SHAPES) if params is None else params
  return {"params": params, "opt_state": cases.random_state(tx, params)}


def save(path, tree, args=orbax.Save):
  with ocp.Checkpointer(
    orbax.Handler() if args is orbax.Save else ocp.StandardCheckpointHandler()
  ) as checkpointer:
    checkpointer.save(path, args=args(tree))


def restore(path, target):
  with ocp.Checkpointer(orbax.Handler()) as checkpointer:
    return checkpointer.restore(path, args=orbax.Restore(target))


TX = optax.chain(optax.clip(1.0), fo.adamw(1e-3, storage=cases.QUANTIZED))


def in_chain(tx):
  return optax.chain(optax.clip(1.0), tx)


@pytest.mark.parametrize("described", [True, False])
def test_another_tree_is_refused(described, tmp_path):
  """The error names the first path that differs, and the conversion to call."""
  params = cases.tree(cases.TINY_SHAPES)
  tree = make_tree(TX, params)
  save(tmp_path / "0", tree, orbax.Save if described else ocp.args.StandardSave)
  cases.assert_same(restore(tmp_path / "0", tree), tree)

  def target(tx=TX, params=params):
    state = jax.eval_shape(tx.init, params)
    return jax.eval_shape(lambda: {"params": params, "opt_state": state})

  def with_storage(**options):
    storage = fo.Storage(**options, min_quantized_size=0)
    return target(in_chain(fo.adamw(1e-3, storage=storage)))

  taller = {**params, "matrix": jnp.zeros((3, 40), jnp.bfloat16)}
  wide = fo.cast_params(params, jnp.float32)
  refused = [
    (with_storage(master_bits=32), r"opt_state/1.*flashoptim_jax\.convert"),
    (with_storage(moment_bits=32), r"opt_state/1.*flashoptim_jax\.convert"),
    (target(in_chain(optax.adamw(1e-3))), r"opt_state/1"),
    (target(in_chain(fo.lion(1e-3, storage=cases.QUANTIZED))), r"opt_state/1"),
    (target(params=taller), r"matrix.*\(2, 40\).*\(3, 40\)"),
    (
      {**target(), "params": jax.eval_shape(lambda: wide)},
      r"params/matrix.*bfloat16.*float32.*flashoptim_jax\.to_fp32",
    ),
    ({**target(), "step": jnp.int32(0)}, r"'step', found nothing"),
    ({"params": target()["params"]}, r"opt_state/1"),
  ]
  if described:
    refused += [
      (with_storage(companding="paper"), r"opt_state/1.*flashoptim_jax\.convert"),
      (target(in_chain(optax.adamw(1e-3))), r"flashoptim_jax\.to_optax"),
      (target(in_chain(fo.lion(1e-3, storage=cases.QUANTIZED))), r"no conversion"),
    ]
  for abstract, message in refused:
    with pytest.raises(ValueError, match=message):
      restore(tmp_path / "0", abstract)


def test_plain_optax_is_refused_with_a_way_to_come_from_it(tmp_path):
  params = fo.cast_params(cases.tree(cases.TINY_SHAPES), jnp.float32)
  plain = in_chain(optax.adamw(1e-3))
  save(tmp_path / "0", {"params": params, "opt_state": plain.init(params)})
  narrow = fo.cast_params(params, jnp.bfloat16)
  with pytest.raises(ValueError, match=r"opt_state/1.*flashoptim_jax\.from_optax"):
    restore(tmp_path / "0", make_tree(TX, narrow))
  save(tmp_path / "1", {"params": params})
  with pytest.raises(ValueError, match=r"params/matrix.*flashoptim_jax\.from_fp32"):
    restore(tmp_path / "1", {"params": narrow})


ODD_LEAVES = {
  "typed key": jax.random.key(3),
  "typed keys": jax.random.split(jax.random.key(3, impl="rbg"), 4),
  "raw key": jax.random.PRNGKey(3),
  "int": 7,
  "float": 0.1,
  "bool": True,
  "NumPy int64": np.arange(3),
  "NumPy float64": np.linspace(0, 1, 3),
  "NumPy bool": np.array([True, False]),
  "NumPy scalar": np.int64(5),
  "NumPy float scalar": np.float64(0.1),
  "bfloat16 NumPy scalar": jnp.bfloat16(1.5),
  "int4": jnp.arange(3, dtype=jnp.int4),
}


def value_of(leaf):
  if jnp.issubdtype(getattr(leaf, "dtype", int), jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  return np.asarray(leaf)


@pytest.mark.parametrize("args", [orbax.Save, ocp.args.StandardSave])
def test_odd_leaves(args, tmp_path):
  """As they were, where the leaf itself is asked for; else as JAX has them."""
  tree = {**ODD_LEAVES, "state": make_tree(TX)}
  save(tmp_path / "0", tree, args)
  restored = restore(tmp_path / "0", tree)
  abstract = restore(tmp_path / "0", jax.eval_shape(lambda: tree))
  for name, leaf in ODD_LEAVES.items():
    if not isinstance(leaf, jax.Array):
      assert type(restored[name]) is type(leaf)
    assert jnp.result_type(abstract[name]) == jnp.result_type(leaf)
    for found in (restored[name], abstract[name]):
      wanted = value_of(leaf).astype(value_of(found).dtype)
      np.testing.assert_array_equal(value_of(found), wanted)
  cases.assert_same(restored["state"], tree["state"])
  sizes = {a.path: a.nbytes for a in inspection.inspect(tmp_path / "0").arrays}
  assert (sizes["typed key"], sizes["typed keys"]) == (8, 4 * 16)


@pytest.mark.parametrize(
  ("saved", "asked"),
  [("typed key", "raw key"), ("raw key", "typed key"), ("typed keys", "typed key")],
)
@pytest.mark.parametrize("args", [orbax.Save, ocp.args.StandardSave])
def test_other_keys_are_refused(args, saved, asked, tmp_path):
  save(tmp_path / "0", {"key": ODD_LEAVES[saved]}, args)
  with pytest.raises(ValueError, match=r"'key'.*found an array|array of .* at 'key'"):
    restore(tmp_path / "0", {"key": ODD_LEAVES[asked]})


@pytest.mark.parametrize("value", [2**40 + 1, -(2**31) - 1, 1e300])
@pytest.mark.parametrize("args", [orbax.Save, ocp.args.StandardSave])
def test_numbers_of_64_bits_are_not_truncated(args, value, tmp_path):
  """Orbax alone would."""
  for i, leaf in enumerate((value, np.full((2, 3), value))):
    path = tmp_path / str(i)
    save(path, {"a": [leaf]}, args)
    np.testing.assert_array_equal(restore(path, {"a": [leaf]})["a"][0], leaf)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    dtype = jnp.int32 if isinstance(value, int) else jnp.float32
    abstract = jax.ShapeDtypeStruct(np.shape(leaf), dtype)
    for target in (abstract, abstract.update(sharding=sharding)):
      with pytest.raises(ValueError, match=r"64 at 'a/0' that (int|float)32 has not"):
        restore(path, {"a": [target]})
  save(tmp_path / "small", {"a": np.full(3, 7)}, args)
  target = jax.ShapeDtypeStruct((3,), jnp.int32, sharding=sharding)
  found = restore(tmp_path / "small", {"a": target})
  cases.assert_same(found, {"a": jnp.full(3, 7)})
  assert isinstance(found["a"], jax.Array)


def test_leaves_that_are_no_arrays(tmp_path):
  for leaf in ("float32", object(), b"x"):
    with pytest.raises(ValueError, match=r"'a/b' is a (str|object|bytes); expected"):
      save(tmp_path / "0", {"a": {"b": leaf}})


@pytest.mark.parametrize("dotted", [False, True])
@pytest.mark.parametrize("twin", [*cases.TWINS.values()], ids=cases.TWINS)
def test_leaves_of_one_name(twin, dotted, tmp_path):
  """Restored as they were, or refused with both paths where Orbax would keep one."""
  tree = twin(jnp.ones(3), jnp.zeros(3))
  if dotted and "a/b" in tree:
    tree["a.b"] = tree.pop("a/b")
  if dotted or 1 in tree:
    with pytest.raises(ValueError, match=r"both become Orbax's array"):
      save(tmp_path / "0", {"params": tree})
    return
  tree = {"params": tree, "s": TX.init(tree)}
  save(tmp_path / "0", tree)
  cases.assert_same(restore(tmp_path / "0", tree), tree)
  names = [array.path for array in inspection.inspect(tmp_path / "0").arrays]
  assert len(set(names)) == len(names) == len(jax.tree.leaves(tree))
  with pytest.raises(ValueError, match=r"both become optimizer state 'a/b/1'"):
    save(tmp_path / "1", twin(tree["s"], tree["s"]))
  other = {**tree, "params": twin(jnp.ones(3), jnp.zeros(4))}
  with pytest.raises(ValueError, match=r"a\\+/b'.*\(3,\).*\(4,\)"):
    restore(tmp_path / "0", other)


def test_shardings_that_do_not_fit(tmp_path):
  """The error is about the sharding: the checkpoint is sound."""
  tree = make_tree(TX)
  save(tmp_path / "0", tree)
  mesh = resume.make_mesh((4, 2))
  sharding = jax.sharding.NamedSharding(mesh, P())
  target = resume.abstract(jax.device_put(tree, sharding))
  restore(tmp_path / "0", target)
  matrix = target["params"]["matrix"]
  target["params"]["matrix"] = matrix.update(sharding=sharding.update(spec=P("x")))
  with pytest.raises(ValueError, match=r"sharding .*'params/matrix'") as error:
    restore(tmp_path / "0", target)
  assert "damaged" not in str(error.value)
  assert "not read" in str(error.value)


@pytest.mark.parametrize("args", [orbax.Save, ocp.args.StandardSave])
def test_the_parameters_alone(args, tmp_path):
  """Refused, with a way that works."""
  tree = make_tree(TX)
  save(tmp_path / "0", tree, args)
  part = {"params": jax.eval_shape(lambda: tree["params"])}
  with pytest.raises(ValueError, match=r"opt_state/1/.* partial_restore=True"):
    restore(tmp_path / "0", part)
  restore_args = ocp.checkpoint_utils.construct_restore_args(part)
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    found = checkpointer.restore(
      tmp_path / "0",
      args=ocp.args.PyTreeRestore(
        part, restore_args=restore_args, partial_restore=True
      ),
    )
  cases.assert_same(found, {"params": tree["params"]})


def test_params_and_state_as_items_of_a_manager(tmp_path):
  tree = make_tree(TX)
  with ocp.CheckpointManager(tmp_path) as manager:
    items = {name: orbax.Save(item) for name, item in tree.items()}
    manager.save(3, args=ocp.args.Composite(**items, notes=ocp.args.JsonSave([1])))
  with ocp.CheckpointManager(tmp_path) as manager:
    items = {name: orbax.Restore(item) for name, item in tree.items()}
    restored = manager.restore(manager.latest_step(), args=ocp.args.Composite(**items))
  cases.assert_same({name: restored[name] for name in tree}, tree)


def edit_description(path, edit):
  """Rewrites the description of a checkpoint."""
  metadata = json.loads((path / "_METADATA").read_text())
  edit(metadata["custom_metadata"][orbax.KEY])
  (path / "_METADATA").write_text(json.dumps(metadata))


def reseal(description):
  """Gives a changed description the checksum that it would have been saved with."""
  rest = ("format_version", "sha256")
  content = {k: v for k, v in description.items() if k not in rest}
  description["sha256"] = orbax._digest(content)


def test_descriptions_from_before_small_leaves_were_told_apart(tmp_path):
  """Without the option, every leaf has codes."""
  tx = fo.adamw(1e-3, storage=fo.Storage(min_quantized_size=0))
  tree = make_tree(tx)
  save(tmp_path / "0", tree)

  def edit(description):
    for form in description["states"].values():
      del form["storage"]["min_quantized_size"]
    reseal(description)

  edit_description(tmp_path / "0", edit)
  cases.assert_same(restore(tmp_path / "0", tree), tree)
  assert "min_quantized_size=0" in str(inspection.inspect(tmp_path / "0"))
  with pytest.raises(ValueError, match=r"min_quantized_size=0.*asked for.*=4096"):
    restore(tmp_path / "0", make_tree(fo.adamw(1e-3)))


@pytest.mark.parametrize(
  ("version", "message"),
  [
    (2, r"format version 2; this version.* reads 1.*Install a later"),
    (0, r"format version 0; this version.* reads 1.*Install an earlier"),
  ],
)
def test_another_format_version(version, message, tmp_path):
  tree = make_tree(TX)
  save(tmp_path / "0", tree)
  edit_description(tmp_path / "0", lambda d: d.update(format_version=version))
  for read in (lambda path: restore(path, tree), inspection.inspect):
    with pytest.raises(ValueError, match=message):
      read(tmp_path / "0")


STATE = {"optimizer": "adam", "moments": [["mu", "first"]], "storage": {}}


@pytest.mark.parametrize(
  "change",
  [
    {"format_version": None},
    {"format_version": "1"},
    {"format_version": True},
    {"states": []},
    {"states": {"opt_state/1": None}},
    {"states": {"opt_state/1": {"optimizer": "adam"}}},
    {"states": {"opt_state/1": {**STATE, "storage": 3}}},
    {"states": {"opt_state/1": {**STATE, "optimizer": []}}},
    {"states": {"opt_state/1": {**STATE, "moments": [[1, 2]]}}},
    {"arrays": None},
    {"arrays": {"x": 3}},
    {"arrays": {"x": [3, "float32"]}},
    {"arrays": {"x": [[-3], "float32"]}},
    {"arrays": {"x": [["3"], "float32"]}},
    {"arrays": {"x": [[3], "float33"]}},
    {"arrays": {"x": [[3], None]}},
  ],
)
def test_malformed_descriptions(change, tmp_path):
  """With the right checksum. For inspect too, which would print them."""
  tree = make_tree(TX)
  save(tmp_path / "0", tree)

  def edit(description):
    description.update(change)
    reseal(description)

  edit_description(tmp_path / "0", edit)
  for read in (lambda path: restore(path, tree), inspection.inspect):
    with pytest.raises(ValueError, match=r"damaged or incomplete"):
      read(tmp_path / "0")


def test_a_changed_description(tmp_path):
  tree = make_tree(TX)
  save(tmp_path / "0", tree)

  def edit(description):
    description["states"]["opt_state/1"]["storage"]["companding"] = "paper"

  edit_description(tmp_path / "0", edit)
  with pytest.raises(ValueError, match=r"damaged.*checksum"):
    restore(tmp_path / "0", tree)


@pytest.mark.slow
def test_damaged_files(tmp_path):
  """Whatever is missing, cut short or flipped: an error or the very same tree."""
  tree = make_tree(TX)
  save(tmp_path / "0", tree)
  # When one of its reads fails, Orbax forgets the others. In a process of its own
  # their exceptions disturb no later test.
  spawn = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(1, spawn) as pool:
    damage = functools.partial(checkpoint_faults.damage, flips=1, seed=0)
    report = pool.submit(damage, tmp_path / "0", tree).result()
  assert report.wrong == []
  assert report.unclear == []
  assert report.refused > report.files / 2  # Orbax can do without some.


def test_damaged_exports(tmp_path):
  report = checkpoint_faults.damage_export(tmp_path, flips=20, seed=1)
  assert report.wrong == []
  assert report.unclear == []
  assert report.refused > report.harmless


@pytest.mark.slow
def test_killed_while_exporting(tmp_path):
  report = checkpoint_faults.kill_exports(tmp_path, tries=1, seed=0)
  assert report.wrong == []


@pytest.mark.slow
def test_killed_while_saving(tmp_path):
  """The last complete checkpoint is whole. A script does it more often."""
  report = checkpoint_faults.kill(tmp_path, tries=2, seed=0)
  assert report.wrong == []


EARLIER = pathlib.Path(__file__).with_name("version_0_1.zip")
EARLIER_STORAGE = fo.Storage(min_quantized_size=64)


@pytest.mark.parametrize("tx", ["adamw", "compress"])
@pytest.mark.parametrize("kind", ["described", "plain", "msgpack"])
def test_states_from_before_scales_had_gaps(kind, tx, tmp_path):
  """Three steps were made, with scales (4, 3) for a kernel (4, 96)."""
  with zipfile.ZipFile(EARLIER) as earlier:
    earlier.extractall(tmp_path)
  folder = tmp_path / tx
  make = {
    "adamw": lambda: fo.adamw(1e-2, storage=EARLIER_STORAGE),
    "compress": lambda: fo.compress(optax.adamw(1e-2), EARLIER_STORAGE),
  }
  transformation = make[tx]()
  params = {"kernel": jnp.zeros((4, 96), jnp.bfloat16), "norm": jnp.zeros(5)}
  target = {"params": params, "opt_state": transformation.init(params)}
  from_bytes = flax.serialization.from_bytes(
    target, (folder / "state.msgpack").read_bytes()
  )
  if kind == "msgpack":
    # As it was: what kernels can update has fewer gaps, or none.
    found = from_bytes
  else:
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    shardings = {"kernel": NamedSharding(mesh, P("x"))}
    shardings["norm"] = NamedSharding(mesh, P())
    places = {
      "params": shardings,
      "opt_state": fo.state_shardings(transformation, params, shardings),
    }
    asked = jax.tree.map(
      lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
      target,
      places,
    )
    found = restore(folder / kind, asked)
    cases.assert_same_types(jax.device_get(found), jax.device_get(target))
    for leaf, place in zip(*map(jax.tree.leaves, (found, places)), strict=True):
      assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
  moments, expected = (fo.moments(each["opt_state"]) for each in (found, from_bytes))
  cases.assert_same(jax.device_get(moments), jax.device_get(expected))
  assert np.abs(moments["mu"]["kernel"]).min() > 0
  # And on they go, as each other.
  grads = jax.tree.map(jnp.ones_like, params)
  after = [
    fo.step(transformation, grads, each["opt_state"], each["params"])
    for each in jax.device_get((found, from_bytes))
  ]
  masters = [fo.to_fp32(*each) for each in after]
  cases.assert_same(*masters)
  cases.assert_same(*(fo.moments(opt_state) for _, opt_state in after))
