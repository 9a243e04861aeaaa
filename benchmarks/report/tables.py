"""Tables of README and the documentation, from the JSON files in results/."""

import math
import statistics
from collections.abc import Sequence

from benchmarks import record
from benchmarks.memory.plans import PLANS
from benchmarks.quality import companding


def memory_row():
  memory = record.load("llama_memory.json")
  usual = memory["baseline_bytes"]
  kept = sum(usual.values()) - usual["gradients"]
  return (
    "Llama-3-8B: bytes per parameter, weights and optimizer state",
    f"{memory['bytes_per_param']:.3f}",
    f"{kept / memory['parameters']:.3f}",
    f"{100 * (memory['bytes_per_param'] * memory['parameters'] / kept - 1):+.0f} %",
  )


def loss_rows():
  """One row per seed of the example's default run."""
  paths = sorted(record.RESULTS.glob("train_lm_cpu_seed*.json"))
  rows, differences = [], []
  for path in paths:
    result = record.load(path.name)
    flash, usual = result["runs"]
    difference = 100 * (flash["valid_loss"] / usual["valid_loss"] - 1)
    differences.append(difference)
    rows.append(
      (
        f"`examples/train_lm.py`, seed {result['settings']['seed']}: validation loss",
        f"{flash['valid_loss']:.4f}",
        f"{usual['valid_loss']:.4f}",
        f"{difference:+.2f} %",
      )
    )
  if len(rows) > 1:
    rows.append(
      (
        "the same, mean over seeds",
        *(f"{statistics.mean(float(row[i]) for row in rows):.4f}" for i in (1, 2)),
        f"{statistics.mean(differences):+.2f} %",
      )
    )
  return rows


def quality_rows():
  """Mean validation losses of the large language models, over seeds."""
  rows = []
  for name in ("adamw", "lion"):
    found = record.load(f"quality_lm_{name}.json")
    values = {
      method: [run["value"] for run in found["runs"] if run["name"] == method]
      for method in (f"fo.{name} 24/8 root", found["baseline"])
    }
    ours, usual = map(statistics.mean, values.values())
    label = {"adamw": "AdamW", "lion": "Lion, beside `optax.lion`"}[name]
    seeds = len(values[found["baseline"]])
    rows.append(
      (
        f"language model of 124 M, {label}: validation loss, {seeds} seeds",
        f"{ours:.3f}",
        f"{usual:.3f} ± {statistics.stdev(values[found['baseline']]):.3f}",
        f"{round(100 * (ours / usual - 1), 2) + 0.0:+.2f} %",
      )
    )
  return rows


def step_row():
  step = record.load("xla_step_cpu.json")
  flash, usual = (step["step_seconds"][name] for name in ("fo.adamw", "optax.adamw"))
  return (
    f"CPU: update of {step['parameters'] / 1e6:.0f} M parameters, ms",
    f"{flash * 1e3:.0f}",
    f"{usual * 1e3:.0f}",
    f"×{step['ratio']:.2f}",
  )


def gpu_rows():
  """One row per leaf set, of the device's time."""
  rows = []
  for name, found in record.load("gpu_step.json").items():
    flash, usual = found["rows"]["adamw"], found["rows"]["optax.adamw fp32"]
    times = [cell["device_milliseconds"] for cell in (flash, usual)]
    rows.append(
      (
        f"{_short(found['device'])}: update of {name}, ms",
        f"{times[0]:.2f}",
        f"{times[1]:.2f}",
        f"×{times[0] / times[1]:.2f}",
      )
    )
  return rows


def _short(device: str) -> str:
  """A GPU's name without its maker and memory."""
  return device.removeprefix("NVIDIA ").split(" ")[0]


def release_row():
  found = record.load("release_gpu.json")
  ours = found["memory"]["peak_bytes"]
  usual = found["baseline"]["cast_in_layers"]["total_bytes"]
  return (
    "H100: memory of Llama-3-8B's training step, with gradient release, GiB",
    f"{ours / 2**30:.1f}",
    f"{usual / 2**30:.1f} (XLA's plan)",
    f"{100 * (ours / usual - 1):+.0f} %",
  )


