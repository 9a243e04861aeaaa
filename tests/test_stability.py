"""What training must survive when its state has 8 bits a number.

Each test lets float32 training with Optax, or arithmetic that is exact, say what to
expect. Weights are in float32 where the moments alone are looked at.
"""

import functools
import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

import flashoptim_jax as fo
from flashoptim_jax.storage.state import is_flash_state
from tests.support import cases
from tests.support.processes import worker
from tests.support.tiers import slow_but

LR = 2.0**-10
GROUP = 32
ADAM = {"adam": {}, "nadam": {"nesterov": True}}
COMPANDINGS = ("root", "paper")
# Of one optimizer: ours, ours around Optax's, and Optax's in float32.
TRANSFORMATIONS = {
  "adam": (fo.adam, optax.adam, {}),
  "nadam": (fo.adam, optax.adam, {"nesterov": True}),
  "lion": (fo.lion, optax.lion, {"weight_decay": 0.0}),
  "momentum": (fo.sgd, optax.sgd, {"momentum": 0.9}),
}
every_companding = pytest.mark.parametrize("companding", slow_but(COMPANDINGS))
every_way = pytest.mark.parametrize(
  "compressed", slow_but([False, True]), ids=["fused", "compress"]
)


def storage(companding="root", **kwargs):
  return fo.Storage(companding=companding, min_quantized_size=0, **kwargs)


def make(name, companding, compressed=False, rate=LR, bits=24, **kwargs):
  """A transformation with 8-bit moments, and Optax's own."""
  ours, plain, arguments = TRANSFORMATIONS[name]
  arguments = {**arguments, **kwargs}
  if compressed:
    tx = fo.compress(plain(rate, **arguments), storage(companding, master_bits=bits))
  else:
    tx = ours(rate, storage=storage(companding, master_bits=bits), **arguments)
  return tx, plain(rate, **arguments)


def second_moments(state):
  """Those of a state of ours or of Optax's."""
  ours = any(map(is_flash_state, jax.tree.leaves(state, is_leaf=is_flash_state)))
  return fo.moments(state)["nu"] if ours else optax.tree.get(state, "nu")


def run(tx, params, grads, look=lambda params, state: params, function=fo.step):
  """Trains; what ``look`` sees after every step."""

  @jax.jit
  def scan(params, state, grads):
    def step(carry, grad):
      params, state = function(tx, grad, carry[1], carry[0])
      return (params, state), look(params, state)

    return jax.lax.scan(step, (params, state), grads)

  (params, state), seen = scan(params, tx.init(params), jnp.asarray(grads))
  return params, state, jax.tree.map(np.asarray, seen)


def noise(shape, steps, mean=0.1, seed=0):
  rng = np.random.default_rng(seed)
  return (rng.standard_normal((steps, *shape)) + mean).astype(np.float32)


# How far one step goes.

STEPS = 300
BETAS = [(0.9, 0.95), (0.9, 0.999), (0.0, 0.9), (0.8, 0.99)]
SHAPE = (2, 40)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def steps_taken(name, companding, compressed, betas, grads):
  b1, b2 = betas
  tx, _ = make(name, companding, compressed, 1.0, b1=b1, b2=b2)
  params = jnp.zeros(SHAPE)

  def step(carry, grad):
    params, state = fo.step(tx, grad, carry[1], carry[0])
    return (params, state), params - carry[0]

  return jax.lax.scan(step, (params, tx.init(params)), grads)[1]


@st.composite
def element(draw):
  """A sequence of gradients of one element."""
  t = np.arange(STEPS)
  size = draw(st.sampled_from([1.0, 1e-2, 1e-6, 1e-12, 1e8]))
  grads = np.full(STEPS, size * draw(st.floats(0.1, 1)))
  kind = draw(st.sampled_from(["constant", "alternates", "sparse", "shrinks", "grows"]))
  if kind == "alternates":
    grads *= (-1.0) ** t
  elif kind == "sparse":
    period = draw(st.integers(2, 100))
    grads *= t % period == draw(st.integers(0, period - 1))
  elif kind in ("shrinks", "grows"):
    grads *= draw(st.floats(0.5, 1)) ** (t if kind == "shrinks" else STEPS - t)
  first, last = draw(st.integers(0, STEPS)), draw(st.integers(0, STEPS))
  if first < last:
    grads *= (t >= first) & (t < last)
  if draw(st.booleans()):
    spike = draw(st.sampled_from([1e-20, 1e-5, 1e5, 1e10, 1e20]))
    grads[draw(st.integers(0, STEPS - 1))] = spike
  return grads


