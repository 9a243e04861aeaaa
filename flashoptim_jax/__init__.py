"""Optax optimizers with 8-bit moments and 24-bit master weights.

The names in ``__all__`` are public, with the modules ``checkpoint`` and ``flax``, and
``planning`` and ``models`` as far as the API reference has them. Everything else may
change without notice.
"""

from flashoptim_jax import serialization
from flashoptim_jax.compression.transform import compress
from flashoptim_jax.conversion.optax_states import convert, from_optax, to_optax
from flashoptim_jax.conversion.pytorch import from_pytorch, load_pytorch
from flashoptim_jax.conversion.safetensors import export_safetensors, import_safetensors
from flashoptim_jax.memory import MemoryReport, memory_report
from flashoptim_jax.numerics import (
  NonFiniteLeaf,
  NumericsError,
  NumericsReport,
  StalledLeaf,
  check_numerics,
  nonfinite_leaves,
)
from flashoptim_jax.optimizers import adam, adamw, lion, sgd
from flashoptim_jax.release.calls import released_call, value_and_release
from flashoptim_jax.sharding import state_shardings, with_shardings
from flashoptim_jax.storage.moments import moments
from flashoptim_jax.storage.options import Storage
from flashoptim_jax.storage.precision import cast_params, from_fp32, to_fp32
from flashoptim_jax.storage.state import CompressedState, FlashState, Format
from flashoptim_jax.update.step import step

__version__ = "0.1.0"

serialization.register()

__all__ = [
  "CompressedState",
  "FlashState",
  "Format",
  "MemoryReport",
  "NonFiniteLeaf",
  "NumericsError",
  "NumericsReport",
  "StalledLeaf",
  "Storage",
  "adam",
  "adamw",
  "cast_params",
  "check_numerics",
  "checkpoint",
  "compress",
  "convert",
  "export_safetensors",
  "flax",
  "from_fp32",
  "from_optax",
  "from_pytorch",
  "import_safetensors",
  "lion",
  "load_pytorch",
  "memory_report",
  "moments",
  "nonfinite_leaves",
  "released_call",
  "sgd",
  "state_shardings",
  "step",
  "to_fp32",
  "to_optax",
  "value_and_release",
  "with_shardings",
]


# Imported on first use: Flax and Orbax are optional dependencies. The last two are not
# public, but programs know them by the names that they had before they moved.
_LAZY = {
  "checkpoint": "flashoptim_jax.checkpoint",
  "flax": "flashoptim_jax.flax",
  "codec": "flashoptim_jax.storage.codec",
  "inspection": "flashoptim_jax.checkpoint.inspection",
}


def __dir__() -> list[str]:
  return sorted([*__all__, "__version__"])


def __getattr__(name: str):
  if name in _LAZY:
    import importlib

    return importlib.import_module(_LAZY[name])
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
