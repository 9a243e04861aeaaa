"""Full-precision parameters to safetensors files and back."""

import json
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import flashoptim_jax as fo
from flashoptim_jax.conversion import safetensors as module
from tests.support import cases
from tests.support.tiers import slow_but

BITS = pytest.mark.parametrize("bits", slow_but([24, 32, None]))


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


@pytest.mark.parametrize("max_shard_bytes", slow_but([None, 1000], 1000))
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
  cases.assert_same(fo.import_safetensors(path, params), fo.to_fp32(params, state))
  params = {"w": jnp.ones(3, jnp.bfloat16)}
  more = {**params, "ids": jnp.arange(3), "mask": jnp.array([True, False])}
  fo.export_safetensors(path, more, tx.init(params))
  cases.assert_same(fo.import_safetensors(path, more), {**more, "w": jnp.ones(3)})


def test_the_library_reads_what_is_written(tmp_path):
  _, _, (params, state) = make()
  fo.export_safetensors(tmp_path / "a.safetensors", params, state)
  tensors = safetensors.numpy.load_file(tmp_path / "a.safetensors")
  assert set(tensors) == {
    "layers.0.kernel",
    "layers.0.bias",
    "layers.1.kernel",
    "layers.1.bias",
    "scale",
    "empty",
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
  mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
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
  np.testing.assert_array_equal(np.concatenate([*found, np.array([], int)]), x.ravel())


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


EXPORTS = pytest.mark.parametrize(
  ("older", "newer"), [(None, 1000), (1000, None), (1000, 1000), (1000, 1500)]
)


def two_exports():
  _, _, (params, state) = make()
  doubled = jax.tree.map(lambda p: 2 * p, params)
  return (params, state), (doubled, state)


@EXPORTS
def test_a_newer_export_replaces_the_older(older, newer, tmp_path):
  path = tmp_path / "model.safetensors"
  first, second = two_exports()
  (tmp_path / "model-notes.safetensors").touch()
  for _ in range(2):
    fo.export_safetensors(path, *first, max_shard_bytes=older)
    fo.export_safetensors(path, *second, max_shard_bytes=newer)
    back = fo.import_safetensors(path, first[0])
    cases.assert_same(back, fo.to_fp32(*second))
    expected = {"model-notes.safetensors"}
    if newer is None:
      expected |= {"model.safetensors"}
    else:
      index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
      expected |= {"model.safetensors.index.json", *index["weight_map"].values()}
    assert set(os.listdir(tmp_path)) == expected


@pytest.mark.parametrize("killed", [True, False])
@EXPORTS
def test_an_interrupted_export_mixes_nothing(
  older, newer, killed, tmp_path, monkeypatch
):
  """At every change of the folder: the old tensors, or the new, or an error.

  A process that is killed tidies nothing up; one that fails does.
  """
  path = tmp_path / "model.safetensors"
  first, second = two_exports()
  masters = [jax.tree.map(np.asarray, fo.to_fp32(*each)) for each in (first, second)]
  changes = {name: getattr(pathlib.Path, name) for name in ("replace", "unlink")}
  seen = []

  def interrupted(name, limit):
    def change(file, *args, **kwargs):
      limit[0] -= 1
      if limit[0] == 0 or (limit[0] < 0 and killed):
        raise KeyboardInterrupt
      return changes[name](file, *args, **kwargs)

    return change

  for count in range(1, 100):
    for file in tmp_path.iterdir():
      file.unlink()
    fo.export_safetensors(path, *first, max_shard_bytes=older)
    with monkeypatch.context() as patch:
      limit = [count]
      for name in changes:
        patch.setattr(pathlib.Path, name, interrupted(name, limit))
      try:
        fo.export_safetensors(path, *second, max_shard_bytes=newer)
        break
      except KeyboardInterrupt:
        pass
    try:
      back = fo.import_safetensors(path, first[0])
    except ValueError as error:
      assert "There are both" in str(error)
      seen.append("both")
    else:
      same = [
        all(map(np.array_equal, jax.tree.leaves(back), jax.tree.leaves(each)))
        for each in masters
      ]
      assert sum(same) == 1
      seen.append(("old", "new")[same.index(True)])
    # Another try gets there.
    fo.export_safetensors(path, *second, max_shard_bytes=newer)
    cases.assert_same(fo.import_safetensors(path, first[0]), fo.to_fp32(*second))
  assert "old" in seen
  assert seen == sorted(seen, key=("old", "both", "new").index)


def test_a_failed_export_of_several_files_leaves_none(tmp_path, monkeypatch):
  _, _, (params, state) = make()
  monkeypatch.setattr(module, "_MAX_HEADER", 100)
  path = tmp_path / "model.safetensors"
  for limit in (None, 1000):
    with pytest.raises(ValueError, match=r"header of .*; expected at most 100"):
      fo.export_safetensors(path, params, state, max_shard_bytes=limit)
    assert not os.listdir(tmp_path)


def test_files_of_different_exports(tmp_path):
  first, second = two_exports()
  for name, each in (("a", first), ("b", second)):
    (tmp_path / name).mkdir()
    path = tmp_path / name / "model.safetensors"
    fo.export_safetensors(path, *each, max_shard_bytes=1000)
  shard = next((tmp_path / "a").glob("*-00002-of-*"))
  shard.replace(path.with_name(shard.name))
  with pytest.raises(ValueError, match=r"00002-of-.* is of another export than"):
    fo.import_safetensors(path, first[0])
  # An older file beside newer ones, which another program wrote there.
  fo.export_safetensors(tmp_path / "model.safetensors", *first)
  (tmp_path / "model.safetensors").replace(path)
  with pytest.raises(ValueError, match=r"There are both.*Delete the one"):
    fo.import_safetensors(path, first[0])


def test_an_index_of_one_file(tmp_path):
  _, _, (params, state) = make()
  path = tmp_path / "model.safetensors"
  fo.export_safetensors(path, params, state)
  names = safetensors.numpy.load_file(path)
  index = {"metadata": None, "weight_map": dict.fromkeys(names, path.name)}
  (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
  cases.assert_same(fo.import_safetensors(path, params), fo.to_fp32(params, state))


def write(path, dtype, content, shape=(4,), name="w"):
  """A file of one tensor, of any dtype."""
  tensor = {"dtype": dtype, "shape": shape, "data_offsets": [0, len(content)]}
  header = json.dumps({name: tensor}).encode()
  header += b" " * (-len(header) % 8)
  path.write_bytes(len(header).to_bytes(8, "little") + header + content)


FLOATS = "F32 or BF16 or F16"


@pytest.mark.parametrize(
  ("dtype", "size", "like", "expected"),
  [
    ("I64", 32, jnp.int32, "I32"),
    ("U8", 4, jnp.int8, "I8"),
    ("I32", 16, jnp.float32, FLOATS),
    ("BOOL", 4, jnp.bfloat16, FLOATS),
    ("F32", 16, jnp.int32, "I32"),
    ("F32", 16, jnp.bool, "BOOL"),
    ("F64", 32, jnp.float32, FLOATS),
    ("F8_E4M3", 4, jnp.bfloat16, FLOATS),
    ("F8_E5M2", 4, jnp.float8_e5m2, "none"),
    ("F32", 16, jax.random.key(0).dtype, "none"),
  ],
)
def test_other_dtypes_are_refused(dtype, size, like, expected, tmp_path):
  path = tmp_path / "model.safetensors"
  write(path, dtype, bytes(size))
  like = {"w": jax.ShapeDtypeStruct((4,), like)}
  with pytest.raises(ValueError, match=f"'w'.*has dtype {dtype}; expected {expected},"):
    fo.import_safetensors(path, like)


def test_float64(tmp_path):
  """With x64, float64 leaves take any float; others take no float64."""
  path = tmp_path / "model.safetensors"
  x = np.linspace(0, 1e300, 4)
  with jax.enable_x64():
    like = {"w": jnp.zeros(4, jnp.float64)}
    for dtype, value in (("F64", x), ("F32", np.ones(4, np.float32))):
      write(path, dtype, value.tobytes())
      back = fo.import_safetensors(path, like)["w"]
      assert back.dtype == np.float64
      np.testing.assert_array_equal(back, value)
    write(path, "F64", x.tobytes())
    with pytest.raises(ValueError, match="has dtype F64"):
      fo.import_safetensors(path, {"w": jnp.zeros(4, jnp.float32)})


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("[" * 100_000, "RecursionError"),
    ("[]", "damaged"),
    ("{}", "weight_map"),
    ('{"weight_map": [1]}', "damaged"),
    ('{"weight_map": {"w": "shard", "w": "other"}}', r"\['w'\].* there twice"),
    ('{"weight_map": {"w": 3}}', "found 3 as the file of tensor 'w'"),
    ('{"weight_map": {"w": ["a"]}}', "as the file of tensor 'w'"),
    ('{"weight_map": {"w": null}}', "found None"),
    ('{"weight_map": {"w": ""}}', "found ''"),
    ('{"weight_map": {"w": "."}}', "found '.'"),
    ('{"weight_map": {"w": ".."}}', "beside it|no regular file"),
    ('{"weight_map": {"w": "../other/model.safetensors"}}', "beside it"),
    ('{"weight_map": {"w": "/etc/passwd"}}', "beside it"),
    ('{"weight_map": {"w": "a\\u0000b"}}', "beside it"),
    ('{"weight_map": {"w": "\\ud800"}}', "beside it"),
    ('{"weight_map": {"w": "shard", "\\ud800": "shard"}}', r"'\\ud800'.*no such"),
    ('{"weight_map": {"w": "folder"}}', "folder is no regular file"),
    ('{"weight_map": {"w": "pipe"}}', "pipe is no regular file"),
    ('{"weight_map": {"w": "shard", "v": "shard"}}', "'v'.*no such tensor"),
  ],
)
def test_hostile_indices(content, message, tmp_path):
  (tmp_path / "folder").mkdir()
  os.mkfifo(tmp_path / "pipe")
  write(tmp_path / "shard", "F32", bytes(16))
  (tmp_path / "model.safetensors.index.json").write_text(content)
  with pytest.raises(ValueError, match=message):
    fo.import_safetensors(tmp_path / "model.safetensors", {"w": jnp.zeros(4)})


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
@pytest.mark.parametrize("make_file", [os.mkfifo, os.mkdir])
def test_what_is_no_file(name, make_file, tmp_path):
  make_file(tmp_path / name)
  _, _, (params, state) = make()
  path = tmp_path / "model.safetensors"
  for attempt in (
    lambda: fo.import_safetensors(path, params),
    lambda: fo.export_safetensors(path, params, state),
    lambda: fo.export_safetensors(path, params, state, max_shard_bytes=1000),
  ):
    with pytest.raises(ValueError, match=f"{name} is no regular file"):
      attempt()
  assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("limit", [None, 1000])
