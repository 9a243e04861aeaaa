"""Saving and restoring with Orbax: what comes back, and what is refused."""

import concurrent.futures
import functools
import json
import multiprocessing

import cases
import checkpoint_faults
import checkpoint_resume as resume
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest

import flashoptim_jax as fo
from flashoptim_jax import checkpoint


@pytest.mark.parametrize(
    ("name", "storage", "container", "mesh", "saves"),
    [
        ("adamw", "root", "bare", (1, 1), ("sync", "async", "manager")),
        ("lion", "root", "linen", (1, 1), ("async",)),
        ("nesterov", "paper", "nnx", (1, 1), ("sync",)),
        ("adamw_nesterov", "32/32", "bare", (4, 2), ("async",)),
        ("momentum", "none/8", "linen", (1, 1), ("manager",)),
        ("sgd", "root", "nnx", (4, 2), ("manager",)),
    ],
)
def test_a_restored_run_goes_on_bit_for_bit(
    name, storage, container, mesh, saves, tmp_path
):
  run = resume.CONTAINERS[container](
      resume.make_tx(name, storage), resume.make_mesh(mesh)
  )
  assert not resume.resumes(run, saves, tmp_path)


def test_across_meshes(tmp_path):
  """4×2 → 8 → 2×4 → 1: the same arrays, and the same updates after them."""
  tx = optax.chain(optax.clip(1.0), fo.adamw(resume.SCHEDULE, storage=cases.QUANTIZED))
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


def make_tree(tx, params=None):
  params = cases.tree(cases.TINY_SHAPES) if params is None else params
  return {"params": params, "opt_state": cases.random_state(tx, params)}


def save(path, tree, args=checkpoint.Save):
  with ocp.Checkpointer(
      checkpoint.Handler()
      if args is checkpoint.Save
      else ocp.StandardCheckpointHandler()
  ) as checkpointer:
    checkpointer.save(path, args=args(tree))


def restore(path, target):
  with ocp.Checkpointer(checkpoint.Handler()) as checkpointer:
    return checkpointer.restore(path, args=checkpoint.Restore(target))


TX = optax.chain(optax.clip(1.0), fo.adamw(1e-3, storage=cases.QUANTIZED))


def in_chain(tx):
  return optax.chain(optax.clip(1.0), tx)


@pytest.mark.parametrize("described", [True, False])
def test_another_tree_is_refused(described, tmp_path):
  """The error names the first path that differs, and the conversion to call."""
  params = cases.tree(cases.TINY_SHAPES)
  tree = make_tree(TX, params)
  save(tmp_path / "0", tree, checkpoint.Save if described else ocp.args.StandardSave)
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


def test_params_and_state_as_items_of_a_manager(tmp_path):
  tree = make_tree(TX)
  with ocp.CheckpointManager(tmp_path) as manager:
    items = {name: checkpoint.Save(item) for name, item in tree.items()}
    manager.save(3, args=ocp.args.Composite(**items, notes=ocp.args.JsonSave([1])))
  with ocp.CheckpointManager(tmp_path) as manager:
    items = {name: checkpoint.Restore(item) for name, item in tree.items()}
    restored = manager.restore(manager.latest_step(), args=ocp.args.Composite(**items))
  cases.assert_same({name: restored[name] for name in tree}, tree)


def edit_description(path, edit):
  """Rewrites the description of a checkpoint."""
  metadata = json.loads((path / "_METADATA").read_text())
  edit(metadata["custom_metadata"][checkpoint.KEY])
  (path / "_METADATA").write_text(json.dumps(metadata))


def test_a_later_format_version(tmp_path):
  tree = make_tree(TX)
  save(tmp_path / "0", tree)
  edit_description(tmp_path / "0", lambda d: d.update(format_version=2))
  with pytest.raises(ValueError, match=r"format version 2; this version.* reads 1"):
    restore(tmp_path / "0", tree)


def test_a_changed_description(tmp_path):
  tree = make_tree(TX)
  save(tmp_path / "0", tree)

  def edit(description):
    description["states"]["opt_state/1"]["storage"]["companding"] = "paper"

  edit_description(tmp_path / "0", edit)
  with pytest.raises(ValueError, match=r"damaged.*checksum"):
    restore(tmp_path / "0", tree)


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


def test_killed_while_saving(tmp_path):
  """The last complete checkpoint is whole. A script does it more often."""
  report = checkpoint_faults.kill(tmp_path, tries=2, seed=0)
  assert report.wrong == []
