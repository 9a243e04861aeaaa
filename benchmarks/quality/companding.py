"""How well companded moments follow float32 ones: the storage format's reason.

Simulates Adam's moments of groups of 32 elements. An element's gradients are normal,
or of Student's t distribution with 3 degrees of freedom, with a scale of its own, drawn
once from lognormal(σ): σ = 0 is a group of equals, at σ = 2 scales in a group differ by
a factor of several thousand. They are steady, or shrink tenfold over the first half of
the steps. Both moments are kept twice, in float32 and in 8 bits with a decode, an
update and an encode per step, from the same gradients. Figures are over all elements
and over 100 steps, evenly spaced in the last quarter of the run: the thresholds of
rounding move from step to step, and all elements share them.

* collapsed: share of codes of v that are zero, while the float32 v is not.
* median |log|: of decoded/true sqrt(v), infinite for collapsed elements.
* mean log: the same, with its sign, collapsed elements left out. It shows drift: 0
  is unbiased.
* 1 %, 99 %: quantiles of decoded/true sqrt(v), collapsed elements included.
* inverse: mean of true/decoded sqrt(v), less 1: by how much the steps of parameters
  are too large with the true m. By Jensen's inequality, a spread of the ratio alone
  makes it larger than 0.
* direction: by how much the 8-bit m/sqrt(v) is too large along the true one: the slope
  of its regression on that, through zero, less 1. Without Adam's eps, and without
  the bound that flashoptim_jax sets to it.
* m: root mean square of decoded - true m over the element's own σ, the standard
  deviation of its m: sqrt((1-β1)/(1+β1)) times its gradients' scale. Once for an
  encoding of the float32 m, and once for the m kept in 8 bits
  from step to step, where errors of about 1/(1-β1) steps add up: 2.3 times as much
  if independent.
* stopped: after all of this, every other element has gradients of zero, and those
  between have constant ones, so that scales are steady. The largest difference of an
  element's m without gradients from float32's, in codes of the group's float32 m.

Three storages: "root" and "paper" as in flashoptim_jax.storage.codec, and "root" with
everything rounded to the nearest, and codes against scales in bfloat16, which was
rejected.
"""

import functools
import itertools
import pathlib
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

sys.path.append(str(pathlib.Path(__file__).parents[2]))

from benchmarks import record
from flashoptim_jax import Storage
from flashoptim_jax.storage import codec

KINDS = ("first", "second")
VARIANTS = ("paper", "root", "root_nearest")
TITLES = ("paper", "root (default)", "root, to nearest")
SIGMAS = (0.0, 0.5, 1.0, 2.0)
B1 = 0.9
SLOWEST = 0.9999  # needs longer runs, of fewer groups
LONGER, FEWER = 10, 8
B2S = (0.95, 0.999, SLOWEST)
STEP_SIGMAS = (0.5, 1.5)  # of the figures of parameters' steps
STEP_B2S = (0.95, 0.999)
GROUP = 32
SHRINKING = 10  # times
WINDOW = 100  # steps of the last quarter that figures are taken over
STOPPED = (30, 100)  # steps after gradients have stopped


class Case(NamedTuple):
  """What a run simulates; ``heavy`` is Student's t instead of the normal."""

  sigma: float
  b2: float
  shrink: bool = False
  heavy: bool = False


def cases():
  """Every run's case."""
  for shrink, sigma, b2 in itertools.product((False, True), SIGMAS, B2S):
    yield Case(sigma, b2, shrink)
  for heavy, sigma, b2 in itertools.product((False, True), STEP_SIGMAS, STEP_B2S):
    if heavy or sigma not in SIGMAS:
      yield Case(sigma, b2, heavy=heavy)


def roundtrip(x, kind, variant, count):
  """What is left of a moment, its last axis one group, after a step's storage."""
  storage = Storage(companding=variant.partition("_")[0], group_size=GROUP)
  if variant != "root_nearest":
    rounding = getattr(codec.rounding_of(count), kind)
    encoded = codec.encode(x, kind, storage, rounding)
    return codec.decode(*encoded, kind, storage)
  exact = codec.exact_scale(x, kind, storage)
  scale = codec.round_scale(exact, codec.TO_NEAREST.scale)
  factor = codec.group_expand(
    codec.encode_factor(scale, kind, storage), x.shape, storage
  )
  root = jnp.sqrt(jnp.abs(x) if kind == "first" else jnp.sqrt(x))
  level = jnp.clip(jnp.round(root * factor), max=codec.LEVELS[kind])
  codes = (jnp.sign(x) * level).astype(codec.CODE_DTYPE[kind])
  return codec.decode(codes, scale, kind, storage)


