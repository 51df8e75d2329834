"""A real Slurm of one node on this machine, with its own daemons, ports and folders; nothing of the system is touched."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.distributed.harness import reserved_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo", "squeue")
ALIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED")
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])


def absent() -> str:
    """Why there can be no Slurm here; empty if there can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: apt-get install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "slurmd starts jobs as their users, so it has to be root"


class Slurm:
    """A running cluster; `environment` makes Slurm's commands speak to it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.environment = os.environ | {"PATH": _PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        for name in [name for name in self.environment if name.startswith(("SLURM_", "SBATCH_")) and name != "SLURM_CONF"]:
            del self.environment[name]

    def call(self, *command: str, **extra: str) -> str:
        done = subprocess.run(command, env=self.environment | extra, text=True, capture_output=True, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What Slurm says of a job: JobState, Restarts, ExitCode, …"""
        words = self.call("scontrol", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_until(self, number: str, there: Callable[[dict[str, str]], object], *logs: Path, timeout_s: float = 400.0) -> dict[str, str]:
        """The job when `there` says so of it. A job that Slurm could not launch and holds is released, as its user would, three times.

        Raises:
            AssertionError: it ended before, or the time is over; says the job's state and what `logs` and Slurm's own logs end with.
        """
        deadline, releases = time.monotonic() + timeout_s, 0
        while not there(job := self.job(number)):
            held = job["JobState"] == "PENDING" and job["Priority"] == "0"
            if job["JobState"] not in ALIVE or time.monotonic() > deadline or (held and releases == 3):
                raise AssertionError("\n".join([f"job {number} is not where it should be: {job}", *self._tails(*logs)]))
            if held:
                self.call("scontrol", "release", number)
                releases += 1
            time.sleep(0.2)
        return job

    def wait_for_restart(self, number: str, restarts: int, *logs: Path) -> None:
        """Until the job runs again, after so many times back into the queue."""
        self.wait_until(number, lambda job: (job["JobState"], job["Restarts"]) == ("RUNNING", str(restarts)), *logs)

    def wait_for_end(self, number: str, *logs: Path, timeout_s: float = 600.0) -> dict[str, str]:
        """The job when it is neither waiting nor running any more."""
        return self.wait_until(number, lambda job: job["JobState"] not in ALIVE, *logs, timeout_s=timeout_s)

    def _tails(self, *logs: Path) -> list[str]:
        there = [path for path in (*logs, self._folder / "slurmctld.out", self._folder / "slurmd.out") if path.is_file()]
        return [f"-- {path.name}:\n{path.read_text(errors='replace')[-4000:]}" for path in there]


@contextlib.contextmanager
def slurm(folder: Path, cpus: int) -> Iterator[Slurm]:
    """Start munge and Slurm, wait until the node is idle, and end them all afterwards."""
    _configure(folder, cpus)
    cluster = Slurm(folder)
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        for command in (
            _munged(folder),
            ["slurmctld", "-D", "-i"],
            ["slurmd", "-D", "-N", socket.gethostname()],
        ):
            output = (folder / f"{command[0]}.out").open("wb")
            daemons.append(subprocess.Popen(command, env=cluster.environment, stdout=output, stderr=output))
            output.close()
            if command[0] == "munged":
                _wait_until(lambda: (folder / "munge.socket").exists(), folder)
        _wait_until(lambda: _idle(cluster), folder)
        yield cluster
        _clear(cluster)
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _configure(folder: Path, cpus: int) -> None:
    """`config_overrides`: more CPUs than there are, so that ranks of a small machine start side by side.

    A job that was put back starts again after `cred_expire` seconds, else two minutes. To start it at once by `scontrol update StartTime`
    loses it now and then: within a second of its end, slurmd takes the new launch for the one that it has just been told to end ("Job
    credential revoked"). The other times are patience with a busy machine: without it, slurmctld gives launches up that are only slow.
    """
    with reserved_ports(2) as (controller, node):
        pass
    host, user = socket.gethostname(), getpass.getuser()
    (folder / "munge.key").write_bytes(os.urandom(64))
    (folder / "munge.key").chmod(0o600)
    folder.chmod(0o755)
    lines = [
        "ClusterName=t",
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmctldPort={controller}",
        f"SlurmdPort={node}",
        f"SlurmUser={user}",
        f"SlurmdUser={user}",
        "AuthType=auth/munge",
        f"AuthInfo=socket={folder}/munge.socket,cred_expire=30",
        "CredType=cred/munge",
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/spool",
        f"SlurmctldPidFile={folder}/slurmctld.pid",
        f"SlurmdPidFile={folder}/slurmd.pid",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "SelectType=select/cons_tres",
        "MpiDefault=none",
        "ReturnToService=2",
        "KillWait=5",
        "MinJobAge=86400",
        "MessageTimeout=60",
        "BatchStartTimeout=120",
        "SchedulerParameters=sched_interval=2,bf_interval=2",
        "SlurmdParameters=config_overrides",
        f"NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN",
        "PartitionName=p Nodes=ALL Default=YES MaxTime=INFINITE State=UP",
    ]
    (folder / "slurm.conf").write_text("\n".join(lines) + "\n")


def _munged(folder: Path) -> list[str]:
    files = {
        "key-file": "munge.key",
        "socket": "munge.socket",
        "pid-file": "munged.pid",
        "log-file": "munged.log",
        "seed-file": "munge.seed",
    }
    return ["munged", "--foreground", "--force", *(f"--{option}={folder / name}" for option, name in files.items())]


def _clear(cluster: Slurm) -> None:
    """End the jobs that a failed test left behind."""
    deadline = time.monotonic() + 30
    while (jobs := cluster.call("squeue", "-h", "-o", "%i").split()) and time.monotonic() < deadline:
        cluster.call("scancel", *jobs)
        time.sleep(0.5)


def _idle(cluster: Slurm) -> bool:
    done = subprocess.run(["sinfo", "-h", "-o", "%t"], env=cluster.environment, text=True, capture_output=True)
    return done.returncode == 0 and done.stdout.strip() == "idle"


def _wait_until(there: object, folder: Path, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not there():  # type: ignore[operator]
        told = "\n".join(f"{file.name}: {file.read_text(errors='replace')[-2000:]}" for file in sorted(folder.glob("*.out")))
        assert time.monotonic() < deadline, told
        time.sleep(0.1)