def fsdp_row():
  cells = record.load("fsdp_gpu.json")["train"]
  ours, usual = (
    cells[f"8b {name} 4 GPUs"]["peak_bytes"] for name in ("flash", "optax")
  )
  return (
    "4 H200s, FSDP: memory of Llama-3-8B's training step on each, GiB",
    f"{ours / 2**30:.1f}",
    f"{usual / 2**30:.1f}",
    f"{100 * (ours / usual - 1):+.0f} %",
  )


def checkpoint_row():
  found = record.load("checkpoint_size.json")
  return (
    "GPT-2 124 M: checkpoint, MB",
    f"{found['flash_bytes'] / 1e6:.0f}",
    f"{found['optax_fp32_bytes'] / 1e6:.0f}",
    f"{100 * (found['ratio'] - 1):+.0f} %",
  )


def readme():
  """The table of README."""
  header = ("", "`fo.adamw`, bf16", "`optax.adamw`, fp32", "difference")
  rows = [memory_row(), release_row(), fsdp_row(), checkpoint_row(), *quality_rows()]
  return markdown(header, [*rows, *loss_rows(), *gpu_rows(), step_row()])


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A Markdown table, all columns but the first to the right."""
  rule = ["---", *["---:"] * (len(header) - 1)]
  return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def _gib(size):
  return f"{size / 2**30:.2f}"


def _note(found, *more):
  """Where and when something was measured."""
  versions = found["versions"]
  parts = [
    found.get("device"),
    *(f"{name} {versions[name]}" for name in ("jax", "optax") if name in versions),
    *more,
    found["date"],
  ]
  return ", ".join(part for part in parts if part) + "."


def plans():
  """Bytes per device of four models."""
  rows = []
  for name in PLANS:
    plan = record.load(f"plan_{name}.json")
    axes = ", ".join(f"{axis}={size}" for axis, size in plan["mesh"].items())
    for row in plan["rows"]:
      rows.append(
        (
          f"{name} on {plan['device']}, {axes}",
          row["name"],
          *(
            _gib(row[key])
            for key in ("params", "state", "gradients", "in_flight", "total")
          ),
        )
      )
  header = (
    "GiB per device",
    "",
    "parameters",
    "state",
    "gradients",
    "in flight",
    "total",
  )
  return markdown(header, rows)


def plan_of_8b():
  """What Llama-3-8B takes of one device, in short."""
  plan = record.load("plan_llama3-8b.json")
  keys = ("params", "state", "gradients", "total", "left")
  rows = [
    (row["name"], *(_gib(row[key]) for key in keys), "yes" if row["fits"] else "no")
    for row in plan["rows"]
    if not row["host"]
  ]
  header = ("GiB on one H100", "parameters", "state", "gradients", "total", "left")
  return markdown((*header, "fits"), rows)


def plan_check():
  """The plan beside compiled train steps."""
  found = record.load("plan_check.json")
  rows = [
    (
      f"{name}, {mesh}",
      optimizer,
      *(
        _gib(sizes[key][source])
        for key in ("params_and_state", "gradients")
        for source in ("plan", "compiled")
      ),
    )
    for name, model in found["models"].items()
    for mesh, cells in model["meshes"].items()
    for optimizer, sizes in cells.items()
  ]
  header = (
    "GiB per device",
    "",
    "parameters and state: plan",
    "compiled",
    "gradients: plan",
    "compiled",
  )
  note = f"Largest difference {found['largest_difference']:.4%}. {_note(found)}"
  return f"{markdown(header, rows)}\n\n{note}"


def plan_peaks():
  """The plan beside the peak that a GPU's allocator saw, activations included."""
  plan, found = record.load("plan_llama3-8b.json"), record.load("fsdp_gpu.json")
  rows = []
  for row, name in zip(plan["rows"], ("optax", "flash", "released"), strict=False):
    measured = found["train"][f"8b {name} 1 GPUs"]
    rows.append((row["name"], _gib(row["total"]), _gib(measured["peak_bytes"])))
  table = markdown(
    ("Llama-3-8B on one device, GiB", "plan", "measured peak of a training step"), rows
  )
  return f"{table}\n\n{_note(found)}"


