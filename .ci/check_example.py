"""Runs the example at a tiny size; a stopped and resumed run must be the same.

Usage: check_example.py FOLDER
"""

import json
import pathlib
import signal
import subprocess
import sys

SCRIPT = pathlib.Path(__file__).parent.parent / "examples" / "train_lm.py"
SIZE = ["--dim=16", "--layers=2", "--heads=2", "--seq=32", "--batch=2"]
STEPS = 800  # enough for a signal to come before the end


def command(output, *flags):
  """The example's command line."""
  return [sys.executable, str(SCRIPT), "--output", str(output), *flags]


def main():
  """Raises an error where something does not hold."""
  folder = pathlib.Path(sys.argv[1])
  flags = [*SIZE, "--steps", str(STEPS), "--no-baseline"]
  whole, stopped, both = (folder / name for name in ("whole", "stopped", "both"))
  subprocess.run(command(whole, *flags), check=True, stderr=subprocess.DEVNULL)

  process = subprocess.Popen(
    command(stopped, *flags), stderr=subprocess.PIPE, text=True, bufsize=1
  )
  # The progress bar shows a loss once steps are done.
  seen = ""
  while "fo.adamw=" not in seen:
    character = process.stderr.read(1)
    assert character, f"the example ended early:\n{seen}"
    seen += character
  process.send_signal(signal.SIGINT)
  seen += process.communicate()[1]
  assert process.returncode == 130, seen
  subprocess.run(command(stopped, "--resume"), check=True, stderr=subprocess.DEVNULL)
  results = [
    json.loads((path / "results.json").read_text())["runs"][0]
    for path in (whole, stopped)
  ]
  for key in ("train_losses", "valid_losses", "valid_loss"):
    assert results[0][key] == results[1][key], f"{key} differs after a resume"

  subprocess.run(
    command(both, *SIZE, "--steps", "30", "--optimizer", "lion"),
    check=True,
    stderr=subprocess.DEVNULL,
  )
  subprocess.run(
    command(folder / "released", *SIZE, "--steps", "30", "--gradient-release"),
    check=True,
    stderr=subprocess.DEVNULL,
  )
  assert (both / "losses.png").stat().st_size > 10_000
  print("The example runs, stops, and resumes to the same losses.")


if __name__ == "__main__":
  main()