@pytest.mark.parametrize("name", ["__metadata__", "a\ud800", "\udfff", 3, None])
def test_names_that_a_file_can_not_have(name, limit, tmp_path):
  params = {"w": jnp.ones(3, jnp.bfloat16)}
  path = tmp_path / "model.safetensors"
  state = fo.adamw(1e-3).init(params)
  message = re.escape(f"'w' becomes tensor {name!r}; expected")
  with pytest.raises(ValueError, match=message):
    fo.export_safetensors(
      path, params, state, rename=lambda _: name, max_shard_bytes=limit
    )
  if isinstance(name, str):
    params = {name: params["w"]}
    with pytest.raises(ValueError, match="becomes tensor"):
      fo.export_safetensors(path, params, fo.adamw(1e-3).init(params))
  assert not os.listdir(tmp_path)


@cases.every_twin
def test_leaves_of_one_name_are_refused(twin, tmp_path):
  """With both paths: a file knows tensors by their name."""
  params = twin(jnp.ones(3, jnp.bfloat16), jnp.zeros(3, jnp.bfloat16))
  path = tmp_path / "model.safetensors"
  first, second = (
    re.escape(repr(jax.tree_util.keystr(path)))
    for path, _ in jax.tree.leaves_with_path(params)
  )
  for attempt in (
    lambda: fo.export_safetensors(path, params, fo.adamw(1e-3).init(params)),
    lambda: fo.import_safetensors(path, params),
  ):
    with pytest.raises(ValueError, match=f"{first} and {second} both become tensor"):
      attempt()
  assert not os.listdir(tmp_path)


