"""Two tiers of tests. The first is quick; what is slow belongs to the second."""

import importlib.util
from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(values: Iterable[Any], *quick: Any) -> list[Any]:
  """Parameters of a test, of which all but some are slow.

  Args:
    values: The parameters; a tuple for a test with several.
    quick: Those of the first tier; where none is given, the first of ``values``.
  """
  values = list(values)
  quick = quick or values[:1]
  unknown = [value for value in quick if value not in values]
  assert not unknown, f"{unknown} are not among the parameters"
  return [
    value
    if value in quick
    else pytest.param(
      *(value if type(value) is tuple else (value,)), marks=pytest.mark.slow
    )
    for value in values
  ]


def require(package: str) -> None:
  """Fails where a package of the second tier is missing: a skip may go unnoticed."""
  if importlib.util.find_spec(package) is None:
    pytest.fail(
      f"{package} is not installed; expected the extra 'test-all'. Run"
      " `pip install -e '.[test-all]'`.",
      pytrace=False,
    )
