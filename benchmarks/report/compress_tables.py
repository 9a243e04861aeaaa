"""Tables of docs/compress.md.

The codecs from ``flashoptim_jax.compression.moment_table``, the others from the JSON
files of ``compress_loss.py``, ``compress_convergence.py`` and
``compress_temporaries.py``.
"""

import math

from benchmarks import record
from benchmarks.report import tables
from benchmarks.support.optax_optimizers import OPTIMIZERS
from flashoptim_jax.compression import moment_table

# Why a field is in float32.
REASONS = {
  "z": "copy of the parameters",
  "x0": "copy of the parameters",
  "params0": "copy of the parameters",
  "init_params": "copy of the parameters",
  "init_particles": "copy of the parameters",
  "cache": "copy of the parameters",
  "projector": "basis of a subspace",
  "grad_sum": "sum that never decays",
  "grad_sum_sq": "sum that never decays",
  "s": "sum that never decays",
  "sum_of_squares": "sum that never decays",
  "cumulative_gradients": "sum that never decays",
  "subgradients": "sum that never decays",
  "reward": "sum that never decays",
  "scale": "largest gradient so far",
  "m2": "average over 10,000 steps",
  "e_g": "feeds back on itself",
  "e_x": "feeds back on itself",
  "exp_avg": "step size by cancellation",
  "mu": "variance by cancellation",
  "nu": "variance by cancellation",
  "step_sizes": "step size",
}


def codecs():
  """Which code a field is kept in."""
  by_codec = {}
  for field, codec in moment_table.CODECS.items():
    by_codec.setdefault(codec, []).append(f"`{field}`")
  rows = [(f"`{codec}`", ", ".join(names)) for codec, names in by_codec.items()]
  return tables.markdown(("codec", "fields"), rows)


def quality():
  """Losses of the small language model, plain and compressed."""
  found = record.load("compress_quality.json")
  rows = []
  for row in found["optimizers"]:
    size, plain, ours = row["bytes_per_param"], row["plain"], row["compressed"]
    kept = [f"`{field}`: {REASONS[field]}" for field in row["kept_in_float32"]]
    by_seed = row["difference_percent_by_seed"]
    spread = f", {min(by_seed):+.2f} to {max(by_seed):+.2f}" if len(by_seed) > 1 else ""
    diverged = math.isnan(ours["valid_loss"])
    rows.append(
      [
        f"`{row['optimizer']}`",
        f"{size['plain']:.2f}",
        f"{size['compressed']:.2f}",
        f"{plain['valid_loss']:.4f}",
        "NaN" if diverged else f"{ours['valid_loss']:.4f}",
        "" if diverged else f"{row['difference_percent']:+.2f}{spread}",
        "; ".join(kept),
      ]
    )
  header = [
    "",
    "B/param",
    "compressed",
    "loss",
    "compressed",
    "difference, % (of seeds)",
    "kept in float32",
  ]
  (device,) = {row["device"] for row in found["optimizers"]}
  left_out = [
    f"`{name}` {optimizer.note}"
    for name, optimizer in OPTIMIZERS.items()
    if optimizer.lm_rate is None
  ]
  return (
    f"{tables.markdown(header, rows)}\n\n{found['settings']['steps']:,} steps; three"
    f" seeds, or one; {device}; {found['date']}. Not in the table:"
    f" {'; '.join(left_out)}."
  )


def reason(distance):
  """What the other runs of an optimizer that did not converge say."""
  for variant, text in (
    ("plain", "Optax's own does not converge either"),
    ("rounded gradients", "nor does Optax's own with gradients at bf16 parameters"),
    ("32-bit masters", "24-bit masters: use `master_bits=32`"),
    ("32-bit moments", "8-bit moments: keep them in float32 with `codecs`"),
  ):
    if (distance[variant] > 1) == (variant in ("plain", "rounded gradients")):
      return text
  return "8-bit moments and 24-bit masters together"


def convergence():
  """What does not converge on Optax's own problems."""
  runs = record.load("compress_convergence.json")["runs"]
  rows = [
    [
      f"`{run['optimizer']}`, {run['problem']}",
      f"{run['distance']['compressed']:.2f}",
      f"{run['distance']['plain']:.2f}",
      f"{run['distance']['rounded gradients']:.2f}",
      reason(run["distance"]),
    ]
    for run in runs
    if not run["converged"]
  ]
  converged = sum(run["converged"] for run in runs)
  header = ["", "compressed", "plain", "plain, bf16 gradients", "reason"]
  table = tables.markdown(header, rows)
  return f"{converged} of {len(runs)} converge. The others:\n\n{table}"


def memory():
  """Temporaries of a step, those of the most first."""
  found = record.load("compress_memory.json")
  rows = [
    (f"`{name}`", *(f"{cells[k]['temporaries']:.1f}" for k in ("compressed", "plain")))
    for name, cells in sorted(
      found["optimizers"].items(),
      key=lambda item: -item[1]["compressed"]["temporaries"],
    )
  ]
  few = sum(float(ours) <= 3 for _, ours, _ in rows)
  table = tables.markdown(
    ("copies of the largest leaf", "`fo.compress`", "Optax, float32"), rows
  )
  return (
    f"{few} of {len(rows)} take 3 at most.\n\n{table}\n\nA tree of"
    f" {found['tree']:.0f} such copies, one CPU device, jax"
    f" {found['versions']['jax']}, {found['date']}."
  )
