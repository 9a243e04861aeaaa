"""Orbax checkpoints that say what their arrays mean, and a look into them."""

from flashoptim_jax.checkpoint.orbax import (
  FORMAT_VERSION,
  KEY,
  Description,
  Handler,
  Restore,
  Save,
  check,
  describe,
  read_description,
)

__all__ = [
  "FORMAT_VERSION",
  "KEY",
  "Description",
  "Handler",
  "Restore",
  "Save",
  "check",
  "describe",
  "read_description",
]
