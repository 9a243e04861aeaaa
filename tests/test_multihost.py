"""Several processes, as several hosts would be, and more devices than here."""

import os
import pickle
import socket
import subprocess
import sys

import pytest

from tests.support import cases, meshes

pytestmark = pytest.mark.slow

TIMEOUT = 600  # seconds


def environment(devices: int):
  """Of a process with so many CPU devices, not this one's eight."""
  flags = os.environ["XLA_FLAGS"].split()
  return os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": str(devices),
    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    "XLA_FLAGS": " ".join(flag for flag in flags if "device_count" not in flag),
  }


def free_address() -> str:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return f"127.0.0.1:{probe.getsockname()[1]}"


def test_processes_equal_one(tmp_path):
  processes, name = 4, "lion"
  file = tmp_path / "result.pickle"
  common = [sys.executable, "-m", "tests.support.multihost_worker", free_address()]
  workers = [
    subprocess.Popen(
      [*common, str(processes), str(i), name, file],
      env=environment(8 // processes),
    )
    for i in range(processes)
  ]
  assert [worker.wait(TIMEOUT) for worker in workers] == [0] * processes
  actual = pickle.loads(file.read_bytes())
  cases.assert_equal(actual, meshes.alone(name), meshes.STEPS)


def test_parameter_smaller_than_the_mesh(tmp_path):
  command = [sys.executable, "-m", "tests.support.gate_worker", tmp_path]
  subprocess.run(command, env=environment(32), timeout=TIMEOUT, check=True)
