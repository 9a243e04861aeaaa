"""Writes README's table of results from the JSON files in results/.

``python benchmarks/readme_table.py`` rewrites the table; with ``--check`` it
fails if that would change anything.
"""

import argparse
import json
import pathlib
import statistics
import sys

HERE = pathlib.Path(__file__).parent
README = HERE.parent / "README.md"
START, END = "<!-- results -->", "<!-- /results -->"


def load(name):
  return json.loads((HERE / "results" / name).read_text())


def memory_row():
  memory = load("llama_memory.json")
  usual = memory["baseline_bytes"]
  kept = sum(usual.values()) - usual["gradients"]
  return (
    "Llama-3-8B: bytes per parameter, weights and optimizer state",
    f"{memory['bytes_per_param']:.3f}",
    f"{kept / memory['parameters']:.3f}",
    f"{100 * (memory['bytes_per_param'] * memory['parameters'] / kept - 1):+.0f} %",
  )


def loss_rows():
  """One row per seed of the example's default run."""
  paths = sorted((HERE / "results").glob("train_lm_cpu_seed*.json"))
  rows, differences = [], []
  for path in paths:
    result = load(path.name)
    flash, usual = result["runs"]
    difference = 100 * (flash["valid_loss"] / usual["valid_loss"] - 1)
    differences.append(difference)
    rows.append((
      f"`examples/train_lm.py`, seed {result['settings']['seed']}:"
      " validation loss",
      f"{flash['valid_loss']:.4f}",
      f"{usual['valid_loss']:.4f}",
      f"{difference:+.2f} %",
    ))
  if len(rows) > 1:
    rows.append((
      "the same, mean over seeds",
      *(
        f"{statistics.mean(float(row[i]) for row in rows):.4f}" for i in (1, 2)
      ),
      f"{statistics.mean(differences):+.2f} %",
    ))
  return rows


def step_row():
  step = load("xla_step_cpu.json")
  flash, usual = (
    step["step_seconds"][name] for name in ("fo.adamw", "optax.adamw")
  )
  return (
    f"CPU: update of {step['parameters'] / 1e6:.0f} M parameters, ms",
    f"{flash * 1e3:.0f}",
    f"{usual * 1e3:.0f}",
    f"×{step['ratio']:.2f}",
  )


def gpu_rows():
  """One row per leaf set, of the device's time."""
  found = load("gpu_step.json")
  rows = []
  for name, cells in found["leaf_sets"].items():
    flash, usual = cells["adamw"], cells["optax.adamw fp32"]
    times = [cell["device_milliseconds"] for cell in (flash, usual)]
    rows.append((
      f"H100: update of {name}, ms ({flash['of_copy']:.0%} of a copy's speed)",
      f"{times[0]:.2f}",
      f"{times[1]:.2f}",
      f"×{times[0] / times[1]:.2f}",
    ))
  return rows


def release_row():
  found = load("release_gpu.json")
  ours = found["memory"]["peak_bytes"]
  usual = found["baseline"]["cast_in_layers"]["total_bytes"]
  return (
    "H100: memory of Llama-3-8B's training step, with gradient release, GiB",
    f"{ours / 2**30:.1f}",
    f"{usual / 2**30:.1f} (XLA's plan)",
    f"{100 * (ours / usual - 1):+.0f} %",
  )


def checkpoint_row():
  found = load("checkpoint_size.json")
  return (
    "GPT-2 124 M: checkpoint, MB",
    f"{found['flash_bytes'] / 1e6:.0f}",
    f"{found['optax_fp32_bytes'] / 1e6:.0f}",
    f"{100 * (found['ratio'] - 1):+.0f} %",
  )


def table():
  header = ("", "`fo.adamw`, bf16", "`optax.adamw`, fp32", "difference")
  rows = [header, ("---", "---:", "---:", "---:")]
  rows += [memory_row(), release_row(), checkpoint_row()]
  rows += [*loss_rows(), *gpu_rows(), step_row()]
  return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main():
  parser = argparse.ArgumentParser(description="Writes README's table.")
  parser.add_argument("--check", action="store_true", help="change nothing")
  arguments = parser.parse_args()
  text = README.read_text()
  before, rest = text.split(START)
  after = rest.split(END)[1]
  new = f"{before}{START}\n{table()}\n{END}{after}"
  if arguments.check:
    if new != text:
      print("README.md's table is not that of benchmarks/results.")
    return int(new != text)
  README.write_text(new)
  return 0


if __name__ == "__main__":
  sys.exit(main())
