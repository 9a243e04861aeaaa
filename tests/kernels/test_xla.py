"""Leaves that XLA updates in batches on a GPU, and large ones on a CPU."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest

from flashoptim_jax import rules
from flashoptim_jax.kernels import xla
from flashoptim_jax.kernels.base import Leaf, UpdateSpec
from tests.support import cases
from tests.support.cases import some_cases

BF16, F32 = jnp.bfloat16, jnp.float32
WHOLE = {  # Without partial groups, and small.
  "matrix": ((4, 64), BF16),
  "bias": ((32,), BF16),
  "other bias": ((32,), BF16),
  "stack": ((2, 3, 32), BF16),
}
PARTIAL = {
  "ragged": ((3, 40), BF16),
  "few": ((5,), BF16),
  "other axis": ((64, 5), BF16),
  "scalar": ((), BF16),
}
LARGE = {"large": ((64, 4096), BF16)}
OTHERS = {
  "empty": ((0, 64), BF16),
  "norm": ((64,), F32),
  "undecayed": ((64,), BF16),
}
SHAPES = WHOLE | PARTIAL | LARGE | OTHERS


def is_decayed(params):
  return {name: name != "undecayed" for name in params}


def train(tx, params, via):
  """Two steps, traced anew."""

  def step(*args):
    return via(*args)

  return cases.train(tx, params, 2, jax.jit(step, static_argnums=0))


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "storage", "via"),
  [
    ("adamw", "root", cases.step),
    ("adamw", "root", cases.update),
    ("adam", "paper", cases.step),
    ("adam_nesterov", "32/32", cases.step),
    ("lion", "none/8", cases.step),
    ("adamw", "16/8", cases.step),
    ("lion", "16/8", cases.update),
  ],
)
def test_batches_equal_leaves_alone(name, storage, via, monkeypatch):
  has_decay = "weight_decay" in cases.OPTIMIZERS[name].kwargs
  kwargs = {"mask": is_decayed} if has_decay else {}
  tx = cases.make(name, storage, implementation="xla", **kwargs)
  params = cases.tree(SHAPES)
  alone = train(tx, params, via)

  batches = []

  def update_batch(spec, leaves, scalars):
    batches.append(sorted(leaf.param.shape for leaf in leaves))
    return update(spec, leaves, scalars)

  update = xla._update_batch
  monkeypatch.setattr(xla, "_update_batch", update_batch)
  cases.update_as_on("gpu", monkeypatch, devices=1)
  together = train(tx, params, via)

  cases.assert_equal(together, alone, 2)
  if cases.STORAGES[storage].master_bits == 16:
    cases.assert_same(together[0], alone[0])
  joined, others = dict(WHOLE), PARTIAL | LARGE
  if cases.STORAGES[storage].moment_bits == 32:  # There are no groups.
    joined, others = WHOLE | PARTIAL, LARGE
  if not has_decay:
    joined["undecayed"] = OTHERS["undecayed"]
  of_one_size = {}
  for shape, _ in others.values():
    of_one_size.setdefault(math.prod(shape), []).append(shape)
  alone = [[shape] for key, (shape, _) in OTHERS.items() if key not in joined]
  expected = [[shape for shape, _ in joined.values()], *of_one_size.values(), *alone]
  assert sorted(batches) == sorted(map(sorted, expected))


@pytest.mark.parametrize(
  ("limits", "expected"),
  [
    ({"_MOST_SHARING": 3, "_MOST_CACHED": 300}, [[96] * 3, [96], [32, 64], [512]]),
    ({"_MOST_SHARING": 3, "_MOST_CACHED": 200}, [[96] * 2] * 2 + [[32, 64], [512]]),
    ({"_MOST_JOINED": 1}, [[96] * 4, [32], [64], [512]]),
    (
      {"_MOST_JOINED": 2, "_JOINED_BELOW": 128},
      [[32, 64], [96, 96], [96, 96], [512]],
    ),
    ({"_JOINED_BELOW": 128}, [[32, 64, 96, 96, 96, 96], [512]]),
  ],
)
def test_batches_are_limited(limits, expected, monkeypatch):
  monkeypatch.setattr(xla, "_JOINED_BELOW", 96)
  for name, limit in limits.items():
    monkeypatch.setattr(xla, name, limit)
  sizes = [96, 32, 96, 512, 96, 64, 96]
  params = cases.tree({str(i): ((n,), BF16) for i, n in enumerate(sizes)})
  leaves = [Leaf(p, p, None, ((p, p),), "", decay=True) for p in params.values()]
  spec = UpdateSpec(rules.LION, cases.QUANTIZED, None, new_params=True)
  batches = list(xla._batches(spec, leaves))
  assert sorted(i for batch in batches for i in batch) == list(range(len(sizes)))
  found = [sorted(sizes[i] for i in batch) for batch in batches]
  assert sorted(found) == sorted(expected)

  tx = cases.make("lion", implementation="xla")
  alone = cases.train(tx, params, steps=1)
  cases.update_as_on("gpu", monkeypatch, devices=1)
  cases.assert_same(cases.train(tx, params, steps=1), alone)


@some_cases
def test_large_leaves_on_one_device(name, storage, monkeypatch):
  """On one device that is a CPU they have a path of their own."""
  tx = cases.make(name, storage)
  params = cases.tree({"w": ((4, 1 << 14), jnp.bfloat16)})
  grads, state = cases.grads_like(params), tx.init(params)
  for function in (cases.step, cases.update):
    results = []
    for least in (params["w"].size, params["w"].size + 1):
      monkeypatch.setattr(xla, "_OUTLINED_FROM", least)
      jitted = jax.jit(functools.partial(function, tx))
      new_params, new_state = jitted(grads, state, params)
      results.append(jitted(grads, new_state, new_params))
    cases.assert_equal(*results, steps=2)