@st.composite
def gradients(draw):
  """Gradients of all elements: a few kinds, in any order."""
  kinds = np.stack(draw(st.lists(element(), min_size=1, max_size=6)), axis=-1)
  order = np.random.default_rng(draw(st.integers(0, 9)))
  return kinds[:, order.integers(0, kinds.shape[-1], SHAPE)].astype(np.float32)


@every_way
@every_companding
@pytest.mark.parametrize("name", slow_but(ADAM))
@hypothesis.settings(max_examples=20)
@hypothesis.given(grads=gradients(), betas=st.sampled_from(BETAS))
def test_no_step_is_longer_than_adams(name, companding, compressed, grads, betas):
  found = np.asarray(
    steps_taken(name, companding, compressed, jnp.array(betas), grads), np.float64
  )
  bound = cases.largest_steps(*betas, name == "nadam", STEPS)[:, None, None]
  # `compress` knows of no bound. There a first moment's code may be rounded up, to 2,
  # beside a second moment's of 1: (2/127)² over (1/255)², about 16.
  allowed = 1.1 if not compressed else 18
  assert np.isfinite(found).all()
  assert (np.abs(found) <= allowed * bound).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAM)
def test_no_step_of_the_tpu_kernel_is_longer(name):
  steps, shape = 20, (5, 168)
  tx = fo.adam(
    1.0, b2=0.95, storage=storage(), implementation="mosaic_tpu", **ADAM[name]
  )
  params = jnp.zeros(shape)
  step = jax.jit(functools.partial(fo.step, tx))
  state, path = tx.init(params), [params]
  for grad in cases.spiky(shape, steps):
    params, state = step(grad, state, path[-1])
    path.append(params)
  found = np.abs(np.diff(np.float64(path), axis=0)).max((1, 2))
  bound = cases.largest_steps(0.9, 0.95, name == "nadam", steps)
  assert found.max() > 0.5 * bound[-1]
  assert (found <= 1.1 * bound).all()


# Gradients that are zero.


@every_way
@every_companding
@pytest.mark.parametrize("name", slow_but(TRANSFORMATIONS))
def test_weights_whose_gradients_end_come_to_rest(name, companding, compressed):
  """Dead units: as far after their last gradient as in float32, at most."""
  steps, last = 900, 200
  arguments = {"b2": 0.95} if name in ADAM else {}
  ours, plain = make(name, companding, compressed, **arguments)
  grads = noise((4, 40), steps, mean=0.3)
  dead = np.arange(40) % 3 == 0
  grads[last:, :, dead] = 0
  params = jnp.zeros((4, 40))
  moved = [
    np.abs(np.diff(run(tx, params, grads)[2][last - 1 :, :, dead], axis=0)).sum(0)
    for tx in (ours, plain)
  ]
  assert (moved[0] <= 1.1 * moved[1] + 20 * LR).all()
  assert moved[0].mean() <= 1.1 * moved[1].mean()


@every_way
@every_companding
@pytest.mark.parametrize("name", slow_but(TRANSFORMATIONS))
def test_weights_without_gradients_rest(name, companding, compressed):
  """Masked or pruned ones, and half a group of them."""
  ours, _ = make(name, companding, compressed)
  grads = noise((3, 64), 300)
  masked = np.stack([np.arange(64) % 8 < 4, np.arange(64) != 5, np.arange(64) % 2 == 0])
  grads[:, masked] = 0
  params, _, _ = run(ours, jnp.full((3, 64), 0.5), grads)
  np.testing.assert_array_equal(np.asarray(params)[masked], 0.5)
  assert (np.asarray(params)[~masked] != 0.5).mean() > 0.9


