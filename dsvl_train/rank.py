"""One rank that `dsvl_train.launcher` started: `python -m dsvl_train.rank CONFIG.yaml`."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from dsvl_train.failures import guarded

LAUNCHER_PID = "DSVL_LAUNCHER_PID"
"""Environment variable: the launcher that this rank must not outlive."""

_PR_SET_PDEATHSIG = 1


def main(config_path: str) -> int:
    """Run one rank; the exit code."""
    from dsvl_train.config.compose import load_run_config

    _end_with_the_launcher()
    config = load_run_config(config_path)
    from dsvl_train.training.run import run

    return run(config)


def _end_with_the_launcher() -> None:
    """Ask the kernel for SIGTERM when the launcher dies without a word (Linux only)."""
    launcher = int(os.environ.get(LAUNCHER_PID, os.getppid()))
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != launcher:
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(sys.argv[1])))
