"""launch/slurm.sbatch on a real Slurm: the three stages as one job of four tasks, put back into the queue in the middle of stage 2."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_recipes.make_tiny import main as make_tiny
from dsvl_train.reporting.metrics import read_metrics
from tests.distributed.slurm import Slurm, absent, slurm
from tests.distributed.test_launch import losses, weights

REPOSITORY = Path(__file__).parents[2]
FAMILY, STAGES = "deepseek_vl2", ("align", "pretrain", "sft")
SIZES = ["--nodes=1", "--ntasks-per-node=4", "--cpus-per-task=1", "--gpus-per-node=0", "--mem=0", "--time=30", "--parsable"]
SETTINGS = {"PYTHON": sys.executable, "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}

pytestmark = [pytest.mark.full, pytest.mark.skipif(bool(absent()), reason=absent()), pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with slurm(tmp_path_factory.mktemp("slurm"), cpus=8) as running:
        yield running


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    assert make_tiny([*(f"--recipe={FAMILY}/{stage}" for stage in STAGES), "--out", str(folder), "--samples", "12"]) == 0
    return folder


def submit(cluster: Slurm, data: Path, root: Path, *more: str, health_check: str = "no") -> str:
    """The number of a job that trains all stages, TP 2 x PP 2, stage 2 for eight steps."""
    chain = [FAMILY, "shrink=tiny", f"data.root={data}", "parallel.tp=2", "parallel.pp=2", "checkpoint.every=1", f"--root={root}"]
    chain += ["--set=align:run.max_steps=1", "--set=pretrain:run.max_steps=8", "--set=sft:run.max_steps=1", *more]
    options = [*SIZES, f"--chdir={REPOSITORY}", f"--output={log_of(root)}"]
    settings = SETTINGS | {"HEALTH_CHECK": health_check}
    return cluster.call("sbatch", *options, "launch/slurm.sbatch", *chain, **settings)


def wait_for_steps(cluster: Slurm, job: str, run: Path, steps: int, *logs: Path) -> None:
    metrics = run / "metrics.jsonl"
    cluster.wait_until(job, lambda _: metrics.is_file() and len(read_metrics(metrics)) >= steps, *logs)


def finish(cluster: Slurm, job: str, root: Path) -> tuple[dict[str, str], str]:
    state = cluster.wait_for_end(job, log_of(root))
    log = log_of(root).read_text()
    assert (state["JobState"], state["ExitCode"]) == ("COMPLETED", "0:0"), log
    assert [len(losses(root / stage)) for stage in STAGES] == [1, 8, 1]
    return state, log


def log_of(root: Path) -> Path:
    return root.with_name(f"{root.name}.log")


def test_a_job_interrupted_in_stage_2_ends_with_the_weights_of_one_left_alone(cluster: Slurm, data: Path, tmp_path: Path) -> None:
    """Once by the signal that tells of the end of its time, once by a requeue that ends all tasks at once."""
    job = submit(cluster, data, tmp_path / "alone", health_check="--min-free-gb 0.1")
    state, log = finish(cluster, job, tmp_path / "alone")
    assert state["Restarts"] == "0"
    assert "health check: 4 ranks well" in log

    root = tmp_path / "interrupted"
    job = submit(cluster, data, root)
    wait_for_steps(cluster, job, root / "pretrain", 2, log_of(root))
    cluster.call("scancel", "--batch", "--signal=USR1", job)  # what --signal=B:USR1@600 does
    cluster.wait_for_restart(job, 1, log_of(root))
    wait_for_steps(cluster, job, root / "pretrain", 5, log_of(root))
    cluster.call("scontrol", "requeue", job)
    state, log = finish(cluster, job, root)
    assert state["Restarts"] == "2"
    assert "time is nearly up: saved, and back into the queue" in log
    assert log.count(f"== {FAMILY}_align: finished before") == 2
    assert weights(root / "sft") == weights(tmp_path / "alone" / "sft")
    assert losses(root / "pretrain") == losses(tmp_path / "alone" / "pretrain")


def test_waiting_for_a_job_releases_a_held_one_and_tells_at_once_of_a_lost_one(cluster: Slurm, tmp_path: Path) -> None:
    """What the other tests rest on where Slurm could not launch a job."""
    log = tmp_path / "words.log"
    job = cluster.call("sbatch", "--parsable", "--hold", f"--output={log}", "--wrap", "echo last words; exit 3")
    started = time.monotonic()
    with pytest.raises(AssertionError, match=r"(?s)FAILED.*last words.*slurmctld\.out"):
        cluster.wait_for_restart(job, 1, log)
    assert time.monotonic() - started < 100


def test_a_failure_ends_the_job_and_is_named_once(cluster: Slurm, data: Path, tmp_path: Path) -> None:
    job = submit(cluster, data, tmp_path / "wrong", "--set=align:data.sources.sharegpt4v.path=/no/such/folder")
    state = cluster.wait_for_end(job, tmp_path / "wrong.log")
    log = (tmp_path / "wrong.log").read_text()
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("FAILED", "1:0", "0"), log
    assert log.count("/no/such/folder") <= 3 and "data.sources.sharegpt4v.path" in log


def test_a_node_that_is_not_well_is_named_before_anything_starts(cluster: Slurm, data: Path, tmp_path: Path) -> None:
    command = ["sbatch", "--wait", *SIZES, f"--chdir={REPOSITORY}", f"--output={tmp_path}/sick.log", "launch/slurm.sbatch", FAMILY]
    settings = SETTINGS | {"HEALTH_CHECK": "--min-free-gb 1e9"}
    done = subprocess.run(command, env=cluster.environment | settings, capture_output=True, text=True, timeout=400)
    log = (tmp_path / "sick.log").read_text()
    assert done.returncode == 1, log
    assert "health check: rank 0 on " in log and "GB free, less than 1e+09" in log
    assert "==" not in log


def test_a_sweep_is_one_job_per_point_and_a_preempted_one_goes_on(cluster: Slurm, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="pip install -e .[slurm] brings the launcher")
    folder = tmp_path / "sweep"
    points = [folder / f"text_ratio={ratio}" for ratio in ("0.5", "0.6")]
    sweep = [f"recipe={FAMILY}/pretrain", "shrink=tiny", f"data.root={data}", "init.from=null", f"run.dir={folder}"]
    sweep += ["run.max_steps=8", "checkpoint.every=1", "parallel.tp=2", "data.text_ratio=0.5,0.6"]
    slurm = ["hydra/launcher=submitit_slurm", "hydra.launcher.tasks_per_node=2", "hydra.launcher.timeout_min=30"]
    command = [sys.executable, "train.py", "-m", *sweep, *slurm]
    environment = cluster.environment | SETTINGS
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as waiting:
        try:
            jobs, deadline = [""], time.monotonic() + 120
            while len(jobs) < 2:
                assert waiting.poll() is None, waiting.stdout and waiting.stdout.read()
                assert time.monotonic() < deadline, jobs
                time.sleep(0.2)
                jobs = cluster.call("squeue", "--noheader", "--array", "--format=%F").split("\n")
            first = f"{jobs[0]}_0"  # not the array's number alone, which is all of its jobs
            wait_for_steps(cluster, first, points[0], 2)
            cluster.call("scancel", "--signal=USR2", first)  # as submitit asks Slurm to do before a job's time is up
            cluster.wait_for_restart(first, 1)
            # asked of Slurm, since submitit waits for ever for a job that ended without a result, where there is no accounting to tell it
            for job in (first, f"{jobs[0]}_1"):
                state = cluster.wait_for_end(job)
                assert state["JobState"] == "COMPLETED", (state, *(file.read_text() for file in folder.glob(".submitit/*/*.err")))
            output, _ = waiting.communicate(timeout=120)
        finally:
            waiting.kill()
    assert waiting.returncode == 0, output
    assert "2 of 2 points finished" in output
    assert cluster.job(first)["Restarts"] == "1"
    assert [len((point / "metrics.jsonl").read_text().splitlines()) for point in points] == [8, 8], "a step was done twice"
