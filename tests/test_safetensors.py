"""Full-precision parameters to safetensors files and back."""

import json
import os

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import flashoptim_jax as fo
from flashoptim_jax import safetensors as module

BITS = pytest.mark.parametrize("bits", [24, 32, None])


def make(bits=24, dtype=jnp.bfloat16):
  """float32 parameters, and what training starts from."""
  masters = {
      "layers": [{"kernel": draw(i, (6, 40)), "bias": draw(i, (40,))} for i in (0, 1)],
      "scale": draw(2, ()),
      "empty": jnp.zeros((0, 4)),
  }
  tx = fo.adamw(1e-3, storage=fo.Storage(master_bits=bits, min_quantized_size=0))
  return masters, tx, fo.from_fp32(tx, masters, dtype, keep="*bias")


def draw(seed, shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("max_shard_bytes", [None, 1000])
@BITS
def test_round_trip(bits, max_shard_bytes, tmp_path):
  masters, tx, (params, state) = make(bits)
  path = tmp_path / "model.safetensors"
  fo.export_safetensors(path, params, state, max_shard_bytes=max_shard_bytes)
  back = fo.import_safetensors(path, params)
  cases.assert_same(back, fo.to_fp32(params, state))
  cases.assert_same(fo.from_fp32(tx, back, keep="*bias"), (params, state))
  rtol = {24: 2.0**-16, 32: 0, None: 2.0**-8}[bits]
  for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(masters), strict=True):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=0)


def test_other_dtypes(tmp_path):
  tx = fo.adamw(1e-3, storage=cases.QUANTIZED)
  path = tmp_path / "model.safetensors"
  _, _, (params, state) = make(dtype=jnp.float16)
  fo.export_safetensors(path, params, state)
  cases.assert_same(
      fo.import_safetensors(path, params), fo.to_fp32(params, state)
  )
  params = {"w": jnp.ones(3, jnp.bfloat16)}
  more = {**params, "ids": jnp.arange(3), "mask": jnp.array([True, False])}
  fo.export_safetensors(path, more, tx.init(params))
  cases.assert_same(
      fo.import_safetensors(path, more), {**more, "w": jnp.ones(3)}
  )


def test_the_library_reads_what_is_written(tmp_path):
  _, _, (params, state) = make()
  fo.export_safetensors(tmp_path / "a.safetensors", params, state)
  tensors = safetensors.numpy.load_file(tmp_path / "a.safetensors")
  assert set(tensors) == {
      "layers.0.kernel", "layers.0.bias", "layers.1.kernel", "layers.1.bias",
      "scale", "empty",
  }
  masters = fo.to_fp32(params, state)
  np.testing.assert_array_equal(
      tensors["layers.1.kernel"], masters["layers"][1]["kernel"]
  )
  with safetensors.safe_open(tmp_path / "a.safetensors", "numpy") as file:
    assert file.metadata() == {"format": "pt"}


def test_16_bit_files_are_widened(tmp_path):
  x = np.asarray(draw(0, (3,)).astype(jnp.bfloat16))
  safetensors.numpy.save_file({"w": x}, tmp_path / "a.safetensors")
  like = {"w": jax.ShapeDtypeStruct((3,), jnp.bfloat16)}
  back = fo.import_safetensors(tmp_path / "a.safetensors", like)
  cases.assert_same(back, {"w": jnp.asarray(x, jnp.float32)})


def test_rename(tmp_path):
  _, _, (params, state) = make()

  def rename(leaf):
    return "model." + leaf.replace("/", ".").replace("kernel", "weight")

  path = tmp_path / "model.safetensors"
  fo.export_safetensors(path, params, state, rename=rename, max_shard_bytes=1)
  index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
  masters = fo.to_fp32(params, state)
  sizes = [leaf.nbytes for leaf in jax.tree.leaves(masters)]
  assert index["metadata"]["total_size"] == sum(sizes)
  assert "model.layers.0.weight" in index["weight_map"]
  files = set(index["weight_map"].values())
  # The empty leaf shares a file with its neighbour.
  assert len(files) == sum(size > 0 for size in sizes)
  assert set(os.listdir(tmp_path)) == files | {"model.safetensors.index.json"}
  back = fo.import_safetensors(path, params, rename=rename)
  cases.assert_same(back, masters)


