"""Checkpoints of FlashOptim for PyTorch, read here, against its own decoding.

Trains a small bf16 model with the library's AdamW, Lion and SGD, saves it, and
compares what ``flashoptim_jax`` reads with what the library decodes. Needs an
NVIDIA GPU, PyTorch and ``flashoptim``; JAX runs on the CPU.

  python tests/checks/pytorch_checkpoint.py
"""

import itertools
import os
import pathlib
import sys
import tempfile
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import flashoptim
import numpy as np
import torch

sys.path.append(str(pathlib.Path(__file__).parents[2]))

import flashoptim_jax as fo
from benchmarks import record
from flashoptim_jax.conversion import pytorch

STEPS = 20
LIMIT = 8  # of differences, in units of float32's precision: a few roundings
OPTIMIZERS = {
  "FlashAdamW": (flashoptim.FlashAdamW, {"lr": 1e-3}, fo.adamw(1e-3)),
  "FlashLion": (flashoptim.FlashLion, {"lr": 1e-4}, fo.lion(1e-4)),
  "FlashSGD": (
    flashoptim.FlashSGD,
    {"lr": 1e-2, "momentum": 0.9},
    fo.sgd(1e-2, 0.9),
  ),
}
MOMENTS = {"mu": ("exp_avg", "momentum_buffer"), "nu": ("exp_avg_sq",)}


def trained(factory: Any, options: dict[str, Any]) -> tuple[Any, Any]:
  """A model with odd sizes, and its optimizer, after some steps."""
  torch.manual_seed(0)
  model = torch.nn.Sequential(
    torch.nn.Linear(45, 130), torch.nn.GELU(), torch.nn.Linear(130, 7)
  ).to("cuda", torch.bfloat16)
  optimizer = factory(model.parameters(), **options)
  for _ in range(STEPS):
    x = torch.randn(64, 45, device="cuda", dtype=torch.bfloat16)
    loss = (model(x) - x[:, :7]).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
  return model, optimizer


def difference(found: np.ndarray, expected: torch.Tensor) -> float:
  """The largest difference, in units of float32's relative precision."""
  wanted = expected.detach().float().cpu().numpy()
  largest = np.abs(found - wanted) / np.maximum(np.abs(wanted), 1e-30)
  return float(largest.max() / np.finfo(np.float32).eps)


def compare(name: str, bits: int, quantize: bool) -> dict[str, Any]:
  factory, options, tx = OPTIMIZERS[name]
  options = {**options, "master_weight_bits": bits, "quantize": quantize}
  model, optimizer = trained(factory, options)
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "checkpoint.pt"
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, path)
    loaded = fo.load_pytorch(path)
  decoded = pytorch.decode(loaded["model"], loaded["optimizer"])
  masters = optimizer.get_fp32_model_state_dict(model)
  result: dict[str, Any] = {
    "optimizer": name,
    "master_bits": bits,
    "quantized": quantize,
    "masters_eps": max(
      difference(decoded.masters[key], masters[key]) for key in masters
    ),
  }
  for moment, keys in MOMENTS.items():
    units = [
      difference(
        decoded.moments[moment][key], optimizer.state[param][own].materialize()
      )
      for key, param in model.named_parameters()
      for own in keys
      if own in optimizer.state[param]
    ]
    result[f"{moment}_eps"] = max(units, default=None)
  # What training goes on with, and how far its storage takes it from that.
  params, opt_state = fo.from_pytorch(tx, loaded["model"], loaded["optimizer"])
  back = fo.to_fp32(params, opt_state)
  result["masters_after_24_bits"] = max(
    float(np.max(np.abs(back[key] - value) / np.maximum(np.abs(value), 1e-30)))
    for key, value in decoded.masters.items()
  )
  result["count"] = int(opt_state.count)
  return result


def main() -> int:
  arguments = record.parser(__doc__).parse_args()
  rows = [
    compare(*case) for case in itertools.product(OPTIMIZERS, (24, 32), (True, False))
  ]
  columns = list(rows[0])
  for row in [columns, *([row[c] for c in columns] for row in rows)]:
    cells = (f"{x:.3g}" if isinstance(x, float) else str(x) for x in row)
    print("".join(f"{cell:>22}" for cell in cells))
  result = {
    **record.about("torch", "flashoptim", device=torch.cuda.get_device_name()),
    "rows": rows,
  }
  record.write("torch_checkpoint.json", result, arguments.output)
  keys = ("masters_eps", *(f"{moment}_eps" for moment in MOMENTS))
  return int(any((row[key] or 0) > LIMIT for row in rows for key in keys))


if __name__ == "__main__":
  sys.exit(main())
