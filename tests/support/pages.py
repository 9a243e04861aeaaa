"""The documentation's pages and notebooks, and the code in them."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
# Code for readers, or setup that they don't see. What can't run here is marked, with
# the reason, and still has to be Python.
BLOCK = re.compile(
  r"^(?P<mark><!-- compiled only: [^>]+ -->\n)?"
  r"(?:```python\n(?P<shown>.*?)^```|<!-- setup\n(?P<hidden>.*?)^-->)",
  re.DOTALL | re.MULTILINE,
)


def blocks(text):
  """Pairs of code and whether to run it, lines as they are numbered in the page."""
  for match in BLOCK.finditer(text):
    kind = "shown" if match["shown"] is not None else "hidden"
    lines = text[: match.start(kind)].count("\n")
    yield "\n" * lines + match[kind], match["mark"] is None
