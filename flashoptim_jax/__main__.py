"""The command line: ``python -m flashoptim_jax``."""

import argparse
import sys


def _inspect(arguments: argparse.Namespace) -> None:
  from flashoptim_jax import inspection

  print(inspection.inspect(arguments.path))


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
  arguments = parser.parse_args()
  try:
    arguments.run(arguments)
  except (ValueError, FileNotFoundError) as error:
    print(error, file=sys.stderr)
    return 1
  return 0


if __name__ == "__main__":
  sys.exit(main())
