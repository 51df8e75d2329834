"""The report: one HTML page about a chain of stage runs, without anything from outside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from dsvl_train.reporting.charts import Chart, Figures, Series
from dsvl_train.reporting.evaluation_section import Evaluation, read_evaluation, results_section
from dsvl_train.reporting.metrics import number, smooth, total
from dsvl_train.reporting.pictures import Pictures
from dsvl_train.reporting.runs import MODALITIES, Run, read_run
from dsvl_train.reporting.scale import NO_VALUE, compact, percent
from dsvl_train.reporting.stage_section import modality_tail, stage_section, stage_titles
from dsvl_train.reporting.style import CSS, JS

_NO_OUTSIDE = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_PICTURE_BYTES = 2_500_000
"""Of the results, and of all stages together."""


def report(run_dirs: Sequence[Path], out: Path, evaluation: Path | Mapping[str, Path] | None = None, *, title: str | None = None) -> Path:
    """Write the report of a chain of stage runs, given in the order in which they ran, to `out`; returns `out`.

    evaluation: the evaluation file of the last run, or one per stage (`{"lm": path, "sft": path}`).
    title: a heading; by default the model's name.

    Raises ValueError without runs, FileNotFoundError for a folder that is no run or a missing evaluation file.
    """
    if not run_dirs:
        raise ValueError("a report needs at least one run folder")
    runs = [read_run(Path(folder)) for folder in run_dirs]
    files = {runs[-1].stage: evaluation} if isinstance(evaluation, (str, Path)) else dict(evaluation or {})
    page = _page(runs, [read_evaluation(stage, Path(path)) for stage, path in files.items()], title)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    return out


def parse_evaluations(pairs: Iterable[str]) -> dict[str, Path]:
    """`STAGE=FILE` arguments as a mapping, in their order. Raises ValueError for one without a stage or a file."""
    files = {}
    for pair in pairs:
        stage, equals, path = pair.partition("=")
        if not (stage and equals and path):
            raise ValueError(f"--eval {pair}: give STAGE=FILE, for example sft=runs/demo/sft/evaluation.json")
        files[stage] = Path(path)
    return files


def _page(runs: list[Run], evaluations: list[Evaluation], title: str | None) -> str:
    figures = Figures()
    titles = stage_titles(runs)
    by_stage = {run.stage: title for run, title in zip(runs, titles, strict=True)}
    model = str(next((name for run in runs if (name := run.setting("model.name"))), "Training report"))
    heading = title or model
    anchors = [f"stage-{index}" for index in range(1, len(runs) + 1)]
    links = [("#results", "Results")] if evaluations else []
    links += [("#stages", "Stages")] + [(f"#{anchor}", name) for anchor, name in zip(anchors, titles, strict=True)]
    navigation = "".join(f'<a href="{href}">{escape(text)}</a>' for href, text in links)
    parts = [
        f"<header><h1>{escape(heading)}</h1><p>{escape(_subtitle(runs, model if title else ''))}</p></header>",
        f"<nav><div>{navigation}</div></nav><main>",
        results_section(evaluations, by_stage, Pictures(_PICTURE_BYTES)) if evaluations else "",
        f'<section id="stages"><h2>Stages</h2>{_summary(runs, titles)}',
        f'<div class="grid after-table">{figures.draw(_whole_path(runs, titles))}</div></section>',
        *(
            stage_section(run, name, anchor, figures, Pictures(_PICTURE_BYTES // len(runs)))
            for run, name, anchor in zip(runs, titles, anchors, strict=True)
        ),
        "</main><footer>Made from metrics.jsonl, evaluation.jsonl, samples/ and config.yaml of each run. "
        "A step that was repeated after a resume counts once, as it last ran.</footer>",
    ]
    return document(heading, "".join(parts), figures)


def document(heading: str, body: str, figures: Figures) -> str:
    """A whole page, with the style sheet, the script and the figures' points in it."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_NO_OUTSIDE}"><title>{escape(heading)}</title>'
        f"<style>{CSS}</style></head><body>"
        f"{body}{figures.script_data()}<script>{JS}</script></body></html>\n"
    )


