"""Plans of what models take of each device."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import flashoptim_jax as fo
from benchmarks.support.leaf_sets import gpt2, llama3_8b, resnet50
from flashoptim_jax import __main__ as command
from flashoptim_jax import models, planning
from tests.support.model_configs import HUGE, TINY, is_array, separate
from tests.support.processes import python
from tests.support.tiers import slow_but


def largest(name, **others):
  """A built-in configuration with every size at its limit."""
  sizes = {k: HUGE for k, v in models.BUILT_IN[name].items() if type(v) is int}
  return {**models.BUILT_IN[name], **sizes, **others}


@pytest.mark.parametrize("name", slow_but(models.BUILT_IN))
def test_the_largest_sizes(name):
  """Plans come out, in a time that doesn't depend on the sizes."""
  described = largest(name, head_dim=HUGE, attention_bias=True)
  for mesh in ({"fsdp": HUGE}, {"ep": 2**15, "tp": 2**15}):
    found = plan(described, mesh, "999999999GiB")
    assert all(row.total > 0 for row in found.rows)
    json.dumps(found.to_json())
    assert str(found)


def test_cost_does_not_grow_with_layers():
  """The host's share of many layers is that of few, in proportion."""

  def hosted(layers):
    *_, row = plan({**TINY, "num_hidden_layers": layers}, {"fsdp": 1}).rows
    return row

  few = [hosted(n).host for n in (1, 2)]
  for layers in (3, 7, 10**6, HUGE):
    assert hosted(layers).host == few[0] + (layers - 1) * (few[1] - few[0])
    assert hosted(layers).in_flight == hosted(3).in_flight


def test_files_of_another_kind(tmp_path, monkeypatch, capsys):
  path = tmp_path / "config.json"
  path.write_bytes(b"\xef\xbb\xbf" + json.dumps(TINY).encode())  # a byte-order mark
  assert models.load(path).num_params == models.from_config(TINY, "x").num_params
  for text, message in (
    ("[" * 200_000, "nested too deep"),
    ('{"a":' * 200_000, "nested too deep"),
    (" " * 2**24 + "{}", "more than 16777216 bytes"),
    ('{"hidden_size": ' + "9" * 5000 + "}", "is not JSON: Exceeds the limit"),
    ("null", "holds a NoneType"),
  ):
    path.write_text(text)
    status, out, error = run(monkeypatch, capsys, str(path), "--device", "h100")
    assert (status, out) == (1, "")
    assert message in error
    assert error.count("\n") == 1
  path.unlink()
  os.mkfifo(path)
  for name in (str(path), str(tmp_path), "x" * 5000, "\udcff"):
    assert run(monkeypatch, capsys, name, "--device", "h100")[0] == 1


MESH = {"fsdp": 4, "tp": 2}


def plan(described=TINY, mesh=MESH, device="h100"):
  return planning.plan(models.from_config(described, "tiny"), mesh, device)


def placed_params(dtype, mesh=MESH):
  """The tiny model's parameters as real arrays on a real mesh."""
  devices = np.array(jax.devices()).reshape(tuple(mesh.values()))
  mesh = Mesh(devices, tuple(mesh))
  axes = {models.EMBED: "fsdp", models.WIDE: "tp", None: None}

  def make(array):
    sharding = NamedSharding(mesh, P(*(axes[role] for role in array.roles)))
    return jnp.zeros(array.shape, dtype, device=sharding)

  return jax.tree.map(
    make,
    separate(models.from_config(TINY, "tiny")),
    is_leaf=is_array,
  )


def on_one_device(tree):
  device = jax.devices()[0]
  return sum(
    shard.data.nbytes
    for leaf in jax.tree.leaves(tree)
    for shard in leaf.addressable_shards
    if shard.device == device
  )


@pytest.mark.filterwarnings("ignore:Shards cut groups")
@pytest.mark.parametrize(
  ("row", "dtype", "tx"),
  [(0, jnp.float32, optax.adamw(1e-3)), (1, jnp.bfloat16, fo.adamw(1e-3))],
)
def test_bytes_are_those_of_arrays(row, dtype, tx):
  params = placed_params(dtype)
  shardings = fo.state_shardings(
    tx, params, jax.tree.map(lambda leaf: leaf.sharding, params)
  )
  state = jax.tree.map(
    lambda s, sharding: jnp.zeros(s.shape, s.dtype, device=sharding),
    jax.eval_shape(tx.init, params),
    shardings,
  )
  found = plan().rows[row]
  assert found.params == found.gradients == on_one_device(params)
  assert found.state == on_one_device(state)


