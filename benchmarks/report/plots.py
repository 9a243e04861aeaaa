"""Plots of the documentation, from the JSON files in results/ and the format."""

import dataclasses
import hashlib
import inspect
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import record
from benchmarks.memory.plans import PLANS
from benchmarks.report import tables

OURS, USUAL, PALE, GREY = "#c44e52", "#4c72b0", "#8fb0dc", "#9a9a9a"
PARTS = {
  "params": ("parameters", "#4c72b0"),
  "state": ("optimizer state", "#dd8452"),
  "in_flight": ("state in flight", "#f3c9a5"),
  "gradients": ("gradients", "#55a868"),
}
# What is shown of a plan.
PLANNED = ("model", "mesh", "device", "device_bytes", "rows")
_DIGEST = re.compile(r"digest:([0-9a-f]{64})")


@dataclasses.dataclass(frozen=True)
class Figure:
  """A plot and what it is drawn from.

  Attributes:
    plot: Draws data on a Matplotlib figure.
    data: What JSON can hold.
    size: Width and height in inches.
  """

  plot: Callable[[Any, Any], None]
  data: Any
  size: tuple[float, float] = (8, 4)

  def digest(self) -> str:
    """Changes with the data and with the function that draws them."""
    text = json.dumps([self.data, self.size, inspect.getsource(self.plot)])
    return hashlib.sha256(text.encode()).hexdigest()

  def draw(self, path: pathlib.Path) -> None:
    """Writes an SVG that holds the digest."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context({"svg.hashsalt": "flashoptim", "font.size": 10}):
      canvas = Canvas(figsize=self.size, layout="constrained")
      FigureCanvasSVG(canvas)
      self.plot(canvas, self.data)
      path.parent.mkdir(parents=True, exist_ok=True)
      about = {"Date": None, "Description": f"digest:{self.digest()}"}
      canvas.savefig(path, format="svg", metadata=about)


def digest_of(path: pathlib.Path) -> str | None:
  """The digest in an SVG."""
  found = _DIGEST.search(path.read_text())
  return found and found[1]


def memory_bars(canvas, plans):
  """Stacked bars of four plans, each against its device's memory."""
  axes = canvas.subplots(2, len(plans) // 2).flat
  short = ("optax\nfp32", "fo", "fo\nreleased", "fo, state\non host")
  for ax, plan in zip(axes, plans, strict=True):
    bottom = np.zeros(len(plan["rows"]))
    for key, (label, colour) in PARTS.items():
      sizes = np.array([row[key] for row in plan["rows"]]) / 2**30
      ax.bar(short, sizes, bottom=bottom, color=colour, label=label, width=0.7)
      bottom += sizes
    limit = plan["device_bytes"] / 2**30
    if limit < 2 * bottom.max():
      ax.axhline(limit, color="black", linewidth=1, linestyle="--")
      ax.text(3.4, limit, f"{plan['device']}: {limit:g}", ha="right", va="bottom")
    devices = " × ".join(f"{k}={v}" for k, v in plan["mesh"].items() if v > 1)
    ax.set_title(f"{plan['model']}, {devices or 'one device'}", fontsize=10)
    ax.tick_params(axis="x", labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_ylabel("GiB per device")
  handles, labels = axes[0].get_legend_handles_labels()
  canvas.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)


def speed_bars(canvas, leaf_sets):
  """Time of an update over optax.adamw's in float32."""
  names = {
    "adamw": "fo.adamw",
    "adamw, update": "fo.adamw with tx.update",
    "adamw, XLA": "fo.adamw, XLA alone",
    "flashoptim (PyTorch)": "flashoptim (PyTorch)",
    "flashoptim-jax": "flashoptim-jax",
    "torch AdamW fused fp32": "torch, fused, fp32",
  }
  colours = (OURS, "#e3a6a8", "#f0d3d4", USUAL, PALE, GREY)
  ax = canvas.subplots()
  width = 0.8 / len(names)
  for i, (name, label) in enumerate(names.items()):
    ratios = []
    for found in leaf_sets.values():
      cell = found["rows"].get(name, {})
      time = cell.get("device_milliseconds", cell.get("milliseconds"))
      usual = found["rows"]["optax.adamw fp32"]["device_milliseconds"]
      ratios.append(float("nan") if time is None else time / usual)
    places = np.arange(len(leaf_sets)) + (i - len(names) / 2 + 0.5) * width
    bars = ax.bar(places, ratios, width, label=label, color=colours[i])
    ax.bar_label(bars, [f"{r:.2g}" for r in ratios], fontsize=7, padding=1)
  ax.axhline(1, color="black", linewidth=1, linestyle="--")
  ax.set_yscale("log")
  ax.set_xticks(np.arange(len(leaf_sets)), leaf_sets, fontsize=8)
  ax.set_ylabel("time / optax.adamw, fp32")
  ax.spines[["top", "right"]].set_visible(False)
  ax.legend(fontsize=8, frameon=False, ncols=3, loc="upper left")
  ax.set_ylim(top=ax.get_ylim()[1] * 3)


def released_bars(canvas, found):
  """Llama-3-8B's step on one H100."""
  ax = canvas.subplots()
  memory, usual = found["memory"], found["baseline"]["cast_in_layers"]
  rows = {
    "fo.adamw, released\n(measured peak)": (
      memory["params_and_state_bytes"],
      memory["peak_bytes"] - memory["params_and_state_bytes"],
    ),
    "optax.adamw, fp32\n(XLA's plan)": (
      usual["masters_and_state_bytes"],
      usual["temporary_bytes"],
    ),
  }
  kept, rest = (np.array(sizes) / 2**30 for sizes in zip(*rows.values(), strict=True))
  ax.barh(list(rows), kept, color=USUAL, label="parameters and state")
  bars = ax.barh(
    list(rows), rest, left=kept, color="#55a868", label="gradients, activations, ..."
  )
  ax.bar_label(bars, [f"{a + b:.1f}" for a, b in zip(kept, rest, strict=True)])
  ax.axvline(80e9 / 2**30, color="black", linewidth=1, linestyle="--", label="80 GB")
  ax.set_xlabel("GiB")
  ax.spines[["top", "right"]].set_visible(False)
  ax.set_xlim(right=1.12 * (kept + rest).max())
  canvas.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)


