"""Train steps of a 1 B model over a TPU slice, compiled ahead of time: memory.

    python benchmarks/tpu_train_step.py

Needs libtpu, and no TPU: nothing runs. A Llama-shaped model and its batch are split
over 16 v5e chips. Its ordinary step, gradients and then the update, is compiled with
``fo.adamw``, updated by the TPU kernel, and with ``optax.adamw`` on float32 weights.
Each step's gradients are compiled alone too: what that program needs beside its
arguments and results are activations, gathered weights among them, which the
optimizer has no part in. Writes results/tpu_train_step.json.
"""

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import os
import pathlib
import re
from unittest import mock

os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu"}
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
import llama
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from release_memory import per_device

import flashoptim_jax as fo

RESULTS = pathlib.Path(__file__).parent / "results"
TOPOLOGY = "v5e:4x4"
SEQUENCE = 2048


def place(mesh, config, struct):
  """Rows of matrices over all devices; vectors, stacked ones too, on each."""
  is_matrix = struct.ndim > 1 and struct.shape[-2] != config.layers
  spec = P(*[None] * (struct.ndim - 2), "fsdp") if is_matrix else P()
  return NamedSharding(mesh, spec)


def held(*trees) -> int:
  """Bytes of trees on one device."""
  return sum(per_device(leaf) for leaf in jax.tree.leaves(trees))


def measure(name, mesh, config):
  """Compiles one optimizer's step, and its gradients alone."""
  params = llama.structs(config, jnp.float32 if name == "optax" else jnp.bfloat16)
  shardings = jax.tree.map(functools.partial(place, mesh, config), params)
  params = llama.placed(params, shardings)
  if name == "optax":
    tx = optax.adamw(1e-3)
    found = jax.eval_shape(tx.init, params)
    state_shardings = optax.tree.map_params(
        tx,
        lambda _, sharding: sharding,
        found,
        shardings,
        transform_non_params=lambda _: NamedSharding(mesh, P()),
    )
  else:
    tx = fo.with_shardings(fo.adamw(1e-3), params, shardings)
    found = jax.eval_shape(tx.init, params)
    state_shardings = fo.state_shardings(tx, params, shardings)
  state = llama.placed(found, state_shardings)
  batch = jax.ShapeDtypeStruct(
      (mesh.size, SEQUENCE), jnp.int32, sharding=NamedSharding(mesh, P("fsdp"))
  )
  loss = functools.partial(llama.ordinary_loss, config)
  step = jax.jit(
      llama.train_step(loss, tx),
      donate_argnums=(0, 1),
      out_shardings=(None, shardings, state_shardings),
  )
  gradients = jax.jit(jax.value_and_grad(loss), out_shardings=(None, shardings))
  compiled = step.lower(params, state, batch, batch).compile()
  alone = gradients.lower(params, batch, batch).compile().memory_analysis()
  memory, hlo = compiled.memory_analysis(), compiled.as_text()
  kernels = re.findall(r"custom_call_target=\"tpu_custom_call\".*flashoptim_up", hlo)
  # Two arguments are the batch's.
  arguments = memory.argument_size_in_bytes - 2 * held(batch)
  without = arguments + memory.temp_size_in_bytes - alone.temp_size_in_bytes
  return {
      "kernels": len(kernels),
      "per_device_bytes": {
          "params": held(params),
          "state": held(state),
          "arguments": arguments,
          "gradients": held(params),
          "temporaries": memory.temp_size_in_bytes,
          "temporaries_of_gradients_alone": alone.temp_size_in_bytes,
          "aliased": memory.alias_size_in_bytes,
          "all": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
          "all_but_activations": without,
      },
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
  arguments = parser.parse_args()
  arguments.output.mkdir(parents=True, exist_ok=True)
  devices = topologies.get_topology_desc(
      topology_name=TOPOLOGY, platform="tpu"
  ).devices
  mesh = Mesh(np.array(devices), ("fsdp",), axis_types=(AxisType.Auto,))
  config = dataclasses.replace(
      llama.ONE_BILLION, activations=NamedSharding(mesh, P("fsdp"))
  )
  # Leaves are given to the kernel as they are where the default backend is a TPU.
  with mock.patch.object(jax, "default_backend", lambda: "tpu"):
    steps = {name: measure(name, mesh, config) for name in ("flash", "optax")}
  flash, plain = (
      steps[name]["per_device_bytes"]["all_but_activations"] for name in steps
  )
  result = {
      "date": datetime.date.today().isoformat(),
      "topology": TOPOLOGY,
      "device": devices[0].device_kind,
      "devices": len(devices),
      "jax": jax.__version__,
      "libtpu": importlib.metadata.version("libtpu"),
      "optax": optax.__version__,
      "parameters": sum(leaf.size for leaf in jax.tree.leaves(llama.structs(config))),
      "tokens_per_device": SEQUENCE,
      "steps": steps,
      "saved_share_of_all_but_activations": 1 - flash / plain,
  }
  print(json.dumps(result, indent=1))
  path = arguments.output / "tpu_train_step.json"
  path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
  main()
