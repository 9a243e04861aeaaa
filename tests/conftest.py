import os

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

import hypothesis  # noqa: E402

from tests.support import compilation_cache  # noqa: E402

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
  compilation_cache.remove()
