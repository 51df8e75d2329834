"""Axes: ranges, ticks and numbers as people read them. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

NO_VALUE = "\u2013"
"""What stands in a table where there is nothing."""


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic axis from `low` to `high`."""

    low: float
    high: float
    log: bool = False

    def position(self, value: float) -> float:
        """Where a value lies, 0 at the low end and 1 at the high one; a value beyond an end lies on it."""
        if self.log:
            if value <= 0:
                return 0.0
            at = (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        else:
            at = (value - self.low) / (self.high - self.low)
        return min(1.0, max(0.0, at))

    def ticks(self, count: int) -> list[float]:
        """About `count` round values inside the axis."""
        return _log_ticks(self.low, self.high, count) if self.log else _linear_ticks(self.low, self.high, count)


def value_axis(values: Sequence[float], *, zero: bool = False, log: bool = False) -> Axis:
    """A y axis that holds all values with a little room; with `zero` it starts there."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if log and low > 0:
        room = (high / low) ** 0.04 if high > low else 2.0
        return Axis(low / room, high * room, log=True)
    if zero:
        low = min(low, 0.0)
    if high == low:
        room = abs(high) * 0.5 or 0.5
        return Axis(low if zero and low == 0 else low - room, high + room)
    room = (high - low) * 0.05
    return Axis(low if zero and low == 0 else low - room, high + room)


def step_axis(first: float, last: float) -> Axis:
    """An x axis over steps."""
    return Axis(first, last) if last > first else Axis(first - 0.5, first + 0.5)


def _linear_ticks(low: float, high: float, count: int) -> list[float]:
    rough = (high - low) / max(count, 1)
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= rough * 0.999)
    start = math.ceil(low / step - 1e-9)
    ticks = []
    while start * step <= high + step * 1e-9:
        ticks.append(round(start * step, 12) + 0.0)
        start += 1
    return ticks


def _log_ticks(low: float, high: float, count: int) -> list[float]:
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [f * 10.0**e for e in exponents for f in factors if low <= f * 10.0**e <= high]
        if len(ticks) <= count + 2:
            return ticks
    every = math.ceil(len(ticks) / count)
    return ticks[::every]


def compact(value: float, digits: int = 3) -> str:
    """A number in few characters, rounded to so many significant digits: 0.0123, 3.46, 120, 12.5k, 3.4M, 5.4e-4."""
    size = abs(value)
    if size == 0:
        return "0"
    if size < 1e-3:
        return _scientific(value, digits)
    for limit, unit, suffix in ((999.5e6, 1e9, "G"), (999.5e3, 1e6, "M"), (9999.5, 1e3, "k")):
        if size >= limit:
            return f"{_trim(f'{value / unit:.{digits}g}')}{suffix}" if size / unit < 999.5 else f"{value / unit:,.0f}{suffix}"
    if size >= 999.5:
        return f"{value:,.0f}"
    return _trim(f"{value:.{digits}g}")


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """The ticks of one axis, exact, all in one notation, short enough to stand beside it."""
    digits = max([3, *(_digits(tick) for tick in ticks)])
    labels = [compact(tick, digits) for tick in ticks]
    if any("e" in label or len(label) > 7 for label in labels):
        return [_scientific(tick, digits) if tick else "0" for tick in ticks]
    return labels


def _digits(value: float) -> int:
    """Significant digits that a round number needs."""
    return next((digits for digits in range(1, 9) if abs(float(f"{value:.{digits}g}") - value) <= 1e-9 * abs(value)), 9)


def percent(share: float, digits: int = 0) -> str:
    """A share as a percentage."""
    return f"{100 * share:.{digits}f}%"


def _scientific(value: float, digits: int) -> str:
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{_trim(mantissa)}e{int(exponent)}"


def _trim(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text
