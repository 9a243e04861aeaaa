"""Checks what damage to checkpoints and exports does: an error, never other numbers.

Kills a process at random times while it saves, or exports to safetensors, and
removes, truncates and flips bits of every file's metadata. The tests do a little.

  JAX_PLATFORMS=cpu python tests/checks/checkpoint_faults.py --kills 50 --flips 20
"""

import argparse
import dataclasses
import json
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

sys.path.append(str(pathlib.Path(__file__).parents[2]))

import flashoptim_jax as fo
from benchmarks import record

SIZE = 1024  # Of the square matrices that the killed process saves.


def identical(a: Any, b: Any) -> bool:
  """Whether two trees agree in structure, dtypes and every bit."""
  return jax.tree.structure(a) == jax.tree.structure(b) and all(
    x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


@dataclasses.dataclass
class Damage:
  """What became of damaged checkpoints or exports.

  Attributes:
    files: Files of the checkpoint or exports.
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
    # Files of arrays are not metadata.
    metadata = 0 if "d" in name.parts else len(content)
    report.files += 1
    for what, new in _changes(content, metadata, flips, rng):
      shutil.rmtree(broken, ignore_errors=True)
      shutil.copytree(path, broken)
      if new is None:
        (broken / name).unlink()
      else:
        (broken / name).write_bytes(new)
      _judge(report, lambda: restore(broken, tree), tree, f"{name} {what}")
  shutil.rmtree(broken, ignore_errors=True)
  return report


def _changes(
  content: bytes, metadata: int, flips: int, rng: random.Random
) -> Iterator[tuple[str, bytes | None]]:
  """Damaged contents of a file, None for a missing one, and what was done."""
  yield "missing", None
  yield "truncated", content[: len(content) // 2]
  for _ in range(flips if metadata else 0):
    at, bit = rng.randrange(metadata), 1 << rng.randrange(8)
    flipped = bytes([content[at] ^ bit])
    yield f"bit flipped at {at}", content[:at] + flipped + content[at + 1 :]


def restore(path: pathlib.Path, tree: Any) -> Any:
  """Restores a checkpoint."""
  with ocp.Checkpointer(fo.checkpoint.Handler()) as checkpointer:
    return checkpointer.restore(path, args=fo.checkpoint.Restore(tree))


def damage_export(folder: pathlib.Path, flips: int, seed: int) -> Damage:
  """Damages an export of one file and one of several, and imports them.

  Args:
    folder: An empty folder.
    flips: Bits to flip in each file's header, or in the index, one at a time.
    seed: Chooses the bits.
  """
  rng = random.Random(seed)
  report = Damage()
  params = {name: jnp.full((8, 8), i, jnp.bfloat16) for i, name in enumerate("abcd")}
  state = fo.adamw(1e-3).init(params)
  masters = fo.to_fp32(params, state)
  for i, limit in enumerate((None, 600)):
    path = folder / f"{i}.safetensors"
    before = set(folder.iterdir())
    fo.export_safetensors(path, params, state, max_shard_bytes=limit)
    for file in sorted(set(folder.iterdir()) - before):
      content = file.read_bytes()
      is_index = file.suffix == ".json"
      header = len(content) if is_index else 8 + int.from_bytes(content[:8], "little")
      report.files += 1
      for what, new in _changes(content, header, flips, rng):
        if new is None:
          file.unlink()
        else:
          file.write_bytes(new)
        _judge(
          report,
          lambda path=path: fo.import_safetensors(path, params),
          masters,
          f"{file.name} {what}",
        )
      file.write_bytes(content)
  return report


def _judge(report: Damage, read: Callable[[], Any], tree: Any, what: str) -> None:
  try:
    restored = read()
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
  params = {f"w{i}": jnp.full((SIZE, SIZE), step + i, jnp.bfloat16) for i in range(4)}
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
  """What became of checkpoints or exports whose process was killed.

  Attributes:
    tries: Processes killed.
    during_save: Of these, those that left an unfinished checkpoint or export.
    refused: Those that left an older export and a newer one, between which the
      reader has to choose.
    wrong: What was wrong with the last complete checkpoint or export.
  """

  tries: int = 0
  during_save: int = 0
  refused: int = 0
  wrong: list[str] = dataclasses.field(default_factory=list)


def _killed(what: str, folder: pathlib.Path, seconds: float) -> int:
  """Kills a process of this script a while after its first step; the last one."""
  process = subprocess.Popen(
    [sys.executable, __file__, what, str(folder)], stdout=subprocess.PIPE, text=True
  )
  assert process.stdout is not None
  done = int(process.stdout.readline())
  time.sleep(seconds)
  process.kill()
  done = max([done, *map(int, process.stdout.read().split())])
  process.wait()
  return done


def exported(step: int) -> tuple[Any, Any]:
  """The parameters and state exported at a step: every number tells the step."""
  params = {f"w{i}": jnp.full((64, 64), step % 100, jnp.bfloat16) for i in range(8)}
  return params, fo.adamw(1e-3).init(params)


def export_forever(folder: pathlib.Path) -> None:
  """Exports step after step over the last one, in one file or several."""
  step = 0
  while True:
    step += 1
    limit = (None, 2**15, 2**14)[step % 3]
    path = folder / "model.safetensors"
    fo.export_safetensors(path, *exported(step), max_shard_bytes=limit)
    print(step, flush=True)


def kill_exports(folder: pathlib.Path, tries: int, seed: int) -> Kills:
  """Kills exporting processes at random times and imports what they left."""
  rng = random.Random(seed)
  report = Kills()
  for i in range(tries):
    own = folder / str(i)
    own.mkdir()
    done = _killed("--export-forever", own, rng.uniform(0, 0.1))
    report.tries += 1
    path = own / "model.safetensors"
    index = path.with_name(f"{path.name}.index.json")
    named = set()
    if index.exists():
      named = {index.name, *json.loads(index.read_bytes())["weight_map"].values()}
    report.during_save += {file.name for file in own.iterdir()} != (
      named or {path.name}
    )
    if path.exists() and index.exists():
      report.refused += 1  # What import_safetensors says, and no more.
      continue
    trees = [fo.to_fp32(*exported(step)) for step in (done, done + 1)]
    try:
      found = fo.import_safetensors(path, trees[0])
    except Exception as error:
      report.wrong.append(f"step {done}: {error}"[:300])
      continue
    if not any(identical(found, tree) for tree in trees):
      report.wrong.append(f"step {done} came back as another tree")
  return report


def kill(folder: pathlib.Path, tries: int, seed: int) -> Kills:
  """Kills saving processes at random times and restores what they left."""
  rng = random.Random(seed)
  report = Kills()
  for _ in range(tries):
    done = _killed("--save-forever", folder, rng.uniform(0, 0.5))
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
  parser = record.parser(__doc__)
  parser.add_argument("--kills", type=int, default=50)
  parser.add_argument("--flips", type=int, default=20)
  parser.add_argument("--save-forever", type=pathlib.Path, help=argparse.SUPPRESS)
  parser.add_argument("--export-forever", type=pathlib.Path, help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.save_forever:
    save_forever(arguments.save_forever)
  if arguments.export_forever:
    export_forever(arguments.export_forever)
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
  print(killed, flush=True)
  with tempfile.TemporaryDirectory() as folder:
    damaged_exports = damage_export(pathlib.Path(folder), arguments.flips, seed=0)
  print(damaged_exports, flush=True)
  with tempfile.TemporaryDirectory() as folder:
    killed_exports = kill_exports(pathlib.Path(folder), arguments.kills, seed=0)
  print(killed_exports)
  result = {
    **record.about("orbax-checkpoint", "safetensors"),
    "damaged": dataclasses.asdict(damaged),
    "killed": dataclasses.asdict(killed),
    "damaged_exports": dataclasses.asdict(damaged_exports),
    "killed_exports": dataclasses.asdict(killed_exports),
  }
  record.write("checkpoint_faults.json", result, arguments.output)
  reports = damaged, killed, damaged_exports, killed_exports
  unclear = damaged.unclear + damaged_exports.unclear
  return 1 if unclear or any(report.wrong for report in reports) else 0


if __name__ == "__main__":
  sys.exit(main())
