"""State dicts of FlashOptim for PyTorch, made by hand after its format."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import flashoptim_jax as fo
from flashoptim_jax.conversion import pytorch
from tests.support import cases
from tests.support.tiers import slow_but

SHAPES = {"0.weight": (5, 13), "0.bias": (5,), "2.weight": (2, 5)}
KEYS = {
  "adamw": {"mu": "exp_avg", "nu": "exp_avg_sq"},
  "lion": {"mu": "exp_avg"},
  "sgd": {"mu": "momentum_buffer"},
}
TX = {
  "adamw": fo.adamw(1e-3, storage=cases.QUANTIZED),
  "lion": fo.lion(1e-3, storage=cases.QUANTIZED),
  "sgd": fo.sgd(1e-3, 0.9, storage=cases.QUANTIZED),
}


def ulp(x, mantissa, smallest):
  exponent = np.floor(np.log2(np.maximum(np.abs(x), 2.0**smallest)))
  return 2.0 ** (exponent - mantissa)


def quantized(x, signed):
  """Codes and scales of the flattened tensor, as the paper defines them."""
  flat = np.abs(x).ravel() if signed else np.sqrt(x).ravel()
  groups = np.pad(flat, (0, -flat.size % 32)).reshape(-1, 32)
  scales = np.maximum(groups.max(1), 1e-12)
  n = groups / scales[:, None]
  n = 2 * n / (1 + n) if signed else n
  codes = np.floor(n * (127 if signed else 255) + 0.5).ravel()[: flat.size]
  codes = codes.reshape(x.shape) * np.where(x < 0, -1, 1)
  return codes.astype(np.int8 if signed else np.uint8), scales.astype(np.float16)


def make(name, bits=24, quantize=True, dtype=ml_dtypes.bfloat16):
  """State dicts, and the float64 masters and moments that they encode."""
  rng = np.random.default_rng(0)
  mantissa, smallest = (7, -126) if dtype == ml_dtypes.bfloat16 else (10, -14)
  model, state, masters = {}, {}, {}
  moments = {moment: {} for moment in KEYS[name]}
  for index, (key, shape) in enumerate(SHAPES.items()):
    x = rng.normal(size=shape)
    param = x.astype(dtype)
    model[key] = param
    own = {} if name != "adamw" else {"step": np.int64(7)}
    if bits:
      largest, width = {24: (127, np.int8), 32: (32767, np.int16)}[bits]
      half = ulp(param.astype(float), mantissa, smallest) / 2
      error = np.rint((x - param.astype(float)) / half * largest)
      error = np.clip(error, -largest, largest).astype(width)
      masters[key] = param.astype(float) + error / largest * half
      own["error_bits"] = error.astype(dtype) if bits == 24 else error.view(dtype)
    else:
      masters[key] = param.astype(float)
    for moment, stored in KEYS[name].items():
      value = rng.normal(size=shape) * 1e-2
      value = value if moment == "mu" else value**2
      if not quantize:
        own[stored] = value.astype(dtype)
        moments[moment][key] = own[stored].astype(float)
        continue
      codes, scales = quantized(value, signed=moment == "mu")
      own[f"{stored}::quantized"] = codes
      bf16 = dtype == ml_dtypes.bfloat16
      own[f"{stored}::scales"] = scales.view(dtype) if bf16 else scales
      s = np.repeat(scales.astype(float), 32)[: value.size].reshape(shape)
      n = codes.astype(float) / (127 if moment == "mu" else 255)
      moments[moment][key] = n / (2 - np.abs(n)) * s if moment == "mu" else (n * s) ** 2
    state[index] = own
  width = {24: 3, 32: 4, None: 0}[bits]
  group = {"params": [0, 1, 2], "lr": 1e-3, "master_bytewidth": width}
  return model, {"state": state, "param_groups": [group]}, masters, moments


def assert_close(found, expected):
  assert set(found) == set(expected)
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, rtol=3e-7, atol=1e-30)


@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize("bits", slow_but([24, 32, None]))
@pytest.mark.parametrize("name", KEYS)
def test_decoding(name, bits, quantize):
  for dtype in (ml_dtypes.bfloat16, np.float16):
    model, optimizer, masters, moments = make(name, bits, quantize, dtype)
    decoded = pytorch.decode(model, optimizer)
    assert_close(decoded.masters, masters)
    assert set(decoded.moments) == set(moments)
    for moment, values in moments.items():
      assert_close(decoded.moments[moment], values)
    assert decoded.count == (7 if name == "adamw" else None)


@pytest.mark.slow
@pytest.mark.parametrize("storage", [cases.QUANTIZED, fo.Storage(32, 32)])
def test_training_goes_on_from_it(storage):
  """In our storage, in a tree of our own, with kernels transposed."""
  model, optimizer, masters, moments = make("adamw", 32)

  def to_tree(arrays):
    return {
      "first": {"kernel": arrays["0.weight"].T, "bias": arrays["0.bias"]},
      "second": {"kernel": arrays["2.weight"].T},
    }

  tx = optax.chain(optax.clip(1.0), fo.adamw(1e-3, storage=storage))
  params, state = fo.from_pytorch(tx, model, optimizer, to_tree=to_tree, keep="*bias")
  rtol = 2.0**-16 if storage.master_bits == 24 else 3e-7
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol),
    fo.to_fp32(params, state),
    to_tree(masters),
  )
  assert params["first"]["bias"].dtype == jnp.float32
  assert params["first"]["kernel"].dtype == jnp.bfloat16
  assert int(state[1].count) == 7
  found = fo.moments(state)
  for moment, exact in moments.items():
    for a, b in zip(
      jax.tree.leaves(found[moment]),
      jax.tree.leaves(to_tree(exact)),
      strict=True,
    ):
      root = np.sqrt(np.abs(b))
      limit = root.max() / 100 if storage.moment_bits == 8 else 1e-6 * root
      assert (np.abs(np.sqrt(np.abs(a)) - root) <= limit).all()
  grads = jax.tree.map(jnp.ones_like, params)
  jax.eval_shape(lambda: fo.step(tx, grads, state, params))


@pytest.mark.parametrize("name", slow_but(["lion", "sgd"]))
def test_optimizers_that_do_not_count(name):
  model, optimizer, _, _ = make(name)
  assert int(fo.from_pytorch(TX[name], model, optimizer)[1].count) == 0
  state = fo.from_pytorch(TX[name], model, optimizer, count=9)[1]
  assert int(state.count) == 9


def test_names_and_groups():
  model, optimizer, masters, _ = make("lion")
  group = optimizer["param_groups"][0]
  # Two groups, another order, a frozen parameter and a buffer.
  optimizer["param_groups"] = [
    {**group, "params": [1]},
    {**group, "params": [0, 2]},
  ]
  del optimizer["state"][2]
  order = ["0.bias", "0.weight", "2.weight"]
  model = {"steps": np.int64(3), **{name: model[name] for name in SHAPES}}
  decoded = pytorch.decode(model, optimizer, order)
  assert_close(
    {name: decoded.masters[name] for name in order[:2]},
    {name: masters[name] for name in order[:2]},
  )
  np.testing.assert_array_equal(
    decoded.masters["2.weight"], model["2.weight"].astype(np.float32)
  )
  assert not decoded.moments["mu"]["2.weight"].any()
  for group in optimizer["param_groups"]:
    group["param_names"] = [list(SHAPES)[i] for i in group["params"]]
  assert_close(pytorch.decode(model, optimizer).masters, decoded.masters)


def test_errors():
  model, optimizer, _, _ = make("adamw")
  with pytest.raises(ValueError, match=r"keeps \['mu', 'nu'\].*lion.*\['mu'\]"):
    fo.from_pytorch(TX["lion"], model, optimizer)
  with pytest.raises(ValueError, match="3 parameters and there are 4 names"):
    fo.from_pytorch(TX["adamw"], {**model, "buffer": np.zeros(3)}, optimizer)
  with pytest.raises(ValueError, match="no parameter 'x'"):
    fo.from_pytorch(TX["adamw"], model, optimizer, names=["x", "y", "z"])
  with pytest.raises(ValueError, match=r"0.bias' has shape \(5, 13\)"):
    fo.from_pytorch(
      TX["adamw"], model, optimizer, names=["0.bias", "0.weight", "2.weight"]
    )
  optimizer["param_groups"][0]["master_bytewidth"] = 5
  with pytest.raises(ValueError, match="5 bytes; expected bfloat16 or float16"):
    fo.from_pytorch(TX["adamw"], model, optimizer)


def of(index, **changes):
  """Changes the state of a parameter."""

  def change(optimizer):
    optimizer["state"][index] |= changes

  return change


def of_group(**changes):
  def change(optimizer):
    optimizer["param_groups"][0] |= changes

  return change


def without(index, *keys):
  def change(optimizer):
    for key in keys:
      del optimizer["state"][index][key]

  return change


BITS = np.zeros((5, 13), np.int8)
SCALES = "exp_avg::scales"


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (of(0, error_bits=BITS[0]), r"'0.weight' have shape \(13,\)"),
    (of(0, error_bits=BITS[None]), r"'0.weight' have shape \(1, 5, 13\)"),
    (of(0, error_bits=BITS + np.nan), "'0.weight' are not all whole numbers"),
    (of(0, error_bits=BITS + 0.5), "'0.weight' are not all whole numbers"),
    (of(0, error_bits=BITS + 200.0), "'0.weight' are not all whole numbers"),
    (of(0, error_bits=BITS.astype("f4")), "'0.weight'.*float32; expected.*int16"),
    (of(0, **{SCALES: np.ones(4, "f2")}), "'0.weight' has 4 scales.* 3, one"),
    (of(0, **{SCALES: np.ones(2, "f2")}), "exp_avg of '0.weight' has 2 scales"),
    (without(0, SCALES), "exp_avg of '0.weight' has 0 scales"),
    (without(0, "exp_avg::quantized"), "'0.weight' has scales and no codes"),
    (without(0, SCALES, "exp_avg::quantized"), "'0.weight' has no mu"),
    (of(1, step=-7), "step of '0.bias' is -7; expected"),
    (of(1, step=np.float32(np.nan)), "step of '0.bias' is nan; expected"),
    (of(1, step=2.5), "step of '0.bias' is 2.5; expected"),
    (of(1, step=2**31), "step of '0.bias' is 2147483648; expected"),
    (of(1, step=np.arange(2)), "step of '0.bias' is"),
    (of(1, step=8), "different numbers of steps"),
    (of_group(params=[0, 1, 1]), "1 is 2 times among the parameters"),
    (of_group(param_names=["0.bias", "x", "x"]), "'x' is 2 times among names"),
    (lambda optimizer: optimizer["state"].update({3: {}}), "parameter 3, which"),
    (lambda optimizer: optimizer.pop("state"), "no 'state'"),
    (lambda optimizer: optimizer.pop("param_groups"), "no 'param_groups'"),
  ],
)
def test_broken_states(change, message):
  model, optimizer, _, _ = make("adamw", 32 if "int16" in message else 24)
  change(optimizer)
  with pytest.raises(ValueError, match=message):
    fo.from_pytorch(TX["adamw"], model, optimizer)


@pytest.mark.parametrize("count", [-1, 2**31, float("nan"), 0.5])
def test_bad_counts(count):
  model, optimizer, _, _ = make("lion")
  with pytest.raises(ValueError, match=f"count is {count}; expected a whole number"):
    fo.from_pytorch(TX["lion"], model, optimizer, count=count)


def test_a_model_of_other_things_than_numbers():
  model, optimizer, _, _ = make("lion")
  with pytest.raises(ValueError, match="'note' is an array of <U1; expected numbers"):
    fo.from_pytorch(TX["lion"], {**model, "note": "x"}, optimizer, names=list(model))


def test_an_sgd_that_keeps_no_momentum():
  """PyTorch writes None then."""
  model, optimizer, masters, _ = make("sgd", quantize=False)
  for state in optimizer["state"].values():
    state["momentum_buffer"] = None
  params, state = fo.from_pytorch(fo.sgd(1e-3), model, optimizer)
  for name, master in masters.items():
    found = fo.to_fp32(params, state)[name]
    np.testing.assert_allclose(found, master, rtol=2.0**-15)


def test_files(tmp_path):
  torch = pytest.importorskip("torch")
  model, optimizer, _, _ = make("adamw", 32)

  def tensor(x):
    if isinstance(x, dict):
      return {key: tensor(value) for key, value in x.items()}
    if not isinstance(x, np.ndarray | np.generic):
      return x
    if x.dtype == ml_dtypes.bfloat16:
      return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.asarray(x))

  tensors = tensor(model), tensor(optimizer)
  torch.save(tensors, tmp_path / "checkpoint.pt")
  loaded = fo.load_pytorch(tmp_path / "checkpoint.pt")
  for source in (loaded, tensors):
    for a, b in zip(
      jax.tree.leaves(dataclasses.asdict(pytorch.decode(*source))),
      jax.tree.leaves(dataclasses.asdict(pytorch.decode(model, optimizer))),
      strict=True,
    ):
      np.testing.assert_array_equal(a, b)

  class Unpickled:
    def __reduce__(self):
      return (print, ("unpickled",))

  torch.save(Unpickled(), tmp_path / "bad.pt")
  with pytest.raises(Exception, match=r"[Ww]eights.only"):
    fo.load_pytorch(tmp_path / "bad.pt")
