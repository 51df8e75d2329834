"""launch/slurm.sbatch under stand-ins for srun, scontrol and Python that write down how they were called. No Slurm is needed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HANDED_ON = (
    "PYTHON",
    "PYTHONPATH",
    "MASTER_ADDR",
    "MASTER_PORT",
    "NCCL_DEBUG",
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "OMP_NUM_THREADS",
    "SRUN_CPUS_PER_TASK",
)
RECORD = """#!/bin/bash
n=1; while ! mkdir "$RECORDS/$(basename "$0").$n" 2>/dev/null; do n=$((n + 1)); done
record="$RECORDS/$(basename "$0").$n"
printf '%s\\0' "$@" > "$record/arguments"
env -0 > "$record/environment"
"""
SRUN = """
case " $* " in *health_check.py*) eval "${HEALTH:-}"; exit "${HEALTH_CODE:-0}";; esac
eval "${TRAINING:-}"
"""
PYTHON = """
[ "$1 $2 $3 $4" = "-m dsvl_train.cli chain --launcher" ] || exit 99
eval "set -- $5 recipe=x/align"
exec "$@"
"""
SCONTROL = """
case "$1" in
    show) seq -f 'node%02.0f' "${NODES:-2}";;
    requeue)
        [ "$n" -gt "$((${REFUSALS:-0} + 1))" ] || { echo "requeue: busy" >&2; exit 1; }
        # as Slurm does: it answers, and then ends the batch script
        (/bin/sleep 0.5; touch "$RECORDS/ended_by_slurm"; kill -TERM "$PPID") > /dev/null 2>&1 &
        ;;