@functools.partial(jax.jit, static_argnames=("steps", "groups", "shrink", "heavy"))
def simulate(key, sigma, b2, *, steps, groups, shrink, heavy):
  """Moments in float32 and as each variant keeps them.

  Returns:
    The gradients' scales, the moments of the window's steps, what one encoding leaves
    of the float32 m of those, and each m at the steps ``STOPPED``.
  """
  key, scale_key = jax.random.split(key)
  shape = (groups, GROUP)
  scale = jnp.exp(sigma * jax.random.normal(scale_key, shape))
  start = {
    name: (jnp.zeros(shape), jnp.zeros(shape)) for name in (*VARIANTS, "float32")
  }

  def gradients(key, count):
    noise = jax.random.normal(key, (4, *shape) if heavy else shape)
    if heavy:  # A normal number over the root of a mean of three squares.
      noise = noise[0] * lax.rsqrt(jnp.mean(lax.square(noise[1:]), axis=0))
    if shrink:
      noise *= SHRINKING ** -jnp.minimum(2 * count / steps, 1)
    return scale * noise

  def step(moments, count, grad=None):
    if grad is None:
      grad = gradients(jax.random.fold_in(key, count), count)
    result = {}
    for name, (m, v) in moments.items():
      new = (1 - B1) * grad + B1 * m, (1 - b2) * grad * grad + b2 * v
      if name != "float32":
        stored = functools.partial(roundtrip, variant=name, count=count)
        new = tuple(map(stored, new, KINDS))
      result[name] = new
    return result

  def several(moments, first, number):
    return lax.fori_loop(first, first + number, lambda i, x: step(x, i), moments)

  def kept(moments, count):
    moments = several(moments, count + 1 - gap, gap)
    return moments, moments

  def stopped(moments, count):
    moments = step(moments, count, scale * (jnp.arange(GROUP) % 2))
    return moments, {name: m for name, (m, _) in moments.items()}

  gap = steps // 4 // WINDOW
  window = steps - 1 - gap * jnp.arange(WINDOW)[::-1]
  moments = several(start, 0, steps - gap * WINDOW)
  moments, last = lax.scan(kept, moments, window)
  once = {
    name: jax.vmap(functools.partial(roundtrip, kind="first", variant=name))(
      last["float32"][0], count=window
    )
    for name in VARIANTS
  }
  counts = jnp.arange(steps, steps + max(STOPPED))
  after = lax.scan(stopped, moments, counts)[1]
  after = {name: m[jnp.array(STOPPED) - 1] for name, m in after.items()}
  return scale, last, once, after


def measure(case, *, steps, groups, seed):
  scale, moments, once, after = jax.device_get(
    simulate(
      jax.random.key(seed),
      case.sigma,
      case.b2,
      steps=steps,
      groups=groups,
      shrink=case.shrink,
      heavy=case.heavy,
    )
  )
  scale = scale / SHRINKING if case.shrink else scale
  m_true, v_true = (x.astype(np.float64) for x in moments["float32"])
  direction_true = m_true / np.sqrt(v_true)
  spread = scale * np.sqrt((1 - B1) / (1 + B1))
  figures = {}
  for name in VARIANTS:
    m, v = (x.astype(np.float64) for x in moments[name])
    ratio, lives = np.sqrt(v / v_true), v > 0
    with np.errstate(divide="ignore"):
      log = np.log(ratio)
    direction = np.sum(m[lives] / np.sqrt(v[lives]) * direction_true[lives])
    figures[name] = {
      "collapsed": float(np.mean(~lives & (v_true > 0))),
      "median_abs_log": float(np.median(np.abs(log))),
      "mean_log": float(np.mean(log[lives])),
      "percentile_1": float(np.quantile(ratio, 0.01)),
      "percentile_99": float(np.quantile(ratio, 0.99)),
      "inverse": float(np.mean(1 / ratio[lives])) - 1,
      "direction": float(direction / np.sum(direction_true[lives] ** 2)) - 1,
      "m_rms": rms((m - m_true) / spread),
      "m_rms_once": rms((once[name] - m_true) / spread),
      **{
        f"stopped_{count}": largest_error(m, true)
        for count, m, true in zip(STOPPED, after[name], after["float32"], strict=True)
      },
    }
  return figures


