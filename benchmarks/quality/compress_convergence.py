"""Convergence of every Optax optimizer inside ``fo.compress``.

On the parabola and Rosenbrock's function of Optax's own tests, with their learning
rates, numbers of steps and tolerance: 3 % and 0.03. ``compressed`` has bfloat16
parameters with 24-bit master weights and 8-bit moments, small as they are, and its
gradients are those at the bfloat16 parameters. Where it does not converge, four more
runs say why:

* ``plain``: Optax itself, on float32.
* ``rounded gradients``: the same with gradients at the parameters rounded to
  bfloat16, so without compression.
* ``32-bit masters``, ``32-bit moments``: compressed, with more bits for either.

``python benchmarks/quality/compress_convergence.py`` writes
compress_convergence.json; ``--only`` takes names, separated by commas.
"""

import functools
import os
import pathlib
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from optax import contrib

sys.path.append(str(pathlib.Path(__file__).parents[2]))

import flashoptim_jax as fo
from benchmarks import record
from benchmarks.support.optax_optimizers import OPTIMIZERS

RESULT = "compress_convergence.json"
TOLERANCE = 3e-2
STORAGES = {
  "compressed": fo.Storage(min_quantized_size=0),
  "32-bit masters": fo.Storage(master_bits=32, min_quantized_size=0),
  "32-bit moments": fo.Storage(moment_bits=32),
}


def parabola(params):
  return jnp.sum((params - jnp.array([1.0, -1.0, 1.0])) ** 2)


def rosenbrock(params):
  return (1.0 - params[0]) ** 2 + 100.0 * (params[1] - params[0] ** 2) ** 2


PROBLEMS = {
  "parabola": (parabola, (-1.0, 10.0, 1.0), (1.0, -1.0, 1.0)),
  "rosenbrock": (rosenbrock, (0.0, 0.0), (1.0, 1.0)),
}


def extra_args(needs, f, value, grads):
  return {
    "": {},
    "examples": {},
    "value": {"value": value},
    "value_fn": {"value": value, "grad": grads, "value_fn": f},
    "obj_fn": {"obj_fn": f},
  }[needs]


def run(name: str, problem: str, tx, dtype, rounded: bool = False) -> np.ndarray:
  """The parameters that training ends with, in float32."""
  optimizer = OPTIMIZERS[name]
  f, start, _ = PROBLEMS[problem]
  f32 = jnp.float32

  def step(carry, _):
    params, state = carry
    at = params.astype(jnp.bfloat16) if rounded else params
    value, grads = jax.value_and_grad(f)(at.astype(f32))
    extra = extra_args(optimizer.needs, f, value, grads)
    if optimizer.needs == "examples":
      grads = grads[None]
    return fo.step(tx, grads, state, params, **extra), None

  @jax.jit
  def train(params, state):
    (params, state), _ = jax.lax.scan(step, (params, state), length=optimizer.steps)
    compressed = isinstance(state, fo.CompressedState)
    masters = fo.to_fp32(params, state) if compressed else params
    if name.startswith("schedule_free"):
      inner = state.inner if compressed else state
      masters = contrib.schedule_free_eval_params(inner, masters)
    return masters

  masters = jnp.array(start)
  if dtype is None:
    return np.asarray(train(masters, tx.init(masters)))
  return np.asarray(train(*fo.from_fp32(tx, masters, dtype)))


def distance(problem: str, params: np.ndarray) -> float:
  """Largest error in units of the tolerance: converged if at most 1."""
  best = np.array(PROBLEMS[problem][2])
  error = np.abs(params - best) / (TOLERANCE + TOLERANCE * np.abs(best))
  return float(error.max()) if np.isfinite(error).all() else float("inf")


def measure(name: str, problem: str) -> dict:
  optimizer = OPTIMIZERS[name]
  plain = optimizer.make(optimizer.rate)
  compressed = {
    variant: functools.partial(run, tx=fo.compress(plain, storage), dtype=jnp.bfloat16)
    for variant, storage in STORAGES.items()
  }
  variants = {
    "compressed": compressed.pop("compressed"),
    "plain": functools.partial(run, tx=plain, dtype=None),
    "rounded gradients": functools.partial(run, tx=plain, dtype=None, rounded=True),
    **compressed,
  }
  found = {}
  for variant, function in variants.items():
    found[variant] = distance(problem, function(name, problem))
    if found["compressed"] <= 1:
      break
  return {
    "optimizer": name,
    "problem": problem,
    "learning_rate": optimizer.rate,
    "steps": optimizer.steps,
    "distance": found,
    "converged": found["compressed"] <= 1,
  }


def main() -> None:
  parser = record.parser(__doc__)
  parser.add_argument("--only", help="optimizers, separated by commas")
  arguments = parser.parse_args()
  names = arguments.only.split(",") if arguments.only else list(OPTIMIZERS)
  known = record.earlier(RESULT, arguments.output).get("runs", [])
  rows = {(row["optimizer"], row["problem"]): row for row in known}
  for name in names:
    for problem in PROBLEMS:
      row = rows[name, problem] = measure(name, problem)
      found = {k: round(v, 3) for k, v in row["distance"].items()}
      print(f"{name:30} {problem:11} {found}", flush=True)
    content = {
      **record.about(),
      "tolerance": TOLERANCE,
      "runs": [
        rows[name, problem]
        for name in OPTIMIZERS
        for problem in PROBLEMS
        if (name, problem) in rows
      ],
    }
    record.write(RESULT, content, arguments.output)


if __name__ == "__main__":
  sys.exit(main())
