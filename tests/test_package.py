"""The package as others see it: names, signatures, imports, distributions."""

import doctest
import importlib
import importlib.resources
import inspect
import pathlib
import pkgutil
import subprocess
import sys
import tarfile
import zipfile

import optax
import pytest

import flashoptim_jax as fo
from tests.support.processes import python

ROOT = pathlib.Path(__file__).parent.parent
KEYWORD = inspect.Parameter.KEYWORD_ONLY
EMPTY = inspect.Parameter.empty
OPTIONAL = (
  "flax",
  "orbax",
  "safetensors",
  "torch",
  "triton",
  "jax_triton",
  "matplotlib",
  "libtpu",
)


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


@pytest.mark.slow
def test_nothing_is_compiled_twice():
  """Whatever the first call imports must leave JAX's configuration as it is."""
  python("""
import functools, jax, jax.numpy as jnp, optax
import flashoptim_jax as fo

@jax.jit
def unrelated(params):
  return params["w"] + 1

def update(tx, grads, state, params):
  updates, state = tx.update(grads, state, params)
  return optax.apply_updates(params, updates), state

def release(tx, _, state, params):
  def loss(live):
    product = fo.released_call(lambda w, x: x @ w, live["w"], jnp.ones((2, 2)))
    return jnp.sum(product)
  _, *new = fo.value_and_release(loss, tx)(params, state)
  return new

params = {"w": jnp.ones((2, 40), jnp.bfloat16)}
unrelated(params)
runs = []
for function, tx in (
  (fo.step, fo.lion(0.1)),
  (update, fo.lion(0.1)),
  (release, fo.lion(0.1)),
  (fo.step, fo.compress(optax.lion(0.1))),
  (fo.step, fo.sgd(0.1, implementation="mosaic_tpu")),
):
  runs.append((jax.jit(functools.partial(function, tx)), params, tx.init(params)))
for _ in range(3):
  for i, (step, own, state) in enumerate(runs):
    runs[i] = step, *step(params, state, own)
unrelated(params)
found = [step._cache_size() for step in (unrelated, *(run[0] for run in runs))]
assert found == [1] * 6, found
""")


@pytest.mark.slow
def test_exported_steps_run_in_another_process(tmp_path):
  """A serialized step says what states it takes, and gives such states."""
  optimizers = """
import functools, pathlib, jax, jax.numpy as jnp, optax
import flashoptim_jax as fo
OPTIMIZERS = {
  "adamw": fo.adamw(0.1),
  "chain": optax.chain(optax.clip(1.0), fo.lion(optax.constant_schedule(0.1))),
  "sgd": fo.sgd(0.1, storage=fo.Storage(None, 32)),
  "compress": fo.compress(optax.adamw(optax.constant_schedule(0.1))),
}
def arguments(tx):
  params = {"w": jnp.ones((2, 32), jnp.bfloat16), "norm": jnp.ones(3)}
  return params, tx.init(params), params
"""
  python(f"""{optimizers}
for name, tx in OPTIMIZERS.items():
  step = jax.jit(functools.partial(fo.step, tx))
  serialized = jax.export.export(step)(*arguments(tx)).serialize()
  pathlib.Path({str(tmp_path)!r}, name).write_bytes(serialized)
""")
  python(f"""{optimizers}
for name, tx in OPTIMIZERS.items():
  serialized = pathlib.Path({str(tmp_path)!r}, name).read_bytes()
  args = arguments(tx)
  params, state = jax.export.deserialize(bytearray(serialized)).call(*args)
  assert jax.tree.structure(state) == jax.tree.structure(args[1]), name
  assert float(params["w"][0, 0]) < 1, name
  # The state is one that the optimizer itself goes on from.
  jax.eval_shape(functools.partial(fo.step, tx), args[0], state, params)
""")


def test_public_names():
  names = {
    *("adamw", "adam", "sgd", "lion", "compress", "Storage", "step", "flax"),
    *("from_fp32", "to_fp32", "cast_params", "moments"),
    *("to_optax", "from_optax", "convert"),
    *("checkpoint", "export_safetensors", "import_safetensors"),
    *("from_pytorch", "load_pytorch"),
    *("memory_report", "check_numerics", "nonfinite_leaves"),
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
      "(master_bits=24, moment_bits=8, group_size=32, companding='root',"
      " min_quantized_size=4096)",
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
      parameters=[p.replace(annotation=EMPTY) for p in signature.parameters.values()],
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
    f"{name}{path.relative_to(ROOT)}" for kind in kinds for path in folder.rglob(kind)
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
  extras = {"test", "test-all", "examples", "cuda12", "cuda13", "tpu", "docs"}
  for extra in extras:
    assert f"Provides-Extra: {extra}" in metadata
