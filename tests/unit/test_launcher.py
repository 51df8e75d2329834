"""The launcher with ranks that are small scripts: exit codes, signals, and which error is shown."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dsvl_train import launcher
from dsvl_train.config.compose import compose_run
from dsvl_train.failures import DONE, FAILED, INTERRUPTED, TERMINATED, WRONG_CONFIG

ROOT = Path(__file__).resolve().parents[2]
RAISES = """
import sys, time
from dsvl_train.config import ConfigError
from dsvl_train.failures import guarded
def body():
    {}
sys.exit(guarded(body))
"""
"""A rank that ends as `body` does."""


def run_job(folder: Path, *scripts: str, after: dict[float, int] | None = None, grace_s: float = 60.0) -> int:
    """The exit code of a job of these scripts; `after` sends signals to the launcher (seconds -> signal)."""
    environment = dict(os.environ) | {"PYTHONPATH": str(ROOT)}
    timers = [threading.Timer(delay, os.kill, (os.getpid(), number)) for delay, number in (after or {}).items()]
    with launcher.Job(folder, folder, grace_s) as job:
        for rank, script in enumerate(scripts):
            job.add(rank, [sys.executable, "-c", script], environment)
        for timer in timers:
            timer.start()
        code = job.wait()
    for timer in timers:
        timer.cancel()
    return code


def waits_for(folder: Path, number: int, then: str) -> str:
    """A script that counts how often it gets a signal, and ends with `then` a while after the first."""
    return (
        f"import signal, sys, time, os\ngot = []\nsignal.signal({number}, lambda *_: got.append(1))\n"
        f"while not got: time.sleep(0.01)\ntime.sleep(0.3)\n"
        f"open({str(folder)!r} + '/got_' + os.environ['RANK'], 'w').write(str(len(got)))\n{then}"
    )


def test_ranks_that_end_well(tmp_path: Path) -> None:
    script = "import os; print(os.environ['RANK'], os.environ['LOCAL_RANK'])"
    assert run_job(tmp_path, script, script, script) == DONE
    assert [(tmp_path / f"rank_{rank}.txt").read_text() for rank in (1, 2)] == ["1 1\n", "2 2\n"]


def test_the_first_error_is_the_one_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "FAILURE_GRACE_S", 1.0)
    told = tmp_path / "error_1.json"
    waits = f"import pathlib; any(time.sleep(0.05) for _ in iter(pathlib.Path({str(told)!r}).exists, True))"
    later = RAISES.format(f"{waits}; raise RuntimeError('connection closed by peer')")
    first = RAISES.format("raise KeyError('the cause')")
    hangs = "import time; time.sleep(60)"
    start = time.monotonic()
    assert run_job(tmp_path, later, first, hangs) == FAILED
    assert time.monotonic() - start < 10
    shown = capfd.readouterr().err
    assert "rank 1: Traceback" in shown and "the cause" in shown
    assert "connection closed" not in shown


def test_a_wrong_setting_is_told_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    wrong = RAISES.format("raise ConfigError('data.x', 'must be y', value=3)")
    assert run_job(tmp_path, wrong, wrong) == WRONG_CONFIG
    assert capfd.readouterr().err == "config error: data.x = 3\n  rule: must be y\n"


def test_a_rank_that_dies_without_a_word(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "FAILURE_GRACE_S", 0.5)
    dies = "import os, sys; print('last words', flush=True); os.kill(os.getpid(), 9)"
    assert run_job(tmp_path, "import time; time.sleep(60)", dies) == FAILED
    shown = capfd.readouterr().err
    assert "rank 1 was ended by SIGKILL (out of memory?)" in shown and "last words" in shown


def test_ctrl_c_reaches_each_rank_once_and_all_are_waited_for(tmp_path: Path) -> None:
    stops = waits_for(tmp_path, signal.SIGINT, "sys.exit(130)")
    assert run_job(tmp_path, stops, stops, after={0.7: signal.SIGINT}) == INTERRUPTED
    assert [(tmp_path / f"got_{rank}").read_text() for rank in (0, 1)] == ["1", "1"]


@pytest.mark.parametrize("code", [DONE, TERMINATED])
def test_a_terminated_job_ends_as_its_ranks_do(tmp_path: Path, code: int, capfd: pytest.CaptureFixture[str]) -> None:
    stops = waits_for(tmp_path, signal.SIGTERM, f"sys.exit({code})")
    assert run_job(tmp_path, stops, stops, after={0.7: signal.SIGTERM}) == code
    assert capfd.readouterr().err == ""


def test_ranks_that_do_not_stop_are_ended(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    assert run_job(tmp_path, deaf, deaf, after={0.7: signal.SIGINT}, grace_s=0.5) == INTERRUPTED
    assert "did not stop within" in capfd.readouterr().err


def test_a_second_ctrl_c_ends_ranks_at_once(tmp_path: Path) -> None:
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    start = time.monotonic()
    assert run_job(tmp_path, deaf, after={0.7: signal.SIGINT, 1.0: signal.SIGINT}) == INTERRUPTED
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_job_manager_s_warning_asks_ranks_to_stop(tmp_path: Path, number: signal.Signals) -> None:
    stops = waits_for(tmp_path, number, f"sys.exit({128 + number})")
    assert run_job(tmp_path, stops, stops, after={0.7: number}) == 128 + number


def test_the_same_signal_again_is_no_second_wish_unless_it_comes_later(tmp_path: Path) -> None:
    stops = waits_for(tmp_path, signal.SIGTERM, f"time.sleep(0.5); sys.exit({TERMINATED})")
    assert run_job(tmp_path, stops, after={0.7: signal.SIGTERM, 0.9: signal.SIGTERM}) == TERMINATED
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    start = time.monotonic()
    assert run_job(tmp_path, deaf, after={0.7: signal.SIGTERM, 3.2: signal.SIGTERM}) == 128 + signal.SIGTERM
    assert time.monotonic() - start < 10


def test_handlers_are_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    run_job(tmp_path, "pass")
    assert signal.getsignal(signal.SIGINT) is before


def test_errors_for_users_have_no_traceback() -> None:
    raises = "import dsvl_train.config.geometry as g\n    g.candidate_resolutions(0)"
    for body, lines in (("raise ValueError('ours? no')", 4), (raises, 2)):
        shown = subprocess.run([sys.executable, "-c", RAISES.format(body)], cwd=ROOT, capture_output=True, text=True, check=False)
        assert shown.returncode == FAILED
        assert ("Traceback" in shown.stderr) == (lines > 2), shown.stderr


def test_reserved_port_can_be_listened_on() -> None:
    with launcher.reserved_port() as reserved, socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(reserved.getsockname())
        server.listen()


def test_environment_of_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose_run(["recipe=demo_vl2/lm"])
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    environment = launcher._environment(config, 2, 1234)
    assert environment["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert (environment["WORLD_SIZE"], environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("2", "127.0.0.1", "1234")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert launcher._environment(config, 2, 1234)["OMP_NUM_THREADS"] == "7"