def release():
  """Llama-3-8B on one GPU, and the speed of a released step."""
  found = record.load("release_gpu.json")
  memory, speed = found["memory"], found["speed"]
  usual = found["baseline"]["cast_in_layers"]
  rows = [
    (
      f"Llama-3-8B, {memory['tokens']:,} tokens: parameters and state, GiB",
      _gib(memory["params_and_state_bytes"]),
      _gib(usual["masters_and_state_bytes"]),
    ),
    (
      "the same: peak, GiB",
      _gib(memory["peak_bytes"]),
      f"{_gib(usual['total_bytes'])} (XLA's plan)",
    ),
    (
      "the same: seconds per step",
      f"{statistics.median(memory['step_seconds'][1:]):.3f}",
      "does not fit",
    ),
  ]
  table = markdown(("", "`fo.adamw`, released", "`optax.adamw`, fp32"), rows)
  times = [
    1e3 * statistics.median(speed[name]["step_seconds"])
    for name in ("ordinary", "released")
  ]
  return (
    f"{table}\n\nWith {speed['parameters'] / 1e9:.1f} B parameters and"
    f" {speed['tokens']:,} tokens, where both fit, `fo.adamw`'s step takes"
    f" {times[0]:.0f} ms with gradients and {times[1]:.0f} ms released; the largest"
    f" difference between their losses is {speed['largest_loss_difference']:.4f}."
    f" {_note(found)}"
  )


def release_memory():
  """XLA's account of a 24-layer model's step."""
  rows = []
  for path in sorted(record.RESULTS.glob("release_memory_*.json")):
    found = record.load(path.name)
    sizes = found["per_device_bytes"]
    rows.append(
      (
        f"{found['devices']} × {found['device']}",
        f"{found['parameters'] / 1e6:,.0f} M",
        *(
          f"{size / 1e6:,.1f}"
          for size in (
            sizes["gradients"],
            sizes["ordinary"]["temporaries"],
            sizes["released"]["temporaries"],
          )
        ),
      )
    )
  header = (
    "MB per device",
    "parameters",
    "gradients",
    "temporaries, ordinary step",
    "temporaries, released",
  )
  return markdown(header, rows)


def host_offload():
  """State in host memory."""
  found = record.load("host_offload.json")
  rows = [
    (
      name,
      f"{cell['milliseconds']:.1f}",
      _gib(cell["state_bytes"]),
      _gib(cell["temporary_bytes"]),
      _gib(cell["peak_bytes"]),
    )
    for name, cell in found["variants"].items()
  ]
  header = (
    "state",
    "step, ms",
    "state, GiB",
    "temporaries, GiB",
    "peak on the device, GiB",
  )
  return f"{markdown(header, rows)}\n\n{_note(found)}"


def speed():
  """Every optimizer of the GPU benchmark, on every leaf set."""
  sets = record.load("gpu_step.json")
  names = list(dict.fromkeys(name for found in sets.values() for name in found["rows"]))

  def cell(measured):
    if "milliseconds" not in measured:
      return "out of memory" if "error" in measured else "–"
    if "device_milliseconds" in measured:
      return f"{measured['device_milliseconds']:.2f}"
    return f"{measured['milliseconds']:.2f}*"

  rows = [
    (name, *(cell(found["rows"].get(name, {})) for found in sets.values()))
    for name in names
  ]
  copies = [f"{found['copy_bytes_per_second'] / 1e12:.2f}" for found in sets.values()]
  runs = {}
  for name, found in sets.items():
    runs.setdefault(_note(found), []).append(name)
  notes = [f"{'; '.join(names)}: {note}" for note, names in runs.items()]
  return (
    f"{markdown(('ms per update', *sets), rows)}\n\nDevice time; * from start to"
    " end, with PyTorch's launches. Names without a library are this one's."
    f" Memory copies at {' to '.join(sorted({min(copies), max(copies)}))} TB/s."
    f" {' '.join(notes)}\n\n{_compile_times()}"
  )


