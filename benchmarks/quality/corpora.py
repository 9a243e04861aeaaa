"""What training_loss.py trains on: sources of installed packages, and digits.

Nothing is downloaded. Text is cut into tokens by byte-pair encoding, trained on a
part of it with Hugging Face's tokenizers; the digits are scikit-learn's.
"""

import json
import os
import pathlib
import site
import sysconfig
import zlib
from typing import NamedTuple

import numpy as np

VOCABULARY = 25_088
TOKENIZER_BYTES = 40_000_000  # what the tokenizer is trained on
SUFFIXES = {
  "python": {".py", ".pyi"},
  "headers": {".h", ".hpp", ".cuh", ".hh"},
}
BYTES = {"python": 300_000_000, "headers": 40_000_000}  # at most
VALID_SHARE = 50  # one file in so many


class Text(NamedTuple):
  """Tokens to train on and tokens, of other files, to validate on: uint16."""

  train: np.ndarray
  valid: np.ndarray


def _files(suffixes):
  """Source files by the crc32 of their path, so in an order without meaning."""
  roots = {*site.getsitepackages(), sysconfig.get_paths()["stdlib"], "/usr/include"}
  found = set()
  for root in roots:
    for folder, _, names in os.walk(root):
      found |= {
        os.path.join(folder, n) for n in names if os.path.splitext(n)[1] in suffixes
      }
  return sorted((zlib.crc32(path.encode()), path) for path in found)


def _documents(suffixes, limit):
  """Texts, without repeated ones, and whether each is to validate on."""
  seen, total = set(), 0
  for order, path in _files(suffixes):
    content = pathlib.Path(path).read_bytes()
    text = content.decode(errors="ignore")
    if len(text) < 200 or hash(text) in seen:
      continue
    seen.add(hash(text))
    total += len(content)
    yield text, order % VALID_SHARE == 0
    if total >= limit:
      return


def prepare(folder: pathlib.Path) -> dict:
  """Writes the tokens of both kinds of text; gives what was found."""
  from tokenizers import ByteLevelBPETokenizer

  folder.mkdir(parents=True, exist_ok=True)
  documents = {
    kind: list(_documents(suffixes, BYTES[kind])) for kind, suffixes in SUFFIXES.items()
  }
  sample, size = [], 0
  for text, valid in documents["python"]:
    if not valid and size < TOKENIZER_BYTES:
      sample.append(text)
      size += len(text)
  tokenizer = ByteLevelBPETokenizer()
  tokenizer.train_from_iterator(
    sample, VOCABULARY, special_tokens=["<end>"], show_progress=False
  )
  about = {"vocabulary": VOCABULARY, "tokenizer_bytes": size}
  for kind, found in documents.items():
    about[kind] = {"files": len(found), "bytes": sum(len(t) for t, _ in found)}
    for part, wanted in (("train", False), ("valid", True)):
      texts = [text for text, valid in found if valid == wanted]
      encoded = tokenizer.encode_batch(texts)
      end = np.zeros(1, np.uint16)
      pieces = [p for e in encoded for p in (np.array(e.ids, np.uint16), end)]
      tokens = np.concatenate(pieces)
      np.save(folder / f"{kind}_{part}.npy", tokens)
      about[kind][f"{part}_tokens"] = len(tokens)
  (folder / "about.json").write_text(json.dumps(about))
  return about


def text(folder: pathlib.Path, kind: str) -> Text:
  """What :func:`prepare` wrote."""
  return Text(*(np.load(folder / f"{kind}_{part}.npy") for part in Text._fields))


class Images(NamedTuple):
  """Images in 0 to 1, float32 (n, 32, 32, 1), and labels, int32 (n,)."""

  images: np.ndarray
  labels: np.ndarray


def digits() -> tuple[Images, Images]:
  """1,797 handwritten digits of 8 × 8 pixels, enlarged; one in five to test on."""
  import jax
  from sklearn.datasets import load_digits

  found = load_digits()
  small = found.images[..., None].astype(np.float32) / 16
  images = np.asarray(jax.image.resize(small, (len(small), 32, 32, 1), "bilinear"))
  labels = found.target.astype(np.int32)
  test = np.random.default_rng(0).permutation(len(images)) % 5 == 0
  return Images(images[~test], labels[~test]), Images(images[test], labels[test])
