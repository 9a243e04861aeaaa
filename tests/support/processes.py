"""Python in processes of its own."""

import os
import subprocess
import sys


def run(*arguments: object, **environment: str) -> str:
  """What a fresh interpreter prints."""
  result = subprocess.run(
    [sys.executable, *map(str, arguments)],
    env={**os.environ, **environment},
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 0, result.stderr[-4000:]
  return result.stdout


def python(code: str) -> str:
  """What code prints where only installed packages are found."""
  return run("-c", code, JAX_PLATFORMS="cpu")


def worker(name: str, *arguments: str) -> str:
  """What a program of this folder prints."""
  path = os.pathsep.join(filter(None, sys.path))
  return run("-m", f"tests.support.{name}", *arguments, PYTHONPATH=path)
