"""The watchdog: a job that stands still names the rank that holds it up, and ends.

Each rank says at what it is (`pulse`). A thread looks on; when nothing was said for `guard.hang_s`, it tells the other ranks through the
job's store where this rank stands, and writes the stacks of its threads to the run's `log/`. The rank that speaks first collects what the
others told and ends the job with it. A rank that does not answer, because it was stopped, swapped out or lost its machine, is named too.

The thread needs Python's lock. Should a library keep that for ever, a timer in C ends the process a little later.
"""

from __future__ import annotations

import faulthandler
import json
import linecache
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType

import torch.distributed as dist

from dsvl_train.failures import end_with

_POLL_S = 0.5
_ANSWER_S = 5.0
"""How long the first rank waits for the others' reports; they fall silent within a step of each other."""
_SILENT_S = 30.0
"""How long the others wait for the first one to end the job."""
_COLLECTIVE_FILES = ("torch/distributed/", "megatron/core/distributed/", "megatron/core/tensor_parallel/", "parallel/gloo_pipeline.py")
_WAITING_CALLS = (".wait(", "synchronize(", ".item(", ".tolist(")


@dataclass(frozen=True)
class Report:
    """Where a rank stands."""

    rank: int
    step: int
    phase: str
    seconds: float
    """Since it last said anything."""
    place: str
    """The innermost line of the main thread, and the line of ours that led there."""
    waits: bool
    """In a collective: for other ranks, then."""


class Watchdog:
    """A context around the training loop; call `pulse` whenever something new begins.

    Args:
        limit_s: silence that ends the job; 0 = never.
        log: folder for the stacks.
        on_hang: what ends this process, given the text to say.
    """

    def __init__(self, limit_s: float, rank: int, world_size: int, log: Path, on_hang: Callable[[str | None], None] = end_with) -> None:
        self.limit_s, self.rank, self.world_size, self.log, self._on_hang = limit_s, rank, world_size, log, on_hang
        self._last = (time.monotonic(), 0, "starting", 1.0)
        self._main = threading.main_thread().ident
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def pulse(self, step: int, phase: str, patience: float = 1.0) -> None:
        """Say that `phase` of `step` begins, which may take `patience` times guard.hang_s."""
        self._last = (time.monotonic(), step, phase, patience)

    def __enter__(self) -> Watchdog:
        if self.limit_s > 0:
            self.pulse(0, "starting")
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._done.wait(min(_POLL_S, self.limit_s / 4)):
            since, _, _, patience = self._last
            limit = self.limit_s * patience
            faulthandler.dump_traceback_later(1.5 * limit + _SILENT_S, exit=True)
            if time.monotonic() - since > limit:
                return self._bark()

    def _bark(self) -> None:
        report = self._report()
        stacks = self.log / f"stacks_rank_{self.rank}.txt"
        try:
            self.log.mkdir(parents=True, exist_ok=True)
            with stacks.open("w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file=file, all_threads=True)
        except OSError as error:
            print(f"{stacks}: {error}", file=sys.stderr, flush=True)
        if self.world_size == 1:
            return self._on_hang(self.describe([report]))
        try:
            self._on_hang(self._exchange(report))
        except (RuntimeError, OSError) as error:  # the store is gone, with the rank that kept it
            self._on_hang(f"{self.describe([report])}\n(the other ranks could not be asked: {error})")

    def _report(self) -> Report:
        since, step, phase, _ = self._last
        frame = sys._current_frames().get(self._main or 0)
        place, waits = locate(frame)
        return Report(self.rank, step, phase, time.monotonic() - since, place, waits)

    def _exchange(self, report: Report) -> str | None:
        """The text for the job's end on the rank that is first; None on the others, which wait to be ended."""
        store = _own_store()
        store.set(f"watchdog/{self.rank}", json.dumps(asdict(report)))
        if store.add("watchdog/speakers", 1) > 1:
            time.sleep(_SILENT_S)
            return None
        deadline = time.monotonic() + _ANSWER_S
        reports = {self.rank: report}
        while len(reports) < self.world_size and time.monotonic() < deadline:
            for rank in set(range(self.world_size)) - set(reports):
                if store.check([f"watchdog/{rank}"]):
                    reports[rank] = Report(**json.loads(store.get(f"watchdog/{rank}")))
            time.sleep(0.05)
        return self.describe(list(reports.values()))

    def describe(self, reports: list[Report]) -> str:
        """Who holds up whom, for people."""
        missing = sorted(set(range(self.world_size)) - {report.rank for report in reports})
        lines = [f"no progress for {max(report.seconds for report in reports):.0f} s (guard.hang_s={self.limit_s:g})"]
        lines += [f"  rank {rank} does not answer: it was stopped, or its machine is gone or swapping" for rank in missing]
        for report in sorted(reports, key=lambda report: (report.waits, report.rank)):
            does = "waits for others" if report.waits else "stands still"
            lines.append(f"  rank {report.rank} {does}: step {report.step}, {report.phase}, at {report.place}")
        lines.append(f"  stacks of the ranks: {self.log}/stacks_rank_*.txt")
        return "\n".join(lines)


def locate(frame: FrameType | None) -> tuple[str, bool]:
    """(where a thread is, whether it waits for other ranks there), from its innermost frame: that line, and the line of ours behind it."""
    if frame is None:
        return "an unknown place", False
    ours: FrameType | None = frame
    while ours is not None and "dsvl_train" not in Path(ours.f_code.co_filename).parts:
        ours = ours.f_back
    place = _line(frame) if ours in (None, frame) else f"{_line(frame)}, from {_line(ours)}"
    return place, _waits(frame)


def _line(frame: FrameType) -> str:
    path = Path(frame.f_code.co_filename)
    code = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
    return f"{'/'.join(path.parts[-3:])}:{frame.f_lineno} `{code}`"


def _waits(frame: FrameType) -> bool:
    """Whether the innermost frame belongs to a collective, or waits for one that was started before."""
    path = frame.f_code.co_filename.replace(os.sep, "/")
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    return any(part in path for part in _COLLECTIVE_FILES) or any(call in line for call in _WAITING_CALLS)


def _own_store() -> dist.Store:
    """A connection of this thread's own to the job's store; the main thread may be waiting on its."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=_ANSWER_S))
    return dist.PrefixStore("dsvl_train", store)
