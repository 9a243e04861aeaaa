"""What every result says of its making, and where results are kept.

A result is a JSON file in ``results/`` with ``date``, ``device``, ``versions`` and what
was measured. JAX is imported on first use: scripts set its environment before that.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any

RESULTS = pathlib.Path(__file__).parent / "results"
# Of every result, beside Python and this package.
PACKAGES = ("jax", "jaxlib", "optax")


def parser(doc: str | None) -> argparse.ArgumentParser:
  """A script's parser, from its docstring, with a folder to write results to."""
  found = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
  found.add_argument(
    "--output", type=pathlib.Path, default=RESULTS, help="folder of results"
  )
  return found


def device_kind() -> str:
  """The kind of this process's first device."""
  import jax

  kind = jax.devices()[0].device_kind
  if jax.default_backend() == "cpu":
    return f"{kind} ({os.cpu_count()} cores, {platform.machine()})"
  return kind


def about(*packages: str, device: str | None = None) -> dict[str, Any]:
  """When something is measured, where, and with which versions.

  Args:
    *packages: More distributions that take part, as package indexes name them. Those
      that are not installed are left out: without Triton, XLA updates on GPUs.
    device: Where; by default :func:`device_kind`, "" where nothing runs.
  """
  import flashoptim_jax as fo

  versions = {"python": platform.python_version()}
  for name in (*PACKAGES, *packages):
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  where = device_kind() if device is None else device
  return {
    "date": datetime.date.today().isoformat(),
    **({"device": where} if where else {}),
    "versions": {**versions, "flashoptim_jax": fo.__version__},
  }


def about_in_process(*packages: str) -> dict[str, Any]:
  """The same from a process of its own, so that this one takes no device."""
  done = subprocess.run(
    [sys.executable, __file__, *packages],
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  return json.loads(done.stdout.splitlines()[-1])


def load(name: str, folder: pathlib.Path | None = None) -> Any:
  """A result."""
  return json.loads(((folder or RESULTS) / name).read_text())


def earlier(name: str, folder: pathlib.Path | None = None) -> dict[str, Any]:
  """A result that a script adds to; empty if there is none."""
  return load(name, folder) if ((folder or RESULTS) / name).exists() else {}


def write(name: str, result: Any, folder: pathlib.Path | None = None) -> None:
  """Writes a result; a process that is killed meanwhile leaves the earlier one."""
  path = (folder or RESULTS) / name
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_suffix(".tmp")
  temporary.write_text(json.dumps(result, indent=1) + "\n")
  temporary.replace(path)


if __name__ == "__main__":
  sys.path.append(str(pathlib.Path(__file__).parents[1]))
  print(json.dumps(about(*sys.argv[1:])))
