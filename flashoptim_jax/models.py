"""Shapes of language models' parameters, from Hugging Face's ``config.json``.

The names follow the configurations' own; the families are those whose
parameters a configuration decides completely.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import reprlib
from collections.abc import Mapping
from typing import Any, NamedTuple

# What a dimension is, which decides the mesh axes it is divided over.
EMBED = "embed"  # the residual stream's channels
WIDE = "wide"  # heads, the MLP's channels, tokens
EXPERT = "expert"


# Of any dimension, count or mesh axis: beyond it, JAX's own arithmetic overflows.
MAX_SIZE = 2**31 - 1
_MAX_FILE = 2**24  # Bytes of a config.json.


class Array(NamedTuple):
  """A parameter.

  Attributes:
    shape: Its shape, a kernel's inputs before its outputs.
    roles: What each dimension is: ``EMBED``, ``WIDE``, ``EXPERT`` or None.
  """

  shape: tuple[int, ...]
  roles: tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class Model:
  """The parameters of a decoder-only transformer.

  Attributes:
    name: What it was asked for by.
    embed: Parameters used before the layers, by name.
    layer: Parameters of one layer, by name.
    num_layers: Number of layers, all alike.
    top: Parameters used after the layers, by name.
    tied: Whether the embedding, ``embed["tokens"]``, is the head as well.
    left_out: Parts of the configured model that are not counted.
  """

  name: str
  embed: Mapping[str, Array]
  layer: Mapping[str, Array]
  num_layers: int
  top: Mapping[str, Array]
  tied: bool
  left_out: tuple[str, ...] = ()

  @property
  def parts(self) -> dict[str, dict[str, Array]]:
    """Parameters before the layers, of one layer, and after the layers."""
    return {
      "embed": dict(self.embed),
      "layers": dict(self.layer),
      "top": dict(self.top),
    }

  @property
  def stacked_parts(self) -> dict[str, dict[str, Array]]:
    """All of them, with layers stacked along a first axis, for ``jax.lax.scan``."""
    layers = {
      name: Array((self.num_layers, *array.shape), (None, *array.roles))
      for name, array in self.layer.items()
    }
    return self.parts | {"layers": layers}

  @property
  def num_params(self) -> int:
    """Number of parameters, a tied embedding counted once."""
    layer, *others = (
      sum(math.prod(array.shape) for array in part.values())
      for part in (self.layer, self.embed, self.top)
    )
    return self.num_layers * layer + sum(others)


@dataclasses.dataclass(frozen=True)
class _Family:
  """What the configurations of a ``model_type`` leave to the code that reads them.

  Attributes:
    tied: ``tie_word_embeddings`` where it isn't given.
    head_dim: ``head_dim`` where it isn't given; None for width over heads.
    qkv_bias: Whether queries, keys and values have biases where ``qkv_bias`` isn't
      given.
    biases: Whether ``attention_bias`` and ``mlp_bias`` are read.
    qk_norm: Whether queries and keys are normalised.
    post_norms: Whether each half of a layer is normalised afterwards too.
    experts: The key of the number of experts; None for a dense model.
    expert_width: The key of an expert's width.
    defaults: Keys that published configurations leave out.
  """

  tied: bool = False
  head_dim: int | None = None
  qkv_bias: bool = False
  biases: bool = False
  qk_norm: bool = False
  post_norms: bool = False
  experts: str | None = None
  expert_width: str = "moe_intermediate_size"
  defaults: Mapping[str, int] = dataclasses.field(default_factory=dict)


_GEMMA = _Family(tied=True, head_dim=256, biases=True)
_FAMILIES = {
  "llama": _Family(biases=True),
  "mistral": _Family(),
  "mixtral": _Family(experts="num_local_experts", expert_width="intermediate_size"),
  "qwen2": _Family(qkv_bias=True),
  "qwen2_moe": _Family(qkv_bias=True, experts="num_experts"),
  "qwen3": _Family(head_dim=128, biases=True, qk_norm=True),
  "qwen3_moe": _Family(head_dim=128, biases=True, qk_norm=True, experts="num_experts"),
  "gemma": _GEMMA,
  "gemma2": dataclasses.replace(_GEMMA, post_norms=True),
  "gemma3_text": dataclasses.replace(
    _GEMMA,
    post_norms=True,
    qk_norm=True,
    defaults={
      "num_attention_heads": 8,
      "num_key_value_heads": 4,
      "vocab_size": 262208,
    },
  ),
}
SUPPORTED = ("gpt2", *_FAMILIES, "gemma3")


def _gpt2(width: int, layers: int, heads: int) -> dict[str, Any]:
  return {
    "model_type": "gpt2",
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": width,
    "n_layer": layers,
    "n_head": heads,
  }


def _grouped(
  model_type: str,
  vocabulary: int,
  width: int,
  hidden: int,
  layers: int,
  heads: int,
  kv_heads: int,
  **others: Any,
) -> dict[str, Any]:
  return {
    "model_type": model_type,
    "vocab_size": vocabulary,
    "hidden_size": width,
    "intermediate_size": hidden,
    "num_hidden_layers": layers,
    "num_attention_heads": heads,
    "num_key_value_heads": kv_heads,
    **others,
  }


_llama = functools.partial(_grouped, "llama")

# Configurations of published models, cut down to what decides their parameters.
BUILT_IN: Mapping[str, Mapping[str, Any]] = {
  "gpt2": _gpt2(768, 12, 12),
  "gpt2-medium": _gpt2(1024, 24, 16),
  "gpt2-large": _gpt2(1280, 36, 20),
  "gpt2-xl": _gpt2(1600, 48, 25),
  "llama-1b": _llama(128256, 2048, 8192, 16, 32, 8, tie_word_embeddings=True),
  "llama-3b": _llama(128256, 3072, 8192, 28, 24, 8, tie_word_embeddings=True),
  "llama2-7b": _llama(32000, 4096, 11008, 32, 32, 32),
  "llama3-8b": _llama(128256, 4096, 14336, 32, 32, 8),
  "llama3-70b": _llama(128256, 8192, 28672, 80, 64, 8),
  "llama3-405b": _llama(128256, 16384, 53248, 126, 128, 8),
  "mistral-7b": _grouped("mistral", 32000, 4096, 14336, 32, 32, 8),
  "mixtral-8x7b": _grouped(
    "mixtral", 32000, 4096, 14336, 32, 32, 8, num_local_experts=8
  ),
  "qwen2-7b": _grouped("qwen2", 152064, 3584, 18944, 28, 28, 4),
  "qwen3-8b": _grouped("qwen3", 151936, 4096, 12288, 36, 32, 8),
  "qwen3-30b-a3b": _grouped(
    "qwen3_moe",
    151936,
    2048,
    6144,
    48,
    32,
    4,
    num_experts=128,
    moe_intermediate_size=768,
  ),
  "gemma-2b": _grouped("gemma", 256000, 2048, 16384, 18, 8, 1),
  "gemma2-9b": _grouped("gemma2", 256000, 3584, 14336, 42, 16, 8),
  "gemma3-1b": _grouped("gemma3_text", 262144, 1152, 6912, 26, 4, 1),
}


def load(source: str | os.PathLike) -> Model:
  """Finds a model.

  Args:
    source: A key of ``BUILT_IN``, a Hugging Face ``config.json``, or a directory
      that has one.

  Raises:
    ValueError: If there is no such file or name, if the file is no JSON object,
      or as for :func:`from_config`.
  """
  name = os.fspath(source)
  if name in BUILT_IN:
    return from_config(BUILT_IN[name], name)
  path = pathlib.Path(name)
  if path.is_dir():
    path /= "config.json"
  if not path.is_file():
    raise ValueError(
      f"{name!r} is no file and no built-in model; expected a config.json, a"
      f" directory with one, or one of {', '.join(BUILT_IN)}."
    )
  with path.open("rb") as file:
    text = file.read(_MAX_FILE + 1)
  if len(text) > _MAX_FILE:
    raise ValueError(
      f"{path} has more than {_MAX_FILE} bytes; expected a model's configuration."
    )
  try:
    config = json.loads(text.decode("utf-8-sig"))  # With a byte-order mark or not.
  except ValueError as error:
    raise ValueError(f"{path} is not JSON: {error}.") from error
  except RecursionError as error:
    raise ValueError(f"{path} is nested too deep; expected a JSON object.") from error
  if not isinstance(config, dict):
    raise ValueError(f"{path} holds a {type(config).__name__}; expected a JSON object.")
  return from_config(config, str(path))


def from_config(config: Mapping[str, Any], name: str) -> Model:
  """The parameters that a Hugging Face configuration describes.

  Args:
    config: The configuration, with its ``model_type``.
    name: What to call it, in errors too.

  Raises:
    ValueError: If its ``model_type`` is not one of ``SUPPORTED``, or if a value
      that decides the parameters is missing or makes no sense.
  """
  model_type = config.get("model_type")
  if model_type == "gemma3":
    text = config.get("text_config")
    if not isinstance(text, Mapping):
      raise ValueError(f"{name}: found no 'text_config'; expected an object.")
    # The text model's own model_type may be left out.
    model = from_config({**text, "model_type": "gemma3_text"}, name)
    return dataclasses.replace(model, left_out=("the vision tower",))
  if model_type == "gpt2":
    return _from_gpt2(_Reader(config, name))
  if not isinstance(model_type, str) or model_type not in _FAMILIES:
    raise ValueError(
      f"{name}: found model_type {_shown(model_type)}; expected one of"
      f" {', '.join(SUPPORTED)}."
    )
  family = _FAMILIES[model_type]
  return _from_decoder(_Reader({**family.defaults, **config}, name), family)


@dataclasses.dataclass(frozen=True)
class _Reader:
  """Reads a configuration, and says what is wrong with it."""

  config: Mapping[str, Any]
  name: str

  def size(self, key: str, default: int | None = None) -> int:
    """A positive whole number."""
    value = self.config.get(key)
    if value is None and default is not None:
      return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
      found = "nothing" if value is None else _shown(value)
      raise self.error(f"found {found} for {key!r}; expected a positive integer")
    if value > MAX_SIZE:
      raise self.error(
        f"found {_shown(value)} for {key!r}; expected at most {MAX_SIZE}"
      )
    return value

  def flag(self, key: str, default: bool) -> bool:
    """True or false."""
    value = self.config.get(key)
    if value is None:
      return default
    if not isinstance(value, bool):
      raise self.error(f"found {_shown(value)} for {key!r}; expected true or false")
    return value

  def error(self, what: str) -> ValueError:
    """An error about this configuration."""
    return ValueError(f"{self.name}: {what}.")


def _shown(value: Any) -> str:
  """A value for an error message, on one line however long it is."""
  return reprlib.repr(value)


def _norms(width: int, *names: str) -> dict[str, Array]:
  return {name: Array((width,), (None,)) for name in names}


def _from_gpt2(read: _Reader) -> Model:
  width, vocabulary = read.size("n_embd"), read.size("vocab_size")
  heads = read.size("n_head")
  if width % heads:
    raise read.error(f"n_embd is {width}; expected a multiple of n_head, {heads}")
  hidden = read.size("n_inner", 4 * width)
  tied = read.flag("tie_word_embeddings", True)
  layer = _norms(width, "ln_1/scale", "ln_1/bias", "ln_2/scale", "ln_2/bias")
  for name, inputs, outputs, roles in (
    ("attn/qkv", width, 3 * width, (EMBED, WIDE)),
    ("attn/proj", width, width, (WIDE, EMBED)),
    ("mlp/fc", width, hidden, (EMBED, WIDE)),
    ("mlp/proj", hidden, width, (WIDE, EMBED)),
  ):
    layer[f"{name}/kernel"] = Array((inputs, outputs), roles)
    bias = WIDE if roles[1] == WIDE else None
    layer[f"{name}/bias"] = Array((outputs,), (bias,))
  head = {} if tied else {"head": Array((width, vocabulary), (EMBED, WIDE))}
  return Model(
    read.name,
    embed={
      "tokens": Array((vocabulary, width), (WIDE, EMBED)),
      "positions": Array((read.size("n_positions"), width), (None, EMBED)),
    },
    layer=layer,
    num_layers=read.size("n_layer"),
    top=_norms(width, "ln_f/scale", "ln_f/bias") | head,
    tied=tied,
  )


def _from_decoder(read: _Reader, family: _Family) -> Model:
  """Rotary positions, grouped queries, gated MLPs: all families but GPT-2."""
  width, vocabulary = read.size("hidden_size"), read.size("vocab_size")
  tied = read.flag("tie_word_embeddings", family.tied)
  names = ["input_norm", "mlp_norm"]
  if family.post_norms:
    names += ["post_attention_norm", "post_mlp_norm"]
  head = {} if tied else {"head": Array((width, vocabulary), (EMBED, WIDE))}
  return Model(
    read.name,
    embed={"tokens": Array((vocabulary, width), (WIDE, EMBED))},
    layer=_norms(width, *names) | _attention(read, family) | _mlp(read, family),
    num_layers=read.size("num_hidden_layers"),
    top=_norms(width, "norm") | head,
    tied=tied,
  )


def _attention(read: _Reader, family: _Family) -> dict[str, Array]:
  width, heads = read.size("hidden_size"), read.size("num_attention_heads")
  kv_heads = read.size("num_key_value_heads", heads)
  if heads % kv_heads:
    raise read.error(
      f"num_attention_heads is {heads}; expected a multiple of"
      f" num_key_value_heads, {kv_heads}"
    )
  given = family.head_dim or read.config.get("head_dim")
  if given is None and width % heads:
    raise read.error(
      f"hidden_size is {width}; expected a multiple of num_attention_heads,"
      f" {heads}, where there is no head_dim"
    )
  channels = read.size("head_dim", family.head_dim or width // heads)
  arrays = {}
  biased = family.biases and read.flag("attention_bias", False)
  qkv_biased = biased or (family.qkv_bias and read.flag("qkv_bias", True))
  for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
    arrays[name] = Array((width, count * channels), (EMBED, WIDE))
    if qkv_biased:
      arrays[f"{name}_bias"] = Array((count * channels,), (WIDE,))
  arrays["o"] = Array((heads * channels, width), (WIDE, EMBED))
  if biased:
    arrays["o_bias"] = Array((width,), (None,))
  if family.qk_norm:
    arrays |= _norms(channels, "q_norm", "k_norm")
  return arrays


def _mlp(read: _Reader, family: _Family) -> dict[str, Array]:
  width = read.size("hidden_size")
  if family.experts is None:
    hidden = read.size("intermediate_size")
    arrays = _gated(width, hidden)
    if family.biases and read.flag("mlp_bias", False):
      arrays |= {
        "gate_bias": Array((hidden,), (WIDE,)),
        "up_bias": Array((hidden,), (WIDE,)),
        "down_bias": Array((width,), (None,)),
      }
    return arrays
  if read.config.get("mlp_only_layers") or read.size("decoder_sparse_step", 1) > 1:
    raise read.error(
      "found layers with and without experts (mlp_only_layers,"
      " decoder_sparse_step); expected layers that are all alike"
    )
  experts = read.size(family.experts)
  hidden = read.size(family.expert_width)
  arrays = {"router": Array((width, experts), (EMBED, None))}
  for name, array in _gated(width, hidden).items():
    arrays[f"experts/{name}"] = Array((experts, *array.shape), (EXPERT, *array.roles))
  if read.config.get("shared_expert_intermediate_size") is not None:
    shared = _gated(width, read.size("shared_expert_intermediate_size"))
    arrays |= {f"shared/{name}": array for name, array in shared.items()}
    arrays["shared/router"] = Array((width, 1), (EMBED, None))
  return arrays


def _gated(width: int, hidden: int) -> dict[str, Array]:
  return {
    "gate": Array((width, hidden), (EMBED, WIDE)),
    "up": Array((width, hidden), (EMBED, WIDE)),
    "down": Array((hidden, width), (WIDE, EMBED)),
  }