esac
"""
"""The first call is `show`."""
WAITS = 'trap "echo USR1 > $RECORDS/got; exit 138" USR1; trap "echo TERM > $RECORDS/got; exit 143" TERM; touch $RECORDS/started; '
WAITS += "for i in $(seq 100); do /bin/sleep 0.05; done; exit 98"
"""Training that goes on until it is told to stop."""


class Job:
    """A copy of the launch scripts in a folder of its own, with stand-ins first in the search path."""

    def __init__(self, folder: Path) -> None:
        self.repository, self.records, programs = folder / "repository", folder / "records", folder / "bin"
        self.records.mkdir()
        programs.mkdir()
        shutil.copytree(ROOT / "launch", self.repository / "launch")
        self.stand_in(programs / "srun", SRUN)
        self.stand_in(programs / "scontrol", SCONTROL)
        self.stand_in(programs / "sleep", "exec /bin/sleep 0.01")
        self.python = self.stand_in(programs / "host_python", PYTHON)
        self.environment = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "RECORDS": str(self.records),
            "SLURM_SUBMIT_DIR": str(self.repository),
            "SLURM_JOB_ID": "4242",
            "SLURM_JOB_NODELIST": "node[01-02]",
            "SLURM_CPUS_PER_TASK": "12",
            "PYTHON": str(self.python),
        }

    def stand_in(self, path: Path, then: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(RECORD + then)
        path.chmod(0o755)
        return path

    def start(self, *arguments: str, **settings: str) -> subprocess.Popen[str]:
        command = ["bash", str(ROOT / "launch/slurm.sbatch"), *arguments]
        environment = {key: value for key, value in (self.environment | settings).items() if value}
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=environment, cwd="/", text=True, stdout=pipe, stderr=subprocess.STDOUT, start_new_session=True)

    def run(self, *arguments: str, **settings: str) -> tuple[int, str]:
        return self.end(self.start(*arguments, **settings))

    def end(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        try:
            output, _ = process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return process.returncode, output

    def calls(self, program: str) -> list[list[str]]:
        return [(folder / "arguments").read_text().split("\0")[:-1] for folder in self._records(program)]

    def environments(self, program: str) -> list[dict[str, str]]:
        """Those of HANDED_ON that each call saw."""
        texts = [(folder / "environment").read_text() for folder in self._records(program)]
        pairs = [dict(line.split("=", 1) for line in text.split("\0") if "=" in line) for text in texts]
        return [{name: found[name] for name in HANDED_ON if name in found} for found in pairs]

    def requeues(self) -> list[list[str]]:
        return [call for call in self.calls("scontrol") if call[0] == "requeue"]

    def _records(self, program: str) -> list[Path]:
        folders = [path for path in self.records.iterdir() if path.name.rpartition(".")[0] == program]
        return sorted(folders, key=lambda path: int(path.suffix[1:]))


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def soon(there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def interrupted(job: Job, number: signal.Signals = signal.SIGUSR1, **settings: str) -> tuple[int, str]:
    """The exit code and output of a job whose batch script alone gets a signal while it trains."""
    process = job.start("family", TRAINING=WAITS, **settings)
    soon((job.records / "started").exists)
    process.send_signal(number)
    return job.end(process)


def test_ranks_in_a_container_and_the_chain_outside(job: Job) -> None:
    code, output = job.run(
        *("deepseek_vl2_tiny", "data.root=/my data", "--set=align:optim.lr=1e-3"),
        CONTAINER="nvcr.io#nvidia/pytorch:25.09-py3",
        MOUNTS="/data:/data,/scratch",
        HOST_PYTHON=str(job.python),
        PYTHON="",
        PYTHONPATH="/of/mine",
    )
    assert code == 0, output
    here = job.repository
    container = [
        "--container-image=nvcr.io#nvidia/pytorch:25.09-py3",
        f"--container-mounts={here}:{here},/data:/data,/scratch",
        f"--container-workdir={here}",
    ]
    health, training = job.calls("srun")
    look = ["launch/slurm_task.sh", "launch/health_check.py", "--folder", str(here)]
    assert health == ["--kill-on-bad-exit=1", *container, "--kill-on-bad-exit=0", *look]
    assert training == ["--kill-on-bad-exit=1", *container, "launch/slurm_task.sh", "train.py", "recipe=x/align"]

    (chain,) = job.calls("host_python")
    assert chain[:4] == ["-m", "dsvl_train.cli", "chain", "--launcher"]
    assert chain[5:] == ["deepseek_vl2_tiny", "data.root=/my data", "--set=align:optim.lr=1e-3"]
    expected = {
        "PYTHON": "python",
        "PYTHONPATH": f"{here}:/of/mine",
        "MASTER_ADDR": "node01",
        "MASTER_PORT": "24242",
        "NCCL_DEBUG": "WARN",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "OMP_NUM_THREADS": "1",
        "SRUN_CPUS_PER_TASK": "12",
    }
    assert job.environments("srun") == [expected, expected]
    assert job.calls("scontrol") == [["show", "hostnames", "node[01-02]"]]


def test_the_container_sees_this_folder_alone_and_python3_runs_the_chain_unless_told_otherwise(job: Job, tmp_path: Path) -> None:
    job.stand_in(tmp_path / "bin" / "python3", PYTHON)
    code, output = job.run("family", CONTAINER="/images/dsvl.sqsh", PYTHON="/opt/python", HEALTH_CHECK="no")
    assert code == 0, output
    (training,) = job.calls("srun")
    assert f"--container-mounts={job.repository}:{job.repository}" in training
    assert len(job.calls("python3")) == 1
    assert job.environments("srun")[0]["PYTHON"] == "/opt/python", "the one inside the container"


def test_without_a_container_one_python_does_both(job: Job) -> None:
    venv = job.stand_in(job.repository / ".venv/bin/python", PYTHON)
    code, output = job.run("family", PYTHON="", MASTER_ADDR="login", MASTER_PORT="1234", NCCL_DEBUG="INFO", OMP_NUM_THREADS="4")
    assert code == 0, output
    assert not any(argument.startswith("--container") for call in job.calls("srun") for argument in call)
    assert len(job.calls("python")) == 1
    environment = job.environments("srun")[1]
    assert environment["PYTHON"] == str(venv)
    assert [environment[name] for name in ("MASTER_ADDR", "MASTER_PORT", "NCCL_DEBUG", "OMP_NUM_THREADS")] == ["login", "1234", "INFO", "4"]

    code, output = job.run("family")
    assert code == 0, output
    assert len(job.calls("python")) == 1 and len(job.calls("host_python")) == 1, "PYTHON goes before .venv"


def test_the_health_check_comes_first_and_can_be_told_or_left_out(job: Job) -> None:
    code, output = job.run("family", HEALTH_CHECK="--timeout 60 --min-free-gb 500", HEALTH_CODE="3")
    assert code == 3, output
    (health,) = job.calls("srun")
    assert health[-6:] == ["--folder", str(job.repository), "--timeout", "60", "--min-free-gb", "500"]
    assert job.calls("host_python") == [], "nothing starts on a node that is not well"

    code, output = job.run("family", HEALTH_CHECK="no", HEALTH_CODE="3")
    assert code == 0, output
    assert not any("health_check" in argument for argument in job.calls("srun")[-1])


def test_the_first_of_many_nodes_is_where_they_meet(job: Job) -> None:
    """More names than a pipe holds."""
    code, output = job.run("family", NODES="20000", HEALTH_CHECK="no")
    assert code == 0, output
    assert job.environments("srun")[0]["MASTER_ADDR"] == "node01"


def test_at_the_end_of_its_time_it_goes_back_into_the_queue_and_waits_to_be_ended(job: Job) -> None:
    code, output = interrupted(job, SLURM_RESTART_COUNT="99")
    assert code == 0, output
    assert (job.records / "got").read_text() == "USR1\n"
    assert job.requeues() == [["requeue", "4242"]]
    assert (job.records / "ended_by_slurm").exists(), "it ended by itself, which may end the requeued job"
    assert "time is nearly up: saved, and back into the queue" in output


def test_a_controller_that_is_busy_is_asked_again(job: Job) -> None:
    code, output = interrupted(job, REFUSALS="3")
    assert code == 0, output
    assert len(job.requeues()) == 4
    assert job.calls("sleep")[:3] == [["10"]] * 3


def test_a_controller_that_never_takes_it_back_is_an_error_in_the_end(job: Job) -> None:
    code, output = interrupted(job, REFUSALS="1000")
    assert code == 138, output
    assert len(job.requeues()) == 30
    assert "error: Slurm did not take the job back" in output


def test_it_goes_back_no_more_often_than_max_restarts(job: Job) -> None:
    code, output = interrupted(job, SLURM_RESTART_COUNT="2", MAX_RESTARTS="2")
    assert code == 138, output
    assert job.requeues() == []
    assert "MAX_RESTARTS=2 is reached" in output


def test_a_signal_during_the_health_check_starts_nothing_and_goes_back(job: Job) -> None:
    process = job.start("family", HEALTH="touch $RECORDS/started; /bin/sleep 0.5")
    soon((job.records / "started").exists)
    process.send_signal(signal.SIGUSR1)
    code, output = job.end(process)
    assert code == 0, output
    assert job.calls("host_python") == []
    assert job.requeues() == [["requeue", "4242"]]


def test_sigterm_is_handed_on_and_the_rest_is_slurms(job: Job) -> None:
    """Preempted or cancelled: Slurm itself requeues the job, or does not."""
    code, output = interrupted(job, signal.SIGTERM)
    assert code == 143, output
    assert (job.records / "got").read_text() == "TERM\n"
    assert job.requeues() == []


@pytest.mark.parametrize("own", [0, 1, 2])
def test_a_chain_that_ends_by_itself_is_not_put_back(job: Job, own: int) -> None:
    """Neither without a signal nor with one that came too late."""
    code, output = job.run("family", TRAINING=f"exit {own}")
    assert code == own, output
    process = job.start("family", TRAINING=f"trap '' USR1; touch $RECORDS/started; /bin/sleep 0.4; exit {own}")
    soon((job.records / "started").exists)
    process.send_signal(signal.SIGUSR1)
    code, output = job.end(process)
    assert code == own, output
    assert job.requeues() == []


def test_it_refuses_another_folder_than_the_repositorys(job: Job, tmp_path: Path) -> None:
    code, output = job.run("family", SLURM_SUBMIT_DIR=str(tmp_path))
    assert (code, output) == (2, f"error: submit from the repository's folder, not from {tmp_path}\n")
    code, output = job.run("family", SLURM_SUBMIT_DIR="")
    assert code != 0 and "start this with sbatch" in output
    assert job.calls("srun") == []


def test_slurm_is_asked_for_what_going_on_needs() -> None:
    lines = (ROOT / "launch/slurm.sbatch").read_text().splitlines()
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    assert {"--requeue", "--signal=B:USR1@600", "--open-mode=append"} <= set(options)
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert max(number for number, line in enumerate(lines) if line.startswith("#SBATCH ")) < first_command, "sbatch reads none after it"


def test_a_task_becomes_a_rank(tmp_path: Path) -> None:
    printing = tmp_path / "python"
    printing.write_text('#!/bin/bash\necho "$RANK $WORLD_SIZE $LOCAL_RANK $MASTER_ADDR $MASTER_PORT: $*"\nexit 5\n')
    printing.chmod(0o755)
    task = {"SLURM_PROCID": "11", "SLURM_NTASKS": "16", "SLURM_LOCALID": "3", "MASTER_ADDR": "node01", "MASTER_PORT": "24242"}
    command = [str(ROOT / "launch/slurm_task.sh"), "train.py", "recipe=a/b", "data.root=/my data"]
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(printing)} | task
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (5, "11 16 3 node01 24242: train.py recipe=a/b data.root=/my data\n")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        done = subprocess.run(command, env=environment | {name: ""}, capture_output=True, text=True)
        assert done.returncode == 1 and name in done.stderr
