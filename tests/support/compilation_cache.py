"""A compilation cache for one run of tests, which a conftest imports before JAX starts.

Tests compile many of the same programs, in two processes.
"""

import os
import shutil
import tempfile

_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
_OWN = None if _VARIABLE in os.environ else tempfile.mkdtemp()
if _OWN:  # Not in a worker, which inherits it.
  os.environ[_VARIABLE] = _OWN
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
  os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


def remove() -> None:
  """At the end of the run."""
  if _OWN:
    shutil.rmtree(_OWN, ignore_errors=True)
