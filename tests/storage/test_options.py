"""What ``Storage`` takes, and which leaves it quantizes."""

import pytest

import flashoptim_jax as fo
from tests.support.cases import raises


@pytest.mark.parametrize(
  ("storage", "shape", "quantized"),
  [
    (fo.Storage(), (4096,), True),
    (fo.Storage(), (4095,), False),
    (fo.Storage(), (64, 64), True),
    (fo.Storage(), (), False),
    (fo.Storage(min_quantized_size=0), (), True),
    (fo.Storage(min_quantized_size=0), (0,), True),
    (fo.Storage(min_quantized_size=10), (3, 3), False),
    (fo.Storage(min_quantized_size=10), (2, 5), True),
    (fo.Storage(moment_bits=32), (64, 64), False),
    (fo.Storage(moment_bits=32, min_quantized_size=0), (64, 64), False),
  ],
)
def test_small_leaves_are_not_quantized(storage, shape, quantized):
  assert storage.quantizes(shape) is quantized


@pytest.mark.parametrize(
  ("option", "value", "expected"),
  [
    ("master_bits", 8, "16, 24, 32, None"),
    ("master_bits", "24", "16, 24, 32, None"),
    ("master_bits", True, "16, 24, 32, None"),
    ("moment_bits", 4, "8, 32"),
    ("moment_bits", None, "8, 32"),
    ("group_size", 0, "int of at least 1"),
    ("group_size", -32, "int of at least 1"),
    ("group_size", 32.0, "int of at least 1"),
    ("group_size", True, "int of at least 1"),
    ("min_quantized_size", -1, "int of at least 0"),
    ("min_quantized_size", 0.0, "int of at least 0"),
    ("min_quantized_size", False, "int of at least 0"),
    ("companding", "linear", "'root', 'paper'"),
    ("companding", None, "'root', 'paper'"),
  ],
)
def test_storage_options(option, value, expected):
  with raises(f"Storage.{option} is {value!r}", expected):
    fo.Storage(**{option: value})


def test_storage_is_frozen_and_hashable():
  assert hash(fo.Storage()) == hash(fo.Storage(group_size=32))
  with pytest.raises(AttributeError):
    fo.Storage().group_size = 64
  with raises("unexpected keyword argument 'bits'", error=TypeError):
    fo.Storage(bits=8)
