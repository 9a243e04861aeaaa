"""Shapes from configurations."""

import json

import jax
import numpy as np
import pytest

from benchmarks.support.leaf_sets import gpt2, llama3_8b
from flashoptim_jax import models, planning
from tests.support.model_configs import HUGE, TINY, config, is_array, separate

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
    (
      {"head_dim": None, "num_attention_heads": 3, "num_key_value_heads": 3},
      "where there is no head_dim",
    ),
    ({"model_type": "gemma3", "text_config": []}, "no 'text_config'"),
  ],
)
def test_hostile_configurations(change, message):
  with pytest.raises(ValueError, match=message) as error:
    models.from_config({**TINY, **change}, "some/config.json")
  assert len(str(error.value)) < 500


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
