"""Writes `metrics.jsonl`: one JSON object per step, appended.

Steps repeated after a resume are appended too; readers take the last object of a step (`reporting.metrics.read_metrics`), so a run that
dies while it writes never loses what was there.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from dsvl_train.training.callbacks.base import Callback, Metrics, TrainerView

_log = logging.getLogger(__name__)


class MetricsFile(Callback):
    """One line per step on rank 0. Numbers carry all their digits; NaN and infinities are written as null, since JSON has no word for
    them. Lines for which the disk has no room wait in memory for the next step."""

    def __init__(self, name: str = "metrics.jsonl") -> None:
        self._name = name
        self._file: FileIO | None = None
        self._waiting = b""
        self._warned = False

    def on_run_start(self, trainer: TrainerView) -> None:
        if trainer.is_main:
            path = trainer.run_dir / self._name
            path.parent.mkdir(parents=True, exist_ok=True)
            if _ends_inside_a_line(path):
                # The last run died in the middle of a line; ours must not be glued to it.
                self._waiting = b"\n"
            self._file = FileIO(path, "a")

    def on_step_end(self, trainer: TrainerView, metrics: Metrics) -> None:
        if self._file is not None:
            self._waiting += json_line(metrics).encode() + b"\n"
            self._write(self._file)

    def on_run_end(self, trainer: TrainerView, reason: str) -> None:
        self._close()

    def on_exception(self, trainer: TrainerView, error: BaseException) -> None:
        self._close()

    def _write(self, file: FileIO) -> None:
        """Straight to the file, so that what did not fit is known to the byte and goes on exactly there."""
        try:
            while self._waiting:
                self._waiting = self._waiting[file.write(self._waiting) :]
            self._warned = False
        except OSError as error:
            if not self._warned:
                _log.warning("%s cannot be written (%s); its lines wait in memory", file.name, error.strerror)
            self._warned = True

    def _close(self) -> None:
        if self._file is not None:
            self._write(self._file)
            self._file.close()
            self._file = None


def json_line(metrics: Metrics) -> str:
    """The record as strict JSON on one line. Tensors and numpy values become plain numbers and lists."""
    return json.dumps(_plain(metrics), ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return str(value)


def _ends_inside_a_line(path: Path) -> bool:
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) != b"\n"
