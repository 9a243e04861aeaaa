"""Updates compiled for TPUs that are not there.

Needs ``pip install libtpu`` on x86-64 Linux. Import it before JAX takes a device.
"""

import functools
import os

import jax
import numpy as np
from jax.experimental import topologies

import flashoptim_jax as fo

# What libtpu reads when it is loaded.
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
jax.config.update("jax_platforms", "cpu")

TOPOLOGIES = {
  "v4": "v4:2x2x1",
  "v5e": "v5e:2x2",
  "v5p": "v5p:2x2x1",
  "v6e": "v6e:2x2",
}
OPTIMIZERS = {
  "adamw": lambda **kwargs: fo.adamw(1e-3, **kwargs),
  "adamw_nesterov": lambda **kwargs: fo.adamw(1e-3, nesterov=True, **kwargs),
  "adam": lambda **kwargs: fo.adam(1e-3, **kwargs),
  "lion": lambda **kwargs: fo.lion(1e-3, **kwargs),
  "sgd": lambda **kwargs: fo.sgd(1e-3, **kwargs),
  "momentum": lambda **kwargs: fo.sgd(1e-3, momentum=0.9, **kwargs),
  "nesterov": lambda **kwargs: fo.sgd(1e-3, momentum=0.9, nesterov=True, **kwargs),
}
STORAGES = {
  "24/8": fo.Storage(),
  "24/8 paper": fo.Storage(companding="paper"),
  "16/8": fo.Storage(master_bits=16),
  "32/8": fo.Storage(master_bits=32),
  "none/8": fo.Storage(master_bits=None),
  "24/32": fo.Storage(moment_bits=32),
  "32/32": fo.Storage(master_bits=32, moment_bits=32),
  "none/32": fo.Storage(master_bits=None, moment_bits=32),
}


@functools.cache
def devices_of(chip: str) -> list[jax.Device]:
  """Devices of a chip that need not be there."""
  return topologies.get_topology_desc(
    topology_name=TOPOLOGIES[chip], platform="tpu"
  ).devices


def mesh(chip: str) -> jax.sharding.Mesh:
  """One of them."""
  return jax.sharding.Mesh(np.array(devices_of(chip)[:1]), ("x",))


def single(chip: str) -> jax.sharding.NamedSharding:
  return jax.sharding.NamedSharding(mesh(chip), jax.sharding.PartitionSpec())


def compile_step(tx, params, chip: str):
  """``fo.step`` compiled for one device, with params and state donated."""
  spec = jax.sharding.PartitionSpec()
  args = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=single(chip)),
    (params, jax.eval_shape(tx.init, params), params),
  )
  step = jax.shard_map(
    lambda grads, state, params: fo.step(tx, grads, state, params),
    mesh=mesh(chip),
    in_specs=spec,
    out_specs=spec,
    check_vma=False,
  )
  return jax.jit(step, donate_argnums=(1, 2)).lower(*args).compile()
