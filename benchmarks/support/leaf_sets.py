"""Shapes of the parameters of well-known models, for benchmarks."""

Shapes = dict[str, tuple[int, ...]]


def one_leaf() -> Shapes:
  """A single leaf of 268 M parameters."""
  return {"w": (16384, 16384)}


def _llama(vocabulary: int, dim: int, kv: int, hidden: int, layers: int) -> Shapes:
  """Embedding and layers, ``kv`` being the width of keys and of values."""
  shapes: Shapes = {"embed": (vocabulary, dim)}
  for i in range(layers):
    shapes |= {
      f"layer{i}/wq": (dim, dim),
      f"layer{i}/wk": (dim, kv),
      f"layer{i}/wv": (dim, kv),
      f"layer{i}/wo": (dim, dim),
      f"layer{i}/gate": (dim, hidden),
      f"layer{i}/up": (dim, hidden),
      f"layer{i}/down": (hidden, dim),
      f"layer{i}/attention_norm": (dim,),
      f"layer{i}/mlp_norm": (dim,),
    }
  return shapes


def llama3_8b(layers: int = 32) -> Shapes:
  """Llama-3-8B: 128,256 × 4,096 embedding, ``layers`` of its 32 layers, a head.

  The head is left out where the stack is cut short.
  """
  shapes = _llama(128256, 4096, 1024, 14336, layers)
  if layers == 32:
    shapes |= {"norm": (4096,), "head": (4096, 128256)}
  return shapes


def llama32_1b() -> Shapes:
  """Llama-3.2-1B: 16 layers of width 2,048, embedding tied to the head."""
  return _llama(128256, 2048, 512, 8192, 16) | {"norm": (2048,)}


def gpt2() -> Shapes:
  """GPT-2, 124 M parameters in 148 leaves."""
  shapes: Shapes = {"wte": (50257, 768), "wpe": (1024, 768)}
  for i in range(12):
    for norm in ("ln_1", "ln_2"):
      shapes |= {f"h{i}/{norm}/scale": (768,), f"h{i}/{norm}/bias": (768,)}
    for name, rows, columns in (
      ("attn/qkv", 768, 2304),
      ("attn/proj", 768, 768),
      ("mlp/fc", 768, 3072),
      ("mlp/proj", 3072, 768),
    ):
      shapes[f"h{i}/{name}/kernel"] = (rows, columns)
      shapes[f"h{i}/{name}/bias"] = (columns,)
  return shapes | {"ln_f/scale": (768,), "ln_f/bias": (768,)}


def resnet50() -> Shapes:
  """ResNet-50, 25.6 M parameters in 161 leaves."""
  shapes: Shapes = {}

  def conv(name, size, inputs, outputs):
    shapes[f"{name}/kernel"] = (size, size, inputs, outputs)
    shapes[f"{name}/norm/scale"] = (outputs,)
    shapes[f"{name}/norm/bias"] = (outputs,)

  conv("stem", 7, 3, 64)
  inputs = 64
  for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512))):
    for block in range(blocks):
      name = f"stage{stage}/block{block}"
      if block == 0:
        conv(f"{name}/shortcut", 1, inputs, 4 * width)
      conv(f"{name}/a", 1, inputs, width)
      conv(f"{name}/b", 3, width, width)
      conv(f"{name}/c", 1, width, 4 * width)
      inputs = 4 * width
  return shapes | {"head/kernel": (2048, 1000), "head/bias": (1000,)}


LEAF_SETS = {
  "one leaf, 268 M": one_leaf,
  "Llama-3-8B, 4 layers + embedding": lambda: llama3_8b(4),
  "GPT-2 124 M": gpt2,
  "ResNet-50": resnet50,
}
