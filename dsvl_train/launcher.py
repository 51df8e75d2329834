"""Starts a run: in this process, as a rank under torchrun, or as ranks of its own on this machine (`launch.nproc=N`).

The ranks are plain child processes, each in a session of its own, so that Ctrl-C reaches them through the launcher and only once. Rank 0
writes to the terminal, the others to `log/rank_N.txt` of the run folder. The first rank that fails ends the job, and only its error is
shown.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

from dsvl_train.config.compose import to_yaml
from dsvl_train.config.schema import RunConfig
from dsvl_train.config.validate import validate
from dsvl_train.failures import DONE, ERROR_FILE, FAILED, INTERRUPTED, SECOND_SIGNAL_AFTER_S, STOP_SIGNALS, WRONG_CONFIG, read_error
from dsvl_train.rank import LAUNCHER_PID

FAILURE_GRACE_S = 5.0
"""Seconds that ranks have to end by themselves after one of them failed."""

_POLL_S = 0.05
_LOG_LINES_SHOWN = 20
_NO_FAILURE = {DONE, *(128 + number for number in STOP_SIGNALS)}
_CRASHES = {-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGBUS, -signal.SIGILL, -signal.SIGFPE}
"""Ends that are a cause: the other ranks' errors follow from them. SIGABRT is not one, libraries abort when they lose a peer."""


def start(config: RunConfig) -> int:
    """Check the configuration and run it; the exit code.

    Raises:
        ConfigError: before any process group or child process starts.
    """
    in_a_job = "RANK" in os.environ
    own_ranks = 0 if in_a_job else config.launch.nproc
    world_size = int(os.environ.get("WORLD_SIZE", 1)) if in_a_job else max(own_ranks, 1)
    validate(config, world_size)
    if own_ranks:
        return launch(config, own_ranks)
    from dsvl_train.training.run import run

    return run(config)


def launch(config: RunConfig, ranks: int) -> int:
    """Run `config` on `ranks` processes of this machine and wait for all of them; the exit code of the job."""
    with tempfile.TemporaryDirectory(prefix="dsvl_launch_") as scratch, reserved_port() as reserved:
        config_path = Path(scratch) / "config.yaml"
        config_path.write_text(to_yaml(config), encoding="utf-8")
        log = Path(config.run.dir) / "log"
        log.mkdir(parents=True, exist_ok=True)
        shared = _environment(config, ranks, reserved.getsockname()[1])
        job = Job(Path(scratch), log, config.launch.grace_s)
        with job:
            for rank in range(ranks):
                job.add(rank, [sys.executable, "-m", "dsvl_train.rank", str(config_path)], shared)
            return job.wait()


