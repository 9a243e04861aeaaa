"""ZeRO-1: state that is sharded over more mesh axes than the parameters."""

import collections
import functools
import math
import re

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
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


@functools.cache
def alone(name):
  """The same training on one device."""
  return cases.train(cases.make(name), cases.tree(SHAPES), STEPS, cases.jitted_step)


def combinations():
  for name in ("adamw", "lion", "momentum"):
    for mesh in MESHES:
      for kind in KINDS:
        yield name, mesh, kind


@pytest.mark.parametrize(
  ("name", "mesh", "kind"),
  slow_but(combinations(), ("adamw", "4x2", "explicit"), ("lion", "8", "auto")),
)
def test_gathers_16_bits_of_each_parameter(name, mesh, kind):
  setup = Setup(mesh, kind, cases.make(name))
  devices = math.prod(MESHES[mesh].values())
  for path, array in jax.tree.leaves_with_path(setup.state._replace(count=())):
    leaf = path[-1].key
    wanted = setup.along(*SPECS[mesh][leaf])
    assert array.sharding.is_equivalent_to(wanted, array.ndim), path
    (part, *_) = array.addressable_shards
    assert part.data.nbytes * (1 if leaf == "norm" else devices) == array.nbytes

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
  cases.assert_equal(jax.device_get((params, state)), alone(name), STEPS)


@pytest.mark.parametrize("kind", slow_but(KINDS, "auto"))
def test_gradients_of_a_divided_batch_are_not_gathered(kind):
  setup = Setup("8", kind, cases.make("adamw"))

  def loss(params, batch):
    activations = (batch @ params["rows"]).astype(jnp.float32)
    return jnp.mean(activations**2)

  def step(params, state, batch):
    grads = jax.grad(loss)(params, batch)
    return fo.step(setup.tx, grads, state, params)

  sent = setup.sent(setup.compiled(step, setup.batch).as_text())
  assert sent.pop(("all-gather", "u16")) == setup.gathered()
  # The sums over the batch, here before the gradient is cut.
  assert {kind for kind, _ in sent} <= {"all-reduce", "reduce-scatter"}
  assert sum(sent.values()) <= math.prod(SHAPES["rows"][0])


def wrappers(tx):
  return {
    "clip": optax.chain(optax.clip_by_global_norm(1e9), tx),
    "MultiSteps": optax.MultiSteps(tx, 2).gradient_transformation(),
    "compress": fo.compress(optax.adam(1e-2), storage=cases.QUANTIZED),
    "partition": optax.partition(
      {"flash": tx, "plain": optax.sgd(0.1)},
      {"rows": "flash", "columns": "plain", "gaps": "flash", "norm": "plain"},
    ),
  }


@pytest.mark.parametrize(
  ("name", "kind"),
  slow_but(
    [(name, kind) for name in wrappers(cases.make("adamw")) for kind in KINDS],
    ("compress", "explicit"),
  ),
)
def test_through_wrappers(name, kind):
  inside = cases.make("adamw")
  tx = wrappers(inside)[name]
  if name == "MultiSteps":  # It passes on no arguments.
    tx = wrappers(Setup("4x2", kind, inside).tx)[name]
  setup = Setup("4x2", kind, tx)

  def step(params, state, grads):
    return fo.step(setup.tx, grads, state, params)

  grads = [
    jax.device_put(cases.grads_like(setup.params, 1 + i), setup.shardings)
    for i in range(2)
  ]
  compiled = setup.compiled(step, grads[0])
  gathered = setup.gathered() - (3 * 256 if name == "partition" else 0)
  assert setup.sent(compiled.as_text()) == {("all-gather", "u16"): gathered}
  params, state = setup.params, setup.state
  for each in grads:
    params, state = compiled(params, state, each)
  expected = cases.train(
    wrappers(inside)[name], cases.tree(SHAPES), 2, cases.jitted_step
  )
  cases.assert_equal(jax.device_get((params, state)), expected, 2)


@pytest.mark.parametrize("kind", slow_but(KINDS, "explicit"))
def test_precision_in_and_out(kind):
  """Master weights lie where the corrections do."""
  tx = cases.make("adamw")
  setup = Setup("4x2", kind, tx)
  params, state = alone("adamw")
  given = jax.device_put((params, state), (setup.shardings, setup.placed))
  masters = fo.to_fp32(*given)
  assert masters["rows"].addressable_shards[0].data.size * 8 == masters["rows"].size
  for actual in cases.there_and_back(tx, *given):
    cases.assert_same(*jax.device_get((actual, (params, state))))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_of_another_mesh(kind, tmp_path):
  tx = cases.make("adamw")
  saved, restored = (Setup(mesh, kind, tx) for mesh in MESHES)
  arrays = alone("adamw")
  abstract = jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    ),
    arrays,
    (restored.shardings, restored.placed),
  )
  with ocp.AsyncCheckpointer(fo.checkpoint.Handler()) as checkpointer:
    given = jax.device_put(arrays, (saved.shardings, saved.placed))
    checkpointer.save(tmp_path / "saved", args=fo.checkpoint.Save(given))
    checkpointer.wait_until_finished()
    found = checkpointer.restore(
      tmp_path / "saved", args=fo.checkpoint.Restore(abstract)
    )
  cases.assert_same(*jax.device_get((found, arrays)))
  for leaf, wanted in zip(*map(jax.tree.leaves, (found, abstract)), strict=True):
    assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["adamw", "compress"])
def test_gradient_release(name, kind):
  tx = cases.make("adamw")
  if name == "compress":
    tx = wrappers(tx)[name]
  setup = Setup("8", kind, tx)

  def product(weight, batch):
    return batch @ weight

  def rest(weights, batch):
    squares = [jnp.sum(x.astype(jnp.float32) ** 2) for x in (batch, *weights)]
    return sum(squares)

  def loss(live, batch):
    batch = fo.released_call(product, live["rows"], batch)
    others = [live[name] for name in ("columns", "gaps", "norm")]
    return fo.released_call(rest, others, batch)

  step = jax.jit(
    fo.value_and_release(loss, setup.tx),
    out_shardings=(None, setup.shardings, setup.placed),
  )
  _, *actual = step(setup.params, setup.state, setup.batch)
  params = cases.tree(SHAPES)
  _, *expected = jax.jit(fo.value_and_release(loss, tx))(
    params, tx.init(params), jax.device_get(setup.batch)
  )
  cases.assert_equal(jax.device_get(actual), expected, 1)


@pytest.mark.slow
def test_derivatives():
  tx = fo.sgd(1e-2, momentum=0.9, storage=fo.Storage(32, 32))
  setup = Setup("8", "auto", tx)

  def total(tx, state, params):
    new_params, _ = fo.step(tx, params, state, params)
    return sum(jnp.sum(leaf.astype(jnp.float32)) for leaf in new_params.values())

  actual = jax.jit(jax.grad(functools.partial(total, setup.tx, setup.state)))
  params = cases.tree(SHAPES)
  expected = jax.grad(functools.partial(total, tx, tx.init(params)))(params)
  cases.assert_same(*jax.device_get((actual(setup.params), expected)))
