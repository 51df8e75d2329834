"""The report of a sweep: its points side by side, as one table (HTML and text) and one picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from dsvl_train.reporting.charts import Chart, Figures, Series
from dsvl_train.reporting.metrics import number, smooth, total
from dsvl_train.reporting.page import document
from dsvl_train.reporting.runs import MODALITIES, Run, read_run
from dsvl_train.reporting.scale import NO_VALUE, compact
from dsvl_train.reporting.stage_section import modality_tail

_SETTINGS_SHOWN = 6
_OF_THE_FOLDER = ("run.dir", "run.name")
"""Settings that follow from the point and say nothing more about it."""
_COLOURS = ("c1", "c2", "c3", "c4", "c5", "c6")
_CURVES = len(_COLOURS)
_WIDEST_LINEAR = 30.0
"""Largest value of a setting over its smallest for which points are drawn at their values and not side by side."""
_FILES = ("config.yaml", "metrics.jsonl")


@dataclass
class SweepTable:
    """A row per point; cells are text."""

    heads: list[str]
    rows: list[list[str]]

    def as_text(self) -> str:
        """For a terminal: columns of equal width, the first flush left."""
        widths = [max(map(len, column)) for column in zip(self.heads, *self.rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if index == 0 else cell.rjust(width) for index, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in (self.heads, *self.rows)
        ]
        return "\n".join(line.rstrip() for line in lines)

    def as_html(self) -> str:
        """For a page: numbered, as the picture of the points may be."""
        heads = "".join(f"<th>{escape(head)}</th>" for head in self.heads)
        rows = "".join(
            f'<tr><td class="number">{number}</td>{"".join(f"<td>{escape(cell)}</td>" for cell in row)}</tr>'
            for number, row in enumerate(self.rows, start=1)
        )
        return (
            f'<div class="table-box"><table class="plain"><thead><tr><th class="number"></th>{heads}</tr></thead>'
            f"<tbody>{rows}</tbody></table></div>"
        )


def is_sweep(folder: Path) -> bool:
    """Whether a folder holds run folders and is none itself."""
    return not _is_run(folder) and bool(_points(folder))


def report_sweep(folder: Path, out: Path) -> str:
    """Write the page of a sweep to `out`; the table as text.

    Raises:
        FileNotFoundError: no run folder lies in it.
        ValueError: a point's metrics.jsonl is none.
    """
    runs = [read_run(point) for point in _points(folder)]
    if not runs:
        raise FileNotFoundError(f"{folder} is no sweep: none of its folders is a run folder, with config.yaml or metrics.jsonl")
    varied = _varied(runs)
    runs.sort(key=lambda run: [_order(run.setting(key)) for key in varied])
    table = _table(runs, varied)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(_page(folder, runs, varied, table), encoding="utf-8")
    return table.as_text()


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _FILES)


def _points(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and _is_run(path)) if folder.is_dir() else []


# ---------------------------------------------------------------------------------------------------------------------- table


def _varied(runs: Sequence[Run]) -> list[str]:
    """Settings that are not the same in all runs, by their dotted names."""
    flat = [_flat(run.config) for run in runs]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    return [key for key in keys if key not in _OF_THE_FOLDER and len({json.dumps(settings.get(key)) for settings in flat}) > 1]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves of nested mappings; a list is a leaf."""
    leaves: dict[str, Any] = {}
    for key, value in settings.items():
        leaves |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


def _order(value: Any) -> tuple[bool, float, str]:
    """Numbers by size, before everything else by its words."""
    size = number(value)
    return (size is None, size or 0.0, "" if size is not None else str(value))


def _table(runs: Sequence[Run], varied: Sequence[str]) -> SweepTable:
    scores = list(dict.fromkeys(key for run in runs for record in run.records for key in record if _is_score(key)))
    heads = [
        "Point",
        *varied[:_SETTINGS_SHOWN],
        *(f"{modality.capitalize()} loss" for modality in MODALITIES),
        *scores,
        "Tokens/s",
        "Status",
    ]
    return SweepTable(heads, [_row(run, varied[:_SETTINGS_SHOWN], scores) for run in runs])


