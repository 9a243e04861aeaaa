"""Shapes from configurations, and plans of what they take."""

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
from test_package import python

import flashoptim_jax as fo
from benchmarks.support.leaf_sets import gpt2, llama3_8b, resnet50
from flashoptim_jax import __main__ as command
from flashoptim_jax import models, planning


def config(model_type, *sizes, **others):
  names = (
      "vocab_size",
      "hidden_size",
      "intermediate_size",
      "num_hidden_layers",
      "num_attention_heads",
      "num_key_value_heads",
  )
  return {"model_type": model_type, **dict(zip(names, sizes, strict=False)), **others}


TINY = config("llama", 96, 64, 128, 2, 4, 2)

# As their authors published them.
COUNTS = {
    "llama-2-7b": (config("llama", 32000, 4096, 11008, 32, 32), 6_738_415_616),
    "llama-3.2-1b": (
        config("llama", 128256, 2048, 8192, 16, 32, 8, tie_word_embeddings=True),
        1_235_814_400,
    ),
    "mistral-7b": (config("mistral", 32000, 4096, 14336, 32, 32, 8), 7_241_732_096),
    "mixtral-8x7b": (
        config("mixtral", 32000, 4096, 14336, 32, 32, 8, num_local_experts=8),
        46_702_792_704,
    ),
    "qwen2-7b": (config("qwen2", 152064, 3584, 18944, 28, 28, 4), 7_615_616_512),
    "qwen2.5-0.5b": (
        config("qwen2", 151936, 896, 4864, 24, 14, 2, tie_word_embeddings=True),
        494_032_768,
    ),
    "qwen1.5-moe-a2.7b": (
        config(
            "qwen2_moe",
            *(151936, 2048, 5632, 24, 16, 16),
            num_experts=60,
            moe_intermediate_size=1408,
            shared_expert_intermediate_size=5632,
        ),
        14_315_784_192,
    ),
    "qwen3-0.6b": (
        config("qwen3", 151936, 1024, 3072, 28, 16, 8, tie_word_embeddings=True),
        596_049_920,
    ),
    "qwen3-30b-a3b": (
        config(
            "qwen3_moe",
            *(151936, 2048, 6144, 48, 32, 4),
            num_experts=128,
            moe_intermediate_size=768,
        ),
        30_532_122_624,
    ),
    "gemma-2b": (config("gemma", 256000, 2048, 16384, 18, 8, 1), 2_506_172_416),
    "gemma-2-2b": (config("gemma2", 256000, 2304, 9216, 26, 8, 4), 2_614_341_888),
    "gemma-3-1b": (config("gemma3_text", 262144, 1152, 6912, 26, 4, 1), 999_885_952),
}
BUILT_IN_COUNTS = {
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
    "qwen3-8b": 8_190_735_360,
    "gemma2-9b": 9_241_705_984,
}


def is_array(node):
  return isinstance(node, models.Array)


def separate(model):
  """All parameters, each layer's as leaves of their own."""
  return model.parts | {"layers": [model.parts["layers"]] * model.num_layers}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_of_published_models(name):
  described, count = COUNTS[name]
  assert models.from_config(described, name).num_params == count


@pytest.mark.parametrize("name", BUILT_IN_COUNTS)
def test_counts_of_built_in_models(name):
  assert models.load(name).num_params == BUILT_IN_COUNTS[name]


@pytest.mark.parametrize("name", models.BUILT_IN)
def test_every_built_in_model_and_its_trees(name):
  model = models.load(name)
  for tree in (separate(model), model.stacked_parts):
    arrays = jax.tree.leaves(tree, is_leaf=is_array)
    assert sum(np.prod(a.shape, dtype=int) for a in arrays) == model.num_params
    assert all(len(a.shape) == len(a.roles) for a in arrays)


@pytest.mark.parametrize(
    ("name", "shapes"), [("gpt2", gpt2()), ("llama3-8b", llama3_8b())]
)
def test_shapes_are_those_of_the_benchmarks(name, shapes):
  arrays = jax.tree.leaves(separate(models.load(name)), is_leaf=is_array)
  assert sorted(a.shape for a in arrays) == sorted(shapes.values())


def test_options_add_their_arrays():
  def added(**options):
    model = models.from_config({**TINY, **options}, "tiny")
    return model.num_params - models.from_config(TINY, "tiny").num_params

  assert added(attention_bias=True) == 2 * (64 + 32 + 32 + 64)
  assert added(mlp_bias=True) == 2 * (128 + 128 + 64)
  assert added(tie_word_embeddings=True) == -96 * 64
  assert added(head_dim=32) == 2 * 2 * 64 * (64 + 32)
  gpt2_tiny = {
      **dict.fromkeys(("n_embd", "vocab_size", "n_positions"), 64),
      **{"model_type": "gpt2", "n_layer": 1, "n_head": 2},
  }
  base = models.from_config(gpt2_tiny, "tiny").num_params
  untied = models.from_config({**gpt2_tiny, "tie_word_embeddings": False}, "tiny")
  assert untied.num_params - base == 64 * 64
  narrow = models.from_config({**gpt2_tiny, "n_inner": 128}, "tiny")
  assert base - narrow.num_params == 128 * (2 * 64 + 1)