@every_way
@every_companding
@pytest.mark.parametrize("b2", slow_but([0.95, 0.999]))
def test_others_go_on_beside_weights_without_gradients(companding, compressed, b2):
  """Half a group, or all but one weight, may have none, from the start or later."""
  steps = 600
  grads = noise((4, 32), steps, mean=0.3)
  first, one = np.arange(32) % 8 < 4, np.arange(32) == 9
  grads[:, 0, ~first] = grads[:, 1, ~one] = 0
  grads[100:, 2, ~first] = grads[100:, 3, ~one] = 0
  live = np.stack([first, one, first, one])
  ours, plain = make("adam", companding, compressed, b2=b2)
  params = jnp.zeros((4, 32))
  found, expected = (
    run(tx, params, grads, lambda params, state: (params, second_moments(state)))[2]
    for tx in (ours, plain)
  )
  roots = [np.sqrt(x[1][300:, live]).mean(0) for x in (found, expected)]
  np.testing.assert_allclose(*roots, rtol=0.1)
  np.testing.assert_allclose(roots[0].mean(), roots[1].mean(), rtol=0.05)
  moved = [np.abs(x[0][-1, live]).mean() for x in (found, expected)]
  np.testing.assert_allclose(*moved, rtol=0.05)


@every_way
@every_companding
@pytest.mark.parametrize("name", slow_but(ADAM))
def test_rare_rows_move_as_far_as_in_float32(name, companding, compressed):
  """Rows of an embedding, from one hit at every step to one that nearly none hits."""
  steps, rows = 4000, 32
  ours, plain = make(name, companding, compressed, b2=0.95)
  rate = np.geomspace(2e-4, 1, rows)
  rng = np.random.default_rng(0)
  hit = rng.random((steps, rows, 1)) < rng.permutation(rate)[:, None]
  grads = noise((rows, 8), steps, mean=0) * hit
  params = jnp.zeros((rows, 8))
  found, expected = (np.float64(run(tx, params, grads)[0]) for tx in (ours, plain))
  rms = [np.sqrt((x**2).mean(1)) for x in (found, expected)]
  touched = rms[1] > 0
  ratio = rms[0][touched] / rms[1][touched]
  # The rarest rows are hit once or twice, in the noise of one scale's codes.
  least, most = (0.9, 1.15) if companding == "root" else (0.8, 1.25)
  assert ((ratio > least) & (ratio < most)).all(), np.sort(ratio)
  np.testing.assert_allclose(ratio.mean(), 1, rtol=0.03)


# Spikes.


@every_way
@every_companding
@pytest.mark.parametrize(
  ("name", "arguments"),
  slow_but(
    [
      *itertools.product(ADAM, ({"b2": 0.95}, {"b2": 0.999})),
      ("lion", {}),
      ("momentum", {}),
    ]
  ),
)
def test_a_spike_is_its_own_affair(name, arguments, companding, compressed):
  """One finite gradient beyond all others, in the first update or in the fourth."""
  spikes = [(1e10, 0), (1e20, 0), (1e10, 3), (1e20, 3)]
  ours, plain = make(name, companding, compressed, **arguments)
  grads = noise((len(spikes), 64), 304, mean=0.3)
  spiked = grads.copy()
  for row, (spike, at) in enumerate(spikes):
    spiked[at, row, 5] = spike
  params = jnp.zeros(grads.shape[1:])
  _, _, found = run(ours, params, spiked)
  _, _, expected = run(plain, params, grads)
  assert not np.isnan(found).any()
  others = [i for i in range(GROUP) if i != 5]
  progress = [(x[-1] - x[3])[:, others].mean(1) for x in (found, expected)]
  # "paper" has too few places for neighbours that are 4096 times smaller.
  least = 0.8 if companding == "root" else 0.2
  ratio = progress[0] / progress[1]
  assert ((ratio > least) & (ratio < 1.25)).all(), ratio


# Gradients that shrink, and small steps.