def loss_curves(canvas, curves):
  """Training losses by name: mean over seeds, and their range."""
  ax = canvas.subplots()
  others = ("#55a868", "#dd8452", "#8172b3", "#937860", PALE, "#da8bc3", "#ccb974")
  colours = iter((OURS, USUAL, *others))
  for name, runs in curves["runs"].items():
    baseline = name == curves["baseline"]
    colour = GREY if baseline else next(colours)
    steps = runs[0]["steps"]
    losses = np.array([run["losses"] for run in runs], float)
    ax.plot(steps, losses.mean(0), label=name, color=colour, **_line(baseline))
    if len(runs) > 1:
      ax.fill_between(steps, losses.min(0), losses.max(0), color=colour, alpha=0.2)
  # What diverges leaves the picture.
  usual = np.array([run["losses"] for run in curves["runs"][curves["baseline"]]], float)
  margin = 0.1 * np.ptp(usual)
  ax.set_ylim(usual.min() - margin, usual.max() + margin)
  ax.set_xlabel("step")
  ax.set_ylabel(curves["metric"])
  ax.spines[["top", "right"]].set_visible(False)
  ax.legend(frameon=False)


def _line(baseline):
  """The baseline is a broad line below the others, which may cover it."""
  return {"linewidth": 5 if baseline else 1.5, "zorder": 1 if baseline else 2}


