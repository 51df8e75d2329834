"""Charts as inline SVG and HTML, without a plotting library.

Lines are SVG stretched to the plot's box (strokes keep their width); all text is HTML placed by percentages, so that it keeps its size on
a phone. Each chart carries its points as JSON, which the page's script shows under the pointer and which a test can read back.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Literal

from dsvl_train.reporting.metrics import thin
from dsvl_train.reporting.scale import Axis, compact, percent, step_axis, tick_labels, value_axis

POINT_LIMIT = 4000
"""Points of one series that are drawn singly; a longer one shows the lowest and highest of neighbours."""
_BOX = 1000
_STRIP_CELLS = 500
_POINT_TICKS = 16
_FULL_HEAT = 0.8
"""Opacity of the strongest cell of a heat map; the numbers stay legible on it."""

COLOURS = ("c3", "c4", "c5", "c6", "c1", "c2")
"""Of curves that are neither of a modality nor a reference."""
Look = Literal["line", "dots", "points", "marked", "dash", "thin"]
"""dots: pale, of many steps. points: of few, each of which counts. marked: points joined by a line."""
_EACH_STEP: tuple[Look, ...] = ("dots", "thin")
"""Looks of curves that show each step's own value; the others are averages, schedules and targets."""


@dataclass
class Series:
    """One curve. `colour` is a class of the style sheet: text, multimodal, muted, ink, c1 … c6."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float | None]
    colour: str
    look: Look = "line"
    legend: str | None = None
    """Words for the legend, where they differ from the name; "" leaves the curve out of it."""

    @property
    def key(self) -> str:
        return self.name if self.legend is None else self.legend


@dataclass
class Chart:
    """A chart over steps, or over what `x_label` says."""

    title: str
    unit: str
    series: list[Series]
    note: str = ""
    zero: bool = False
    """The y axis starts at 0."""
    log: bool = False
    share: bool = False
    """The y axis is 0 to 100 %."""
    robust: bool = False
    """A few values far above the rest are drawn at the upper edge and counted in the note, so that they do not flatten the curve."""
    line_at: tuple[float, str] | None = None
    """A horizontal reference: value, label."""
    strip: Sequence[tuple[float, str]] = ()
    """(step, modality) of each step, drawn as a strip under the plot."""
    bands: Sequence[tuple[float, float, str]] = ()
    """(first, last, label) of ranges of steps set apart on the x axis."""
    wide: bool = False
    x_label: str = "step"
    x_whole: bool = True
    """Only whole numbers stand on the x axis."""
    x_room: bool = False
    """The x axis counts things: it goes on for half a unit on both sides, and names as many as there is room for."""


@dataclass
class Figures:
    """Draws charts and collects what the script at the end of the page needs."""

    payload: dict[str, object] = field(default_factory=dict)

    def draw(self, chart: Chart) -> str:
        """The chart as HTML; nothing where no series has a value."""
        drawn = [(s, *thin(s.xs, s.ys, POINT_LIMIT)) for s in chart.series]
        drawn = [(s, xs, ys) for s, xs, ys in drawn if any(y is not None for y in ys)]
        if not drawn:
            return ""
        room = 0.5 if chart.x_room else 0.0
        x_axis = step_axis(min(x for _, xs, _ in drawn for x in xs) - room, max(x for _, xs, _ in drawn for x in xs) + room)
        y_axis, notes = _y_axis(chart)
        if any(len(s.xs) > len(xs) for s, xs, _ in drawn):
            notes.append(f"Drawn: the lowest and highest of neighbouring steps, at most {POINT_LIMIT:,} points a curve.")
        name = f"figure-{len(self.payload) + 1}"
        self.payload[name] = {
            "title": chart.title,
            "x": [x_axis.low, x_axis.high],
            "x_label": chart.x_label,
            "share": chart.share,
            "series": [
                {"name": s.name, "colour": s.colour, "x": xs, "y": [None if y is None else float(f"{y:.7g}") for y in ys]}
                for s, xs, ys in drawn
            ],
        }
        marks = "".join(_marks(s.look, s.colour, xs, ys, x_axis, y_axis) for s, xs, ys in drawn)
        return (
            f'<figure class="chart{" wide" if chart.wide else ""}">{_caption(chart, [s for s, _, _ in drawn], y_axis.log)}'
            f'<div class="plot{" has-strip" if chart.strip else ""}{" has-bands" if chart.bands else ""}" data-figure="{name}">'
            f'<svg viewBox="0 0 {_BOX} {_BOX}" preserveAspectRatio="none" role="img" aria-label="{escape(_describe(chart, drawn))}">'
            f"{_grid(chart, x_axis, y_axis)}{marks}</svg>{_strip(chart.strip, x_axis)}{_labels(chart, x_axis, y_axis)}</div>"
            f'<div class="x-label">{escape(chart.x_label)}</div>{_note(" ".join([chart.note, *notes]).strip())}</figure>'
        )

    def script_data(self) -> str:
        """The points of all charts as a JSON script element; `<` is escaped so that no text can close it."""
        return f'<script type="application/json" id="figures">{json.dumps(self.payload).replace("<", chr(92) + "u003c")}</script>'


def _y_axis(chart: Chart) -> tuple[Axis, list[str]]:
    if chart.share:
        return Axis(0.0, 1.0), []
    values = [y for s in chart.series for y in s.ys if y is not None]
    if chart.robust and len(values) >= 20:
        top = 1.5 * sorted(values)[int(0.97 * (len(values) - 1))]
        inside = [value for value in values if value <= top]
        beyond = [y for s in chart.series if s.look in _EACH_STEP for y in s.ys if y is not None and y > top]
        if beyond and top > 0:
            word = "step lies" if len(beyond) == 1 else "steps lie"
            return value_axis(inside, zero=chart.zero), [f"{len(beyond)} {word} beyond the axis, up to {compact(max(beyond))}."]
    reference = [chart.line_at[0]] if chart.line_at else []
    return value_axis(values + reference, zero=chart.zero, log=chart.log and min(values) > 0), []


def _caption(chart: Chart, series: list[Series], log: bool) -> str:
    keys = [(s.key, f"{s.colour} {s.look}") for s in series if s.key and s.key != chart.title.lower()]
    keys += [(modality, f"{modality} block") for modality in sorted({modality for _, modality in chart.strip}, reverse=True)]
    legend = "".join(f'<span class="key {look}"><i></i>{escape(words)}</span>' for words, look in keys)
    unit = f"{chart.unit}, log scale" if log else chart.unit
    return (
        f'<figcaption><b>{escape(chart.title)}</b> <span class="unit">{escape(unit)}</span>'
        f"{f'<span class=legend>{legend}</span>' if legend else ''}</figcaption>"
    )


def _grid(chart: Chart, x_axis: Axis, y_axis: Axis) -> str:
    parts = [f'<path class="grid" d="M0 {_y(y_axis, tick)}H{_BOX}"/>' for tick in _y_ticks(chart, y_axis)]
    for index, (first, last, _) in enumerate(chart.bands):
        left, right = _x(x_axis, first), _x(x_axis, last)
        if index % 2:
            parts.append(f'<rect class="band" x="{left}" y="0" width="{round(right - left, 1)}" height="{_BOX}"/>')
    if chart.line_at:
        parts.append(f'<path class="reference" d="M0 {_y(y_axis, chart.line_at[0])}H{_BOX}"/>')
    return "".join(parts)


def _labels(chart: Chart, x_axis: Axis, y_axis: Axis) -> str:
    y_ticks = _y_ticks(chart, y_axis)
    words = [percent(tick) for tick in y_ticks] if chart.share else tick_labels(y_ticks)
    parts = [
        f'<span class="y-tick" style="top:{_y(y_axis, tick) / 10:.2f}%">{label}</span>' for tick, label in zip(y_ticks, words, strict=True)
    ]
    ticks = [tick for tick in x_axis.ticks(_POINT_TICKS if chart.x_room else 5) if not chart.x_whole or tick == int(tick)]
    parts += [f'<span class="x-tick" style="left:{_x(x_axis, tick) / 10:.2f}%">{compact(tick)}</span>' for tick in ticks]
    if chart.line_at:
        value, label = chart.line_at
        parts.append(f'<span class="reference-label" style="top:{_y(y_axis, value) / 10:.2f}%">{escape(label)}</span>')
    for first, last, label in chart.bands:
        left, right = _x(x_axis, first) / 10, _x(x_axis, last) / 10
        parts.append(f'<span class="band-label" style="left:{left:.2f}%;width:{right - left:.2f}%">{escape(label)}</span>')
    return "".join(parts)


def _y_ticks(chart: Chart, axis: Axis) -> list[float]:
    return [0.0, 0.25, 0.5, 0.75, 1.0] if chart.share else axis.ticks(6)


def _marks(look: Look, colour: str, xs: Sequence[float], ys: Sequence[float | None], x_axis: Axis, y_axis: Axis) -> str:
    if look == "marked":
        return "".join(_marks(part, colour, xs, ys, x_axis, y_axis) for part in ("line", "points"))
    if look in ("dots", "points") or sum(y is not None for y in ys) == 1:
        # A line of no length with round ends stays a circle however the picture is stretched.
        dots = "".join(f"M{_x(x_axis, x)} {_y(y_axis, y)}h0" for x, y in zip(xs, ys, strict=True) if y is not None)
        crowd = "" if look == "points" else " few" if len(xs) <= 60 else " many" if len(xs) > 400 else ""
        return f'<path class="{"points" if look == "points" else "dots"} {colour}{crowd}" d="{dots}"/>'
    path, pen_down = [], False
    for x, y in zip(xs, ys, strict=True):
        if y is not None:
            path.append(f"{'L' if pen_down else 'M'}{_x(x_axis, x)} {_y(y_axis, y)}")
        pen_down = y is not None
    return f'<path class="{look} {colour}" d="{"".join(path)}"/>'


def _strip(strip: Sequence[tuple[float, str]], x_axis: Axis) -> str:
    """Each step's modality; where steps are many, each cell's height is the share of text steps in it."""
    if not strip:
        return ""
    size = max(1, -(-len(strip) // _STRIP_CELLS))
    cells: list[tuple[float, float, float]] = []
    for start in range(0, len(strip), size):
        group = strip[start : start + size]
        text = sum(modality == "text" for _, modality in group) / len(group)
        # A step owns the half step on either side of it.
        left, right = group[0][0] - 0.5, group[-1][0] + 0.5
        if cells and cells[-1][2] == text and cells[-1][1] == left:
            cells[-1] = (cells[-1][0], right, text)
        else:
            cells.append((left, right, text))
    rects = []
    for left, right, text in cells:
        x = _x(x_axis, left)
        width = round(_x(x_axis, right) - x, 2)
        for colour, top, height in (("multimodal", 0.0, 1 - text), ("text", 1 - text, text)):
            if height:
                rects.append(f'<rect class="{colour}" x="{x}" y="{top * _BOX:.0f}" width="{width}" height="{height * _BOX:.0f}"/>')
    return (
        f'<svg class="strip" viewBox="0 0 {_BOX} {_BOX}" preserveAspectRatio="none" role="img" aria-label="modality of each step">'
        f"{''.join(rects)}</svg>"
    )


def _describe(chart: Chart, drawn: Sequence[tuple[Series, list[float], list[float | None]]]) -> str:
    parts = []
    for s, _, ys in drawn:
        values = [y for y in ys if y is not None]
        parts.append(f"{s.name} from {compact(values[0])} to {compact(values[-1])}")
    return f"{chart.title}, {chart.unit}: " + "; ".join(parts)


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>' if text else ""


def _x(axis: Axis, value: float) -> float:
    return round(axis.position(value) * _BOX, 1)


def _y(axis: Axis, value: float) -> float:
    return round((1.0 - axis.position(value)) * _BOX, 1)


def bars(title: str, unit: str, labels: Sequence[str], values: Sequence[float], x_label: str, note: str = "") -> str:
    """A bar per label, its value above it."""
    axis = value_axis(list(values), zero=True)
    columns = "".join(
        f'<div class="bar"><i style="height:{100 * axis.position(value):.2f}%"><b>{compact(value)}</b></i>'
        f"<span>{escape(label)}</span></div>"
        for label, value in zip(labels, values, strict=True)
    )
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b> <span class="unit">{escape(unit)}</span></figcaption>'
        f'<div class="bars">{columns}</div><div class="x-label">{escape(x_label)}</div>{_note(note)}</figure>'
    )


def load_map(title: str, unit: str, rows: Sequence[tuple[str, Sequence[float]]], note: str = "") -> str:
    """A heat map of loads relative to an even share: 1 is neutral, above and below have a colour each, full at 2 and at 0."""
    width = max(len(values) for _, values in rows)
    numbered = width <= 16
    lines = []
    for label, values in rows:
        cells = []
        for expert, value in enumerate(values):
            side, strength = ("over", value - 1.0) if value >= 1 else ("under", 1.0 - value)
            style = f"background:rgba(var(--{side}),{_FULL_HEAT * min(strength, 1.0):.3f})"
            text = f"{value:.2f}" if numbered else ""
            cells.append(f'<td style="{style}" title="{escape(label)}, expert {expert}: {value:.3f}">{text}</td>')
        lines.append(f"<tr><th>{escape(label)}</th>{''.join(cells)}</tr>")
    every = 1 if numbered else max(1, width // 8)
    heads = "".join(f"<th>{expert if expert % every == 0 else ''}</th>" for expert in range(width))
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b> <span class="unit">{escape(unit)}</span>'
        '<span class="ramp"><span>0</span><i></i><span>1</span><i></i><span>2+</span></span></figcaption>'
        f'<div class="heat-box"><table class="heat{"" if numbered else " fine"}"><tbody>{"".join(lines)}</tbody>'
        f'<tfoot><tr><th></th>{heads}</tr></tfoot></table></div><div class="x-label">expert</div>{_note(note)}</figure>'
    )
