"""Configurations of models."""

from flashoptim_jax import models


def config(model_type, *sizes, **others):
  names = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
  )
  return {"model_type": model_type, **dict(zip(names, sizes, strict=False)), **others}


TINY = config("llama", 96, 64, 128, 2, 4, 2)


def is_array(node):
  return isinstance(node, models.Array)


def separate(model):
  """All parameters, each layer's as leaves of their own."""
  return model.parts | {"layers": [model.parts["layers"]] * model.num_layers}


HUGE = models.MAX_SIZE