@pytest.mark.parametrize("limit", [None, 1000])
def test_ignored_tensors(limit, tmp_path):
  """A head that is the embedding as well, as Hugging Face's files have it."""
  _, _, (params, state) = make()
  path = tmp_path / "model.safetensors"
  fo.export_safetensors(path, params, state, max_shard_bytes=limit)
  like = {name: leaf for name, leaf in params.items() if name != "layers"}
  masters = {name: fo.to_fp32(params, state)[name] for name in like}
  for patterns in ("layers.*", ["layers.*", "nothing.*", "scale"], ("*",)):
    back = fo.import_safetensors(path, like, ignore_patterns=patterns)
    cases.assert_same(back, masters)
  for patterns in ((), "layers.0.*", "Layers.*", "layers"):
    with pytest.raises(ValueError, match=r"'layers.*no such tensor.*ignore_patterns"):
      fo.import_safetensors(path, like, ignore_patterns=patterns)
  with pytest.raises(ValueError, match=r"'more' .* none"):
    fo.import_safetensors(path, {**params, "more": 1.0}, ignore_patterns="more")


def test_damaged_files(tmp_path):
  _, _, (params, state) = make()
  path = tmp_path / "model.safetensors"
  with pytest.raises(FileNotFoundError, match="neither"):
    fo.import_safetensors(path, params)
  fo.export_safetensors(path, params, state)
  content = path.read_bytes()
  header = int.from_bytes(content[:8], "little")
  for bad in (
    content[:-1],
    content[:20],
    b"",
    b"\xff" * 8 + content[8:],
    content[:8] + b"}" + content[9:],
    content.replace(b"F32", b"F99", 1),
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
  with pytest.raises(ValueError, match="'v' has dtype float8_e5m2; expected one of"):
    fo.export_safetensors(path, {**params, "v": jnp.ones(3, jnp.float8_e5m2)}, state)
  fo.export_safetensors(path, params, state)
  for like, message in [
    ({"w": jnp.ones(4)}, r"'w'.*shape \(3,\); expected \(4,\)"),
    ({**params, "v": jnp.ones(4)}, r"'v'.*none; expected \(4,\)"),
    ({}, r"'w'.*\(3,\); expected no such tensor"),
  ]:
    with pytest.raises(ValueError, match=message):
      fo.import_safetensors(path, like)
