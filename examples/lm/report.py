"""What a training run ends with: a table and a picture."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Bytes of a component, by the name it has in results and in the picture.
COMPONENTS = ("weights", "correction", "moments", "scales")
_COLOURS = ("#4c72b0", "#8fb0dc", "#dd8452", "#f3c9a5")
_LINES = (
  {"color": "#c44e52", "linewidth": 1.2, "zorder": 3},
  {"color": "#9a9a9a", "linewidth": 3.2, "zorder": 2},
)


def table(results: Sequence[Mapping[str, Any]]) -> str:
  """A table of one column per run and, for two runs, the difference.

  Args:
    results: One mapping per run, the one to judge first and the baseline second:
      ``name``, ``valid_loss``, ``bytes_per_param``, ``step_seconds``.
  """
  rows = (
    ("validation loss, nats per byte", "valid_loss", "{:.4f}", 1),
    ("weights + optimizer state, bytes/param", "bytes_per_param", "{:.3f}", 1),
    ("time per step, ms", "step_seconds", "{:.1f}", 1e3),
  )
  lines = [["", *(result["name"] for result in results)]]
  if len(results) == 2:
    lines[0].append("difference")
  for label, key, form, unit in rows:
    values = [result[key] for result in results]
    cells = [form.format(value * unit) for value in values]
    if len(values) == 2:
      cells.append(f"{100 * (values[0] / values[1] - 1):+.2f} %")
    lines.append([label, *cells])
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return "\n".join(
    "  ".join(
      cell.rjust(width) if i else cell.ljust(width)
      for i, (cell, width) in enumerate(zip(line, widths, strict=True))
    )
    for line in lines
  )


def picture(path: pathlib.Path, results: Sequence[Mapping[str, Any]]) -> None:
  """Draws the loss curves and the memory of each run to a PNG.

  Args:
    path: The file to write.
    results: As for :func:`table`, with ``train_losses`` (one per step),
      ``valid_losses`` (pairs of step and loss) and ``components`` (bytes per
      parameter by the names in ``COMPONENTS``).
  """
  # Not pyplot: a figure of its own needs no display and no global state.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(10, 4.2), layout="constrained")
  FigureCanvasAgg(figure)
  curves, bars = figure.subplots(1, 2, width_ratios=(2.2, 1))
  for result, style in zip(results, _LINES, strict=False):
    steps, losses = _smooth(result["train_losses"])
    curves.plot(steps, losses, alpha=0.6, **style)
    valid = np.array(result["valid_losses"])
    curves.plot(
      *valid.T,
      label=f"{result['name']}: {result['valid_loss']:.4f}",
      marker="o",
      markersize=3 + 2 * style["linewidth"],
      linestyle="none",
      color=style["color"],
      zorder=style["zorder"],
    )
  curves.set_xlabel("step")
  curves.set_ylabel("loss, nats per byte")
  curves.set_title("Training loss (line) and validation loss (dots)")
  curves.legend(title="final validation loss", frameon=False)
  curves.grid(alpha=0.25)

  bottom = np.zeros(len(results))
  for name, colour in zip(COMPONENTS, _COLOURS, strict=True):
    heights = np.array([result["components"][name] for result in results])
    if heights.any():
      bars.bar(range(len(results)), heights, 0.6, bottom, color=colour, label=name)
    bottom += heights
  for i, total in enumerate(bottom):
    bars.text(i, total + 0.15, f"{total:.2f}", ha="center", va="bottom")
  bars.set_xticks(range(len(results)), [r["name"] for r in results])
  bars.set_xlim(-0.6, len(results) - 0.4)
  bars.set_ylim(0, 1.35 * max(bottom))
  bars.set_ylabel("bytes per parameter")
  bars.set_title("Weights and optimizer state")
  bars.legend(frameon=False, ncols=2, loc="upper left", fontsize="small")
  for axes in (curves, bars):
    axes.spines[["top", "right"]].set_visible(False)
  figure.savefig(path, dpi=150)


def _smooth(losses: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
  """Running means over a fiftieth of the run, at their last step."""
  window = max(1, len(losses) // 50)
  means = np.convolve(losses, np.full(window, 1 / window), "valid")
  return np.arange(window, len(losses) + 1), means