def test_gemma3_is_counted_without_its_vision_tower():
  text = config("gemma3_text", 262208, 2560, 10240, 34)
  del text["model_type"]
  model = models.from_config({"model_type": "gemma3", "text_config": text}, "4b")
  assert model.num_params == 3_880_263_168
  assert model.left_out == ("the vision tower",)
  found = planning.plan(model, {"fsdp": 8}, "h100")
  assert "Not counted: the vision tower." in str(found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": None}, "model_type None; expected one of gpt2, llama"),
        ({"model_type": "bert"}, "model_type 'bert'; expected one of"),
        ({"hidden_size": None}, "nothing for 'hidden_size'; expected a positive"),
        ({"vocab_size": "96"}, "'96' for 'vocab_size'; expected a positive integer"),
        ({"num_hidden_layers": 0}, "0 for 'num_hidden_layers'"),
        ({"num_hidden_layers": True}, "True for 'num_hidden_layers'"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "multiple of num_att"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads, 3"),
        ({"tie_word_embeddings": "yes"}, "'yes' for 'tie_word_embeddings'"),
        ({"model_type": "mixtral"}, "nothing for 'num_local_experts'"),
        (
            {"model_type": "qwen3_moe", "mlp_only_layers": [0]},
            "layers with and without experts",
        ),
        ({"model_type": "gemma3"}, "no 'text_config'"),
        ({"model_type": "gpt2"}, "nothing for 'n_embd'"),
        (
            {"model_type": "gpt2", "n_embd": 10, "n_head": 3},
            "n_embd is 10; expected a multiple of n_head, 3",
        ),
    ],
)
def test_broken_configurations(change, message):
  with pytest.raises(ValueError, match=message) as error:
    models.from_config({**TINY, **change}, "some/config.json")
  assert str(error.value).startswith("some/config.json: ")


HUGE = models.MAX_SIZE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *[
            ({name: size}, f"found {str(size)[:9]}.* for '{name}'; expected at most")
            for name in ("hidden_size", "num_hidden_layers", "vocab_size")
            for size in (HUGE + 1, 2**63, 10**400)
        ],
        *[
            ({"model_type": value}, "found model_type .*; expected one of gpt2")
            for value in ([], {}, 3, ["llama"], "x" * 10**6)
        ],
        ({"hidden_size": float("nan")}, "found nan for"),
        ({"hidden_size": [1] * 10**6}, "found \\[1, 1, 1, 1, 1, 1, ...\\] for"),
        ({"head_dim": None, "num_attention_heads": 3, "num_key_value_heads": 3},
         "where there is no head_dim"),
        ({"model_type": "gemma3", "text_config": []}, "no 'text_config'"),
    ],
)
def test_hostile_configurations(change, message):
  with pytest.raises(ValueError, match=message) as error:
    models.from_config({**TINY, **change}, "some/config.json")
  assert len(str(error.value)) < 500


def largest(name, **others):
  """A built-in configuration with every size at its limit."""
  sizes = {k: HUGE for k, v in models.BUILT_IN[name].items() if type(v) is int}
  return {**models.BUILT_IN[name], **sizes, **others}


@pytest.mark.parametrize("name", models.BUILT_IN)
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


def test_biases_of_queries_keys_and_values():
  def count(**options):
    return models.from_config({**TINY, **options}, "tiny").num_params

  biases = 2 * (64 + 32 + 32)
  moe = {"num_experts": 4, "moe_intermediate_size": 32}
  for kind in ({"model_type": "qwen2"}, {"model_type": "qwen2_moe", **moe}):
    assert count(**kind) == count(**kind, qkv_bias=True)
    assert count(**kind) - count(**kind, qkv_bias=False) == biases
  shared = {"shared_expert_intermediate_size": None}
  assert count(**kind, **shared) == count(**kind)
  with pytest.raises(ValueError, match="'no' for 'qkv_bias'"):
    count(**kind, qkv_bias="no")


def test_files(tmp_path):
  path = tmp_path / "config.json"
  with pytest.raises(ValueError, match=r"is no file and no built-in.*gpt2-medium"):
    models.load(path)
  path.write_text(json.dumps(TINY))
  assert models.load(path) == models.from_config(TINY, str(path))
  assert models.load(tmp_path) == models.load(str(path))
  path.write_text("{")
  with pytest.raises(ValueError, match="is not JSON"):
    models.load(path)
  path.write_text("[1]")
  with pytest.raises(ValueError, match="holds a list; expected a JSON object"):
    models.load(path)
  path.write_bytes(b"\xff\xfe")
  with pytest.raises(ValueError, match="is not JSON"):
    models.load(path)


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
      report.params, report.state, report.gradients
  )
  assert usual.total == sum(report.baseline.values())


@pytest.mark.parametrize("shapes", [llama3_8b, gpt2, resnet50])
def test_small_leaves_in_float32_take_next_to_nothing(shapes):
  shapes = {k: jax.ShapeDtypeStruct(v, jnp.bfloat16) for k, v in shapes().items()}
  check_small_leaves(shapes)


@pytest.mark.parametrize("layers", [separate, lambda model: model.stacked_parts])
@pytest.mark.parametrize("name", ["gpt2", "llama3-8b", "gemma2-9b"])
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
    assert row["total"] == real.total == (
        row["params"] + row["state"] + row["gradients"] + row["in_flight"]
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