def _compile_times():
  """Seconds until a step of GPT-2's leaves is compiled, and with a warm cache."""
  found = record.load("gpu_compile.json")
  runs = found["runs"]
  (ours, ours_again), (usual, usual_again) = (
    [
      runs[optimizer][run]["lower_seconds"] + runs[optimizer][run]["compile_seconds"]
      for run in ("first", "second")
    ]
    for optimizer in ("adamw", "optax.adamw fp32")
  )
  first = runs["adamw"]["first"]
  return (
    f"A step of GPT-2's leaves takes {ours:.1f} s to lower and compile, and"
    f" {ours_again:.1f} s in a second process, which finds it in JAX's compilation"
    " cache after Triton has compiled its kernels once more; one of `optax.adamw`"
    f" {usual:.1f} and {usual_again:.1f} s. Importing Triton, which imports PyTorch"
    f" where it is installed, took {first['import_seconds']:.1f} s more."
    f" {found['device']}, jax {found['versions']['jax']}, {found['date']}."
  )


def tpu_kernel():
  """Cycles of the compiled TPU kernels over those that memory needs."""
  found = record.load("tpu_static.json")
  rows = [
    (
      row["chip"],
      row["optimizer"],
      row["backend"],
      "×".join(map(str, row["shape"])),
      f"{round(row['bytes_per_parameter'], 3):g}",
      f"{row['over_hbm_cycles']:.2f}",
      f"{row['temporary_bytes'] / 2**20:.1f}",
    )
    for row in found["rows"]
  ]
  header = (
    "chip",
    "optimizer",
    "backend",
    "leaf",
    "bytes per parameter",
    "cycles over memory's",
    "temporaries, MiB",
  )
  return (
    f"{markdown(header, rows)}\n\nOn the same scale `optax.adamw` in float32 is at"
    f" {found['fp32_adamw_over_hbm_cycles']:.2f} if it is bound by memory alone."
    f" libtpu {found['versions']['libtpu']}, {_note(found)}"
  )


def tpu_tried():
  """What was tried on the TPU kernel, in bundles of its inner loop."""
  found = record.load("tpu_tried.json")
  rows = [
    (row["step"], *(str(row.get(chip, "")) for chip in found["chips"]))
    for row in found["rows"]
  ]
  return markdown(("step", *found["chips"]), rows)


def tpu_compile():
  """What of the TPU kernel was compiled, chip by chip."""
  found = record.load("tpu_compile.json")
  rows = []
  for chip in dict.fromkeys(row["chip"] for row in found["rows"]):
    cells = [row for row in found["rows"] if row["chip"] == chip]
    pairs = {(row["optimizer"], row["storage"]) for row in cells}
    shapes = {tuple(shape) for row in cells for shape in row["shapes"]}
    rows.append(
      (
        chip,
        str(len(pairs)),
        str(len(shapes)),
        f"{sum(row['kernels'] for row in cells)} of {sum(r['leaves'] for r in cells)}",
        f"{sum(row['aliased'] for row in cells)} of {sum(r['outputs'] for r in cells)}",
        str(sum(len(row["copies"]) for row in cells)),
      )
    )
  header = (
    "chip",
    "optimizers × storages",
    "shapes",
    "leaves that are kernels",
    "arrays in place",
    "copies",
  )
  done = len(found["rows"])
  copied = {tuple(s) for row in found["rows"] if row["copies"] for s in row["shapes"]}
  shapes = ", ".join("×".join(map(str, s)) for s in sorted(copied))
  copies = f"copies with {shapes}" if copied else "no copies"
  return (
    f"{markdown(header, rows)}\n\n{done} of {found['cases']} cases; {copies}."
    f" libtpu {found['versions']['libtpu']}, {_note(found)}"
  )


