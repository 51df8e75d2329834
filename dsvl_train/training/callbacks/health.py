"""Warns of ranks that hold up the others and of machines that run out of memory."""

from __future__ import annotations

import logging
import statistics
from collections import deque

from dsvl_train.training.callbacks.base import Callback, Metrics, TrainerView

_log = logging.getLogger(__name__)


class Health(Callback):
    """Looks at `rank_s` and `rank_free_memory` of each step and leaves `straggler` (a rank, or null) and `slowest_over_median` in their
    place: tables of thousands of ranks are not for the metrics file."""

    def __init__(self) -> None:
        self._seconds: deque[list[float]] = deque()
        self._warned_memory: set[int] = set()

    def on_step_end(self, trainer: TrainerView, metrics: Metrics) -> None:
        guard = trainer.cfg.guard
        seconds_r = metrics.pop("rank_s", None)
        free_r = metrics.pop("rank_free_memory", None) or []
        if seconds_r:
            metrics["straggler"], metrics["slowest_over_median"] = self._straggler(trainer, seconds_r)
        for rank, free in enumerate(free_r):
            if free < guard.min_free_memory and rank not in self._warned_memory:
                self._warned_memory.add(rank)
                if trainer.is_main:
                    _log.warning(
                        "step %d: %.1f %% of the memory of rank %d's machine is free (guard.min_free_memory): lower data.prefetch_gb or "
                        "data.workers, or start fewer ranks there",
                        trainer.step, 100 * free, rank,
                    )  # fmt: skip

    def _straggler(self, trainer: TrainerView, seconds_r: list[float]) -> tuple[int | None, float]:
        """The rank that was too slow over the whole window, and how much slower the slowest was than the middle one."""
        guard = trainer.cfg.guard
        self._seconds.append(seconds_r)
        while len(self._seconds) > guard.straggler_window:
            self._seconds.popleft()
        means = [statistics.fmean(of_rank) for of_rank in zip(*self._seconds, strict=True)]
        slowest = max(range(len(means)), key=means.__getitem__)
        middle = statistics.median_low(means)
        ratio = means[slowest] / middle if middle else 1.0
        if len(self._seconds) < guard.straggler_window or ratio < guard.straggler_ratio:
            return None, ratio
        if trainer.is_main:
            _log.warning(
                "rank %d computes %.1f times as long as the middle rank (%.3f s against %.3f s, mean of %d steps): look at its machine",
                slowest, ratio, means[slowest], middle, len(self._seconds),
            )  # fmt: skip
        self._seconds.clear()  # the next warning needs a whole window again
        return slowest, ratio
