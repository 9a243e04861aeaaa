"""How well companded moments follow float32 ones: the storage format's reason.

Simulates Adam's moments of groups of 32 elements. An element's gradients are
normal with a scale of its own, drawn once from lognormal(σ): σ = 0 is a group of
equals, at σ = 2 scales in a group differ by a factor of several thousand. They are
steady, or shrink tenfold over the first half of the steps. Both moments are kept
twice, in float32 and in 8 bits with a decode, an update and an encode per step, from
the same gradients; after the last step they are compared:

* collapsed: share of codes of v that are zero, while the float32 v is not.
* median |log|: of decoded/true sqrt(v), infinite for collapsed elements.
* mean log: the same, with its sign, collapsed elements left out. It shows drift: 0
  is unbiased.
* 1 %, 99 %: quantiles of decoded/true sqrt(v), collapsed elements included.
* m: root mean square of decoded - true m over the element's own σ, the standard
  deviation of its m: sqrt((1-β1)/(1+β1)) times its gradients' scale. Once for an
  encoding of the float32 m, and once for the m kept in 8 bits from step to step,
  where errors of about 1/(1-β1) steps add up: 2.3 times as much if independent.

Three storages: "root" and "paper" as in flashoptim_jax.codec, and "root" with
everything rounded to the nearest, and codes against scales in bfloat16, which was
rejected.
"""

import argparse
import datetime
import functools
import itertools
import json
import os
import pathlib
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np

from flashoptim_jax import Storage, codec

HERE = pathlib.Path(__file__).parent
OUTPUT = HERE / "results" / "companding.json"
KINDS = ("first", "second")
VARIANTS = ("paper", "root", "root_nearest")
TITLES = ("paper", "root (default)", "root, to nearest")
SIGMAS = (0.0, 0.5, 1.0, 2.0)
B1 = 0.9
B2S = (0.95, 0.999)
GROUP = 32
SHRINKING = 10  # times


def roundtrip(x, kind, variant, count):
  """What is left of a moment, its last axis one group, after a step's storage."""
  storage = Storage(companding=variant.partition("_")[0], group_size=GROUP)
  if variant != "root_nearest":
    rounding = getattr(codec.rounding_of(count), kind)
    encoded = codec.encode(x, kind, storage, rounding)
    return codec.decode(*encoded, kind, storage)
  exact = codec.exact_scale(x, kind, storage)
  scale = codec.round_scale(exact, codec.TO_NEAREST.scale)
  factor = codec.encode_factor(scale, kind, storage)
  codes = codec.encode_codes(x, factor, kind, storage)
  return codec.decode(codes, scale, kind, storage)


@functools.partial(jax.jit, static_argnames=("steps", "groups", "shrink"))
def simulate(key, sigma, b2, *, steps, groups, shrink):
  """Moments after some steps, in float32 and as each variant keeps them."""
  key, scale_key = jax.random.split(key)
  shape = (groups, GROUP)
  scale = jnp.exp(sigma * jax.random.normal(scale_key, shape))
  start = {name: (jnp.zeros(shape), jnp.zeros(shape)) for name in VARIANTS}
  start["float32"] = (jnp.zeros(shape), jnp.zeros(shape))

  def step(moments, key_and_count):
    key, count = key_and_count
    grad = scale * jax.random.normal(key, shape)
    if shrink:
      grad *= SHRINKING ** -jnp.minimum(2 * count / steps, 1)
    result = {}
    for name, (m, v) in moments.items():
      new = (1 - B1) * grad + B1 * m, (1 - b2) * grad * grad + b2 * v
      if name != "float32":
        stored = functools.partial(roundtrip, variant=name, count=count)
        new = tuple(map(stored, new, KINDS))
      result[name] = new
    return result, None

  xs = jax.random.split(key, steps), jnp.arange(steps)
  moments, _ = jax.lax.scan(step, start, xs)
  m = moments["float32"][0]
  once = {name: roundtrip(m, "first", name, steps) for name in VARIANTS}
  return scale, moments, once


