"""What is said about checkpoints."""

import shutil
import sys

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest

import flashoptim_jax as fo
from flashoptim_jax import __main__ as command
from flashoptim_jax.checkpoint import inspection
from tests.support import cases

TX = optax.chain(optax.clip(1.0), fo.adamw(1e-3, storage=cases.QUANTIZED))


def make():
  params = cases.tree(cases.TINY_SHAPES)
  return {
    "params": params,
    "opt_state": cases.random_state(TX, params, count=17),
    "step": jnp.int32(17),
  }


@pytest.fixture
def saved(tmp_path):
  tree = make()
  tree["params"]["norm"] = jnp.array([1, jnp.nan, jnp.inf, 0, 2], jnp.float32)
  with ocp.CheckpointManager(tmp_path) as manager:
    manager.save(17, args=fo.checkpoint.Save(tree))
    manager.save(5, args=fo.checkpoint.Save(make()), force=True)
  return tmp_path, tree


def test_inspect(saved, monkeypatch):
  monkeypatch.setattr(inspection, "_BATCH", 100)  # Several batches.
  folder, tree = saved
  found = inspection.inspect(folder)
  for path in (folder / "17", folder / "17" / "default"):
    assert inspection.inspect(path) == found
  assert found.directory == folder / "17" / "default"
  assert found.counts == {"opt_state/1": 17}
  assert found.states["opt_state/1"]["storage"]["companding"] == "root"
  assert {a.path: (a.shape, a.dtype) for a in found.arrays} == fo.paths.arrays(tree)
  nonfinite = {a.path: a.nonfinite for a in found.arrays if a.nonfinite}
  assert nonfinite == {"params/norm": 2}
  assert sum(a.nbytes for a in found.arrays) == sum(
    leaf.nbytes for leaf in jax.tree.leaves(tree)
  )
  state = tree["opt_state"][1]
  for component, part in {
    "params": tree["params"],
    "corrections": state.correction,
    "moments": (state.mu, state.nu),
    "scales": (state.mu_scale, state.nu_scale),
    "counts": state.count,
    "step": tree["step"],
  }.items():
    sizes = [a.nbytes for a in found.arrays if a.component == component]
    assert sum(sizes) == sum(leaf.nbytes for leaf in jax.tree.leaves(part))


def test_the_command(saved, monkeypatch, capsys):
  folder, _ = saved
  monkeypatch.setattr(sys, "argv", ["flashoptim_jax", "inspect", str(folder)])
  assert command.main() == 0
  out = capsys.readouterr().out
  assert "opt_state/1: flashoptim_jax.adam, step 17, Storage(master_bits=24" in out
  lines = [line.split() for line in out.splitlines()]
  assert ["params/norm", "5", "float32", "20", "B", "2"] in lines
  assert ["corrections", "1", "80", "B"] in [line[:4] for line in lines]


def test_incomplete_steps_are_passed_over(saved):
  """A folder that a killed process began to delete or to copy."""
  folder, _ = saved
  found = inspection.inspect(folder)
  (folder / "18").mkdir()
  shutil.copytree(folder / "17", folder / "19")
  (folder / "19" / "default" / "_METADATA").unlink()
  (folder / "20" / "default").mkdir(parents=True)
  shutil.copytree(folder / "17", folder / "21")
  (folder / "21" / "_CHECKPOINT_METADATA").unlink()
  shutil.rmtree(folder / "21" / "default" / "d")
  assert inspection.inspect(folder) == found
  for step in ("18", "19", "20"):
    with pytest.raises(FileNotFoundError, match=f"no complete checkpoint .*{step}"):
      inspection.inspect(folder / step)


def test_without_a_description(tmp_path):
  tree = make()
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "0", tree)
  found = inspection.inspect(tmp_path / "0")
  assert not found.states
  assert "storage unknown" in str(found)
  assert {a.path: (a.shape, a.dtype) for a in found.arrays} == fo.paths.arrays(tree)


def test_texts_beside_arrays(tmp_path):
  tree = {"note": "text", "x": jnp.array([1, jnp.nan]), "none": None, "n": [1, 2.5]}
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    checkpointer.save(tmp_path / "0", args=ocp.args.PyTreeSave(tree))
  found = inspection.inspect(tmp_path / "0")
  assert {a.path: a.nonfinite for a in found.arrays} == {"x": 1, "n/0": 0, "n/1": 0}
  assert "storage unknown" in str(found)


def test_a_state_alone(tmp_path):
  state = fo.adamw(1e-3, storage=cases.QUANTIZED).init(cases.tree(cases.TINY_SHAPES))
  with ocp.Checkpointer(fo.checkpoint.Handler()) as checkpointer:
    checkpointer.save(tmp_path / "0", args=fo.checkpoint.Save(state))
  found = inspection.inspect(tmp_path / "0")
  assert found.counts == {"<root>": 0}
  assert {a.component for a in found.arrays} == {
    "counts",
    "moments",
    "scales",
    "corrections",
  }


def test_errors(tmp_path, monkeypatch, capsys):
  with pytest.raises(FileNotFoundError, match="no directory"):
    inspection.inspect(tmp_path / "x")
  with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
    inspection.inspect(tmp_path)
  with ocp.CheckpointManager(tmp_path) as manager:
    items = {name: fo.checkpoint.Save({"x": jnp.ones(3)}) for name in "ab"}
    manager.save(1, args=ocp.args.Composite(**items))
  with pytest.raises(ValueError, match=r"several items.*1/a.*1/b"):
    inspection.inspect(tmp_path)
  (tmp_path / "1" / "a" / "_METADATA").write_text("{")
  with pytest.raises(ValueError, match="damaged"):
    inspection.inspect(tmp_path / "1" / "a")
  path = str(tmp_path / "x")
  monkeypatch.setattr(sys, "argv", ["flashoptim_jax", "inspect", path])
  assert command.main() == 1
  assert capsys.readouterr().err.strip() == f"There is no directory {path}."
