"""The code of pages on trainers, which the documentation's own tests only compile."""

import pytest

from tests.support import pages


@pytest.mark.parametrize("page", ["tunix.md"])
def test_code_of_a_page_runs(page):
  namespace = {"__name__": "page"}
  for code, _ in pages.blocks((pages.ROOT / "docs" / page).read_text()):
    exec(compile(code, page, "exec"), namespace)
