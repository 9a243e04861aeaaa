"""The Triton kernel, on a machine without a GPU.

It compiles for real GPUs, and does in Triton's interpreter what the XLA path does.
"""

import importlib.util
import platform
import re
import sys

import pytest

from flashoptim_jax import Storage
from flashoptim_jax.kernels import triton as launches
from flashoptim_jax.kernels.base import GROUP_SIZE
from flashoptim_jax.storage import codec
from tests.support.processes import worker
from tests.support.tiers import require

pytestmark = pytest.mark.slow

# Triton has no wheels for other machines; there the kernel can't run either.
if not (sys.platform == "linux" and platform.machine() == "x86_64"):
  pytest.skip("needs x86-64 Linux", allow_module_level=True)

CONSTANTS = {
  "ALIGNMENT": 32,
  "RULE": "adam",
  "NESTEROV": False,
  "DECAY": True,
  "MASTER_BITS": 24,
  "COMPRESSED": True,
  "EPS_ROOT": False,
  "ROOT": True,
  "NEW_PARAMS": True,
  "GAPS": False,
  "DITHER": 0,
  "BLOCK_GROUPS": 64,
}
MOMENTS = {"adam": ("mu", "nu"), "lion": ("mu",), "momentum": ("mu",), "sgd": ()}
VARIANTS = {
  "adam": {},
  "adam, 17 leaves": {"COUNT": 17},
  "adam, ragged rows": {"ALIGNMENT": 2},
  "adam, gaps": {"GAPS": True},
  "adam, update": {"NEW_PARAMS": False},
  "nadam, paper": {"NESTEROV": True, "ROOT": False, "EPS_ROOT": True},
  "adam, 32/32": {"MASTER_BITS": 32, "COMPRESSED": False},
  "adam, none/8": {"MASTER_BITS": 0},
  "adam, 16/8": {"MASTER_BITS": 0, "DITHER": 1},
  "adam, 16/8, part": {"MASTER_BITS": 0, "DITHER": 2},
  "adam, 16/8, rows": {"MASTER_BITS": 0, "DITHER": 3, "NEW_PARAMS": False},
  "adam, 16/32, rows": {"MASTER_BITS": 0, "DITHER": 3, "COMPRESSED": False},
  "adam, float16": {"dtype": "fp16"},
  "adam, float16, 16/8": {"dtype": "fp16", "MASTER_BITS": 0, "DITHER": 1},
  "adam, float32, update": {"dtype": "fp32", "MASTER_BITS": 0, "NEW_PARAMS": False},
  "lion": {"RULE": "lion"},
  "nesterov": {"RULE": "momentum", "NESTEROV": True, "DECAY": False},
  "sgd": {"RULE": "sgd"},
}


def build(target, aliased_outputs, dtype="bf16", COUNT=2, **changes):
  """Compiles one variant down to machine code, as jax-triton would ask for it.

  For a compute capability of NVIDIA's, or an architecture of AMD's.
  """
  import triton
  from triton.backends.compiler import GPUTarget
  from triton.compiler import ASTSource

  constants = {**CONSTANTS, **changes, "COUNT": COUNT}
  constants["WIDTH"] = 1 << (COUNT - 1).bit_length()
  types = {"scalars": "*fp32", "layout": "*i32", "grad": "*bf16", "param": f"*{dtype}"}
  if constants["MASTER_BITS"]:
    types["correction"] = "*i8" if constants["MASTER_BITS"] == 24 else "*i16"
  for name in MOMENTS[constants["RULE"]]:
    types[name] = "*fp32"
    if constants["COMPRESSED"]:
      types[name] = {"mu": "*i8", "nu": "*u8"}[name]
      types[f"{name}_scale"] = "*bf16"
  names = tuple(name for name in types if name not in ("scalars", "layout"))
  written = tuple(
    name
    for name in names
    if name != "grad" and (name != "param" or constants["NEW_PARAMS"])
  )
  kernel = launches.launcher(
    COUNT, names, written, constants["NEW_PARAMS"], aliased_outputs
  )
  types["update"] = "*bf16"
  signature, attributes = {}, {}
  for i, argument in enumerate(kernel.arg_names):
    if argument in constants:
      signature[argument] = "constexpr"
    else:
      name = argument.removeprefix("new_").rstrip("0123456789").rstrip("_")
      signature[argument] = types[name]
      attributes[(i,)] = [["tt.divisibility", 16]]
  source = ASTSource(
    kernel, signature=signature, constexprs=constants, attrs=attributes
  )
  nvidia = isinstance(target, int)
  return triton.compile(
    source,
    target=GPUTarget("cuda", target, 32) if nvidia else GPUTarget("hip", target, 64),
    options={"num_warps": 4, "enable_fp_fusion": False},
  )


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path, monkeypatch):
  require("triton")
  monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def test_constants_are_the_codecs():
  """The kernel can't import them."""
  from flashoptim_jax.kernels import triton_kernel

  of_kernel = {
    "_GROUP": GROUP_SIZE,
    "_TINY": codec.TINY,
    "_LARGEST_SECOND": codec.LARGEST_SECOND,
    "_HALF_RUN": codec.HALF_RUN,
    "_LARGEST_RATIO": codec.LARGEST_RATIO["first"],
    "_HALF_OF_FLOAT32": codec.HALF_OF_FLOAT32,
    "_PLACE": codec.PLACE,
  }
  found = {name: getattr(triton_kernel, name).value for name in of_kernel}
  assert found == of_kernel
  # For second moments it takes the square.
  assert codec.LARGEST_RATIO["second"] == codec.LARGEST_RATIO["first"] ** 2
  assert Storage().group_size == GROUP_SIZE


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles(variant, capability):
  compiled = build(capability, True, **VARIANTS[variant])
  assert f".target sm_{capability}" in compiled.asm["ptx"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles_for_amd(variant, monkeypatch):
  import triton

  from flashoptim_jax.kernels import triton_kernel, triton_portable

  for name, function in vars(triton_portable).items():
    if isinstance(function, triton.JITFunction):
      monkeypatch.setattr(triton_kernel, name, function)
  compiled = build("gfx942", True, **VARIANTS[variant])
  assert re.search(r"\.amdgcn_target .*gfx942", compiled.asm["amdgcn"])


@pytest.mark.parametrize("aliased_outputs", [True, False])
def test_arguments_of_both_jax_triton_lines(aliased_outputs):
  compiled = build(90, aliased_outputs)
  arguments = compiled.src.fn.arg_names
  assert ("new_param_1" in arguments) == aliased_outputs
  assert "update_0" not in arguments


def test_memory_is_read_in_wide_words():
  ptx = build(90, True, COUNT=16).asm["ptx"]
  assert ptx.count("ld.global.v4.b32") >= 7
  assert ptx.count("st.global.v4.b32") >= 5


def test_equals_xla_in_the_interpreter():
  """Codes, scales and float32 moments bit for bit; masters within one unit."""
  assert int(worker("triton_worker")) > 8


def test_triton_is_installed():
  assert importlib.util.find_spec("triton") is not None
