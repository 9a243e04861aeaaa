"""Train steps of Llama-shaped models over TPU slices, compiled ahead of time: memory.

    python benchmarks/tpu/train_step.py
    python benchmarks/tpu/train_step.py --only "Llama-3-70B"

Needs libtpu, and no TPU: nothing runs. A model and its batch are split over a slice.
Its step is compiled with ``fo.adamw``, updated by the TPU kernel, ordinary (gradients
and then the update) and released, and with ``optax.adamw`` on float32 weights. The
gradients are compiled alone too: what that program needs beside its arguments and
results are activations, gathered weights among them, which the optimizer has no part
in. Where XLA plans more for the gradients alone than for the step, this tells nothing,
and ``all_but_activations`` is null. Writes results/tpu_train_step.json.
"""

import dataclasses
import functools
import json
import os
import pathlib
import re
import sys
from typing import NamedTuple

os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu"}
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

sys.path.append(str(pathlib.Path(__file__).parents[2]))

import flashoptim_jax as fo
from benchmarks import record
from benchmarks.support import llama

RESULT = "tpu_train_step.json"
SEQUENCE = 2048


class Model(NamedTuple):
  """A model and the slice that it is split over."""

  config: llama.Config
  topology: str


MODELS = {
  "Llama, 1.1 B": Model(llama.ONE_BILLION, "v5e:4x4"),
  "Llama-3-70B": Model(llama.LLAMA3_70B, "v5e:16x16"),
}
STEPS = ("flash", "released", "optax")


def place(mesh, config, struct):
  """Rows of matrices over all devices; vectors, stacked ones too, on each."""
  is_matrix = struct.ndim > 1 and struct.shape[-2] != config.layers
  spec = P(*[None] * (struct.ndim - 2), "fsdp") if is_matrix else P()
  return NamedSharding(mesh, spec)


def held(*trees) -> int:
  """Bytes of trees on one device."""
  return sum(llama.per_device(leaf) for leaf in jax.tree.leaves(trees))


def measure(name, mesh, config):
  """Compiles a step, and its gradients alone."""
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
  released = name == "released"
  step = jax.jit(
    llama.released_step(config, tx) if released else llama.train_step(loss, tx),
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
  beyond_activations = memory.temp_size_in_bytes - alone.temp_size_in_bytes
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
      "all_but_activations": (
        arguments + beyond_activations
        if name == "released" or beyond_activations >= 0
        else None
      ),
    },
  }


def measure_model(model: Model):
  """Every step of a model; its part of the result."""
  devices = topologies.get_topology_desc(
    topology_name=model.topology, platform="tpu"
  ).devices
  mesh = Mesh(np.array(devices), ("fsdp",), axis_types=(AxisType.Auto,))
  config = dataclasses.replace(model.config, activations=NamedSharding(mesh, P("fsdp")))
  steps = {name: measure(name, mesh, config) for name in STEPS}
  flash, plain = (
    steps[name]["per_device_bytes"]["all_but_activations"]
    for name in ("flash", "optax")
  )
  return {
    "topology": model.topology,
    "device": devices[0].device_kind,
    "devices": len(devices),
    "parameters": sum(leaf.size for leaf in jax.tree.leaves(llama.structs(config))),
    "tokens_per_device": SEQUENCE,
    "steps": steps,
    "saved_share_of_all_but_activations": (
      1 - flash / plain if flash and plain else None
    ),
  }


def main():
  parser = record.parser(__doc__)
  parser.add_argument("--only", choices=MODELS)
  arguments = parser.parse_args()
  known = record.earlier(RESULT, arguments.output).get("models", {})
  for name in [arguments.only] if arguments.only else MODELS:
    known[name] = measure_model(MODELS[name])
    result = record.about("libtpu", device="") | {"models": known}
    record.write(RESULT, result, arguments.output)
    print(name, json.dumps(known[name], indent=1), flush=True)


if __name__ == "__main__":
  main()
