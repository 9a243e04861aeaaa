"""ZeRO-1: state that is sharded over more mesh axes than the parameters."""

import collections
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import flashoptim_jax as fo
from tests.support import cases
from tests.support.meshes import KINDS
from tests.support.tiers import slow_but

STEPS = 5
MESHES = {"8": {"data": 8}, "4x2": {"data": 4, "fsdp": 2}}
SHAPES = {
  "rows": ((64, 128), jnp.bfloat16),
  "columns": ((3, 512), jnp.bfloat16),  # Along the axis of the groups.
  "gaps": ((16, 192), jnp.bfloat16),
  "norm": ((12,), jnp.float32),  # None that fits.
}
SPECS = {
  "8": {
    "rows": P("data"),
    "columns": P(None, "data"),
    "gaps": P("data"),
    "norm": P(),
  },
  "4x2": {
    "rows": P(("fsdp", "data")),
    "columns": P(None, ("fsdp", "data")),
    "gaps": P(("fsdp", "data")),
    "norm": P(),
  },
}
SENT = re.compile(
  r"= (?:\()?(\w+)\[([\d,]*)\]\S*"
  r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\("
)


class Setup:
  """Parameters on a mesh, and where the state is."""

  def __init__(self, mesh, kind, tx, told=True):
    sizes = MESHES[mesh]
    self.mesh = jax.make_mesh(
      tuple(sizes.values()), tuple(sizes), axis_types=(KINDS[kind],) * len(sizes)
    )
    whole = cases.tree(SHAPES)

    def place(name):
      shared = "fsdp" in sizes and name != "norm"
      spec = {"columns": P(None, "fsdp")}.get(name, P("fsdp")) if shared else P()
      return NamedSharding(self.mesh, spec)

    self.shardings = {name: place(name) for name in whole}
    self.placed = fo.state_shardings(tx, whole, self.shardings, over="data")
    self.params = jax.device_put(whole, self.shardings)
    self.state = jax.jit(tx.init, out_shardings=self.placed)(self.params)
    self.batch = jax.device_put(jnp.ones((8, 64), jnp.bfloat16), self.along("data"))
    self.tx = tx
    if told and kind == "auto":
      self.tx = fo.with_shardings(tx, whole, self.shardings, over="data")

  def along(self, *axes):
    return NamedSharding(self.mesh, P(*axes))

  def compiled(self, step, *args):
    return (
      jax.jit(step, donate_argnums=(0, 1), out_shardings=(self.shardings, self.placed))
      .lower(self.params, self.state, *args)
      .compile()
    )

  def sent(self, text):
    """How many elements of which dtype each kind of collective takes or gives."""
    found = collections.Counter()
    for dtype, shape, kind in SENT.findall(text):
      found[kind, dtype] += math.prod(map(int, filter(None, shape.split(","))))
    return dict(found)

  def gathered(self):
    """Elements of parameters whose state is sharded over more axes than they are."""
    return sum(
      math.prod(self.shardings[name].shard_shape(shape))
      for name, (shape, _) in SHAPES.items()
      if name != "norm"
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", slow_but(["adamw", "lion", "momentum"], "adamw"))
def test_gathers_16_bits_of_each_parameter(name, mesh, kind):
  setup = Setup(mesh, kind, cases.make(name))
  specs = jax.tree.map(lambda sharding: sharding.spec, setup.placed)
  for field in ("mu", "mu_scale", "correction"):
    for leaf, spec in getattr(specs, field).items():
      entries = tuple(spec) + (None,) * (2 - len(spec))
      wanted = tuple(SPECS[mesh][leaf])
      assert entries[: len(wanted)] == wanted or spec == P(None), (field, leaf)

  def step(params, state, grads):
    return fo.step(setup.tx, grads, state, params)

  grads = [
    jax.device_put(cases.grads_like(setup.params, 1 + i), setup.shardings)
    for i in range(STEPS)
  ]
  compiled = setup.compiled(step, grads[0])
  assert setup.sent(compiled.as_text()) == {("all-gather", "u16"): setup.gathered()}
  params, state = setup.params, setup.state
  for each in grads:
    params, state = compiled(params, state, each)
  expected = cases.train(setup.tx, cases.tree(SHAPES), STEPS, cases.jitted_step)
  cases.assert_equal(jax.device_get((params, state)), expected, STEPS)
