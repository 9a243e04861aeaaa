"""The package as others see it: names, signatures, imports, distributions."""

import doctest
import importlib
import importlib.resources
import inspect
import os
import pathlib
import pkgutil
import subprocess
import sys
import tarfile
import zipfile

import optax
import pytest

import flashoptim_jax as fo

ROOT = pathlib.Path(__file__).parent.parent
KEYWORD = inspect.Parameter.KEYWORD_ONLY
EMPTY = inspect.Parameter.empty
OPTIONAL = (
    "flax", "orbax", "safetensors", "torch", "triton", "jax_triton", "matplotlib",
    "libtpu",
)


def python(code: str) -> str:
  """What a fresh interpreter prints."""
  env = dict(os.environ, JAX_PLATFORMS="cpu")
  result = subprocess.run(
      [sys.executable, "-c", code],
      env=env,
      capture_output=True,
      text=True,
      check=False,
  )
  assert result.returncode == 0, result.stderr
  return result.stdout


def test_import_starts_no_backend_and_needs_no_extras():
  out = python(f"""
import sys, optax
before = set(sys.modules)
import flashoptim_jax as fo
from jax._src import xla_bridge
assert not xla_bridge._backends, xla_bridge._backends
names = {{module.split(".")[0] for module in sys.modules}}
print(sorted(names & set({OPTIONAL!r})))
assert "flashoptim_jax.flax" not in sys.modules
""")
  assert out.strip() == "[]"


def test_step_needs_no_extras():
  """With every optional package made impossible to import."""
  python(f"""
import sys
for name in {OPTIONAL!r}:
  sys.modules[name] = None
import flashoptim_jax as fo, jax, jax.numpy as jnp
tx = fo.adamw(0.1)
params, state = fo.from_fp32(tx, {{"w": jnp.ones((4, 64))}})
params, state = jax.jit(lambda g, s, p: fo.step(tx, g, s, p))(params, state, params)
assert float(params["w"][0, 0]) < 1
try:
  fo.flax
except ImportError:
  pass
else:
  raise AssertionError("Flax was found")
""")


def test_public_names():
  names = {
      *("adamw", "adam", "sgd", "lion", "compress", "Storage", "step", "flax"),
      *("from_fp32", "to_fp32", "cast_params", "moments"),
      *("to_optax", "from_optax", "convert"),
      *("checkpoint", "export_safetensors", "import_safetensors"),
      *("from_pytorch", "load_pytorch"),
      *("memory_report", "check_numerics"),
      *("released_call", "value_and_release"),
  }
  assert names <= set(fo.__all__)
  for name in fo.__all__:
    assert getattr(fo, name).__doc__, name
  assert {"TrainState", "Optimizer"} <= set(dir(fo.flax))
  with pytest.raises(AttributeError, match="no attribute 'adagrad'"):
    _ = fo.adagrad
  assert fo.__version__


EXTRAS = {"storage": fo.Storage(), "implementation": None}
ADAM = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "eps_root": 0.0, "mu_dtype": None}


@pytest.mark.parametrize(
    ("name", "positional", "keyword"),
    [
        (
            "adamw",
            {**ADAM, "weight_decay": 1e-4, "mask": None},
            {"nesterov": False, "decouple_lr": False, **EXTRAS},
        ),
        ("adam", ADAM, {"nesterov": False, **EXTRAS}),
        (
            "sgd",
            {"momentum": None, "nesterov": False, "accumulator_dtype": None},
            {
                "dampening": 0.0,
                "weight_decay": 0.0,
                "mask": None,
                "decouple_lr": False,
                **EXTRAS,
            },
        ),
        (
            "lion",
            {
                "b1": 0.9,
                "b2": 0.99,
                "mu_dtype": None,
                "weight_decay": 1e-3,
                "mask": None,
            },
            {"decouple_lr": False, **EXTRAS},
        ),
    ],
)
def test_optimizer_signatures(name, positional, keyword):
  ours = inspect.signature(getattr(fo, name)).parameters.values()
  found = [(p.name, p.default) for p in ours if p.kind is not KEYWORD]
  assert found == [("learning_rate", EMPTY), *positional.items()]
  found = [(p.name, p.default) for p in ours if p.kind is KEYWORD]
  assert found == list(keyword.items())
  # What Optax takes by position we take by the same position, with its default;
  # what it takes by keyword we take by keyword.
  theirs = inspect.signature(getattr(optax, name)).parameters.values()
  places = list(inspect.signature(getattr(fo, name)).parameters)
  for i, parameter in enumerate(theirs):
    own = inspect.signature(getattr(fo, name)).parameters[parameter.name]
    assert own.default == parameter.default, parameter.name
    if parameter.kind is not KEYWORD:
      assert places[i] == parameter.name