def tpu_interpret():
  """The TPU kernel in interpret mode, against XLA and under gradient release."""
  found = record.load("tpu_interpret.json")
  rows = []
  for released in found["released"]:
    name = released["optimizer"]
    cells = [row for row in found["against_xla"] if row["optimizer"] == name]
    codes, differing, scales = (
      sum(row.get(key, 0) for row in cells)
      for key in ("codes", "codes_differing", "scales_differing")
    )
    together = sum(value for key, value in released.items() if "differing" in key)
    rows.append(
      (
        name,
        str(len(cells)),
        f"{differing} of {codes:,}",
        str(max(row.get("largest_code_gap", 0) for row in cells)),
        str(scales),
        f"{max(row['master_units'] for row in cells):.2f}",
        f"{max(row.get('float32_moment_units', 0) for row in cells):.2f}",
        str(together),
      )
    )
  header = (
    "optimizer",
    "storages",
    "codes that differ",
    "by at most",
    "scales that differ",
    "masters, units",
    "float32 moments, units",
    "all that differs after 20 released steps",
  )
  return f"{markdown(header, rows)}\n\n{_note(found)}"


def tpu_sharding():
  """Sharded steps, compiled ahead of time."""
  found = record.load("tpu_sharding.json")
  rows = [
    (
      f"{name}: {', '.join(f'{k}={v}' for k, v in cell['mesh'].items())}",
      f"{cell['parameters'] / 1e6:,.0f} M",
      ", ".join(cell["resident"]["collectives_in_update"]) or "none",
      f"{cell['resident']['params_and_state_bytes'] / 1e6:.2f}",
      f"{cell['resident']['of_arithmetic'] - 1:+.1%}",
    )
    for name, cell in found["slices"].items()
  ]
  header = (
    "slice",
    "parameters",
    "collectives in the update",
    "parameters and state, MB per device",
    "against an even division",
  )
  return f"{markdown(header, rows)}\n\n{_note(found)}"


# Whole training steps that are compared.
STEPS = {
  "optax": "`optax.adamw`, fp32",
  "flash": "`fo.adamw`",
  "released": "`fo.adamw`, gradient release",
}


def tpu_train_step():
  """Whole training steps' memory, compiled ahead of time."""
  found = record.load("tpu_train_step.json")
  kinds = ("params", "state", "temporaries", "all", "all_but_activations")
  rows, notes = [], []
  for model, cells in found["models"].items():
    for name, label in STEPS.items():
      sizes = cells["steps"][name]["per_device_bytes"]
      rows.append(
        (
          f"{model}, {cells['topology']}",
          label,
          *(
            "–" if sizes[kind] is None else f"{sizes[kind] / 1e6:,.1f}"
            for kind in kinds
          ),
        )
      )
    saved = cells["saved_share_of_all_but_activations"]
    less = saved and f" all but activations is {saved:.1%} less than with Optax;"
    notes.append(
      f"{model}: {cells['steps']['flash']['kernels']} kernels in the step of"
      f" `fo.adamw`;{less or ''} {cells['tokens_per_device']:,} tokens on"
      f" each of {cells['devices']} chips."
    )
  header = (
    "MB per device",
    "",
    "parameters",
    "state",
    "temporaries",
    "all",
    "all but activations",
  )
  notes.append(f"libtpu {found['versions']['libtpu']}, {_note(found)}")
  return f"{markdown(header, rows)}\n\n{' '.join(notes)}"


def zero1():
  """A step with whole parameters and divided state, on several GPUs."""
  found = record.load("zero1_1b.json")
  rows = [
    (
      STEPS[optimizer],
      _gib(cell["params_bytes"]),
      _gib(cell["state_bytes"]),
      " + ".join(
        f"{_gib(size)}, {kind.removeprefix('all-gather ')}"
        for kind, size in cell["collectives_of_update"].items()
      ),
      f"{1e3 * cell['step_seconds']:.0f}",
      f"{1e3 * cell['update_seconds']:.1f}",
    )
    for optimizer in ("optax", "flash")
    for cell in [found[optimizer]]
  ]
  header = (
    "",
    "parameters on each GPU, GiB",
    "state on each GPU, GiB",
    "gathered by an update, GiB and dtype",
    "step, ms",
    "update, ms",
  )
  parameters = found["flash"]["parameters"]
  return f"{markdown(header, rows)}\n\n{_note(found, f'{parameters / 1e9:.1f} B')}"


