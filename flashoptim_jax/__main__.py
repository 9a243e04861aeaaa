"""The command line: ``python -m flashoptim_jax``."""

import argparse
import json
import os
import sys


def _inspect(arguments: argparse.Namespace) -> None:
  from flashoptim_jax.checkpoint import inspection

  print(inspection.inspect(arguments.path))


def _plan(arguments: argparse.Namespace) -> None:
  from flashoptim_jax import models, planning

  found = planning.plan(
    models.load(arguments.model),
    planning.parse_mesh(arguments.mesh),
    arguments.device,
    planning.parse_storage(arguments.storage),
  )
  print(json.dumps(found.to_json(), indent=1) if arguments.json else found)


def main() -> int:
  """Runs a command; an error it can explain is one line and exit status 1."""
  parser = argparse.ArgumentParser(prog="python -m flashoptim_jax")
  commands = parser.add_subparsers(required=True, metavar="COMMAND")
  inspect = commands.add_parser(
    "inspect",
    help="say what a checkpoint holds",
    description="Says what an Orbax checkpoint holds: tree, storage, bytes by"
    " component, step, largest arrays, and elements that are not finite.",
  )
  inspect.add_argument(
    "path", help="a saved tree, a step, or a CheckpointManager's directory"
  )
  inspect.set_defaults(run=_inspect)
  plan = commands.add_parser(
    "plan",
    help="say what training a model takes of each device",
    description="Says what a model's parameters, AdamW's state and gradients"
    " take of each device of a mesh, and whether that fits.",
  )
  plan.add_argument(
    "model",
    help="a Hugging Face config.json, a directory with one, or a built-in name"
    " such as gpt2, llama3-8b or llama3-70b; an unknown name lists them",
  )
  plan.add_argument(
    "--mesh",
    default="fsdp=1",
    help="devices along each axis, such as fsdp=32,tp=8 (default: one device)",
  )
  plan.add_argument(
    "--device",
    required=True,
    help="a kind, such as h100 or v5e, or its memory, such as 24GiB",
  )
  plan.add_argument(
    "--storage",
    default="24,8",
    help="bits of master weights and of moments: 16, 24, 32 or none, and 8 or 32"
    " (default: 24,8)",
  )
  plan.add_argument("--json", action="store_true", help="print JSON, in bytes")
  plan.set_defaults(run=_plan)
  arguments = parser.parse_args()
  try:
    arguments.run(arguments)
    sys.stdout.flush()
  except BrokenPipeError:  # The reader has seen enough, as in `| head`.
    # Lest Python complain when it flushes at its end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
  except (ValueError, OSError) as error:
    print(error, file=sys.stderr)
    return 1
  return 0


if __name__ == "__main__":
  sys.exit(main())
