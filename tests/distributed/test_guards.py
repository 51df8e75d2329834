"""What goes wrong on one rank is dealt with by all: steps that may not update, signals in every phase, ranks that stand still."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from dsvl_train import launcher
from dsvl_train.config.compose import compose_run, to_yaml
from dsvl_train.failures import DONE, FAILED, TERMINATED
from dsvl_train.reporting.metrics import read_metrics
from tests.distributed.small_runs import losses, make_data, overrides

FULL = pytest.mark.full


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def run_faulty(data: Path, run_dir: Path, *more: str, fault: str = "none", rank: int = 1, step: int = 3, ranks: int = 2) -> int:
    """Exit code of a job in which one rank meets a fault."""
    cfg = compose_run([*overrides(data, run_dir, "run.max_steps=6"), *more])
    path = run_dir.with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_yaml(cfg))
    (run_dir / "log").mkdir(parents=True, exist_ok=True)
    scratch = run_dir / "scratch"
    scratch.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.distributed.faulty", fault, str(rank), str(step), str(path)]
    with launcher.reserved_port() as reserved, launcher.Job(scratch, run_dir / "log", grace_s=30) as job:
        environment = launcher._environment(cfg, ranks, reserved.getsockname()[1]) | {"OMP_NUM_THREADS": "1"}
        for number in range(ranks):
            job.add(number, command, environment)
        return job.wait()


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert run_faulty(data, run_dir) == DONE
    return run_dir


def test_a_loss_that_is_not_finite_on_one_rank_costs_all_ranks_the_update(data: Path, uninterrupted: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert run_faulty(data, run_dir, fault="nan") == DONE
    records = read_metrics(run_dir / "metrics.jsonl")
    assert [record["step"] for record in records if not record["updated"]] == [3]
    assert [record["skipped_steps"] for record in records] == [0, 0, 1, 1, 1, 1]
    assert records[2]["loss"] is None
    assert losses(run_dir)[:2] == losses(uninterrupted)[:2]
    assert all(record["loss"] > 0 for record in records[3:])
    (noted,) = [json.loads(line) for line in (run_dir / "skipped_steps.jsonl").read_text().splitlines()]
    assert noted["step"] == 3 and "the loss is nan" in noted["trouble"] and len(noted["samples"]) >= 4


def test_too_many_skipped_updates_end_the_job_with_one_error(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_faulty(data, tmp_path / "run", "guard.max_skipped=1", fault="nan") == FAILED
    shown = capfd.readouterr().err
    assert "step 3" in shown and "guard.max_skipped" in shown and "Traceback" not in shown


@pytest.mark.parametrize(
    "phase",
    [
        pytest.param("waiting for data", marks=FULL),
        pytest.param("counting the global batch", marks=FULL),
        "forward and backward",
        pytest.param("reducing metrics", marks=FULL),
        pytest.param("updating", marks=FULL),
        "saving",
    ],
)
def test_sigterm_to_one_rank_in_any_phase_stops_all_after_the_same_step(
    data: Path, uninterrupted: Path, tmp_path: Path, phase: str
) -> None:
    run_dir = tmp_path / "run"
    step = 4 if phase == "saving" else 3
    assert run_faulty(data, run_dir, "checkpoint.every=2", fault=f"signal {phase}", step=step) == TERMINATED
    stopped = len(losses(run_dir))
    assert stopped in (step, step + 1)
    assert (run_dir / "checkpoints" / "latest").read_text().strip() == f"step_{stopped:08d}"
    assert run_faulty(data, run_dir, "checkpoint.every=2") == DONE
    assert losses(run_dir) == losses(uninterrupted)


@pytest.mark.parametrize("fault", ["sleep", pytest.param("freeze", marks=FULL)])
def test_a_rank_that_stands_still_is_named_and_the_job_ends(
    data: Path, tmp_path: Path, fault: str, capfd: pytest.CaptureFixture[str]
) -> None:
    started = time.monotonic()
    assert run_faulty(data, tmp_path / "run", "guard.hang_s=8", "data.batch_size=3", fault=fault, rank=2, ranks=3) == FAILED
    assert time.monotonic() - started < 90
    shown = capfd.readouterr().err
    assert "no progress for" in shown and "guard.hang_s=8" in shown
    if fault == "sleep":
        assert "rank 2 stands still: step 3, forward and backward, at " in shown and "time.sleep(600)" in shown
        assert "rank 0 waits for others" in shown
        assert "time.sleep" not in (tmp_path / "run" / "log" / "stacks_rank_0.txt").read_text()
    else:
        assert "rank 2 does not answer" in shown


def test_a_forwarded_usr1_stops_a_run(data: Path, tmp_path: Path) -> None:
    """As Slurm sends it before the time limit; the exit code tells a job script to requeue."""
    import subprocess

    from tests.distributed.small_runs import start

    run_dir = tmp_path / "run"
    process: subprocess.Popen[str] = start(overrides(data, run_dir, "run.max_steps=400", "checkpoint.every=1000"), ranks=2)
    deadline = time.monotonic() + 120
    while not (run_dir / "metrics.jsonl").is_file() or len(read_metrics(run_dir / "metrics.jsonl")) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGUSR1)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGUSR1, err
    assert (run_dir / "checkpoints" / "latest").read_text().strip() == f"step_{len(losses(run_dir)):08d}"