def fsdp():
  """Training steps over several GPUs, and how they differ from one GPU's."""
  found = record.load("fsdp_gpu.json")
  order = [*STEPS]
  cells = sorted(
    ((name.split(), cell) for name, cell in found["train"].items()),
    key=lambda item: (item[0][0], int(item[0][2]), order.index(item[0][1])),
  )
  rows = [
    (
      f"{cell['parameters'] / 1e9:.1f} B, {gpus} × GPU",
      STEPS[optimizer],
      str(cell["sequences"]),
      _gib(cell["params_and_state_bytes"]),
      _gib(cell["peak_bytes"]),
      f"{1e3 * cell['step_seconds']:.0f}",
      f"{1e3 * cell['update_seconds']:.2f}",
      f"{cell['update_seconds'] / cell['step_seconds']:.1%}",
    )
    for (_, optimizer, gpus, _), cell in cells
  ]
  header = (
    "",
    "optimizer",
    "sequences of 2,048",
    "parameters and state, GiB per GPU",
    "peak, GiB per GPU",
    "step, ms",
    "update, ms",
    "of the step",
  )
  sent = {name for _, cell in cells for name in cell["collectives_in_update"]}
  equality = found["equality"].items()
  differ = [
    (devices, case, cell["differ"])
    for devices, parts in equality
    for case, cell in parts["update"].items()
  ]
  worst = {
    STEPS[optimizer]: max(
      parts["training"][optimizer]["relative_difference_of_parameters"]
      for _, parts in equality
    )
    for optimizer in STEPS
  }
  batches = {name.split()[1]: cell for name, cell in found["batch"].items()}
  (gpus,) = {name.split(maxsplit=2)[2] for name in found["batch"]}
  largest = ", ".join(
    f"{batches[optimizer]['sequences_per_gpu']} with {title}"
    for optimizer, title in STEPS.items()
  )
  return (
    f"{markdown(header, rows)}\n\nMost sequences per GPU that fit by XLA's plan, 8 B"
    f" on {gpus}: {largest}. Collectives in the update:"
    f" {', '.join(sent) or 'none'}. The update on"
    f" {' and '.join(devices for devices, _ in equality)} against one"
    f" GPU, {len(differ)} cases of optimizer, implementation and mesh axes, 20 steps:"
    f" {sum(count for *_, count in differ)} elements of parameters and state differ."
    " A small model trained on several GPUs and on one, where sums over the batch"
    " are made in another order: master weights differ by "
    + ", ".join(f"{value:.2%} with {name}" for name, value in worst.items())
    + f". {_note(found)}"
  )


def faults():
  """What came of faults injected into saving and exporting."""
  found = record.load("checkpoint_faults.json")
  rows = []
  for key, what in (
    ("damaged", "Orbax checkpoint: a file missing, cut short or with a bit flipped"),
    ("damaged_exports", "safetensors: the same"),
  ):
    damage = found[key]
    tries = damage["refused"] + damage["harmless"] + len(damage["wrong"])
    outcomes = damage["refused"], damage["harmless"], len(damage["wrong"])
    rows.append((what, *map(str, (tries, *outcomes))))
  for key, what in (
    ("killed", "Orbax checkpoint: the process killed"),
    ("killed_exports", "safetensors, over an older export: the process killed"),
  ):
    kills = found[key]
    left = f"{what} ({kills['during_save']} left unfinished files)"
    whole = kills["tries"] - kills["refused"] - len(kills["wrong"])
    outcomes = kills["refused"], whole, len(kills["wrong"])
    rows.append((left, *map(str, (kills["tries"], *outcomes))))
  header = ("fault", "injected", "refused", "read whole", "read wrong")
  table = markdown(header, rows)
  versions = found["versions"]
  return (
    f"{table}\n\njax {versions['jax']}, Orbax {versions['orbax-checkpoint']},"
    f" {found['date']}."
  )


