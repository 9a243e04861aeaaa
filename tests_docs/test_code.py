"""The documentation's code runs, page by page, and the notebooks do."""

import nbformat
import pytest

from tests.support.pages import NOTEBOOKS, PAGES, blocks

PAGES_WITH_CODE = [page for page in PAGES if any(blocks(page.read_text()))]


@pytest.mark.parametrize("page", PAGES_WITH_CODE, ids=lambda page: page.name)
def test_code_of_a_page_runs(page, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  namespace = {"__name__": "page"}
  for code, runs in blocks(page.read_text()):
    compiled = compile(code, str(page), "exec")
    if runs:
      exec(compiled, namespace)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  notebook = nbformat.read(path, as_version=4)
  nbformat.validate(notebook)
  namespace = {"__name__": "notebook"}
  for i, cell in enumerate(notebook.cells):
    if cell.cell_type == "code":
      assert not cell.outputs, "Clear the outputs: the page would keep them."
      exec(compile(cell.source, f"{path.name}, cell {i}", "exec"), namespace)