class Job:
    """The ranks of a run as child processes.

    A context: inside it signals to this process go to the ranks, and when it is left no rank is alive.
    """

    def __init__(self, scratch: Path, log: Path, grace_s: float) -> None:
        self._scratch, self._log, self._grace_s = scratch, log, grace_s
        self._ranks: list[subprocess.Popen[bytes]] = []
        self._codes: dict[int, int] = {}
        """Exit codes of the ranks that ended, in the order in which they did."""
        self._stop_signal: int | None = None
        self._stopped_at = 0.0
        self._killed: set[int] = set()
        self._deadline = float("inf")
        self._handlers: dict[int, object] = {}

    def __enter__(self) -> Job:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            self._handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception: object) -> None:
        self._kill()
        for process in self._ranks:
            process.wait()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def add(self, rank: int, command: list[str], shared: dict[str, str]) -> None:
        """Start a rank; every rank but the first speaks into a file."""
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), ERROR_FILE: str(self._error_file(rank))}
        output = None if rank == 0 else self._log_file(rank).open("wb")
        try:
            process = subprocess.Popen(
                command, env=shared | own, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        finally:
            if output is not None:
                output.close()
        self._ranks.append(process)
        if self._stop_signal is not None:  # the signal came between two starts
            self._send(rank, self._stop_signal)

    def wait(self) -> int:
        """Wait for all ranks, print the first error if there was one, and return the exit code of the job."""
        while len(self._codes) < len(self._ranks):
            for rank, process in enumerate(self._ranks):
                if rank not in self._codes and (code := process.poll()) is not None:
                    self._codes[rank] = code
                    if code not in _NO_FAILURE:
                        self._deadline = min(self._deadline, time.monotonic() + FAILURE_GRACE_S)
            if time.monotonic() > self._deadline:
                self._deadline = float("inf")
                self._say_who_is_late()
                self._kill()
            time.sleep(_POLL_S)
        return self._conclude()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._stop_signal is None:
            self._stop_signal, self._stopped_at = signal.SIGTERM if number == signal.SIGHUP else number, now
            self._deadline = min(self._deadline, now + self._grace_s)
            self._send_all(self._stop_signal)
        elif number == signal.SIGINT or now - self._stopped_at > SECOND_SIGNAL_AFTER_S:
            self._kill()  # somebody does not want to wait

    def _send_all(self, number: int) -> None:
        for rank in range(len(self._ranks)):
            self._send(rank, number)

    def _send(self, rank: int, number: int) -> None:
        if self._ranks[rank].poll() is None:
            self._ranks[rank].send_signal(number)

    def _kill(self) -> None:
        """End what is left, with whatever the ranks started (data workers, checkpoint writers)."""
        for rank, process in enumerate(self._ranks):
            if process.poll() is None:
                self._killed.add(rank)
                os.killpg(process.pid, signal.SIGKILL)

    def _say_who_is_late(self) -> None:
        if self._stop_signal is not None:
            late = ", ".join(str(rank) for rank in range(len(self._ranks)) if rank not in self._codes)
            print(f"rank {late} did not stop within launch.grace_s={self._grace_s:g} s and is ended", file=sys.stderr, flush=True)

    def _conclude(self) -> int:
        """The exit code of the job; the first error goes to stderr."""
        failed = {rank: code for rank, code in self._codes.items() if code not in _NO_FAILURE}
        by_themselves = [rank for rank, code in failed.items() if rank not in self._killed and code != -(self._stop_signal or 0)]
        errors = sorted((error, rank) for rank in failed if (error := read_error(self._error_file(rank))) is not None)
        crashed = [rank for rank in by_themselves if failed[rank] in _CRASHES]
        if errors and not crashed:
            (_, text), rank = errors[0]
            alone = len(self._ranks) == 1 or failed[rank] == WRONG_CONFIG
            print(text if alone else f"rank {rank}: {text}", file=sys.stderr, flush=True)
            return failed[rank]
        if by_themselves:
            self._show_end_of((crashed or by_themselves)[0])
            return FAILED
        if self._stop_signal == signal.SIGINT:
            return INTERRUPTED
        if failed:
            return 128 + (self._stop_signal or signal.SIGKILL)
        return max(self._codes.values(), default=DONE)

    def _show_end_of(self, rank: int) -> None:
        """Say how a rank ended that left no error, with the last lines it wrote."""
        code = self._codes[rank]
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        hint = " (out of memory?)" if code == -signal.SIGKILL else ""
        print(f"rank {rank} {how}{hint} without an error message", file=sys.stderr)
        if rank:
            lines = self._log_file(rank).read_text(encoding="utf-8", errors="replace").splitlines()
            if lines:
                print("\n".join(["its last lines:", *lines[-_LOG_LINES_SHOWN:]]), file=sys.stderr, flush=True)

    def _error_file(self, rank: int) -> Path:
        return self._scratch / f"error_{rank}.json"

    def _log_file(self, rank: int) -> Path:
        return self._log / f"rank_{rank}.txt"


def reserved_port() -> socket.socket:
    """A socket bound to a free port of this machine.

    It never listens, so rank 0's store may listen on the same port, and while it is open the port goes to nobody else.
    """
    reserved = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    return reserved


def _environment(config: RunConfig, ranks: int, port: int) -> dict[str, str]:
    """What all ranks find in their environment: the names that torchrun uses, and settings that fit one machine."""
    package_home = str(Path(__file__).resolve().parents[1])
    environment = dict(os.environ)
    environment.update(
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        PYTHONPATH=os.pathsep.join(filter(None, [package_home, environment.get("PYTHONPATH")])),
    )
    environment[LAUNCHER_PID] = str(os.getpid())
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if config.engine.device != "cuda" and loopback is not None:
        # gloo would otherwise look up the host's name, which need not resolve
        environment.setdefault("GLOO_SOCKET_IFNAME", loopback)
    return environment
