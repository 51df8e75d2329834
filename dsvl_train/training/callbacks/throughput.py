"""Speeds: of each step, and as a moving average over the last steps."""

from __future__ import annotations

from collections import deque

from dsvl_train.training.callbacks.base import Callback, Metrics, TrainerView


class Throughput(Callback):
    """Adds `tokens_per_s` and `tiles_per_s` of the step where the trainer did not, and `tokens_per_s_avg` and `tiles_per_s_avg` over the
    last `window` steps: their sum of tokens (tiles) over their sum of seconds, waits for data included.

    Reads `tokens`, `tiles` (both of the global batch), `step_s` (seconds of the step itself) and `data_wait_s` (seconds it waited for its
    batch before). A step without `step_s` is left as it is.
    """

    def __init__(self, window: int = 20) -> None:
        self._recent: deque[tuple[float, float, float]] = deque(maxlen=window)

    def on_step_end(self, trainer: TrainerView, metrics: Metrics) -> None:
        seconds = float(metrics.get("step_s") or 0.0)
        if seconds <= 0.0:
            return
        tokens, tiles = float(metrics.get("tokens") or 0), float(metrics.get("tiles") or 0)
        self._recent.append((seconds + float(metrics.get("data_wait_s") or 0.0), tokens, tiles))
        total_s, total_tokens, total_tiles = (sum(column) for column in zip(*self._recent, strict=True))
        metrics.setdefault("tokens_per_s", tokens / seconds)
        metrics.setdefault("tiles_per_s", tiles / seconds)
        metrics["tokens_per_s_avg"] = total_tokens / total_s
        metrics["tiles_per_s_avg"] = total_tiles / total_s
