"""MaxText in a process of its own, for it changes JAX and Flax: losses, as JSON.

python -m tests_clients.maxtext_worker FOLDER NAME=VALUE ...
"""

import inspect
import json
import os
import pathlib
import sys

# Before MaxText is imported: nothing of Google Cloud.
os.environ["DECOUPLE_GCLOUD"] = "TRUE"

import maxtext
from maxtext.optimizers import optimizers
from maxtext.trainers.pre_train import train as trainer

import flashoptim_jax as fo

STEPS = 12
CONFIG = pathlib.Path(maxtext.__file__).parent / "configs" / "base.yml"
SETTINGS = {
  "hardware": "cpu",
  "skip_jax_distributed_system": True,
  "dataset_type": "synthetic",
  "base_num_decoder_layers": 2,
  "base_emb_dim": 64,
  "base_mlp_dim": 128,
  "base_num_query_heads": 4,
  "base_num_kv_heads": 2,
  "head_dim": 16,
  "vocab_size": 256,
  "max_target_length": 32,
  "per_device_batch_size": 2,
  "learning_rate": 3e-3,
  "learning_rate_schedule_steps": STEPS,
  "async_checkpointing": False,
  "checkpoint_period": STEPS // 2,
}


def with_flash_adamw():
  """``get_optimizer`` as its user edits it: two lines."""
  source = inspect.getsource(optimizers.get_optimizer)
  for line, instead in (
    ("    base_opt = optax.adamw(\n", "    base_opt = fo.adamw(\n"),
    ("        mu_dtype=config.mu_dtype,\n", ""),
  ):
    assert source.count(line) == 1
    source = source.replace(line, instead)
  namespace = vars(optimizers) | {"fo": fo}
  exec(source, namespace)
  return namespace["get_optimizer"]


def train(folder, given, *, steps=STEPS, checkpoints=False):
  """Losses of the steps that this call took."""
  folder.mkdir(exist_ok=True)
  metrics = folder / f"metrics_{steps}.jsonl"
  settings = SETTINGS | {
    "run_name": "run",
    "base_output_directory": folder,
    "metrics_file": metrics,
    "steps": steps,
    "enable_checkpointing": checkpoints,
  }
  arguments = [f"{name}={value}" for name, value in settings.items()]
  trainer.main(["", str(CONFIG), *arguments, *given])
  return [json.loads(line)["learning/loss"] for line in metrics.open()]


def main(folder, *given):
  losses = {"theirs": train(folder / "theirs", given)}
  optimizers.get_optimizer = with_flash_adamw()
  losses["ours"] = train(folder / "ours", given)
  resumed = folder / "resumed"
  losses["resumed"] = [
    *train(resumed, given, steps=STEPS // 2, checkpoints=True),
    *train(resumed, given, checkpoints=True),
  ]
  (folder / "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]), *sys.argv[2:])
