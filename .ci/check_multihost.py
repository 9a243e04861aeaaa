"""Kills one of the multi-host example's processes; the run must resume.

Usage: check_multihost.py FOLDER
"""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

SCRIPT = pathlib.Path(__file__).parent.parent / "examples" / "train_multihost.py"
SIZE = ["--dim=64", "--layers=1", "--heads=2", "--seq=16", "--batch=4"]
STEPS = 40
TIMEOUT = 300  # seconds


def start(output, devices, *flags):
  """A process of the example."""
  sizes = [*SIZE, f"--steps={STEPS}", "--tensor=1", "--save-every=5"]
  return subprocess.Popen(
    [sys.executable, str(SCRIPT), *sizes, f"--output={output}", *flags],
    env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)},
    stderr=subprocess.PIPE,
    text=True,
  )


def start_two(output, *flags):
  """Two processes with a device each, that train together."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{probe.getsockname()[1]}"
  cluster = ["--cluster", f"--coordinator={address}", "--num-processes=2"]
  return [
    start(output, 1, *cluster, f"--process-id={i}", "--heartbeat=10", *flags)
    for i in range(2)
  ]


def finish(processes):
  """Waits for processes that are to end well."""
  for process in processes:
    _, messages = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, messages


def losses(output):
  """Of every step."""
  return json.loads((output / "losses.json").read_text())["losses"]


def main():
  """Raises an error where something does not hold."""
  folder = pathlib.Path(sys.argv[1])
  alone, together = folder / "alone", folder / "together"
  finish([start(alone, 2)])

  processes = start_two(together)
  deadline = time.monotonic() + TIMEOUT
  # A checkpoint's folder gets its name, a number, when it is complete.
  while not any(
    path.name.isdigit() for path in together.glob("checkpoint/*")
  ):
    assert time.monotonic() < deadline, "no checkpoint"
    assert all(process.poll() is None for process in processes), "ended early"
    time.sleep(0.02)
  processes[1].kill()
  processes[0].communicate(timeout=TIMEOUT)
  assert processes[0].returncode != 0, "one process went on alone"
  assert not (together / "losses.json").exists()

  finish(start_two(together, "--resume"))
  pairs = list(zip(losses(together), losses(alone), strict=True))
  assert len(pairs) == STEPS
  # The order in which gradients are summed may differ, and nothing else.
  worst = max(abs(a - b) / b for a, b in pairs)
  assert worst < 0.02, f"losses differ by {worst:.1%}"
  print(
    "Two processes train as one, stop when one is killed, and resume; losses"
    f" differ by at most {worst:.2%}."
  )


if __name__ == "__main__":
  main()
