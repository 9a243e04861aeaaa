"""The package's layout: which module may import which, and how long files are."""

import ast
import functools
import pathlib

import pytest

import flashoptim_jax as fo

PACKAGE = "flashoptim_jax"
ROOT = pathlib.Path(__file__).resolve().parents[1]
# From the top down: a module imports from its own floor and from those below.
FLOORS = (
  ("", "__main__"),
  ("flax", "planning", "sharding"),
  ("compression", "conversion", "release", "optimizers"),
  ("update",),
  ("kernels",),
  ("rules",),
  ("checkpoint", "memory", "models", "numerics", "serialization"),
  ("storage",),
  ("jaxprs", "paths"),
)
LONGEST_CHAIN = 9
MOST_LINES = 600
PUBLIC = {
  *("adam", "adamw", "lion", "sgd", "compress", "Storage"),
  *("step", "value_and_release", "released_call"),
  *("from_fp32", "to_fp32", "cast_params", "moments"),
  *("to_optax", "from_optax", "convert", "load_pytorch", "from_pytorch"),
  *("export_safetensors", "import_safetensors", "checkpoint", "flax"),
  *("state_shardings", "with_shardings"),
  *("memory_report", "MemoryReport", "check_numerics", "nonfinite_leaves"),
  *("NonFiniteLeaf", "NumericsError", "NumericsReport", "StalledLeaf"),
  *("FlashState", "CompressedState", "Format", "__version__"),
}


def _modules() -> dict[str, pathlib.Path]:
  found = {}
  for path in sorted((ROOT / PACKAGE).rglob("*.py")):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    found[name.removesuffix(".__init__")] = path
  return found


MODULES = _modules()


@functools.cache
def _imports(name: str) -> frozenset[str]:
  """Modules of the package that a module imports, inside functions too."""
  found = set()
  for node in ast.walk(ast.parse(MODULES[name].read_text())):
    if isinstance(node, ast.Import):
      found |= {each.name for each in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f"{name}: a relative import"
      full = {f"{node.module}.{each.name}" for each in node.names}
      found |= {each if each in MODULES else node.module for each in full}
  return frozenset(found & MODULES.keys()) - {name}


def _floor(name: str) -> int:
  room = f"{name}.".split(".")[1]
  return next(i for i, rooms in enumerate(FLOORS) if room in rooms)


def _longest_chain(name: str, above: tuple[str, ...] = ()) -> tuple[str, ...]:
  assert name not in above, f"circular import: {' -> '.join((*above, name))}"
  chains = (_longest_chain(each, (*above, name)) for each in sorted(_imports(name)))
  return (name, *max(chains, key=len, default=()))


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_down(name):
  upward = [each for each in _imports(name) if _floor(each) < _floor(name)]
  assert not upward


@pytest.mark.parametrize("name", MODULES)
def test_chains_of_imports_are_short_and_no_circles(name):
  chain = _longest_chain(name)
  assert len(chain) <= LONGEST_CHAIN, " -> ".join(chain)


@pytest.mark.parametrize("name", MODULES)
def test_files_are_short_or_say_why_not(name):
  """A longer one says so in its docstring's first lines: "One file, since ..."."""
  text = MODULES[name].read_text()
  if len(text.splitlines()) > MOST_LINES:
    assert "One file, since" in "\n".join(text.splitlines()[:12])


def test_public_names():
  assert set(fo.__all__) | {"__version__"} == PUBLIC
  assert set(dir(fo)) == PUBLIC
  assert all(hasattr(fo, name) for name in PUBLIC)


def test_modules_by_the_names_that_they_had():
  from flashoptim_jax import codec, inspection

  assert codec.__name__ == "flashoptim_jax.storage.codec"
  assert inspection.__name__ == "flashoptim_jax.checkpoint.inspection"


@pytest.mark.parametrize(
  "name", [n for n, p in MODULES.items() if p.name == "__init__.py"][1:]
)
def test_packages_say_whether_they_are_public(name):
  doc = ast.get_docstring(ast.parse(MODULES[name].read_text()))
  public = name.removeprefix(f"{PACKAGE}.") in PUBLIC
  assert ("Not public." in doc) != public
