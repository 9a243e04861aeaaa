"""Real text without a download: the sources of Python's standard library."""

import pathlib
import sysconfig
import zlib
from typing import NamedTuple

import numpy as np

VOCABULARY = 256  # one token per byte
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}


class Corpus(NamedTuple):
  """Bytes to train on and bytes to validate on.

  Attributes:
    train: uint8 of shape (bytes,).
    valid: uint8 of shape (bytes,), from other files than ``train``.
  """

  train: np.ndarray
  valid: np.ndarray


def standard_library() -> Corpus:
  """The running interpreter's own ``.py`` files, without its tests.

  A file's relative path decides which part it belongs to, so the split is the
  same in every run: about one file in ten is for validation.

  Raises:
    FileNotFoundError: If the standard library is not there as source files.
  """
  root = pathlib.Path(sysconfig.get_paths()["stdlib"])
  parts: tuple[list[bytes], list[bytes]] = ([], [])
  names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
  for name in names:
    if _LEFT_OUT.isdisjoint(name.split("/")):
      for_validation = zlib.crc32(name.encode()) % 10 == 0
      parts[for_validation].append((root / name).read_bytes())
  if not all(parts):
    raise FileNotFoundError(f"No Python sources to train on under {root}.")
  train, valid = (np.frombuffer(b"\0".join(part), np.uint8) for part in parts)
  return Corpus(train, valid)


def train_batch(
  tokens: np.ndarray, batch: int, seq: int, seed: int, step: int
) -> np.ndarray:
  """The batch of one step: random windows, chosen by seed and step alone.

  Nothing has to be remembered between steps, so a resumed run sees the data
  that an uninterrupted one would have seen.

  Args:
    tokens: The training bytes, of shape (bytes,).
    batch: Number of windows.
    seq: Number of predictions in a window.
    seed: The run's seed.
    step: The step's number.

  Returns:
    int32 of shape (batch, seq + 1): inputs and targets overlap by all but one.
  """
  random = np.random.default_rng((seed, step))
  starts = random.integers(0, len(tokens) - seq, size=batch)
  return _windows(tokens, starts, seq)


def valid_batches(tokens: np.ndarray, batch: int, seq: int, count: int) -> np.ndarray:
  """Batches spread evenly over the validation bytes, the same in every run.

  Returns:
    int32 of shape (count, batch, seq + 1).
  """
  starts = np.linspace(0, len(tokens) - seq - 1, count * batch, dtype=np.int64)
  return _windows(tokens, starts, seq).reshape(count, batch, seq + 1)


def _windows(tokens: np.ndarray, starts: np.ndarray, seq: int) -> np.ndarray:
  return tokens[starts[:, None] + np.arange(seq + 1)].astype(np.int32)
