"""Reading `metrics.jsonl`."""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)

Record = dict[str, Any]
"""One step's object."""

SMOOTH_POINTS = 2000


def read_metrics(path: Path) -> list[Record]:
    """The steps of a run in order: the last object of each step, since steps repeated after a resume replace the earlier ones.

    A line that a dying run tore is passed over (a torn last line silently, one with lines after it with a warning, because a resumed
    run normally writes that step again).

    Raises FileNotFoundError without the file and ValueError for an object without a whole `step` from 1.
    """
    by_step: dict[int, Record] = {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            if number < len(lines):
                _log.warning("%s: line %d is torn and passed over", path, number)
            continue
        step = record.get("step") if isinstance(record, dict) else None
        if not isinstance(step, int) or isinstance(step, bool) or step < 1:
            raise ValueError(f"{path}, line {number}: step is {step!r}; each line is an object with a whole step from 1")
        by_step[step] = record
    return [by_step[step] for step in sorted(by_step)]


def number(value: Any) -> float | None:
    """The value as a finite float; None for anything else (null, NaN, a word)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def total(records: Sequence[Record], key: str) -> float:
    """Sum of a key over the steps that have it."""
    return math.fsum(value for record in records if (value := number(record.get(key))) is not None)


def mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def smooth(
    xs: Sequence[float], ys: Sequence[float | None], window: int, statistic: Callable[[Sequence[float]], float] = statistics.fmean
) -> tuple[list[float], list[float | None]]:
    """The statistic over a centred window of points (shorter at the ends) of the values that are there; None where none is.

    A long curve is evaluated at about `SMOOTH_POINTS` of its points, both ends among them, each over its whole window.
    """
    half = max(window, 1) // 2
    stride = max(1, len(xs) // SMOOTH_POINTS)
    at = sorted({*range(0, len(xs), stride), len(xs) - 1} if xs else set())
    smoothed: list[float | None] = []
    for index in at:
        near = [value for value in ys[max(0, index - half) : index + half + 1] if value is not None]
        smoothed.append(statistic(near) if near else None)
    return [xs[index] for index in at], smoothed


def thin(xs: Sequence[float], ys: Sequence[float | None], limit: int) -> tuple[list[float], list[float | None]]:
    """At most about `limit` points that still show every extreme: the lowest and the highest of each bucket of neighbours."""
    if len(xs) <= limit:
        return list(xs), list(ys)
    size = math.ceil(2 * len(xs) / limit)
    kept: list[int] = []
    for start in range(0, len(xs), size):
        there = [(value, i) for i in range(start, min(start + size, len(xs))) if (value := ys[i]) is not None]
        if there:
            kept.extend(sorted({min(there)[1], max(there)[1]}))
    return [xs[i] for i in kept], [ys[i] for i in kept]
