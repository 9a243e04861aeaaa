"""Docstrings' reStructuredText as Markdown, for mkdocstrings."""

import pathlib
import re
import textwrap

import griffe
from latex2mathml import converter

_ROLE = re.compile(r":(?:func|class|mod|meth):`~?([^`]+)`")
_LINK = re.compile(r"`([^`<]+?)\s*<([^>\s]+)>`_")
_MATH_ROLE = re.compile(r":math:`([^`]+)`")
# An indented block after ".. math::", or after a line that ends in "::".
_MATH = re.compile(r"^( *)\.\. math::\n\n((?:\1 +.*\n|\n)+)", re.MULTILINE)
_LITERAL = re.compile(r"^( *)(\S.*)::\n\n((?:\1 +.*(?:\n|\Z)|\n)+)", re.MULTILINE)

# What the reference has an entry for.
_PUBLIC = re.findall(
  r"^::: flashoptim_jax\.(\w+)$",
  pathlib.Path(__file__).with_name("api.md").read_text(),
  re.MULTILINE,
)


class ReStructuredText(griffe.Extension):
  """Rewrites every docstring as it is loaded."""

  def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
    """Called by griffe for modules, classes, functions and attributes."""
    if obj.docstring:
      obj.docstring.value = to_markdown(obj.docstring.value)


def to_markdown(text: str) -> str:
  """Roles, links, equations and literal blocks."""
  text = _MATH.sub(_equation, text)
  text = _LITERAL.sub(_fence, text)
  text = _MATH_ROLE.sub(lambda match: converter.convert(match[1]), text)
  text = _LINK.sub(lambda match: f"[{' '.join(match[1].split())}]({match[2]})", text)
  return _ROLE.sub(_reference, text)


def _equation(match: re.Match) -> str:
  latex = " ".join(match[2].split())
  return f"{match[1]}{converter.convert(latex, display='block')}\n\n"


def _fence(match: re.Match) -> str:
  indent, line, block = match.groups()
  code = textwrap.indent(textwrap.dedent(block).strip("\n"), indent)
  return f"{indent}{line}:\n\n{indent}```python\n{code}\n{indent}```\n\n"


def _reference(match: re.Match) -> str:
  name = match[1]
  short = name.removeprefix("flashoptim_jax.")
  return f"[`{name}`][flashoptim_jax.{short}]" if short in _PUBLIC else f"`{name}`"
