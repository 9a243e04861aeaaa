import os
import shutil
import tempfile

# Before JAX starts: eight CPU devices, and programs that compile fast for they run
# only a few steps; beside whatever flags the user gave.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_FLAGS = {
  "--xla_force_host_platform_device_count": "8",
  "--xla_backend_optimization_level": "0",
  "--xla_llvm_disable_expensive_passes": "true",
}
for _name, _value in _FLAGS.items():
  _given = os.environ.get("XLA_FLAGS", "")
  if _name not in _given:
    os.environ["XLA_FLAGS"] = f"{_given} {_name}={_value}".strip()

# Tests compile many of the same programs, in two processes: keep them for the run.
_CACHE = "JAX_COMPILATION_CACHE_DIR"
_OWN_CACHE = None if _CACHE in os.environ else tempfile.mkdtemp()
if _OWN_CACHE:  # Not in a worker, which inherits it.
  os.environ[_CACHE] = _OWN_CACHE
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
  os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import hypothesis  # noqa: E402

# The same examples in every run, however slow the machine.
hypothesis.settings.register_profile(
  "repeatable", derandomize=True, deadline=None, print_blob=False
)
hypothesis.settings.register_profile(
  "quick", hypothesis.settings.get_profile("repeatable"), max_examples=10
)


def pytest_configure(config):
  quick = config.getoption("markexpr") == "not slow"
  hypothesis.settings.load_profile("quick" if quick else "repeatable")


def pytest_unconfigure():
  if _OWN_CACHE:
    shutil.rmtree(_OWN_CACHE, ignore_errors=True)
