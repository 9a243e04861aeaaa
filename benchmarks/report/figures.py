"""Writes every table and plot of README and docs/ from the JSON in results/.

``python benchmarks/report/figures.py`` rewrites them; with ``--check`` it fails if that
would change anything. A table stands between ``<!-- name -->`` and
``<!-- /name -->``. A plot says which data it was drawn from.
"""

import argparse
import pathlib
import re
import sys

sys.path.append(str(pathlib.Path(__file__).parents[2]))

from benchmarks.report import compress_tables, plots, tables

ROOT = pathlib.Path(__file__).parents[2]
FIGURES = ROOT / "docs" / "figures"
BLOCK = re.compile(r"<!-- ([\w-]+) -->\n.*?<!-- /\1 -->", re.DOTALL)
TABLES = {
  "results": tables.readme,
  "plans": tables.plans,
  "plan-8b": tables.plan_of_8b,
  "plan-check": tables.plan_check,
  "plan-peaks": tables.plan_peaks,
  "release": tables.release,
  "release-memory": tables.release_memory,
  "release-bytes": tables.release_bytes,
  "host-offload": tables.host_offload,
  "fsdp": tables.fsdp,
  "zero1": tables.zero1,
  "speed": tables.speed,
  "tpu-kernel": tables.tpu_kernel,
  "tpu-tried": tables.tpu_tried,
  "tpu-compile": tables.tpu_compile,
  "tpu-interpret": tables.tpu_interpret,
  "tpu-sharding": tables.tpu_sharding,
  "tpu-train-step": tables.tpu_train_step,
  "checkpoints": tables.checkpoints,
  "faults": tables.faults,
  "storage-bytes": tables.storage_bytes,
  "companding": tables.companding_table,
  "example-losses": tables.example_losses,
  "quality": tables.quality,
  "moments": tables.moments,
  "compress-codecs": compress_tables.codecs,
  "compress-quality": compress_tables.quality,
  "compress-convergence": compress_tables.convergence,
  "compress-memory": compress_tables.memory,
}


def filled(text):
  """A page with its tables as the JSON has them."""

  def fill(match):
    name = match[1]
    return f"<!-- {name} -->\n{TABLES[name]()}\n<!-- /{name} -->"

  return BLOCK.sub(fill, text)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--check", action="store_true", help="change nothing")
  arguments = parser.parse_args()
  stale = []
  for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
    text = path.read_text()
    new = filled(text)
    if new != text:
      stale.append(path)
      if not arguments.check:
        path.write_text(new)
  drawn = plots.figures()
  for path in FIGURES.glob("*.svg"):
    if path.stem not in drawn:
      stale.append(path)
      if not arguments.check:
        path.unlink()
  for name, figure in drawn.items():
    path = FIGURES / f"{name}.svg"
    if not path.is_file() or plots.digest_of(path) != figure.digest():
      stale.append(path)
      if not arguments.check:
        figure.draw(path)
  if arguments.check:
    for path in stale:
      print(f"{path.relative_to(ROOT)} is not what benchmarks/results says.")
    return int(bool(stale))
  return 0


if __name__ == "__main__":
  sys.exit(main())
