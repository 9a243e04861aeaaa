"""Losses of the example's default run on a CPU, beside Optax's on float32.

    python benchmarks/quality/example_loss.py --seeds 0 1 2

Runs ``examples/train_lm.py``, which trains with both optimizers on the same data.
Writes train_lm_cpu_seedN.json.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"  # Here and in the example's process.
sys.path.append(str(pathlib.Path(__file__).parents[2]))

from benchmarks import record

SCRIPT = pathlib.Path(__file__).parents[2] / "examples" / "train_lm.py"


def run(seed: int) -> dict:
  """The example's settings and runs, in a process of its own."""
  with tempfile.TemporaryDirectory() as folder:
    command = [sys.executable, str(SCRIPT), "--seed", str(seed), "--output", folder]
    subprocess.run(command, check=True)
    found = json.loads((pathlib.Path(folder) / "results.json").read_text())
  return {key: found[key] for key in ("settings", "runs")}


def main():
  parser = record.parser(__doc__)
  parser.add_argument("--seeds", type=int, nargs="+", default=[0])
  arguments = parser.parse_args()
  for seed in arguments.seeds:
    result = record.about("flax") | run(seed)
    record.write(f"train_lm_cpu_seed{seed}.json", result, arguments.output)


if __name__ == "__main__":
  main()