@pytest.mark.parametrize(
    ("name", "signature"),
    [
        ("step", "(tx, grads, opt_state, params, **extra_args)"),
        ("to_fp32", "(params, opt_state)"),
        ("cast_params", "(params, dtype, keep=())"),
        ("moments", "(opt_state)"),
        ("memory_report", "(tx, params)"),
        (
            "check_numerics",
            "(params, opt_state, learning_rate, *, raise_error=False)",
        ),
        (
            "Storage",
            (
                "(master_bits=24, moment_bits=8, group_size=32, companding='root',"
                " min_quantized_size=4096)"
            ),
        ),
    ],
)
def test_other_signatures(name, signature):
  assert bare_signature(getattr(fo, name)) == signature


def bare_signature(function) -> str:
  """A signature without annotations."""
  signature = inspect.signature(function)
  return str(
      signature.replace(
          parameters=[
              p.replace(annotation=EMPTY) for p in signature.parameters.values()
          ],
          return_annotation=inspect.Signature.empty,
      )
  )


def test_from_fp32_signature():
  parameters = inspect.signature(fo.from_fp32).parameters
  assert list(parameters) == ["tx", "params_fp32", "dtype", "keep"]
  assert parameters["dtype"].default.dtype == "bfloat16"
  assert parameters["keep"].default == ()


def modules():
  skip = ("flashoptim_jax.kernels.triton", "flashoptim_jax.kernels.mosaic")
  return [
      info.name
      for info in pkgutil.walk_packages(fo.__path__, "flashoptim_jax.")
      if not info.name.startswith(skip)
  ] + ["flashoptim_jax"]


@pytest.mark.parametrize("module", modules())
def test_docstring_examples(module):
  module = importlib.import_module(module)
  assert module.__doc__
  assert doctest.testmod(module).failed == 0


def test_there_are_docstring_examples():
  finder = doctest.DocTestFinder()
  optimizers = importlib.import_module("flashoptim_jax.optimizers")
  assert any(test.examples for test in finder.find(optimizers))


def test_is_typed():
  assert importlib.resources.files(fo).joinpath("py.typed").is_file()


def test_kernels_link():
  """The card's name at the top of the checkout."""
  link = ROOT / "kernels"
  assert link.resolve() == ROOT / "flashoptim_jax" / "kernels"
  assert (link / "xla.py").is_file()


def contents(name: str) -> set[str]:
  """Files of the source tree's package folder that have to be shipped."""
  folder = ROOT / "flashoptim_jax"
  kinds = ("*.py", "*.json", "py.typed")
  return {
      f"{name}{path.relative_to(ROOT)}"
      for kind in kinds
      for path in folder.rglob(kind)
  }


def hatch(folder, target, output):
  """Builds in the running environment: no network."""
  command = [sys.executable, "-m", "hatchling", "build", "--target", target]
  subprocess.run(
      [*command, "--directory", str(output)],
      cwd=folder,
      check=True,
      capture_output=True,
  )


def test_sdist_and_the_wheel_built_from_it(tmp_path):
  stem = f"flashoptim_optax-{fo.__version__}"
  hatch(ROOT, "sdist", tmp_path)
  with tarfile.open(tmp_path / f"{stem}.tar.gz") as archive:
    names = set(archive.getnames())
    archive.extractall(tmp_path, filter="data")
  assert contents(f"{stem}/") <= names
  assert {f"{stem}/{name}" for name in ("pyproject.toml", "LICENSE")} <= names
  hatch(tmp_path / stem, "wheel", tmp_path)
  (wheel,) = tmp_path.glob("*.whl")
  assert wheel.name == f"{stem}-py3-none-any.whl"
  with zipfile.ZipFile(wheel) as archive:
    names = set(archive.namelist())
    metadata = archive.read(f"{stem}.dist-info/METADATA").decode()
  assert contents("") <= names
  info = f"{stem}.dist-info/"
  others = {name for name in names if not name.startswith(info)}
  assert {name.split("/")[0] for name in others} == {"flashoptim_jax"}
  assert f"{info}licenses/LICENSE" in names
  required = [
      line.removeprefix("Requires-Dist: ")
      for line in metadata.splitlines()
      if line.startswith("Requires-Dist: ") and "extra ==" not in line
  ]
  assert sorted(required) == ["jax>=0.10", "optax>=0.2.8"]
  assert "Name: flashoptim-optax" in metadata
  assert "Requires-Python: >=3.11" in metadata
  extras = {"test", "examples", "cuda12", "cuda13", "tpu", "docs"}
  for extra in extras:
    assert f"Provides-Extra: {extra}" in metadata