def test_sharded_arrays(tmp_path):
  masters, _, (params, state) = make()
  mesh = jax.make_mesh(
      (2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )
  sharding = NamedSharding(mesh, P("x", "y"))
  for layer in params["layers"]:
    layer["kernel"] = jax.device_put(layer["kernel"], sharding)
  path = tmp_path / "model.safetensors"
  fo.export_safetensors(path, params, state)
  back = fo.import_safetensors(path, params)
  cases.assert_same(back, fo.to_fp32(params, state))
  assert back["layers"][0]["kernel"].sharding == sharding
  assert jax.tree.structure(back) == jax.tree.structure(masters)


@pytest.mark.parametrize("limit", [1, 3, 7, 24, 1000])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4), (1, 7), (0, 2), (4, 1, 3)])
def test_blocks_make_up_the_array(shape, limit):
  x = np.arange(np.prod(shape, dtype=int)).reshape(shape)
  found = [
      x[tuple(slice(a, a + n) for a, n in zip(start, sizes, strict=True))].ravel()
      for start, sizes in module._blocks(shape, limit)
  ]
  assert all(block.size <= limit for block in found)
  np.testing.assert_array_equal(
      np.concatenate([*found, np.array([], int)]), x.ravel()
  )


def test_large_leaves_go_block_by_block(tmp_path, monkeypatch):
  monkeypatch.setattr(module, "_BLOCK", 50)
  _, _, (params, state) = make()
  path = tmp_path / "model.safetensors"
  fo.export_safetensors(path, params, state)
  cases.assert_same(fo.import_safetensors(path, params), fo.to_fp32(params, state))


def test_a_failed_export_leaves_the_old_file(tmp_path, monkeypatch):
  _, _, (params, state) = make()
  path = tmp_path / "model.safetensors"
  fo.export_safetensors(path, params, state)
  before = path.read_bytes()

  def fail(self):
    yield np.zeros(3)
    raise OSError("No space left")

  monkeypatch.setattr(module._Tensor, "blocks", fail)
  with pytest.raises(OSError, match="No space"):
    fo.export_safetensors(path, params, state)
  assert path.read_bytes() == before
  assert os.listdir(tmp_path) == ["model.safetensors"]


def test_damaged_files(tmp_path):
  _, _, (params, state) = make()
  path = tmp_path / "model.safetensors"
  with pytest.raises(FileNotFoundError, match="neither"):
    fo.import_safetensors(path, params)
  fo.export_safetensors(path, params, state)
  content = path.read_bytes()
  header = int.from_bytes(content[:8], "little")
  for bad in (
      content[:-1], content[:20], b"", b"\xff" * 8 + content[8:],
      content[:8] + b"}" + content[9:], content.replace(b"F32", b"F99", 1),
  ):
    path.write_bytes(bad)
    with pytest.raises(ValueError, match="damaged"):
      fo.import_safetensors(path, params)
  assert header % 8 == 0
  path.unlink()
  fo.export_safetensors(path, params, state, max_shard_bytes=1000)
  shard = next(tmp_path.glob("*-00002-of-*"))
  shard.unlink()
  with pytest.raises(FileNotFoundError, match=r"00002-of-.*missing"):
    fo.import_safetensors(path, params)
  (tmp_path / "model.safetensors.index.json").write_text("{]")
  with pytest.raises(ValueError, match=r"index.json is damaged"):
    fo.import_safetensors(path, params)


def test_errors(tmp_path):
  tx = fo.adamw(1e-3, storage=cases.QUANTIZED)
  params = {"w": jnp.ones(3, jnp.bfloat16)}
  state = tx.init(params)
  path = tmp_path / "model.safetensors"
  with pytest.raises(ValueError, match=r"expected NAME.safetensors"):
    fo.export_safetensors(tmp_path / "model.bin", params, state)
  with pytest.raises(ValueError, match="'v' and 'w' both become tensor 'x'"):
    fo.export_safetensors(path, {**params, "v": 1.0}, state, rename=lambda _: "x")
  with pytest.raises(ValueError, match="max_shard_bytes is 0"):
    fo.export_safetensors(path, params, state, max_shard_bytes=0)
  with pytest.raises(ValueError, match="No flash optimizer state"):
    fo.export_safetensors(path, params, ())
  fo.export_safetensors(path, params, state)
  for like, message in [
      ({"w": jnp.ones(4)}, r"'w'.*shape \(3,\); expected \(4,\)"),
      ({**params, "v": jnp.ones(4)}, r"'v'.*none; expected \(4,\)"),
      ({}, r"'w'.*\(3,\); expected no such tensor"),
  ]:
    with pytest.raises(ValueError, match=message):
      fo.import_safetensors(path, like)
