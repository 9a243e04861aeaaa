import os

# Before JAX starts: four CPU devices, and programs that compile fast for they run
# only a few steps.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "4")
os.environ.setdefault(
  "XLA_FLAGS",
  "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
)

from tests.support import compilation_cache


def pytest_unconfigure():
  compilation_cache.remove()