def _row(run: Run, settings: Sequence[str], scores: Sequence[str]) -> list[str]:
    tokens, seconds = total(run.records, "tokens"), run.seconds
    return [
        run.folder.name,
        *(_value(run.setting(key)) for key in settings),
        *(_shown(_final_loss(run, modality), ".4f") for modality in MODALITIES),
        *(_shown(_last(run, key), ".4g") for key in scores),
        compact(tokens / seconds) if seconds else NO_VALUE,
        _status(run),
    ]


def _is_score(key: str) -> bool:
    return key.startswith("eval/") and key != "eval/seconds"


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else NO_VALUE if value is None else str(value)


def _shown(value: float | None, form: str) -> str:
    return NO_VALUE if value is None else format(value, form)


def _final_loss(run: Run, modality: str) -> float | None:
    """Mean loss of the last tenth of a modality's steps."""
    tail = modality_tail(run.records, modality)
    return None if tail is None else tail[1]


def _last(run: Run, key: str) -> float | None:
    return next((value for record in reversed(run.records) if (value := number(record.get(key))) is not None), None)


def _status(run: Run) -> str:
    done, planned = (int(run.records[-1]["step"]) if run.records else 0), run.setting("run.max_steps")
    if not isinstance(planned, int):
        return f"step {done:,}"
    return "finished" if done >= planned else f"step {done:,} of {planned:,}"


# ----------------------------------------------------------------------------------------------------------------------- page


def _page(folder: Path, runs: Sequence[Run], varied: Sequence[str], table: SweepTable) -> str:
    figures = Figures()
    name = folder.resolve().name
    finished = sum(_status(run) == "finished" for run in runs)
    model = str(next((found for run in runs if (found := run.setting("model.name"))), ""))
    subtitle = ", ".join(part for part in (model, f"{len(runs)} points", f"{finished} finished") if part)
    more = f" {len(varied) - _SETTINGS_SHOWN} more settings differ between the points." if len(varied) > _SETTINGS_SHOWN else ""
    pictures = "".join(
        figures.draw(chart) for chart in (_final_losses(runs, varied), *(_curves(runs, modality) for modality in MODALITIES))
    )
    body = (
        f"<header><h1>{escape(name)}</h1><p>Sweep: {escape(subtitle)}.</p></header><main><section>{table.as_html()}"
        '<p class="note">Losses: mean of the last tenth of a modality\'s steps, nats per supervised token. Scores: the last ones. '
        f'Tokens/s: over steps and their waits for data.{more}</p><div class="grid after-table">{pictures}</div></section>'
        "</main><footer>Made from metrics.jsonl and config.yaml of each point. "
        "A step that was repeated after a resume counts once, as it last ran.</footer>"
    )
    return document(name, body, figures)


def _final_losses(runs: Sequence[Run], varied: Sequence[str]) -> Chart:
    """Final losses against the setting that varies, where it is one number; otherwise point by point, by their numbers."""
    values = [number(run.setting(varied[0])) for run in runs] if len(varied) == 1 else []
    sizes = [value for value in values if value is not None]
    at_value = len(sizes) == len(runs) and (min(sizes) == 0 or 0 < max(sizes) / min(sizes) <= _WIDEST_LINEAR)
    xs = sizes if at_value else [float(index) for index in range(1, len(runs) + 1)]
    series = []
    for modality in MODALITIES:
        ys = [_final_loss(run, modality) for run in runs]
        # A line between points whose order means nothing would tell of a course that there is not.
        series.append(Series(modality, xs, ys, modality, "marked" if at_value else "points"))
    label = varied[0] if at_value else "point, by its number in the table"
    unfinished = any(_status(run) != "finished" for run in runs)
    note = "Points that are not finished are shown as far as they are." if unfinished else ""
    return Chart(
        "Final loss", "nats per supervised token", series, note, wide=True, x_label=label, x_whole=not at_value, x_room=not at_value
    )


def _curves(runs: Sequence[Run], modality: str) -> Chart:
    """The averaged losses of the points over their steps."""
    series = []
    for run, colour in zip(runs[:_CURVES], _COLOURS, strict=False):
        xs, ys = run.column("loss", run.of(modality))
        series.append(Series(run.folder.name, *smooth(xs, ys, max(1, len(ys) // 25 | 1)), colour))
    note = f"The first {_CURVES} points of {len(runs)}." if len(runs) > _CURVES else ""
    return Chart(f"{modality.capitalize()} loss", "nats per supervised token, averaged", series, note)