def _subtitle(runs: Sequence[Run], model: str) -> str:
    steps, tokens = sum(len(run.records) for run in runs), sum(total(run.records, "tokens") for run in runs)
    seconds = sum(run.seconds for run in runs)
    stages = f"{len(runs)} training stage{'s' if len(runs) > 1 else ''}"
    parts = [model, stages, f"{steps:,} steps", f"{compact(tokens)} tokens" if tokens else "", _span(seconds) if seconds else ""]
    return ", ".join(part for part in parts if part) + "."


def _summary(runs: Sequence[Run], titles: Sequence[str]) -> str:
    heads = (
        "Stage",
        "Steps",
        "Text steps",
        "Tokens",
        "Supervised",
        "Tiles",
        "Text loss",
        "Multimodal loss",
        "Tokens/s",
        "Data wait",
        "Bad samples",
        "Time",
    )
    rows = "".join(
        f"<tr>{''.join(f'<td>{cell}</td>' for cell in _summary_row(run, title))}</tr>" for run, title in zip(runs, titles, strict=True)
    )
    return (
        f'<div class="table-box"><table class="plain"><thead><tr>{"".join(f"<th>{head}</th>" for head in heads)}</tr></thead>'
        f'<tbody>{rows}</tbody></table></div><p class="note">Losses: mean of the first and of the last tenth of the steps.</p>'
    )


def _summary_row(run: Run, title: str) -> list[str]:
    records = run.records
    seconds, tokens = run.seconds, total(records, "tokens")
    bad = [count for record in records if (count := number(record.get("bad_samples"))) is not None]
    planned = run.setting("run.max_steps")
    done = records[-1]["step"] if records else 0
    losses = [modality_tail(records, modality) for modality in MODALITIES]
    return [
        escape(title),
        f"{done:,}" + (f" <small>of {planned:,}</small>" if isinstance(planned, int) and planned != done else ""),
        percent(len(run.of("text")) / len(records), 1) if records else NO_VALUE,
        compact(tokens),
        compact(total(records, "supervised_tokens")),
        compact(total(records, "tiles")),
        *(NO_VALUE if loss is None else f"<small>{loss[0]:.3f} →</small> {loss[1]:.3f}" for loss in losses),
        compact(tokens / seconds) if seconds else NO_VALUE,
        percent(total(records, "data_wait_s") / seconds, 1) if seconds else NO_VALUE,
        f"{bad[-1]:,.0f}" if bad else NO_VALUE,
        _span(seconds),
    ]


def _whole_path(runs: Sequence[Run], titles: Sequence[str]) -> Chart:
    """The averaged losses of all stages end to end."""
    points: dict[str, tuple[list[float], list[float | None]]] = {modality: ([], []) for modality in MODALITIES}
    bands, offset = [], 0.0
    for run, title in zip(runs, titles, strict=True):
        for modality, (xs, ys) in points.items():
            steps, losses = run.column("loss", run.of(modality))
            if xs and steps:
                # A gap, so that no line joins two stages.
                xs.append(offset + 0.5)
                ys.append(None)
            smooth_steps, averages = smooth(steps, losses, max(1, len(losses) // 25 | 1))
            xs += [offset + step for step in smooth_steps]
            ys += averages
        last = float(run.records[-1]["step"]) if run.records else 0.0
        if last:
            bands.append((offset + 1, offset + last, title))
        offset += last
    ends = [first for first, _, _ in bands]
    bands = [(first, following, label) for (first, _, label), following in zip(bands, [*ends[1:], offset], strict=True)]
    series = [Series(modality, *points[modality], modality) for modality in MODALITIES]
    return Chart("Loss through the stages", "nats per supervised token, averaged", series, bands=bands, wide=True)


def _span(seconds: float) -> str:
    """A length of time: 48 s, 6.2 min, 3.4 h, 5.1 days."""
    for limit, unit, name in ((90.0, 1.0, "s"), (5400.0, 60.0, "min"), (172800.0, 3600.0, "h")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}" if name == "s" else f"{seconds / unit:.1f} {name}"
    return f"{seconds / 86400:.1f} days"