def checkpoints():
  """Files, faults, export."""
  size = record.load("checkpoint_size.json")
  faults = record.load("checkpoint_faults.json")
  export = record.load("export_memory.json")
  damaged, killed = faults["damaged"], faults["killed"]
  rows = [
    (
      "GPT-2 124 M: checkpoint, `fo.adamw` / `optax.adamw` fp32, MB",
      f"{size['flash_bytes'] / 1e6:.0f} / {size['optax_fp32_bytes'] / 1e6:.0f}",
    ),
    (
      "files damaged: refused / harmless / restored wrong",
      f"{damaged['refused']} / {damaged['harmless']} / {len(damaged['wrong'])}",
    ),
    (
      "processes killed, while saving / restored wrong",
      f"{killed['tries']}, {killed['during_save']} / {len(killed['wrong'])}",
    ),
    (
      f"export of {export['parameters'] / 1e9:.2f} B parameters: memory taken"
      " besides, MB (one file / 1 GiB each)",
      " / ".join(
        f"{export[name]['extra_bytes'] / 1e6:.1f}"
        for name in ("one_file", "shards_of_1_GiB")
      ),
    ),
  ]
  return markdown(("", ""), rows)


def storage_bytes():
  """Bytes per parameter by optimizer and component."""
  # Imported here: the package's other tables need no JAX.
  import jax
  import jax.numpy as jnp

  import flashoptim_jax as fo

  params = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16)
  optimizers = {
    "AdamW": fo.adamw,
    "Lion": fo.lion,
    "SGD with momentum": lambda rate, **kw: fo.sgd(rate, 0.9, **kw),
    "SGD": fo.sgd,
  }
  reports = {
    bits: [
      fo.memory_report(make(1e-3, storage=fo.Storage(*bits)), params)
      for make in optimizers.values()
    ]
    for bits in ((24, 8), (16, 8), (32, 8), (None, 8), (24, 32), (32, 32))
  }
  usual = reports[24, 8]

  def row(title, key):
    sizes = [getattr(report, key) / params.size for report in usual]
    return title, *(f"{size:g}" for size in sizes)

  rows = [
    row("parameter", "params"),
    row("correction", "correction"),
    row("moments", "moments"),
    row("scales, one bfloat16 for 32 codes", "scales"),
  ]
  rows += [
    (
      f"together, `Storage({master}, {moment})`"
      + (", the default" if (master, moment) == (24, 8) else ""),
      *(f"{report.bytes_per_param:.4f}".rstrip("0").rstrip(".") for report in found),
    )
    for (master, moment), found in reports.items()
  ]
  return markdown(("bytes per bfloat16 parameter", *optimizers), rows)


def release_bytes():
  """Bytes per parameter of a step: usual, ours, released."""
  memory = record.load("llama_memory.json")
  count, ours, usual = memory["parameters"], memory["bytes"], memory["baseline_bytes"]
  columns = [
    (usual["params"], 0, usual["moments"], usual["gradients"]),
    *(
      (ours["params"], ours["correction"], ours["moments"] + ours["scales"], gradients)
      for gradients in (ours["gradients"], None)
    ),
  ]
  titles = ("parameter", "correction", "moments and their scales", "gradient")
  rows = [
    (
      title,
      *(
        "one layer's" if size is None else f"{size / count:.3f}".rstrip("0").rstrip(".")
        for size in sizes
      ),
    )
    for title, sizes in zip(titles, zip(*columns, strict=True), strict=True)
  ]
  totals = [sum(size or 0 for size in column) / count for column in columns]
  rows.append(("together", *(f"{total:.3f}" for total in totals)))
  header = (
    "bytes per parameter, AdamW",
    "`optax.adamw`, fp32 masters",
    "`fo.adamw`",
    "`fo.adamw`, released",
  )
  return markdown(header, rows)