def test_one_device_is_the_memory_report():
  types = jax.tree.map(
    lambda array: jax.ShapeDtypeStruct(array.shape, jnp.bfloat16),
    separate(models.load("gpt2")),
    is_leaf=is_array,
  )
  report = fo.memory_report(fo.adamw(1e-3), types)
  usual, flash, *_ = planning.plan(models.load("gpt2"), {"fsdp": 1}, "v5e").rows
  assert (flash.params, flash.state, flash.gradients) == (
    report.params,
    report.state,
    report.gradients,
  )
  assert usual.total == sum(report.baseline.values())


@pytest.mark.parametrize("shapes", [llama3_8b, gpt2, resnet50])
def test_small_leaves_in_float32_take_next_to_nothing(shapes):
  shapes = {k: jax.ShapeDtypeStruct(v, jnp.bfloat16) for k, v in shapes().items()}
  check_small_leaves(shapes)


@pytest.mark.parametrize("layers", [separate, lambda model: model.stacked_parts])
@pytest.mark.parametrize("name", slow_but(["gpt2", "llama3-8b", "gemma2-9b"]))
def test_small_leaves_of_built_in_models(name, layers):
  check_small_leaves(
    jax.tree.map(
      lambda array: jax.ShapeDtypeStruct(array.shape, jnp.bfloat16),
      layers(models.load(name)),
      is_leaf=is_array,
    )
  )


def check_small_leaves(shapes):
  usual, small_too = (
    fo.memory_report(fo.adamw(1e-3, storage=storage), shapes)
    for storage in (fo.Storage(), fo.Storage(min_quantized_size=0))
  )
  assert usual.moments >= small_too.moments == 2 * usual.num_params
  assert usual.bytes_per_param <= 1.005 * small_too.bytes_per_param


@pytest.mark.parametrize(("row", "name"), [(0, "optax"), (1, "flash")])
def test_bytes_are_those_measured_on_gpus(row, name):
  """Of Llama-3-8B, by benchmarks/memory/fsdp_gpu.py."""
  path = pathlib.Path(__file__).parent.parent / "benchmarks/results/fsdp_gpu.json"
  measured = json.loads(path.read_text())["train"][f"8b {name} 4 GPUs"]
  found = planning.plan(models.load("llama3-8b"), {"fsdp": 4}, "h200").rows[row]
  assert found.params + found.state == pytest.approx(
    measured["params_and_state_bytes"], rel=1e-3
  )


def test_released_gradients():
  """One layer's, the head's or the embedding's; of a tied embedding all."""
  layer = 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128 + 2 * 64)
  embedding = 2 * 96 * 64
  *_, released, _ = plan(mesh={"fsdp": 1}).rows
  assert released.gradients == layer > embedding
  *_, released, _ = plan({**TINY, "tie_word_embeddings": True}, {"fsdp": 1}).rows
  assert released.gradients == layer + embedding
  *_, released, _ = plan({**TINY, "vocab_size": 9600}, {"fsdp": 1}).rows
  assert released.gradients == 100 * embedding + 2 * 64  # head and last norm


def test_state_on_the_host():
  *_, flash, _, hosted = plan(mesh={"fsdp": 1}).rows
  assert hosted.state == 4  # the count
  assert hosted.host == flash.state - 4
  # Three of the MLP's arrays in a row are the largest.
  assert hosted.in_flight == pytest.approx(3 * 64 * 128 * 3.125, rel=0.15)
  large, *_ = plan({**TINY, "vocab_size": 9600}, {"fsdp": 1}).rows[::-1]
  assert large.in_flight >= 9600 * 64 * 3.125


def test_axes_that_do_not_divide():
  found = plan({**TINY, "vocab_size": 97}, {"data": 2, "fsdp": 2, "model": 2})
  assert "embed/tokens, top/head: kept whole along" in "\n".join(found.notes)
  found = plan(mesh={"fsdp": 4})
  assert any("Shards cut groups" in note for note in found.notes)
  whole = plan(mesh={"fsdp": 1})
  replicated = plan(mesh={"data": 64})
  assert [row.total for row in replicated.rows] == [r.total for r in whole.rows]


def test_experts_are_divided():
  moe = {**TINY, "model_type": "mixtral", "num_local_experts": 8}
  one, eight = (plan(moe, {"ep": n}).rows[1].params for n in (1, 8))
  experts = 2 * 2 * 8 * 3 * 64 * 128
  assert one - eight == experts * 7 // 8


