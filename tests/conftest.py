import os

# Before JAX starts: eight CPU devices, beside whatever flags the user gave.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_FLAG = "--xla_force_host_platform_device_count"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=8".strip()

import hypothesis  # noqa: E402

# The same examples in every run, however slow the machine.
hypothesis.settings.register_profile(
    "repeatable", derandomize=True, deadline=None, print_blob=False
)
hypothesis.settings.load_profile("repeatable")