@every_way
@pytest.mark.parametrize("b2", slow_but([0.9, 0.95, 0.999, 0.9999]))
def test_second_moments_follow_shrinking_gradients(compressed, b2):
  """Down to a tenth, in groups whose largest stay, and in one that shrinks whole."""
  ratios = [1.0, 0.1, 0.02]
  ours, plain = make("adam", "root", compressed, b2=b2)
  steps = max(300, round(3 / (1 - b2)))
  size = np.array(ratios)[:, None] * np.ones(GROUP, np.float32)
  largest = (np.arange(GROUP) < 4) & (size < 1)
  params = jnp.zeros(size.shape)
  optax_state = optax.tree.set(plain.init(params), nu=jnp.where(largest, 1, size**2))

  @functools.partial(jax.jit, static_argnums=0)
  def mean_roots(tx, state):
    def step(carry, key):
      params, state, total = carry
      sign = jax.random.rademacher(key, size.shape, jnp.float32)
      grads = sign * jnp.where(largest, 1, 0.1 * size)
      params, state = fo.step(tx, grads, state, params)
      return (params, state, total + jnp.sqrt(second_moments(state))), None

    keys = jax.random.split(jax.random.key(0), steps)
    return jax.lax.scan(step, (params, state, jnp.zeros(size.shape)), keys)[0][2]

  state = fo.from_optax(ours, params, optax_state)
  found, expected = mean_roots(ours, state), mean_roots(plain, optax_state)
  ratio = np.asarray(found / expected)
  by_row = [row[~big].mean() for row, big in zip(ratio, largest, strict=True)]
  np.testing.assert_allclose(by_row, 1, rtol=0.04)


@pytest.mark.parametrize(
  "function", slow_but([fo.step, cases.update]), ids=["step", "update"]
)
@pytest.mark.parametrize("dtype", slow_but(["bfloat16", "float16"]))
@pytest.mark.parametrize("name", slow_but(["adam", "lion"]))
@pytest.mark.parametrize("bits", slow_but([24, 16], 24, 16))
def test_small_steps_add_up(bits, name, dtype, function):
  """A learning rate of a tenth, 1, 2 and 3 half spacings of the master weights."""
  start, steps, shape = 1.5, 1000, (4, 64)
  spacing = cases.spacing(1.0, np.dtype(dtype), bits)

  @jax.jit
  def train(rate, grads):
    def scan(tx, function, grads, params, state):
      def step(carry, grad):
        return function(tx, grad, carry[1], carry[0]), None

      return jax.lax.scan(step, (params, state), grads)[0]

    ours, plain = make(name, "root", rate=rate, bits=bits)
    begin = fo.from_fp32(ours, jnp.full(shape, start), dtype)
    ended = fo.to_fp32(*scan(ours, function, grads, *begin))
    # Without weight decay all is as it is far from zero, where steps are exact.
    zeros = jnp.zeros(shape)
    grads = grads.astype(jnp.float32)
    return ended - start, scan(plain, fo.step, grads, zeros, plain.init(zeros))[0]

  for grads in (noise(shape, steps), np.ones((steps, *shape), np.float32)):
    for places in (0.1, 1, 2, 3):
      rate = places * spacing / 2
      found, expected = train(rate, jnp.asarray(grads, dtype))
      found, expected = (np.mean(x, dtype=np.float64) for x in (found, expected))
      assert abs(found - expected) <= 0.02 * abs(expected) + spacing


def test_small_steps_of_the_tpu_kernel_are_exact():
  """A hundredth of a place is no whole number of float32's places."""
  spacing = cases.spacing(1.0, np.dtype(jnp.bfloat16), 24)

  def trained(implementation):
    tx = fo.sgd(-0.01 * spacing, implementation=implementation)
    params, state = fo.from_fp32(tx, jnp.full((8, 128), 1.5), "bfloat16")
    grads = jnp.ones_like(params)

    def step(carry, _):
      return fo.step(tx, grads, carry[1], carry[0]), None

    return fo.to_fp32(*jax.lax.scan(step, (params, state), length=1000)[0])

  kernel, xla = map(jax.jit(trained, static_argnums=0), ("mosaic_tpu", "xla"))
  np.testing.assert_array_equal(kernel, xla)
  np.testing.assert_allclose(kernel - 1.5, 10 * spacing, atol=1.5 * spacing)


