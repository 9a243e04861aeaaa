"""The list of benchmarks is complete, and results say how they were made."""

import fnmatch
import json
import pathlib
import re

from benchmarks import record

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "benchmarks" / "README.md").read_text()
COLUMNS = ("script", "question", "needs", "time", "results", "command")
ROWS = [
  dict(zip(COLUMNS, map(str.strip, line.strip("|").split("|")), strict=True))
  for line in README.splitlines()
  if line.startswith("| `")
]


def code(cell):
  return re.findall("`([^`]+)`", cell)


def scripts():
  """Files that run, by their path in the repository."""
  paths = *ROOT.glob("benchmarks/*/*.py"), *ROOT.glob("tests/checks/*.py")
  found = {str(path.relative_to(ROOT)): path.read_text() for path in paths}
  return {name: text for name, text in found.items() if "__main__" in text}


def test_every_script_is_listed_with_its_command():
  listed = [code(row["script"])[0] for row in ROWS]
  assert sorted(listed) == sorted(scripts())
  for name, row in zip(listed, ROWS, strict=True):
    assert f"python {name}" in code(row["command"])[0]
    assert row["question"] and row["needs"] and row["time"]


def test_every_result_has_a_script_that_writes_it():
  results = {path.name: json.loads(path.read_text()) for path in _results()}
  unwritten = {name for name, result in results.items() if "reason" in result}
  for name in unwritten:
    assert f"`{name}`" in README.splitlines()[-1]
  written = []
  for row in ROWS:
    source = scripts()[code(row["script"])[0]]
    for pattern in code(row["results"]):
      found = fnmatch.filter(results, pattern)
      assert found, f"{pattern} matches no result"
      # Of several files the last part of the name differs.
      several = re.sub(r"[^_]*\.json$", "", pattern)
      assert f'"{pattern}"' in source or f'f"{several}' in source, pattern
      written += found
  assert sorted(written) == sorted(set(results) - unwritten)


def test_every_result_says_when_and_with_what_it_was_measured():
  for path in _results():
    result = json.loads(path.read_text())
    if "reason" in result:
      continue
    # One for each leaf set, which are measured one by one.
    parts = result.values() if path.name == "gpu_step.json" else (result,)
    for part in parts:
      assert {"date", "versions"} <= part.keys(), path.name


def test_results_are_recorded_in_one_place():
  for name, text in scripts().items():
    for own in ("datetime", "importlib.metadata", "jax.__version__"):
      assert own not in text, f"{name} has {own}"


def test_record(tmp_path):
  about = record.about("pytest", "no-such-package")
  assert about.keys() == {"date", "device", "versions"}
  assert {"jax", "optax", "flashoptim_jax", "pytest"} <= about["versions"].keys()
  assert "no-such-package" not in about["versions"]
  assert "device" not in record.about(device="")
  assert record.earlier("a.json", tmp_path) == {}
  record.write("a.json", about, tmp_path)
  assert record.earlier("a.json", tmp_path) == record.load("a.json", tmp_path) == about
  assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def _results():
  return sorted((ROOT / "benchmarks" / "results").iterdir())
