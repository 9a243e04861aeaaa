import os
import shutil
import tempfile

# Before JAX starts: four CPU devices, and programs that compile fast for they run
# only a few steps.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "4")
os.environ.setdefault(
  "XLA_FLAGS",
  "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
)

# Runs that are compared compile the same programs, in two processes: keep them.
_CACHE = "JAX_COMPILATION_CACHE_DIR"
_OWN_CACHE = None if _CACHE in os.environ else tempfile.mkdtemp()
if _OWN_CACHE:  # Not in a worker, which inherits it.
  os.environ[_CACHE] = _OWN_CACHE
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
  os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


def pytest_unconfigure():
  if _OWN_CACHE:
    shutil.rmtree(_OWN_CACHE, ignore_errors=True)
