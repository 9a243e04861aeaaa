"""Several processes on one machine, as several hosts would be."""

import json
import os
import pathlib
import pickle
import socket
import subprocess
import sys
import time

import cases
import numpy as np
import pytest
import test_sharding

TESTS = pathlib.Path(__file__).parent
EXAMPLE = TESTS.parent / "examples" / "train_multihost.py"
SIZE = ["--dim=64", "--layers=1", "--heads=2", "--seq=16", "--batch=4"]
STEPS = 40
TIMEOUT = 300  # seconds


def environment(devices: int):
  """Of a process with so many CPU devices, not this one's eight."""
  result = os.environ | {
      "JAX_PLATFORMS": "cpu",
      "JAX_NUM_CPU_DEVICES": str(devices),
      "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
  }
  del result["XLA_FLAGS"]
  return result


def free_address() -> str:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.parametrize(("processes", "name"), [(2, "nesterov"), (4, "lion")])
def test_processes_equal_one(processes, name, tmp_path):
  file = tmp_path / "result.pickle"
  common = [sys.executable, TESTS / "multihost_worker.py", free_address()]
  workers = [
      subprocess.Popen(
          [*common, str(processes), str(i), name, file],
          env=environment(8 // processes),
      )
      for i in range(processes)
  ]
  assert [worker.wait(TIMEOUT) for worker in workers] == [0] * processes
  actual = pickle.loads(file.read_bytes())
  cases.assert_equal(actual, test_sharding.alone(name), test_sharding.STEPS)


def example(output, process=None, address=None, *flags):
  """A process of the example: one of two with a device each, or one with two."""
  command = [sys.executable, EXAMPLE, *SIZE, f"--output={output}", "--save-every=5"]
  command += [f"--steps={STEPS}", "--tensor=1", *flags]
  if process is not None:
    command += ["--cluster", f"--coordinator={address}", "--num-processes=2"]
    command += [f"--process-id={process}", "--heartbeat=10"]
  return subprocess.Popen(
      command,
      env=environment(2 if process is None else 1),
      stderr=subprocess.PIPE,
      text=True,
  )


def both(output, *flags):
  address = free_address()
  return [example(output, process, address, *flags) for process in range(2)]


def losses(output):
  return json.loads((output / "losses.json").read_text())["losses"]


def test_a_killed_process_stops_the_others_and_training_resumes(tmp_path):
  alone, together = tmp_path / "alone", tmp_path / "together"
  uninterrupted = example(alone)
  processes = both(together)
  deadline = time.monotonic() + TIMEOUT
  # A checkpoint's folder gets its name, a number, when it is complete.
  while not list(together.glob("checkpoint/[0-9]")):
    assert time.monotonic() < deadline
    assert all(process.poll() is None for process in processes)
    time.sleep(0.02)
  processes[1].kill()
  assert processes[0].wait(TIMEOUT) != 0
  assert not (together / "losses.json").exists()

  processes = both(together, "--resume")
  for process in (uninterrupted, *processes):
    _, messages = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, messages
  # The order in which gradients are summed may differ, and nothing else.
  assert len(losses(together)) == STEPS
  np.testing.assert_allclose(losses(together), losses(alone), rtol=2e-2)
