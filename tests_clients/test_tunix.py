"""Tunix's ``PeftTrainer`` and its checkpoints: full fine-tuning and LoRA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import qwix
from flax import nnx
from tunix.models.llama3 import model as llama
from tunix.sft import peft_trainer, utils
from tunix.utils import env_utils

import flashoptim_jax as fo
from tests_clients import support

STEPS, VOCABULARY = 16, 64
# Learning rates of the ways to fine-tune.
RATES = {"float32": 3e-3, support.MIXED: 3e-3, "LoRA": 1e-2, "accumulation": 3e-3}
LORA_LAYERS = ".*(q_proj|k_proj|v_proj|gate_proj|up_proj|down_proj)"


def examples():
  """Counting in threes, from anywhere."""
  rng = np.random.default_rng(0)
  for _ in range(2 * STEPS):
    start = rng.integers(VOCABULARY, size=(8, 1))
    tokens = (start + 3 * np.arange(16)) % VOCABULARY
    yield peft_trainer.TrainingInput(
      input_tokens=tokens.astype(np.int32), input_mask=np.ones((8, 16), bool)
    )


def make_model(weights):
  """A Llama as Tunix makes it, sharded by its own metadata."""
  config = llama.ModelConfig(
    num_layers=1,
    vocab_size=VOCABULARY,
    embed_dim=64,
    hidden_dim=128,
    num_heads=4,
    head_dim=16,
    num_kv_heads=2,
    rope_theta=10_000,
    norm_eps=1e-5,
  )
  model = llama.Llama3(config, rngs=nnx.Rngs(0))
  # Tunix starts its kernels at zero, for they come from a checkpoint.
  for i, layer in enumerate(model.layers):
    for j, linear in enumerate(
      (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj)
    ):
      kernel = linear.kernel
      key = jax.random.fold_in(jax.random.key(i), j)
      kernel.set_value(jax.random.normal(key, kernel.shape) / 8)
  if weights == support.MIXED:
    params = nnx.state(model, nnx.Param)
    cast = {
      path: value if "norm" in str(path) else value.astype(jnp.bfloat16)
      for path, value in nnx.to_flat_state(nnx.as_pure(params))
    }
    nnx.update(model, nnx.from_flat_state(cast))
  if weights == "LoRA":
    provider = qwix.LoraProvider(module_path=LORA_LAYERS, rank=8, alpha=64.0)
    model = qwix.apply_lora_to_model(model, provider, **model.get_model_input())
  state = nnx.state(model)
  specs = nnx.get_partition_spec(state)
  nnx.update(model, jax.lax.with_sharding_constraint(state, specs))
  return model


def finetune(tx, weights, devices, folder=None, steps=STEPS):
  """The script: of it, only ``tx`` differs between the runs."""
  with support.mesh((devices, 1), ("fsdp", "tp")):
    config = peft_trainer.TrainingConfig(
      eval_every_n_steps=1000,
      max_steps=steps,
      gradient_accumulation_steps=2 if weights == "accumulation" else None,
      checkpoint_root_directory=folder,
      checkpointing_options=ocp.CheckpointManagerOptions(save_interval_steps=STEPS),
    )
    trainer = peft_trainer.PeftTrainer(make_model(weights), tx, config)
    trainer = trainer.with_gen_model_input_fn(
      lambda x: {
        "input_tokens": x.input_tokens,
        "input_mask": x.input_mask,
        "positions": utils.build_positions_from_mask(x.input_mask),
        "attention_mask": utils.make_causal_attn_mask(x.input_mask),
      }
    )
    trainer.train(examples())
    return trainer.metrics_logger.get_metric_history("", "loss", "train")


@pytest.fixture(autouse=True)
def tunix_defaults():
  """What its modules set when they are imported, and others change."""
  env_utils.setup_sharding_environment()


each_case = pytest.mark.parametrize(
  ("weights", "devices"),
  [(name, n) for name in RATES for n in (1, 4) if (name, n) != ("accumulation", 1)],
)


@functools.cache
def whole(optimizer, weights, devices):
  return finetune(optimizer(RATES[weights]), weights, devices)


@each_case
def test_losses_beside_optax(weights, devices):
  # Weights in bf16 stand beside float32 ones: their master weights are the same.
  theirs = whole(optax.adamw, weights.replace(support.MIXED, "float32"), devices)
  ours = whole(fo.adamw, weights, devices)
  # LoRA finds less in a model that knows nothing.
  fallen_to = 0.95 if weights == "LoRA" else 0.7
  support.assert_alike(ours, theirs, within=0.01, fallen_to=fallen_to)


@each_case
def test_resumes(weights, devices, tmp_path):
  tx = fo.adamw(RATES[weights])
  first = finetune(tx, weights, devices, str(tmp_path), STEPS // 2)
  second = finetune(tx, weights, devices, str(tmp_path))
  resumed = np.concatenate([first, second])
  np.testing.assert_array_equal(resumed, whole(fo.adamw, weights, devices))