# Parameters of different units, and small leaves.


def test_parameters_of_different_units_converge():
  curvature = jnp.asarray([1e4, 1e2, 1.0, 1e-2, 1e-4])

  @functools.partial(jax.jit, static_argnums=0)
  def minimise(tx):
    def step(carry, _):
      params, state = carry
      return fo.step(tx, curvature * (params - 1), state, params), None

    params = jnp.zeros(5)
    return jax.lax.scan(step, (params, tx.init(params)), length=1500)[0][0]

  found, expected = minimise(fo.adam(1e-2)), minimise(optax.adam(1e-2))
  np.testing.assert_allclose(found, 1, atol=1e-3)
  np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("name", slow_but(TRANSFORMATIONS))
@pytest.mark.parametrize("compressed", [False, True])
def test_small_leaves_have_optaxs_moments(name, compressed):
  ours, plain, arguments = TRANSFORMATIONS[name]
  plain = plain(LR, **arguments)
  ours = fo.compress(plain) if compressed else ours(LR, **arguments)
  params = {"norm": jnp.ones(63), "bias": jnp.ones((65, 63))}
  steps = {tx: jax.jit(functools.partial(fo.step, tx)) for tx in (ours, plain)}
  states = {tx: tx.init(params) for tx in steps}
  for i in range(5):
    grads = cases.grads_like(params, i)
    for tx, step in steps.items():
      _, states[tx] = step(grads, states[tx], params)
  for moment, found in fo.moments(states[ours]).items():
    field = moment
    if not compressed and name == "momentum":
      field = "trace"
    cases.assert_same(found, optax.tree.get(states[plain], field.split(".")[-1]))


# Dtypes and configurations of JAX.


@pytest.mark.parametrize("name", slow_but(["adam", "momentum"]))
@pytest.mark.parametrize("rate", slow_but([1e-6, 1e-7, 2e-8]))
def test_float32_weights_with_float16_gradients(name, rate):
  start, steps = 1e-2, 300
  moved = []
  for tx in make(name, "root", rate=rate):
    params = jnp.full((2, 64), start)
    grads = jnp.ones((steps, 2, 64), jnp.float16)
    params, _, _ = run(tx, params, grads, function=cases.update)
    moved.append(start - np.float64(params).mean())
  per_step = np.ones(steps)
  if name == "momentum":
    per_step = (1 - 0.9 ** np.arange(1, steps + 1)) / 0.1
  expected = rate * per_step.sum()
  errors = [abs(x - expected) / expected for x in moved]
  assert errors[0] <= errors[1] + 1e-3
  assert errors[0] < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFORMATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bits", [24, 16])
def test_strict_dtype_promotion(bits, name, dtype):
  ours, _ = make(name, "root", bits=bits)
  masters = {"w": jnp.full((3, 40), 0.5)}
  with jax.numpy_dtype_promotion("strict"):
    params, state = fo.from_fp32(ours, masters, dtype)
    for grad_dtype in (dtype, "float32"):
      grads = fo.cast_params(masters, grad_dtype)
      params, state = cases.jitted_step(ours, grads, state, params)
      _, state = ours.update(grads, state, params)
    optax_state = fo.to_optax(ours, params, state)
    fo.from_optax(ours, params, optax_state, params_fp32=fo.to_fp32(params, state))
    fo.check_numerics(params, state, LR)


@pytest.mark.slow
def test_finite_numbers_raise_nothing_where_jax_looks_for_nans():
  assert int(worker("stability_worker", "debug")) > 10


@pytest.mark.slow
def test_steps_that_are_not_jitted_keep_no_memory():
  """Per call, less than what makes 20 MiB of a thousand."""
  assert float(worker("stability_worker", "memory")) < 20 * 2**20 / 1000
