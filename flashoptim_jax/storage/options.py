"""How parameters and optimizer state are stored."""

import dataclasses
import math
from typing import Literal

# Of moments: running averages of gradients, or of their squares.
Kind = Literal["first", "second"]


@dataclasses.dataclass(frozen=True)
class Storage:
  """The precision in which an optimizer keeps its state.

  Frozen and hashable, and neither a number nor a callable, so that
  ``optax.inject_hyperparams`` leaves it alone.

  Attributes:
    master_bits: Bits of the master weight that a 16-bit parameter and its
      correction make up together: 24 (an int8 correction), 32 (an int16
      correction; float32, lossless, for bfloat16 parameters), 16 or None (no
      correction: the 16-bit parameter is all there is). At 16 an update rounds each
      element up or down by a threshold of its own that moves with the count of
      updates, so that steps of a small part of a place add up to what they should;
      with None it rounds to the nearest, and they are lost. The threshold depends on
      the element's place in the leaf and the count alone. Parameters of 32 and 64
      bits are their own master weights, whatever is chosen here.
    moment_bits: 8 (codes with one scale per group) or 32 (float32).
    group_size: Elements that share a scale, along one axis of a leaf.
    companding: ``"root"`` or ``"paper"``, see :mod:`flashoptim_jax.storage.codec`.
    min_quantized_size: Leaves with fewer elements keep their moments in float32:
      norms, biases and other vectors, whose elements may differ by many orders of
      magnitude, and which take next to no memory.

  Raises:
    ValueError: If an option is none of the above.
  """

  master_bits: Literal[16, 24, 32] | None = 24
  moment_bits: Literal[8, 32] = 8
  group_size: int = 32
  companding: Literal["root", "paper"] = "root"
  min_quantized_size: int = 4096

  def __post_init__(self):
    for name, options in (
      ("master_bits", (16, 24, 32, None)),
      ("moment_bits", (8, 32)),
      ("companding", ("root", "paper")),
    ):
      value = getattr(self, name)
      if isinstance(value, bool) or value not in options:
        raise ValueError(
          f"Storage.{name} is {value!r}; expected one of "
          f"{', '.join(map(repr, options))}."
        )
    for name, least in (("group_size", 1), ("min_quantized_size", 0)):
      size = getattr(self, name)
      if isinstance(size, bool) or not isinstance(size, int) or size < least:
        raise ValueError(
          f"Storage.{name} is {size!r}; expected an int of at least {least}."
        )

  @property
  def has_corrections(self) -> bool:
    """Whether 16-bit parameters have corrections."""
    return self.master_bits in (24, 32)

  @property
  def quantizes_moments(self) -> bool:
    """Whether there are scales, and codes of leaves that are large enough."""
    return self.moment_bits == 8

  def quantizes(self, shape: tuple[int, ...]) -> bool:
    """Whether the moments of a leaf of that shape are codes and scales."""
    return self.quantizes_moments and math.prod(shape) >= self.min_quantized_size