@pytest.mark.parametrize(
  ("mesh", "message"),
  [
    ("fsdp", "found 'fsdp'; expected axes once each"),
    ("fsdp=x", "found 'fsdp=x'"),
    ("fsdp=-1", "found 'fsdp=-1'"),
    ("fsdp=2,fsdp=2", "found 'fsdp=2'"),
    ("", "found ''"),
    ("fsdp=0", "has size 0; expected 1 or more"),
    ("fsdp=99999999999999999999", "has size 9{20}; expected 1 or more, at most"),
    ("fsdp=" + "9" * 5000, "expected axes once each"),
    ("fsdp=٣", "expected axes once each"),
    ("fsdp=65536,tp=65536", "has 4294967296 devices; expected at most"),
    ("pipe=2", "'pipe' is not known; expected one of data"),
  ],
)
def test_bad_meshes(mesh, message):
  with pytest.raises(ValueError, match=message):
    plan(mesh=planning.parse_mesh(mesh))


def test_storages():
  """As the command takes them; the rows say which."""
  usual, *ours = plan().rows
  found = {
    text: planning.plan(
      models.from_config(TINY, "tiny"), MESH, "h100", planning.parse_storage(text)
    ).rows
    for text in ("24,8", "16, 8", "None,8", "none,32")
  }
  assert found["24,8"] == (usual, *ours)
  assert [row.state for row in found["16, 8"]] == [row.state for row in found["None,8"]]
  assert [row.name for row in found["16, 8"]][1:] == [
    row.name.replace("fo.adamw", "fo.adamw 16/8") for row in ours
  ]
  _, flash, _, hosted = found["none,32"]
  assert hosted.state + hosted.host == flash.state
  assert flash.state > ours[0].state > found["16, 8"][1].state
  for text in ("", "8", "16,8,8", "16;8", "x,8"):
    with pytest.raises(ValueError, match="bits of master weights and of moments"):
      planning.parse_storage(text)
  with pytest.raises(ValueError, match="master_bits is 17; expected one of 16, 24"):
    planning.parse_storage("17,8")


def test_devices():
  assert plan(device="H100").device_bytes == plan(device="79.2GiB").device_bytes
  assert plan(device="80 GB").device_bytes == 80 * 10**9
  for device in ("h1000", "80", "-1GiB", "9" * 400 + "GiB", "٣GiB", "1e9GiB", ""):
    with pytest.raises(ValueError, match=r"not known; expected one of a100.*24GiB"):
      plan(device=device)


def run(monkeypatch, capsys, *arguments):
  monkeypatch.setattr(sys, "argv", ["flashoptim_jax", "plan", *arguments])
  status = command.main()
  return status, *capsys.readouterr()


def test_the_command(tmp_path, monkeypatch, capsys):
  path = tmp_path / "config.json"
  path.write_text(json.dumps(TINY))
  flags = (str(path), "--mesh", "fsdp=2, tp=2", "--device", "h100")
  status, out, _ = run(monkeypatch, capsys, *flags)
  assert status == 0
  assert "on 4 devices (fsdp=2, tp=2)" in out
  assert "Not counted: activations" in out
  status, out, _ = run(monkeypatch, capsys, *flags, "--json")
  found = json.loads(out)
  expected = planning.plan(models.load(path), {"fsdp": 2, "tp": 2}, "h100")
  assert found["mesh"] == {"fsdp": 2, "tp": 2}
  for row, real in zip(found["rows"], expected.rows, strict=True):
    assert (
      row["total"]
      == real.total
      == (row["params"] + row["state"] + row["gradients"] + row["in_flight"])
    )
    assert row["fits"] is True
  path.write_text("{}")
  status, out, error = run(monkeypatch, capsys, *flags)
  assert (status, out) == (1, "")
  assert "model_type None" in error


def test_what_does_not_fit(monkeypatch, capsys):
  _, out, _ = run(monkeypatch, capsys, "llama3-8b", "--device", "h100")
  fits = {
    line[:32].strip(): line.split()[-1]
    for line in out.splitlines()
    if line.startswith(("optax", "fo."))
  }
  assert fits == {
    "optax.adamw, float32": "no",
    "fo.adamw": "yes",
    "fo.adamw, gradient release": "yes",
    "fo.adamw, state on the host": "yes",
  }


def test_a_reader_that_stops():
  """As `| head` may: the command says nothing about it."""
  process = subprocess.Popen(
    [sys.executable, "-m", "flashoptim_jax", "plan", "gpt2", "--device", "h100"],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
  )
  process.stdout.close()
  with process.stderr:
    assert process.stderr.read() == ""
  assert process.wait() == 1


def test_a_plan_starts_no_backend():
  python("""
from jax._src import xla_bridge
from flashoptim_jax import models, planning
planning.plan(models.load("gpt2"), {"fsdp": 256, "tp": 2}, "v5e")
assert not xla_bridge._backends
""")
