"""The documentation: its reference is complete, its pages and figures are found."""

import ast
import importlib
import itertools
import json
import pathlib
import re

import flashoptim_jax as fo
from benchmarks import record
from benchmarks.report import figures, plots, tables
from tests.support import pages

ROOT = pages.ROOT


def test_blocks_of_a_page():
  text = "a\n<!-- setup\nx = 1\n-->\n```python\ny = x\n```\n```bash\nls\n```\n"
  text += "<!-- compiled only: needs a pod -->\n```python\nz\n```\n"
  found = list(pages.blocks(text))
  assert [(code.strip(), runs) for code, runs in found] == [
    ("x = 1", True),
    ("y = x", True),
    ("z", False),
  ]
  assert found[1][0].count("\n") == 6


def test_every_python_fence_is_a_block():
  for page in pages.PAGES:
    text = page.read_text()
    fences = len(re.findall(r"^ *```py", text, re.MULTILINE))
    shown = [match["shown"] for match in pages.BLOCK.finditer(text)]
    assert fences == sum(code is not None for code in shown), page


def test_there_are_notebooks():
  names = {"quickstart", "migrate_from_optax", "finetune", "plan_70b"}
  assert {path.stem for path in pages.NOTEBOOKS} == names


def test_the_reference_covers_every_public_name():
  page = (ROOT / "docs" / "api.md").read_text()
  named = set(re.findall(r"^::: flashoptim_jax\.([\w.]+)$", page, re.MULTILINE))
  assert set(fo.__all__) <= named
  for name in named - {"planning", "models"}:
    assert name in fo.__all__, f"{name} is not public"
  for module in ("checkpoint", "flax", "planning", "models"):
    listed = re.search(rf"jax\.{module}\n    options:\n      members: \[(.*)\]", page)
    for name in listed[1].split(", "):
      assert getattr(importlib.import_module(f"flashoptim_jax.{module}"), name).__doc__


def test_every_public_docstring_describes_its_arguments():
  for name in fo.__all__:
    value = getattr(fo, name)
    if not callable(value) or isinstance(value, type):
      continue
    tree = ast.parse(pathlib.Path(value.__code__.co_filename).read_text())
    (node,) = (
      n
      for n in tree.body
      if isinstance(n, ast.FunctionDef) and n.name == value.__name__
    )
    arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
    for argument in arguments:
      assert re.search(rf"^ +{argument.arg}: ", value.__doc__, re.MULTILINE), (
        f"{name} does not describe {argument.arg}"
      )


def test_every_page_is_in_the_navigation():
  navigation = (ROOT / "mkdocs.yml").read_text()
  for page in (ROOT / "docs").glob("*.md"):
    assert f": {page.name}\n" in navigation


def test_every_test_that_is_named_exists():
  tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
  for page in pages.PAGES:
    for name in re.findall(r"`(test_\w+)`", page.read_text()):
      assert f"def {name}(" in tests, f"{page.name} names {name}"


def test_every_picture_is_generated():
  shown = set(
    itertools.chain.from_iterable(
      re.findall(r"\]\(figures/([\w-]+)\.svg\)", page.read_text())
      for page in pages.PAGES
    )
  )
  drawn = {path.stem for path in figures.FIGURES.iterdir()}
  assert shown == drawn


def run(name, seed, value):
  return {"name": name, "seed": seed, "value": value}


def test_quality_table():
  found = {
    "baseline": "optax",
    "metric": "loss",
    "runs": [
      run("optax", 0, 1.0),
      run("optax", 1, 2.0),
      run("fo", 0, 1.1),
      run("fo", 1, 2.3),
      run("diverged", 0, None),
    ],
  }
  lines = tables.quality_table(found).splitlines()
  assert lines[3] == "| fo | 2 of 2 | 1.7000 ± 0.8485 | 0.2000 ± 0.1000 |"
  assert lines[4] == "| diverged | 0 of 1 | – | – |"


def test_quality_runs_have_a_section_and_a_picture(tmp_path, monkeypatch):
  assert tables.quality.__doc__
  losses = {"steps": [1, 2], "losses": [3.0, 2.0]}
  found = {
    "title": "A model",
    "metric": "loss",
    "baseline": "optax",
    "device": "cpu",
    "versions": {"jax": "0.10.0"},
    "date": "2026-01-01",
    "learning_rate": 1e-3,
    "runs": [run("optax", s, 2.0) | losses for s in range(2)]
    + [run("fo", s, 2.1) | losses for s in range(2)],
  }
  (tmp_path / "quality_model.json").write_text(json.dumps(found))
  monkeypatch.setattr(record, "RESULTS", tmp_path)
  page = figures.filled("<!-- quality -->\n<!-- /quality -->")
  assert "### A model" in page
  assert "![A model](figures/quality_model.svg)" in page
  figure = plots.quality_figures()["quality_model"]
  figure.draw(tmp_path / "x.svg")
  assert plots.digest_of(tmp_path / "x.svg") == figure.digest()
