"""``python -m flashoptim_jax plan`` against compiled train steps.

    python tests/checks/plan_accuracy.py

Nothing runs, and nothing is allocated. For GPT-2 124 M, a Llama of 1.1 B parameters
and Llama-3-8B, on one device and over fsdp=4, tp=2, with ``optax.adamw`` on float32
parameters and with ``fo.adamw``, compares per device:

* what a compiled train step takes as arguments beside the batch, with the plan's
  parameters and state;
* what its loss and gradients, compiled alone, return, with the plan's gradients.

Writes plan_check.json, and fails if one is off by more than 2 %.
"""

import functools
import json
import os
import pathlib
import sys

os.environ |= {
  "JAX_PLATFORMS": "cpu",
  "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
}

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

sys.path.append(str(pathlib.Path(__file__).parents[2]))

import flashoptim_jax as fo
from benchmarks import record
from benchmarks.support import llama
from flashoptim_jax import models, planning

TOLERANCE = 0.02
TOKENS = 128
DTYPES = {"optax.adamw, float32": jnp.float32, "fo.adamw": jnp.bfloat16}


def layer_norm(x, w, name):
  x = x - x.mean(-1, keepdims=True)
  x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5)
  return x * w[f"{name}/scale"] + w[f"{name}/bias"]


def gpt2_layer(w, x):
  """A layer of GPT-2 on (batch, seq, 768)."""

  def dense(x, name):
    return x @ w[f"{name}/kernel"] + w[f"{name}/bias"]

  qkv = dense(layer_norm(x, w, "ln_1"), "attn/qkv")
  q, k, v = (t.reshape(*x.shape[:2], 12, 64) for t in jnp.split(qkv, 3, -1))
  h = jax.nn.dot_product_attention(q, k, v, is_causal=True)
  x = x + dense(h.reshape(x.shape), "attn/proj")
  return x + dense(jax.nn.gelu(dense(layer_norm(x, w, "ln_2"), "mlp/fc")), "mlp/proj")


def gpt2_embed(w, tokens):
  return (w["tokens"][tokens] + w["positions"][: tokens.shape[1]]).astype(jnp.bfloat16)


def gpt2_top(w, x, targets):
  logits = layer_norm(x, w, "ln_f") @ w["tokens"].T
  return optax.softmax_cross_entropy_with_integer_labels(
    logits.astype(jnp.float32), targets
  ).mean()


def gpt2_loss(params, tokens, targets):
  """Mean cross-entropy, every layer rematerialised."""
  x = gpt2_embed(params["embed"], tokens)

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def block(w, x):
    return gpt2_layer(llama.as_bfloat16(w), x)

  x, _ = jax.lax.scan(lambda x, w: (block(w, x), None), x, params["layers"])
  top = params["top"] | {"tokens": params["embed"]["tokens"]}
  return gpt2_top(llama.as_bfloat16(top), x, targets)


def gpt2():
  """GPT-2: as the plan sees it, its loss, parameters and their specs."""
  roles = {models.EMBED: "fsdp", models.WIDE: "tensor", None: None}
  arrays = models.load("gpt2").stacked_parts
  # 50,257 tokens are not divisible.
  specs = jax.tree.map(
    lambda a: P(
      *(
        roles[role] if n != 50257 else None
        for n, role in zip(a.shape, a.roles, strict=True)
      )
    ),
    arrays,
    is_leaf=lambda node: isinstance(node, models.Array),
  )
  shapes = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16),
    arrays,
    is_leaf=lambda node: isinstance(node, models.Array),
  )
  return models.load("gpt2"), gpt2_loss, shapes, specs


def llama_model(name, config):
  """The same for a size of benchmarks/support/llama.py."""
  described = models.from_config(
    {
      "model_type": "llama",
      "vocab_size": config.vocabulary,
      "hidden_size": config.dim,
      "intermediate_size": config.hidden,
      "num_hidden_layers": config.layers,
      "num_attention_heads": config.heads,
      "num_key_value_heads": config.kv_heads,
    },
    name,
  )
  return (
    described,
    functools.partial(llama.ordinary_loss, config),
    llama.structs(config),
    llama.SPECS,
  )


def arguments_of(model, tx, dtype, mesh, tokens):
  """Parameters, state and a batch, as types with shardings."""
  *_, structs, specs = model
  shardings = jax.tree.map(functools.partial(NamedSharding, mesh), specs)
  typed = jax.tree.map(lambda struct: struct.update(dtype=dtype), structs)
  params = llama.placed(typed, shardings)
  state = llama.placed(
    jax.eval_shape(tx.init, params), fo.state_shardings(tx, params, shardings)
  )
  batch = jax.ShapeDtypeStruct(
    (mesh.shape["fsdp"], tokens), jnp.int32, sharding=NamedSharding(mesh, P("fsdp"))
  )
  return params, state, batch


def compare(model, sizes):
  """Arguments and gradients, beside the plan's."""
  described, loss, *_ = model
  mesh = Mesh(
    np.array(jax.devices()[: sizes[0] * sizes[1]]).reshape(sizes),
    ("fsdp", "tensor"),
    axis_types=(AxisType.Auto,) * 2,
  )
  plan = planning.plan(
    described, dict(zip(mesh.axis_names, sizes, strict=True)), "h100"
  )
  results = {}
  for row, (name, dtype) in zip(plan.rows[:2], DTYPES.items(), strict=True):
    tx = fo.adamw(1e-3) if dtype == jnp.bfloat16 else optax.adamw(1e-3)
    params, state, batch = arguments_of(model, tx, dtype, mesh, TOKENS)
    shardings = jax.tree.map(lambda s: s.sharding, (params, state))
    step = jax.jit(
      llama.train_step(loss, tx),
      donate_argnums=(0, 1),
      out_shardings=(None, *shardings),
    )
    memory = step.lower(params, state, batch, batch).compile().memory_analysis()
    grads = jax.jit(jax.value_and_grad(loss), out_shardings=(None, shardings[0]))
    returned = grads.lower(params, batch, batch).compile().memory_analysis()
    results[name] = {
      "params_and_state": {
        "plan": row.params + row.state,
        "compiled": memory.argument_size_in_bytes - 2 * llama.per_device(batch),
      },
      "gradients": {
        "plan": row.gradients,
        "compiled": returned.output_size_in_bytes,
      },
    }
  return results


def main():
  arguments = record.parser(__doc__).parse_args()
  found = {
    **record.about(),
    "tokens_per_device": TOKENS,
    "models": {},
  }
  worst = 0.0
  for model in (
    gpt2(),
    llama_model("Llama 1.1 B", llama.ONE_BILLION),
    llama_model("Llama-3-8B", llama.LLAMA3_8B),
  ):
    described = model[0]
    result = {
      "parameters": described.num_params,
      "meshes": {
        "one device": compare(model, (1, 1)),
        "fsdp=4, tp=2": compare(model, (4, 2)),
      },
    }
    for mesh in result["meshes"].values():
      for row in mesh.values():
        for sizes in row.values():
          worst = max(worst, abs(sizes["plan"] / sizes["compiled"] - 1))
    found["models"][described.name] = result
    print(described.name, json.dumps(result, indent=1), flush=True)
  found["largest_difference"] = worst
  record.write("plan_check.json", found, arguments.output)
  print(f"The plan is within {worst:.2%} of arguments and gradients.")
  return int(worst > TOLERANCE)


if __name__ == "__main__":
  sys.exit(main())
