"""Progress of a run on stderr: a bar on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TextIO

from dsvl_train.training.callbacks.base import Callback, Metrics, TrainerView

_LINES_PER_RUN = 20
_HEARTBEAT_S = 300.0
_RATE_WINDOW = 50


class Progress(Callback):
    """Loss of the newest step of each modality, text share, tokens/s and the time that is left.

    On a terminal: a bar. Elsewhere: the first and the last step, and between them a line every `logging.every` steps, but no more than
    about 20 in a run, so that a log stays readable; a long run still speaks at the first such step after five silent minutes.
    """

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._bar: Any = None
        self._first = self._last = 0
        self._losses: dict[str, float] = {}
        self._seconds: deque[float] = deque(maxlen=_RATE_WINDOW)
        self._printed_at = self._stepped_at = 0.0
        self._printed_step = -1

    def on_run_start(self, trainer: TrainerView) -> None:
        if not trainer.is_main:
            return
        run = trainer.cfg.run
        self._first = trainer.step + 1
        self._last = min(run.max_steps, run.stop_after) if run.stop_after else run.max_steps
        self._printed_at = self._stepped_at = self._clock()
        if self._out.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self._last, initial=trainer.step, desc=run.name, unit="step", file=self._out, dynamic_ncols=True)
        elif trainer.step:
            self._say(f"{run.name}: going on after step {trainer.step} of {self._last}")
        else:
            self._say(f"{run.name}: {self._last} steps")

    def on_step_end(self, trainer: TrainerView, metrics: Metrics) -> None:
        if not trainer.is_main:
            return
        if isinstance(loss := metrics.get("loss"), (int, float)):
            self._losses[str(metrics.get("modality", "loss"))] = float(loss)
        now = self._clock()
        self._seconds.append(now - self._stepped_at)
        self._stepped_at = now
        if self._bar is not None:
            self._bar.set_postfix_str(self._status(metrics), refresh=False)
            self._bar.update(1)
        elif self._is_due(trainer):
            self._print_step(trainer.step, metrics)

    def on_run_end(self, trainer: TrainerView, reason: str) -> None:
        if trainer.is_main:
            self._finish(trainer)
            self._say(f"{trainer.cfg.run.name}: {reason} after step {trainer.step}")

    def on_exception(self, trainer: TrainerView, error: BaseException) -> None:
        if trainer.is_main:
            self._finish(trainer)
            self._say(f"{trainer.cfg.run.name}: {type(error).__name__} after step {trainer.step}")

    @property
    def _out(self) -> TextIO:
        return self._stream if self._stream is not None else sys.stderr

    def _is_due(self, trainer: TrainerView) -> bool:
        every = max(1, trainer.cfg.logging.every)
        interval = max(every, math.ceil((self._last - self._first + 1) / _LINES_PER_RUN))
        silent = self._clock() - self._printed_at >= _HEARTBEAT_S
        return trainer.step in (self._first, self._last) or trainer.step % interval == 0 or (silent and trainer.step % every == 0)

    def _print_step(self, step: int, metrics: Metrics) -> None:
        eta = duration(sum(self._seconds) / len(self._seconds) * (self._last - step)) if self._seconds else "?"
        self._say(f"step {step:>{len(str(self._last))}}/{self._last}  {self._status(metrics)}  ETA {eta}")
        self._printed_at, self._printed_step = self._clock(), step

    def _status(self, metrics: Metrics) -> str:
        parts = ["loss " + " / ".join(f"{name} {loss:.4f}" for name, loss in sorted(self._losses.items()))] if self._losses else []
        if isinstance(share := metrics.get("text_share"), (int, float)):
            parts.append(f"text share {share:.0%}")
        rate = metrics.get("tokens_per_s_avg", metrics.get("tokens_per_s"))
        if isinstance(rate, (int, float)):
            parts.append(f"{rate:,.0f} tokens/s")
        return ", ".join(parts)

    def _finish(self, trainer: TrainerView) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        elif self._first <= trainer.step != self._printed_step and trainer.metrics:
            self._print_step(trainer.step, trainer.metrics)

    def _say(self, line: str) -> None:
        print(line, file=self._out, flush=True)


def duration(seconds: float) -> str:
    """Seconds as 0:42, 12:03 or 3:04:05."""
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
