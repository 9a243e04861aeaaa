"""What models take of each device, as ``python -m flashoptim_jax plan`` says it.

    python benchmarks/memory/plans.py

Arithmetic alone: nothing is compiled or allocated. Writes plan_MODEL.json.
"""

import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).parents[2]))

from benchmarks import record
from flashoptim_jax import models, planning

# Mesh and device of each.
PLANS = {
  "gpt2": ({"fsdp": 1}, "v5e"),
  "llama-1b": ({"fsdp": 1}, "h100"),
  "llama3-8b": ({"fsdp": 1}, "h100"),
  "llama3-70b": ({"fsdp": 32, "tp": 8}, "v5e"),
}


def main():
  arguments = record.parser(__doc__).parse_args()
  for name, (mesh, device) in PLANS.items():
    plan = planning.plan(models.load(name), mesh, device)
    # Its device is the one that is planned for.
    result = record.about(device=device) | plan.to_json()
    record.write(f"plan_{name}.json", result, arguments.output)
    print(plan, flush=True)


if __name__ == "__main__":
  main()
