"""Bytes on disk of GPT-2's training state, beside Optax's in float32.

Both have taken three AdamW steps from the same weights with the same gradients,
and are saved with Orbax's defaults; the files are measured.

  JAX_PLATFORMS=cpu python benchmarks/memory/checkpoint_size.py
"""

import json
import pathlib
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

sys.path.append(str(pathlib.Path(__file__).parents[2]))

import flashoptim_jax as fo
from benchmarks import record
from benchmarks.support.leaf_sets import gpt2

STEPS = 3


def draw(seed: int, scale: float) -> dict[str, jax.Array]:
  """A tree of GPT-2's shapes, normal."""
  rng = np.random.default_rng(seed)
  return {
    name: jnp.asarray(scale * rng.standard_normal(shape, np.float32))
    for name, shape in gpt2().items()
  }


def trained(tx: Any, params: Any, opt_state: Any) -> dict[str, Any]:
  step = jax.jit(
    lambda grads, state, params: fo.step(tx, grads, state, params),
    donate_argnums=(1, 2),
  )
  for seed in range(STEPS):
    grads = draw(seed, 1e-3)
    grads = {name: grads[name].astype(params[name].dtype) for name in grads}
    params, opt_state = step(grads, opt_state, params)
  return {"params": params, "opt_state": opt_state, "step": jnp.int32(STEPS)}


def bytes_on_disk(tree: Any, args: Any, handler: Any) -> int:
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "0"
    with ocp.Checkpointer(handler) as checkpointer:
      checkpointer.save(path, args=args(tree))
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def main() -> None:
  arguments = record.parser(__doc__).parse_args()
  tx = fo.adamw(1e-3)
  flash = bytes_on_disk(
    trained(tx, *fo.from_fp32(tx, draw(100, 0.02))),
    fo.checkpoint.Save,
    fo.checkpoint.Handler(),
  )
  plain_tx = optax.adamw(1e-3)
  params = draw(100, 0.02)
  plain = bytes_on_disk(
    trained(plain_tx, params, plain_tx.init(params)),
    ocp.args.StandardSave,
    ocp.StandardCheckpointHandler(),
  )
  count = sum(np.prod(shape) for shape in gpt2().values())
  result = {
    **record.about("orbax-checkpoint"),
    "parameters": int(count),
    "flash_bytes": flash,
    "optax_fp32_bytes": plain,
    "ratio": flash / plain,
  }
  record.write("checkpoint_size.json", result, arguments.output)
  print(json.dumps(result, indent=1))


if __name__ == "__main__":
  main()