def collapse(canvas, runs):
  """Accuracy of sqrt(v) by companding, over the spread of a group."""
  axes = canvas.subplots(1, 3)
  cases = {
    (run["sigma"], run["b2"]): run["figures"]
    for run in runs
    if not run["shrink"] and not run["heavy"]
  }
  sigmas = sorted({sigma for sigma, _ in cases})
  for ax, key, title in zip(
    axes,
    ("collapsed", "median_abs_log", "m_rms_once"),
    ("v that collapse to zero", "median error of log sqrt(v)", "error of m, in its σ"),
    strict=True,
  ):
    for name, colour in (("paper", USUAL), ("root", OURS)):
      for b2, style in ((0.95, "--"), (0.999, "-")):
        values = [cases[sigma, b2][name][key] for sigma in sigmas]
        ax.plot(
          sigmas, values, style, color=colour, marker="o", label=f"{name}, β2={b2}"
        )
    ax.set_title(title, fontsize=10)
    ax.set_xlabel("σ of the group's log scales")
    ax.spines[["top", "right"]].set_visible(False)
  axes[0].yaxis.set_major_formatter("{x:.0%}")
  axes[0].legend(frameon=False, fontsize=8)


def codes(canvas, curves):
  """What each code decodes to, as a share of the group's scale."""
  axes = canvas.subplots(1, 2)
  for ax, (kind, by_companding) in zip(axes, curves.items(), strict=True):
    for (name, values), colour in zip(
      by_companding.items(), (OURS, USUAL), strict=True
    ):
      shown = range(1, len(values))
      ax.plot(shown, values[1:], ".", markersize=3, color=colour, label=name)
    ax.set_yscale("log")
    ax.set_xlabel("code")
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title({"first": "m / scale", "second": "sqrt(v) / scale"}[kind], fontsize=10)
  axes[0].legend(frameon=False)


def bits(canvas, split):
  """A master weight's 32 bits, and where the format keeps them."""
  ax = canvas.subplots()
  ax.axis("off")
  rows = (
    ("float32 master weight", split["float32"], (1, 8, 23)),
    ("bfloat16 parameter", split["parameter"], (1, 8, 7)),
    ("correction, 24 bits", split["correction"], (8,)),
  )
  places = {"correction, 24 bits": 16}
  colours = ("#dddddd", PALE, "#f3c9a5")
  for y, (name, text, fields) in enumerate(rows):
    ax.text(-0.5, -y, name, ha="right", va="center", fontsize=10)
    x, colour = places.get(name, 0), iter(colours if len(fields) > 1 else ("#a8d5b0",))
    position = 0
    for width in fields:
      shade = next(colour)
      for _ in range(width):
        ax.add_patch(_square(x, -y, shade))
        ax.text(x + 0.5, -y, text[position], ha="center", va="center", fontsize=8)
        x, position = x + 1, position + 1
  ax.text(
    0,
    -len(rows) + 0.1,
    f"{split['value']!r} = (parameter's bits · 2⁸ + {split['rest']}) · 2⁸,"
    " the lowest 8 bits rounded",
    fontsize=9,
  )
  ax.set_xlim(-9, 32.5)
  ax.set_ylim(-len(rows) - 0.2, 0.6)


def _square(x, y, colour):
  from matplotlib.patches import Rectangle

  return Rectangle((x, y - 0.4), 1, 0.8, facecolor=colour, edgecolor="white")


def groups(canvas, shapes):
  """A leaf's arrays: one scale for 32 elements of a row."""
  ax = canvas.subplots()
  ax.axis("off")
  rows, columns = shapes["leaf"]
  scales = shapes["scales"][1]
  palette = ("#8fb0dc", "#f3c9a5", "#a8d5b0", "#d8b4dd")
  x = 0.0
  for name, count, width in (
    ("parameter, correction, codes of m and v", columns, 0.12),
    ("scales of m and v", scales, 0.5),
  ):
    for row in range(rows):
      for column in range(count):
        group = column * scales // count
        shade = palette[(group + row) % len(palette)]
        ax.add_patch(_cell(x + column * width, -row * 0.5, width, shade))
    ax.text(x, 0.75, f"{name}\n({rows}, {count})", fontsize=9, va="bottom")
    x += count * width + 1.5
  ax.set_xlim(-0.2, x + 1.5)
  ax.set_ylim(-rows * 0.5 + 0.3, 2.0)