def measure(sigma, b2, *, steps, groups, seed, shrink):
  scale, moments, once = jax.device_get(
      simulate(
          jax.random.key(seed), sigma, b2, steps=steps, groups=groups, shrink=shrink
      )
  )
  scale = scale / SHRINKING if shrink else scale
  m_true, v_true = (x.astype(np.float64) for x in moments["float32"])
  spread = scale * np.sqrt((1 - B1) / (1 + B1))
  figures = {}
  for name in VARIANTS:
    m, v = (x.astype(np.float64) for x in moments[name])
    ratio = np.sqrt(v / v_true)
    with np.errstate(divide="ignore"):
      log = np.log(ratio)
    figures[name] = {
        "collapsed": float(np.mean((v == 0) & (v_true > 0))),
        "median_abs_log": float(np.median(np.abs(log))),
        "mean_log": float(np.mean(log[v > 0])),
        "percentile_1": float(np.quantile(ratio, 0.01)),
        "percentile_99": float(np.quantile(ratio, 0.99)),
        "m_rms": rms((m - m_true) / spread),
        "m_rms_once": rms((once[name] - m_true) / spread),
    }
  return figures


def rms(x):
  return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def table(results):
  """The figures as a Markdown table."""
  by_case = {
      (run["sigma"], run["b2"], run["shrink"]): run["figures"]
      for run in results["runs"]
  }

  def row(title, cell):
    return f"| {title} | " + " | ".join(map(cell, VARIANTS)) + " |"

  def figures(name, key, form, cases):
    return " / ".join(form.format(by_case[case][name][key]) for case in cases)

  def quantiles(case):
    def cell(name):
      found = by_case[case][name]
      return f"{found['percentile_1']:.3f}–{found['percentile_99']:.3f}"

    return cell

  hard = [(2.0, 0.95, False), (2.0, 0.999, False)]
  slow = [(sigma, 0.999, False) for sigma in SIGMAS]
  shrinking = [(sigma, 0.999, True) for sigma in SIGMAS]
  even = [slow[0], slow[2], slow[3]]
  rows = [
      "| | " + " | ".join(TITLES) + " |",
      "|---|" + "---|" * len(TITLES),
      row(
          "share of v codes that collapse to zero, σ=2, β2=0.95 / 0.999",
          lambda name: figures(name, "collapsed", "{:.3%}", hard),
      ),
      row(
          "median error of log sqrt(v), σ=2, β2=0.95 / 0.999",
          lambda name: figures(name, "median_abs_log", "{:.3f}", hard),
      ),
      *(
          row(
              f"1 %–99 % range of decoded/true sqrt(v), σ={sigma:g}, β2=0.999",
              quantiles((sigma, 0.999, False)),
          )
          for sigma in (0.5, 1.0, 2.0)
      ),
      row(
          "mean log of decoded/true sqrt(v), β2=0.999, σ=0 / 0.5 / 1 / 2",
          lambda name: figures(name, "mean_log", "{:+.3f}", slow),
      ),
      row(
          "the same where gradients have shrunk tenfold",
          lambda name: figures(name, "mean_log", "{:+.3f}", shrinking),
      ),
      row(
          "RMS error of one encoding of m, in its own σ, σ=0 / 1 / 2",
          lambda name: figures(name, "m_rms_once", "{:.3f}", even),
      ),
      row(
          "the same of m kept in 8 bits from step to step",
          lambda name: figures(name, "m_rms", "{:.3f}", even),
      ),
  ]
  return "\n".join(rows)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--output", type=pathlib.Path, default=OUTPUT)
  parser.add_argument("--steps", type=int, default=4000)
  parser.add_argument("--groups", type=int, default=512)
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args()
  start = time.monotonic()
  runs = []
  for shrink, sigma, b2 in itertools.product((False, True), SIGMAS, B2S):
    found = measure(
        sigma,
        b2,
        steps=args.steps,
        groups=args.groups,
        seed=args.seed,
        shrink=shrink,
    )
    runs.append({"sigma": sigma, "b2": b2, "shrink": shrink, "figures": found})
    print(f"σ={sigma:g} β2={b2:g}: {time.monotonic() - start:.0f} s", flush=True)
  results = {
      "benchmark": "companding",
      "device": f"{jax.devices()[0].device_kind} ({os.cpu_count()} cores)",
      "machine": platform.machine(),
      "versions": {
          "python": platform.python_version(),
          "jax": jax.__version__,
          "numpy": np.__version__,
      },
      "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
      "seconds": round(time.monotonic() - start, 1),
      "steps": args.steps,
      "groups": args.groups,
      "group_size": GROUP,
      "b1": B1,
      "seed": args.seed,
      "runs": runs,
  }
  args.output.parent.mkdir(parents=True, exist_ok=True)
  args.output.write_text(json.dumps(results, indent=2) + "\n")
  print(table(results))


if __name__ == "__main__":
  main()