def companding_table():
  """The simulation of companded moments."""
  results = record.load("companding.json")
  note = (
    f"{results['groups']:,} groups of {results['group_size']}, "
    f"{results['steps']:,} steps ({results['groups'] // companding.FEWER} and "
    f"{results['steps'] * companding.LONGER:,} for β2={companding.SLOWEST:g}),"
    f" {results['window']} of the last quarter measured; {results['device']}, jax"
    f" {results['versions']['jax']}, {results['date']}."
  )
  return f"{companding.table(results)}\n\n{note}"


def example_losses():
  """The example's runs."""
  header = ("", "`fo.adamw`, bf16", "`optax.adamw`, fp32", "difference")
  return markdown(header, loss_rows())


def quality():
  """One table for each results/quality_*.json.

  Such a file has ``title``, ``metric``, ``learning_rate``, ``date``, ``device``,
  ``versions`` and ``runs``: each with ``name``, ``seed``, ``value`` of the metric (null
  if it is not finite), ``steps`` and ``losses``. ``baseline`` is the name of the runs
  that the others are compared with, seed by seed.
  """
  parts = []
  for name in quality_files():
    found = record.load(name)
    more = [f"peak learning rate {found['learning_rate']:g}"]
    if tokens := found["runs"][0].get("tokens"):
      text = found["data"]["python"]
      more.append(
        f"{tokens / 1e6:.1f} M tokens in a run, of {text['train_tokens'] / 1e6:.0f} M"
        f" in {text['files']:,} Python files"
      )
    stem = name.removesuffix(".json")
    parts += [
      f"### {found['title']}",
      quality_table(found),
      _note(found, *more),
      f"![{found['title']}](figures/{stem}.svg)",
    ]
  return "\n\n".join(parts)


def quality_files():
  """The files of :func:`quality`: large models first, then by name."""
  names = [path.name for path in record.RESULTS.glob("quality_*.json")]
  return sorted(
    names,
    key=lambda name: (-(record.load(name)["runs"][0].get("parameters") or 0), name),
  )


# What else a run may know, its heading and how it is written.
_MORE = {
  "accuracy": ("accuracy", "{:.1%}"),
  "moved": ("weights that moved", "{:.1%}"),
  "stalled_leaves": ("leaves that `check_numerics` lists", "{:.0f}"),
}


def quality_table(found):
  """Mean and spread over seeds, beside the baseline's."""
  by_name: dict[str, dict[int, dict]] = {}
  for run in found["runs"]:
    by_name.setdefault(run["name"], {})[run["seed"]] = run
  more = [key for key in _MORE if key in found["runs"][0]]
  usual = {seed: run["value"] for seed, run in by_name[found["baseline"]].items()}
  rows = []
  for name, runs in by_name.items():
    finite = {s: run["value"] for s, run in runs.items() if run["value"] is not None}
    differences = [
      value - usual[seed]
      for seed, value in finite.items()
      if name != found["baseline"] and usual.get(seed) is not None
    ]
    rows.append(
      (
        name,
        f"{len(finite)} of {len(runs)}",
        _mean(list(finite.values()), statistics.stdev),
        _mean(differences, _standard_error),
        *(
          _MORE[key][1].format(statistics.mean(run[key] for run in runs.values()))
          for key in more
        ),
      )
    )
  header = (
    found["metric"],
    "seeds that ended finite",
    "mean ± standard deviation over seeds",
    f"difference to {found['baseline']}, seed by seed ± standard error",
    *(_MORE[key][0] for key in more),
  )
  return markdown(header, rows)


def moments():
  """Errors of the update's direction with 8-bit moments, by kind of layer."""
  found = record.load("moments.json")
  rows = [
    (
      layer,
      *(
        f"{cells[name]['error']:.1%}, {cells[name]['collapsed']:.2%}"
        for name in ("root", "paper", "linear")
      ),
    )
    for layer, cells in found["layers"].items()
  ]
  header = ("", "root (default)", "paper", "no companding")
  return f"{markdown(header, rows)}\n\n{_note(found)}"


def _standard_error(values):
  return statistics.stdev(values) / math.sqrt(len(values))


def _mean(values, spread):
  if not values:
    return "–"
  text = f" ± {spread(values):.4f}" if len(values) > 1 else ""
  return f"{statistics.mean(values):.4f}{text}"
