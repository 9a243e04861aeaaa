"""Checks a wheel installed with nothing but its hard dependencies."""

import importlib.util
import pathlib
import subprocess
import sys

LIMIT = 0.5  # seconds
# In a process of its own, since only a first import takes time.
TIME_IMPORT = """
import time, optax
begun = time.perf_counter()
import flashoptim_jax
print(time.perf_counter() - begun)
"""


def main():
  """Raises an AssertionError where something does not hold."""
  for name in ("flax", "orbax", "safetensors", "triton", "jax_triton", "libtpu"):
    assert importlib.util.find_spec(name) is None, f"{name} is installed"

  import flashoptim_jax as fo

  assert "site-packages" in pathlib.Path(fo.__file__).parts, fo.__file__
  assert (pathlib.Path(fo.__file__).parent / "py.typed").is_file()
  from jax._src import xla_bridge

  assert not xla_bridge._backends, "the import started a backend"

  import jax
  import jax.numpy as jnp

  params_fp32 = {"w": jnp.ones((4, 64)), "b": jnp.zeros(64)}
  for tx in (fo.adamw(0.1), fo.adam(0.1), fo.lion(0.1), fo.sgd(0.1, 0.9)):
    params, state = fo.from_fp32(tx, params_fp32)
    grads = jax.tree.map(jnp.ones_like, params)
    params, state = jax.jit(lambda *a, tx=tx: fo.step(tx, *a))(grads, state, params)
    assert all(
      jax.tree.leaves(
        jax.tree.map(lambda new, old: bool((new < old).all()), params, params_fp32)
      )
    )

  seconds = min(
    float(subprocess.check_output([sys.executable, "-c", TIME_IMPORT]))
    for _ in range(5)
  )
  assert seconds < LIMIT, f"importing takes {seconds:.2f} s"
  print(f"The wheel works alone; its import takes {seconds:.3f} s beyond optax.")


if __name__ == "__main__":
  main()