def largest_error(m, true):
  """That of elements without gradients, in codes of the true m's groups."""
  largest = np.max(np.abs(true), axis=-1, keepdims=True)
  m, true = (
    np.sign(x) * codec.LEVELS["first"] * np.sqrt(np.abs(x) / largest) for x in (m, true)
  )
  return float(np.max(np.abs(m - true)[:, ::2]))


def rms(x):
  return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def table(results):
  """The figures as a Markdown table."""
  by_case = {
    Case(*(run[field] for field in Case._fields)): run["figures"]
    for run in results["runs"]
  }

  def row(title, cell):
    return f"| {title} | " + " | ".join(map(cell, VARIANTS)) + " |"

  def figures(title, key, form, cases):
    def cell(name):
      found = (by_case[case][name][key] for case in cases)
      return " / ".join(form.format(x) for x in found)

    return row(title, cell)

  def quantiles(case):
    def cell(name):
      found = by_case[case][name]
      return f"{found['percentile_1']:.3f}–{found['percentile_99']:.3f}"

    return cell

  def drift(shrink):
    changed = ", gradients having shrunk tenfold" if shrink else ""
    return [
      figures(
        f"mean log of decoded/true sqrt(v), β2={b2:g}, σ=0 / 0.5 / 1 / 2{changed}",
        "mean_log",
        "{:+.3f}",
        [Case(sigma, b2, shrink) for sigma in SIGMAS],
      )
      for b2 in B2S
    ]

  def steps(key, what):
    return [
      figures(
        f"{what}, {'heavy-tailed' if heavy else 'normal'} gradients,"
        " β2=0.95, σ=0.5 / 1.5, β2=0.999, σ=0.5 / 1.5",
        key,
        "{:+.1%}",
        [
          Case(sigma, b2, heavy=heavy)
          for b2, sigma in itertools.product(STEP_B2S, STEP_SIGMAS)
        ],
      )
      for heavy in (False, True)
    ]

  hard = [Case(2.0, b2) for b2 in (0.95, 0.999)]
  even = [Case(sigma, 0.999) for sigma in (0.0, 1.0, 2.0)]
  return "\n".join(
    [
      "| | " + " | ".join(TITLES) + " |",
      "|---|" + "---|" * len(TITLES),
      figures(
        "share of v codes that collapse to zero, σ=2, β2=0.95 / 0.999",
        "collapsed",
        "{:.3%}",
        hard,
      ),
      figures(
        "median error of log sqrt(v), σ=2, β2=0.95 / 0.999",
        "median_abs_log",
        "{:.3f}",
        hard,
      ),
      *(
        row(
          f"1 %–99 % range of decoded/true sqrt(v), σ={sigma:g}, β2=0.999",
          quantiles(Case(sigma, 0.999)),
        )
        for sigma in (0.5, 1.0, 2.0)
      ),
      *drift(shrink=False),
      *drift(shrink=True),
      *steps("inverse", "mean of true/decoded sqrt(v), less 1"),
      *steps("direction", "m/sqrt(v) along the true one, less 1"),
      figures(
        "RMS error of one encoding of m, in its own σ, σ=0 / 1 / 2",
        "m_rms_once",
        "{:.3f}",
        even,
      ),
      figures(
        "the same of m kept in 8 bits from step to step", "m_rms", "{:.3f}", even
      ),
      *(
        figures(
          f"m's largest error, in codes, {count} steps after the last gradient,"
          " σ=0 / 1 / 2",
          f"stopped_{count}",
          "{:.1f}",
          even,
        )
        for count in STOPPED
      ),
    ]
  )


def main():
  parser = record.parser(__doc__)
  parser.add_argument("--steps", type=int, default=4000)
  parser.add_argument("--groups", type=int, default=512)
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args()
  start = time.monotonic()
  runs = []
  for case in cases():
    slow = case.b2 == SLOWEST
    found = measure(
      case,
      steps=args.steps * (LONGER if slow else 1),
      groups=args.groups // (FEWER if slow else 1),
      seed=args.seed,
    )
    runs.append({**case._asdict(), "figures": found})
    print(f"{case}: {time.monotonic() - start:.0f} s", flush=True)
  results = {
    **record.about("numpy"),
    "seconds": round(time.monotonic() - start, 1),
    "steps": args.steps,
    "groups": args.groups,
    "group_size": GROUP,
    "b1": B1,
    "window": WINDOW,
    "seed": args.seed,
    "runs": runs,
  }
  record.write("companding.json", results, args.output)
  print(table(results))


if __name__ == "__main__":
  main()
