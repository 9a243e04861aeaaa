"""Kills one of the multi-host example's processes; the run must resume.

Usage: check_multihost.py FOLDER [PROCESSES]
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


def start_together(count, output, *flags):
  """Processes with a device each, that train together."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{probe.getsockname()[1]}"
  cluster = ["--cluster", f"--coordinator={address}", f"--num-processes={count}"]
  return [
    start(output, 1, *cluster, f"--process-id={i}", "--heartbeat=10", *flags)
    for i in range(count)
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
  folder, count = pathlib.Path(sys.argv[1]), int((*sys.argv, 2)[2])
  alone, together = folder / "alone", folder / "together"
  finish([start(alone, 2)])

  processes = start_together(count, together)
  deadline = time.monotonic() + TIMEOUT
  # A checkpoint's folder gets its name, a number, when it is complete.
  while not any(path.name.isdigit() for path in together.glob("checkpoint/*")):
    assert time.monotonic() < deadline, "no checkpoint"
    assert all(process.poll() is None for process in processes), "ended early"
    time.sleep(0.02)
  processes[-1].kill()
  for process in processes[:-1]:
    process.communicate(timeout=TIMEOUT)
    assert process.returncode != 0, "a process went on without another"
  assert not (together / "losses.json").exists()

  finish(start_together(count, together, "--resume"))
  pairs = list(zip(losses(together), losses(alone), strict=True))
  assert len(pairs) == STEPS
  # The order in which gradients are summed may differ, and nothing else.
  worst = max(abs(a - b) / b for a, b in pairs)
  assert worst < 0.02, f"losses differ by {worst:.1%}"
  print(
    f"{count} processes train as one, stop when one is killed, and resume; losses"
    f" differ by at most {worst:.2%}."
  )


if __name__ == "__main__":
  main()
