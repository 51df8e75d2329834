"""Exit codes, and one clear error where several processes fail.

A process alone prints its error. Ranks started by `dsvl_train.launcher` leave theirs in a file each, and the launcher prints the first.
Under torchrun nobody collects, so rank 0 speaks at once, and the others wait long enough to be ended by torchrun when an earlier error
ends the job.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsvl_train.config.errors import ConfigError

DONE, FAILED, WRONG_CONFIG, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143
"""Exit codes of a run; the last two after SIGINT and SIGTERM, as shells count."""

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Each asks a run to finish its step, save and leave with exit code 128 + signal, by which a job script knows that it may be requeued."""

SECOND_SIGNAL_AFTER_S = 2.0
"""One signal reaches a rank more than once: a terminal and job managers send it to several processes, and some of these hand it on. A later
one is a second wish."""

ERROR_FILE = "DSVL_ERROR_FILE"
"""Environment variable by which the launcher tells a rank where to leave its error."""

TRACEBACK = "DSVL_TRACEBACK"
"""Environment variable: set to 1 to see the traceback of an error that its message explains."""

_TORCHRUN_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
_PEER_WORDS = ("gloo", "nccl", "connection reset", "connection closed", "connection refused", "broken pipe", "timed out")
_OWN_CODE = Path(__file__).resolve().parent


def guarded(body: Callable[[], int]) -> int:
    """Runs `body` and turns how it ends into an exit code, its error reported once.

    A rank of several does not return after an error: threads of a lost process group would keep it alive.
    """
    try:
        return body()
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else DONE if error.code is None else FAILED
    except Exception as error:
        code = WRONG_CONFIG if isinstance(error, ConfigError) else FAILED
        report(error, code)
        return code


def report(error: Exception, code: int) -> None:
    """Say what went wrong, or leave it for the launcher; does not return in a rank of several."""
    text = describe(error)
    if "RANK" not in os.environ:
        print(text, file=sys.stderr, flush=True)
        return
    for variable in (ERROR_FILE, _TORCHRUN_ERROR_FILE):
        if path := os.environ.get(variable):
            _write_error(Path(path), text)
    if ERROR_FILE not in os.environ:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
        rank = int(os.environ["RANK"])
        _leave_the_word_to_others(error, rank)
        if rank == 0:
            print(text, file=sys.stderr, flush=True)
        elif code != WRONG_CONFIG:  # a wrong setting is the same on every rank
            print(f"rank {rank}: {text}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)


def end_with(text: str | None) -> None:
    """End this process from whatever thread, with an error for people; None = another rank's says it."""
    if text is not None:
        for variable in (ERROR_FILE, _TORCHRUN_ERROR_FILE):
            if path := os.environ.get(variable):
                _write_error(Path(path), text)
        if ERROR_FILE not in os.environ:
            print(f"error: {text}", file=sys.stderr, flush=True)
    os._exit(FAILED)


def describe(error: Exception) -> str:
    """The error as text: its message where it was written for users, the whole traceback where it was not."""
    if isinstance(error, ConfigError):
        return f"config error: {error}"
    trace = "".join(traceback.format_exception(error)).rstrip()
    if not _is_for_users(error) or os.environ.get(TRACEBACK) == "1":
        return trace
    return f"error: {error}\n({TRACEBACK}=1 shows where it was raised)"


def read_error(path: Path) -> tuple[float, str] | None:
    """(when, text) of an error that a rank left, or None where it left none."""
    try:
        message: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["message"]
        return float(message["extraInfo"]["seconds"]), str(message["message"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_error(path: Path, text: str) -> None:
    """In the format that torchrun's report understands (whole seconds, as text), with the exact time beside."""
    now = time.time()
    message = {"message": text, "extraInfo": {"py_callstack": text, "timestamp": str(int(now)), "seconds": now}}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"message": message}), encoding="utf-8")
    except OSError as problem:
        print(f"could not write {path}: {problem}", file=sys.stderr)


def _is_for_users(error: Exception) -> bool:
    """Errors about values, files and numbers that our own code raised; the same kinds from inside a library come with their traceback."""
    if not isinstance(error, ValueError | OSError | FloatingPointError):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and _OWN_CODE in Path(frames[-1].filename).resolve().parents


def _leave_the_word_to_others(error: Exception, rank: int) -> None:
    """Wait before speaking where another rank has probably failed first; torchrun ends this one meanwhile."""
    lost_peer = isinstance(error, RuntimeError | OSError) and any(word in str(error).lower() for word in _PEER_WORDS)
    time.sleep(3.0 if lost_peer else 1.0 if rank else 0.0)
