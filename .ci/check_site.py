"""Checks the built documentation: it loads nothing from elsewhere.

Usage: check_site.py FOLDER
"""

import html.parser
import pathlib
import re
import sys

LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src"}
UNRENDERED = re.compile(r":(?:func|class|mod|meth|math):`|\.\. math::")


class Page(html.parser.HTMLParser):
  """Collects what a page's browser would load from other hosts."""

  def __init__(self):
    """Nothing is found yet."""
    super().__init__()
    self.elsewhere = []

  def handle_starttag(self, tag, attrs):
    """Called by the parser."""
    attributes = dict(attrs)
    target = attributes.get(LOADED.get(tag, "")) or ""
    if re.match(r"(https?:)?//", target) and attributes.get("rel") != "canonical":
      self.elsewhere.append(target)


def main():
  """Raises an AssertionError where something does not hold."""
  pages = list(pathlib.Path(sys.argv[1]).rglob("*.html"))
  assert len(pages) > 10, f"{len(pages)} pages"
  for path in pages:
    page = Page()
    text = path.read_text()
    page.feed(text)
    assert not page.elsewhere, f"{path} loads {page.elsewhere}"
    assert not UNRENDERED.search(text), f"{path} shows {UNRENDERED.search(text)[0]}"
  print(f"{len(pages)} pages load nothing from elsewhere.")


if __name__ == "__main__":
  main()
