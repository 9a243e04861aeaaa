"""Checks what damage to a checkpoint does: an error, never other numbers.

Kills a process at random times while it saves, and removes, truncates and flips
bytes of every file of a checkpoint's metadata. The tests do a little of it.

  JAX_PLATFORMS=cpu python benchmarks/checkpoint_faults.py --kills 50 --flips 20
"""

import argparse
import dataclasses
import datetime
import json
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

import flashoptim_jax as fo

RESULT = pathlib.Path(__file__).parent / "results" / "checkpoint_faults.json"
SIZE = 1024  # Of the square matrices that the killed process saves.


def identical(a: Any, b: Any) -> bool:
  """Whether two trees agree in structure, dtypes and every bit."""
  return jax.tree.structure(a) == jax.tree.structure(b) and all(
    x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


@dataclasses.dataclass
class Damage:
  """What became of damaged checkpoints.

  Attributes:
    files: Files of the checkpoint.
    refused: Damages that gave an error.
    harmless: Damages after which the same tree came back.
    wrong: Those after which another tree came back.
    unclear: Errors that don't say that the checkpoint is at fault.
  """

  files: int = 0
  refused: int = 0
  harmless: int = 0
  wrong: list[str] = dataclasses.field(default_factory=list)
  unclear: list[str] = dataclasses.field(default_factory=list)


def damage(path: pathlib.Path, tree: Any, flips: int, seed: int) -> Damage:
  """Damages copies of a checkpoint, one file at a time, and restores them.

  Args:
    path: The checkpoint of a tree, made by ``fo.checkpoint.Save``.
    tree: The tree.
    flips: Bytes to flip in each file of metadata, one at a time.
    seed: Chooses the bytes.
  """
  rng = random.Random(seed)
  report = Damage()
  broken = path.with_name(path.name + ".broken")
  for file in sorted(p for p in path.rglob("*") if p.is_file()):
    content = file.read_bytes()
    name = file.relative_to(path)
    changes: list[tuple[str, bytes | None]] = [
      ("missing", None),
      ("truncated", content[: len(content) // 2]),
    ]
    if "d" not in name.parts:  # Files of arrays are not metadata.
      for _ in range(flips):
        at, bit = rng.randrange(len(content)), 1 << rng.randrange(8)
        flipped = bytes([content[at] ^ bit])
        changes.append(
          (f"bit flipped at {at}", content[:at] + flipped + content[at + 1 :])
        )
    report.files += 1
    for what, new in changes:
      shutil.rmtree(broken, ignore_errors=True)
      shutil.copytree(path, broken)
      if new is None:
        (broken / name).unlink()
      else:
        (broken / name).write_bytes(new)
      _judge(report, broken, tree, f"{name} {what}")
  shutil.rmtree(broken, ignore_errors=True)
  return report


def _judge(report: Damage, path: pathlib.Path, tree: Any, what: str) -> None:
  try:
    with ocp.Checkpointer(fo.checkpoint.Handler()) as checkpointer:
      restored = checkpointer.restore(path, args=fo.checkpoint.Restore(tree))
  except Exception as error:
    report.refused += 1
    if not isinstance(error, (ValueError, FileNotFoundError)):
      report.unclear.append(f"{what}: {type(error).__name__}: {error}"[:300])
    return
  if identical(restored, tree):
    report.harmless += 1
  else:
    report.wrong.append(what)


def tree_of(step: int) -> dict[str, Any]:
  """What the killed process saves at a step: every number tells the step."""
  tx = fo.adamw(1e-3)
  params = {
    f"w{i}": jnp.full((SIZE, SIZE), step + i, jnp.bfloat16) for i in range(4)
  }
  state = jax.tree.map(lambda x: jnp.full_like(x, step % 100), tx.init(params))
  return {"params": params, "opt_state": state}


def save_forever(folder: pathlib.Path) -> None:
  """Saves step after step, asynchronously, saying which are complete."""
  options = ocp.CheckpointManagerOptions(max_to_keep=2)
  with ocp.CheckpointManager(folder, options=options) as manager:
    step = (manager.latest_step() or 0) + 1
    while True:
      manager.save(step, args=fo.checkpoint.Save(tree_of(step)))
      manager.wait_until_finished()
      print(step, flush=True)
      step += 1


@dataclasses.dataclass
class Kills:
  """What became of checkpoints whose process was killed.

  Attributes:
    tries: Processes killed.
    during_save: Of these, those that left an unfinished checkpoint.
    wrong: What was wrong with the last complete checkpoint.
  """

  tries: int = 0
  during_save: int = 0
  wrong: list[str] = dataclasses.field(default_factory=list)


def kill(folder: pathlib.Path, tries: int, seed: int) -> Kills:
  """Kills saving processes at random times and restores what they left."""
  rng = random.Random(seed)
  report = Kills()
  for _ in range(tries):
    process = subprocess.Popen(
      [sys.executable, __file__, "--save-forever", str(folder)],
      stdout=subprocess.PIPE,
      text=True,
    )
    assert process.stdout is not None
    done = int(process.stdout.readline())
    time.sleep(rng.uniform(0, 0.5))
    process.kill()
    done = max([done, *map(int, process.stdout.read().split())])
    process.wait()
    report.tries += 1
    report.during_save += any(
      "tmp" in path.name for path in folder.iterdir() if path.is_dir()
    )
    with ocp.CheckpointManager(folder) as manager:
      latest = manager.latest_step()
      if latest is None or latest < done:
        report.wrong.append(f"step {done} was saved, the latest is {latest}")
        continue
      tree = tree_of(latest)
      try:
        restored = manager.restore(latest, args=fo.checkpoint.Restore(tree))
      except Exception as error:
        report.wrong.append(f"step {latest}: {error}"[:300])
        continue
      if not identical(restored, tree):
        report.wrong.append(f"step {latest} came back as another tree")
  return report


def main() -> int:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--kills", type=int, default=50)
  parser.add_argument("--flips", type=int, default=20)
  parser.add_argument("--save-forever", type=pathlib.Path, help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.save_forever:
    save_forever(arguments.save_forever)
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "0"
    tx = fo.adamw(1e-3)
    params = {"w": jnp.ones((64, 64), jnp.bfloat16), "b": jnp.ones(64)}
    tree = {"params": params, "opt_state": tx.init(params)}
    tree = jax.tree.map(lambda x: jnp.full_like(x, 3), tree)
    with ocp.Checkpointer(fo.checkpoint.Handler()) as checkpointer:
      checkpointer.save(path, args=fo.checkpoint.Save(tree))
    damaged = damage(path, tree, arguments.flips, seed=0)
  print(damaged, flush=True)
  with tempfile.TemporaryDirectory() as folder:
    killed = kill(pathlib.Path(folder), arguments.kills, seed=0)
  print(killed)
  result = {
    "date": datetime.date.today().isoformat(),
    "jax": jax.__version__,
    "orbax": ocp.__version__,
    "damaged": dataclasses.asdict(damaged),
    "killed": dataclasses.asdict(killed),
  }
  RESULT.write_text(json.dumps(result, indent=1) + "\n")
  return 1 if damaged.wrong or damaged.unclear or killed.wrong else 0


if __name__ == "__main__":
  sys.exit(main())
