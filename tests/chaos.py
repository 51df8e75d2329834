"""A run that is killed again and again must end with the weights of one that was not, bit for bit.

    python -m tests.chaos --kills 50          (make chaos)

Four ranks train a tiny model (experts over two of them, two data-parallel replicas) and save every second step. The case is a function of
--seed: which of the ranks dies, or all of them with their launcher, and when:

* `step`     some steps after the start, at a random moment of a step;
* `save`     while a checkpoint is being written: as soon as its unfinished folder is seen, or up to 60 ms later;
* `publish`  around its publication: as soon as the new step folder or the new content of `latest` is seen, or up to 10 ms later;
* `start`    before the first step, at a random moment of starting and resuming.

After each kill no process of the job may be left, and what `latest` names must be whole. At the end: every step was done, with the
losses, and the order of samples that these depend on, of the run that nobody killed; the last checkpoints hold the same bits.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "unit")]

from safetensors.numpy import load_file  # noqa: E402

from dsvl_train.checkpoints.manifest import DamagedCheckpointError, check  # noqa: E402
from dsvl_train.reporting.metrics import read_metrics  # noqa: E402
from tests.distributed.small_runs import losses, make_data, overrides, start  # noqa: E402

MOMENTS = ("step", "save", "publish", "start")
LAYOUT = ["parallel.ep=2", "parallel.tile_balance=true", "parallel.distributed_optimizer=true"]
RANKS = 4
END_S = 60.0
"""A job of which one rank was killed ends by itself within this time, or counts as hanging."""
_STALE_S = 240.0


@dataclass
class Outcome:
    """What happened, for people and for the test."""

    kills: Counter[str] = field(default_factory=Counter)
    """Moment and victim -> how often."""
    missed: int = 0
    """The run was over before the moment came."""
    repeated_steps: int = 0
    """Steps that were done again, because they came after the last checkpoint."""
    problems: list[str] = field(default_factory=list)


def chaos(folder: Path, kills: int, seed: int, say: Callable[[str], None] = print) -> Outcome:
    """Run the case in `folder`."""
    data = make_data(folder / "data")
    steps = max(6, 3 * kills)

    def arguments(name: str) -> list[str]:
        settings = [f"run.max_steps={steps}", "checkpoint.every=2", "data.text_warmup_steps=4", "data.batch_size=4"]
        return overrides(data, folder / name, *settings, *LAYOUT)

    whole = start(arguments("whole"), ranks=RANKS)
    _, err = whole.communicate()
    if whole.returncode != 0:
        raise RuntimeError(f"the run that nobody kills failed:\n{err}")
    say(f"{steps} steps without a kill: done")
    outcome = _kill_again_and_again(arguments("killed"), folder / "killed", kills, random.Random(seed), say)
    outcome.problems += _differences(folder / "whole", folder / "killed", steps)
    return outcome


def _kill_again_and_again(arguments: list[str], run_dir: Path, kills: int, rng: random.Random, say: Callable[[str], None]) -> Outcome:
    outcome = Outcome()
    for number in range(kills):
        moment, victim = MOMENTS[number % len(MOMENTS)], rng.choice(["one rank", "all ranks"])
        process = start(arguments, ranks=RANKS)
        if not _await(moment, process, run_dir, rng):
            outcome.missed += 1
            _, err = process.communicate()
            if process.returncode != 0:
                outcome.problems.append(f"kill {number}: the job failed by itself: {err[-2000:]}")
            continue
        before = _steps_done(run_dir)
        outcome.kills[f"{moment}, {victim}"] += 1
        _kill(process, victim, rng, outcome, number)
        saved = _check_latest(run_dir, outcome, number)
        outcome.repeated_steps += max(_steps_done(run_dir) - saved, 0)
        say(f"kill {number + 1}/{kills}: {moment}, {victim}; {before} steps done, goes on after step {saved}")
    process = start(arguments, ranks=RANKS)
    _, err = process.communicate()
    if process.returncode != 0:
        outcome.problems.append(f"the last start failed: {err[-2000:]}")
    return outcome


def _await(moment: str, process: subprocess.Popen[str], run_dir: Path, rng: random.Random) -> bool:
    """Wait for the moment of the kill; False when the job ended first."""
    checkpoints = run_dir / "checkpoints"
    deadline = time.monotonic() + _STALE_S
    if moment == "start":
        time.sleep(rng.uniform(0.0, 8.0))
        return process.poll() is None
    done, seen, latest = _lines(run_dir), _folders(checkpoints), _latest(checkpoints)
    wanted = done + rng.randint(1, 4)
    while process.poll() is None:
        if moment == "step" and _lines(run_dir) >= wanted:
            time.sleep(rng.uniform(0.0, 0.3))
            return process.poll() is None
        if moment == "save" and any(name.startswith(".") for name in _folders(checkpoints) - seen):
            time.sleep(rng.choice([0.0, rng.uniform(0.0, 0.06)]))
            return process.poll() is None
        published = {name for name in _folders(checkpoints) - seen if not name.startswith(".")}
        if moment == "publish" and (published or _latest(checkpoints) != latest):
            time.sleep(rng.choice([0.0, rng.uniform(0.0, 0.01)]))
            return process.poll() is None
        if time.monotonic() > deadline:
            process.send_signal(signal.SIGQUIT)
            raise RuntimeError(f"nothing to kill at ({moment}) for {_STALE_S:g} s")
        time.sleep(0.0005)
    return False


def _kill(process: subprocess.Popen[str], victim: str, rng: random.Random, outcome: Outcome, number: int) -> None:
    ranks = _children(process.pid)
    if victim == "one rank" and ranks:
        _sigkill(rng.choice(ranks))
    else:
        for pid in (process.pid, *ranks):
            _sigkill(pid)
    try:
        process.communicate(timeout=END_S)
    except subprocess.TimeoutExpired:
        outcome.problems.append(f"kill {number}: the job did not end within {END_S:g} s")
        for pid in (process.pid, *ranks):
            _sigkill(pid)
        process.communicate()
    if process.returncode == 0:
        outcome.problems.append(f"kill {number}: the job ended with 0")
    deadline = time.monotonic() + END_S
    while left := [pid for pid in ranks if Path(f"/proc/{pid}").exists()]:
        if time.monotonic() > deadline:
            outcome.problems.append(f"kill {number}: processes {left} are left")
            return
        time.sleep(0.02)


def _check_latest(run_dir: Path, outcome: Outcome, number: int) -> int:
    """The step that a resume will go on after; what `latest` names must be whole."""
    name = _latest(run_dir / "checkpoints")
    if name is None:
        return 0
    try:
        check(run_dir / "checkpoints" / name, full=True)
    except DamagedCheckpointError as error:
        outcome.problems.append(f"kill {number}: latest names a checkpoint that is not whole: {error}")
    return int(name.removeprefix("step_"))


def _differences(whole: Path, killed: Path, steps: int) -> list[str]:
    problems = []
    if losses(whole) != losses(killed):
        first = next((a for a, b in zip(losses(whole), losses(killed), strict=False) if a != b), "the number of steps")
        problems.append(f"the losses differ, first at {first}")
    final = [run / "checkpoints" / f"step_{steps:08d}" for run in (whole, killed)]
    tensors: list[dict[str, Any]] = []
    for folder in final:
        files = sorted(folder.rglob("*.safetensors"))
        tensors.append({f"{file.relative_to(folder)}:{key}": value for file in files for key, value in load_file(file).items()})
    if not tensors[0] or tensors[0].keys() != tensors[1].keys():
        problems.append("the last checkpoints hold different tensors")
    problems += [
        f"{key} differs" for key in tensors[0].keys() & tensors[1].keys() if tensors[0][key].tobytes() != tensors[1][key].tobytes()
    ]
    states = [json.loads((folder / "state.json").read_text())["data"] for folder in final]
    if states[0] != states[1]:
        problems.append("the data cursors differ")
    return problems


def _lines(run_dir: Path) -> int:
    try:
        return (run_dir / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def _steps_done(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return max((record["step"] for record in read_metrics(path)), default=0) if path.is_file() else 0


def _folders(checkpoints: Path) -> set[str]:
    try:
        return set(os.listdir(checkpoints))
    except OSError:
        return set()


def _latest(checkpoints: Path) -> str | None:
    try:
        return (checkpoints / "latest").read_text().strip()
    except OSError:
        return None


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _sigkill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dsvl_chaos_") as folder:
        outcome = chaos(Path(folder), arguments.kills, arguments.seed, say=lambda line: print(line, flush=True))
    for kind, number in sorted(outcome.kills.items()):
        print(f"{number:>4}  {kind}")
    print(f"{outcome.kills.total()} kills ({outcome.missed} came too late), {outcome.repeated_steps} steps done again,", end=" ")
    print(f"{(time.monotonic() - started) / 60:.1f} minutes; {'; '.join(outcome.problems) or 'the same bits as without a kill'}")
    return 1 if outcome.problems else 0


if __name__ == "__main__":
    sys.exit(main())