def _cell(x, y, width, colour):
  from matplotlib.patches import Rectangle

  return Rectangle(
    (x, y), width, 0.42, facecolor=colour, edgecolor="white", linewidth=0.4
  )


def _code_curves():
  """Decoded codes of a group whose scale is 1."""
  import jax.numpy as jnp

  from flashoptim_jax import Storage
  from flashoptim_jax.storage import codec

  curves = {}
  for kind, levels in (("first", 127), ("second", 255)):
    dtype = codec.CODE_DTYPE[kind]
    found = {}
    for name in ("root", "paper"):
      storage = Storage(companding=name, group_size=levels + 1)
      code = jnp.arange(levels + 1).astype(dtype)
      value = codec.decode(code, jnp.ones(1, jnp.bfloat16), kind, storage)
      value = jnp.sqrt(value) if kind == "second" else value
      found[name] = [round(float(v), 6) for v in value]
    curves[kind] = found
  return curves


def _split_example(value=3.1415927):
  import jax.numpy as jnp

  from flashoptim_jax.storage import codec

  master = jnp.float32(value)
  param, rest = codec.split(master, jnp.bfloat16, 24)

  def pattern(array, width):
    unsigned = {8: np.uint8, 16: np.uint16, 32: np.uint32}[width]
    return format(int(np.asarray(array).view(unsigned)), f"0{width}b")

  return {
    "value": value,
    "float32": pattern(master, 32),
    "parameter": pattern(param, 16),
    "correction": pattern(rest, 8),
    "rest": int(rest),
  }


def _groups_example(shape=(4, 96)):
  from flashoptim_jax.storage import codec

  return {"leaf": list(shape), "scales": list(codec.scale_shape(shape, 32))}


def _example_curves():
  found = record.load("train_lm_cpu_seed0.json")
  runs = {}
  for run in found["runs"]:
    losses = np.array(run["train_losses"])
    width = 10
    kept = losses[: len(losses) // width * width].reshape(-1, width).mean(1)
    steps = [width * (i + 1) for i in range(len(kept))]
    runs[run["name"]] = [{"steps": steps, "losses": kept.round(4).tolist()}]
  return {
    "metric": "training loss, nats per byte",
    "baseline": "optax.adamw fp32",
    "runs": runs,
  }


def _quality_curves(name):
  found = record.load(name)
  runs: dict[str, list] = {}
  for run in found["runs"]:
    kept = {key: run[key] for key in ("steps", "losses")}
    runs.setdefault(run["name"], []).append(kept)
  unit = found["metric"].partition(",")[2]
  return {
    "metric": f"training loss,{unit}",
    "baseline": found["baseline"],
    "runs": runs,
  }


def quality_figures() -> dict[str, Figure]:
  """The plots of results/quality_*.json, by their file's name."""
  return {
    name.removesuffix(".json"): Figure(loss_curves, _quality_curves(name), (8, 4))
    for name in tables.quality_files()
  }


def figures() -> dict[str, Figure]:
  """Every plot, by its file's name."""
  plans = [record.load(f"plan_{name}.json") for name in PLANS]
  plans = [{key: plan[key] for key in PLANNED} for plan in plans]
  sets = record.load("gpu_step.json")
  return {
    "memory": Figure(memory_bars, plans, (7.5, 6)),
    "speed": Figure(speed_bars, sets, (9, 4.2)),
    "released": Figure(released_bars, record.load("release_gpu.json"), (8, 2.4)),
    "example": Figure(loss_curves, _example_curves(), (8, 3.6)),
    "companding": Figure(collapse, record.load("companding.json")["runs"], (10, 3.4)),
    "codes": Figure(codes, _code_curves(), (9, 3.4)),
    "bits": Figure(bits, _split_example(), (9, 2)),
    "groups": Figure(groups, _groups_example(), (9, 1.6)),
    **quality_figures(),
  }
