"""The section of one stage: its facts and its charts. A chart without data is left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from html import escape
from statistics import fmean, median
from typing import Any

from dsvl_train.reporting.charts import COLOURS, Chart, Figures, Look, Series, bars, load_map
from dsvl_train.reporting.loop_section import answers_part, evaluation_charts
from dsvl_train.reporting.metrics import Record, mean, number, smooth, total
from dsvl_train.reporting.pictures import Pictures
from dsvl_train.reporting.runs import MODALITIES, Run
from dsvl_train.reporting.sample_cards import samples_part
from dsvl_train.reporting.scale import compact, percent

Statistic = Callable[[Sequence[float]], float]

_LOAD_STEPS = 50
_STAGE_TITLES = {"lm": "Language model", "align": "Alignment", "pretrain": "Joint pretraining", "sft": "Supervised fine-tuning"}


def stage_titles(runs: Sequence[Run]) -> list[str]:
    """Names of runs for people: the stage's, with the folder's where two runs are of one stage."""
    times = Counter(run.stage for run in runs)
    names = [_STAGE_TITLES.get(run.stage, run.stage) for run in runs]
    return [name if times[run.stage] == 1 else f"{name} ({run.folder.name})" for name, run in zip(names, runs, strict=True)]


def stage_section(run: Run, title: str, anchor: str, figures: Figures, pictures: Pictures) -> str:
    """The stage as HTML."""
    head = f'<section id="{escape(anchor)}"><h2>{escape(title)}</h2>{_facts(run)}'
    if not run.records:
        return f'{head}<p class="lead">No step was recorded in {escape(run.folder.name)}/metrics.jsonl.</p></section>'
    groups: tuple[tuple[str, Sequence[Chart | str], str], ...] = (
        ("Learning", [_loss(run), _text_share(run), _learning_rate(run), _gradient_norm(run), _loss_by_source(run), _aux_loss(run)], ""),
        ("Evaluation", evaluation_charts(run), answers_part(run, pictures)),
        ("Experts", [_expert_load(run), _expert_violation(run)], ""),
        ("Data and speed", [_tiles_per_image(run), _speed(run), _step_time(run), _balance(run), _bad_samples(run)], ""),
    )
    body = []
    for title, charts, more in groups:
        drawn = [html for chart in charts if (html := figures.draw(chart) if isinstance(chart, Chart) else chart)]
        if drawn or more:
            grid = f'<div class="grid">{"".join(drawn)}</div>' if drawn else ""
            body.append(f"<h3>{title}</h3>{grid}{more}")
    return f"{head}{''.join(body)}{samples_part(run, pictures)}</section>"


def _facts(run: Run) -> str:
    facts = [
        ("Steps", _modalities(run)),
        ("Trains", _policy(run)),
        ("Schedule", _schedule(run)),
        ("Batch", _batch(run)),
        ("Layout", _layout(run)),
    ]
    items = "".join(f"<div><dt>{name}</dt><dd>{escape(text)}</dd></div>" for name, text in facts if text)
    return f'<dl class="facts">{items}</dl>' if items else ""


def _modalities(run: Run) -> str:
    seen = [modality for modality in MODALITIES if run.of(modality)]
    return f"{seen[0]} only" if len(seen) == 1 else ""


def _policy(run: Run) -> str:
    rules = run.setting("stage.policy", [])
    words = []
    for rule in rules:
        multiplier, part = rule.get("lr_multiplier"), str(rule.get("pattern", "")).removesuffix("*").removesuffix(".") or "all else"
        words.append(f"{part} frozen" if multiplier is None else f"{part} \u00d7{multiplier:g}")
    return ", ".join(words)


def _schedule(run: Run) -> str:
    kind, peak = run.setting("optim.schedule.kind"), number(run.setting("optim.lr"))
    if kind is None or peak is None:
        return ""
    return f"{kind}, peak {compact(peak)}, warm-up {run.setting('optim.schedule.warmup_steps', 0)} steps"


def _batch(run: Run) -> str:
    sequences, length = run.setting("data.batch_size"), run.setting("data.seq_len")
    if sequences is None or length is None:
        return ""
    return f"{sequences} sequences of {length} tokens{', packed' if run.setting('data.packing') else ''}"


def _layout(run: Run) -> str:
    sizes = [(name, run.setting(f"parallel.{name}", 1)) for name in ("tp", "pp", "vpp", "ep", "cp")]
    return ", ".join(f"{name.upper()} {size}" for name, size in sizes if size != 1)


# ------------------------------------------------------------------------------------------------------------------- learning


def _by_modality(run: Run, key: str, look: Look = "dots", statistic: Statistic = fmean) -> tuple[list[Series], int]:
    """Each step's value by modality, and its moving average; the longest window in steps of a modality."""
    series, longest = [], 0
    for modality in MODALITIES:
        xs, ys = run.column(key, run.of(modality))
        if any(y is not None for y in ys):
            window = _window(len(xs))
            series.append(Series(modality, xs, ys, modality, look, legend="" if window > 1 else None))
            if window > 1:
                longest = max(longest, window)
                series.append(Series(f"{modality}, averaged", *smooth(xs, ys, window, statistic), modality, legend=modality))
    return series, longest


def _window(points: int) -> int:
    """Width of the moving average: a twenty-fifth of the curve, odd; 1 (none) for a few points."""
    return 1 if points < 12 else max(3, points // 25 | 1)


def _averaging(window: int, kind: str = "mean") -> str:
    return f"Dots: each step; lines: {kind} of up to {window} steps of a modality." if window else ""


def _loss(run: Run) -> Chart:
    series, window = _by_modality(run, "loss")
    broken = sum(number(record.get("loss")) is None for record in run.records if "loss" in record)
    word = "step" if broken == 1 else "steps"
    note = f"{_averaging(window)}{f' {broken} {word} without a finite loss.' if broken else ''}".strip()
    return Chart("Loss", "nats per supervised token", series, note)


def _text_share(run: Run) -> Chart:
    steps, realised = run.column("text_share")
    series = [
        Series("realised", steps, realised, "c3"),
        Series("target", *run.column("text_share_target"), "ink", "dash"),
    ]
    strip = [(float(record["step"]), str(record["modality"])) for record in run.records if record.get("modality") in MODALITIES]
    if all(share in (0, 1, None) for share in realised):
        return Chart("", "", [])
    note = "Strip: the modality of each step." if len({modality for _, modality in strip}) > 1 else "Each step mixes both modalities."
    pairs = [
        (record["step"], abs(share - target))
        for record in run.records
        if (share := number(record.get("text_share"))) is not None and (target := number(record.get("text_share_target"))) is not None
    ]
    if pairs:
        # The shares are means over the steps so far, so their difference times the step is a number of steps.
        worst = max(step * gap for step, gap in pairs)
        note += f" Never further than {worst:.2f} steps from the target."
    return Chart("Text share", "share so far", series, note, share=True, strip=strip)


def _learning_rate(run: Run) -> Chart:
    groups: dict[str, None] = {}
    for record in run.records:
        if isinstance(lr := record.get("lr"), Mapping):
            groups.update(dict.fromkeys(lr))
    if not groups:
        return Chart("Learning rate", "per step", [Series("learning rate", *run.column("lr"), "c3")], zero=True)
    series = []
    for index, group in enumerate(groups):
        kept = [record for record in run.records if isinstance(record.get("lr"), Mapping) and group in record["lr"]]
        xs, ys = [float(record["step"]) for record in kept], [number(record["lr"][group]) for record in kept]
        series.append(Series(_group_name(str(group)), xs, ys, COLOURS[index % len(COLOURS)]))
    return Chart("Learning rate", "by parameter group", series, zero=True)


def _group_name(group: str) -> str:
    """Groups named by their multiplier, x0.1, are written as people do."""
    return f"\u00d7{group[1:]}" if group[:1] == "x" and group[1:2].isdigit() else group


def _gradient_norm(run: Run) -> Chart:
    series, window = _by_modality(run, "grad_norm")
    values = [value for record in run.records if (value := number(record.get("grad_norm"))) is not None and value > 0]
    clip = number(run.setting("optim.clip_grad"))
    log = bool(values) and max(values) > 30 * min(values)
    line = (clip, f"clip at {clip:g}") if clip else None
    return Chart("Gradient norm", "before clipping", series, _averaging(window), log=log, zero=not log, line_at=line)


def _loss_by_source(run: Run) -> Chart:
    sources = sorted(
        {name for record in run.records if isinstance(record.get("loss_by_source"), Mapping) for name in record["loss_by_source"]}
    )
    series = []
    for index, source in enumerate(sources):
        kept = [record for record in run.records if source in (record.get("loss_by_source") or {})]
        xs, ys = [float(record["step"]) for record in kept], [number(record["loss_by_source"][source]) for record in kept]
        series.append(Series(str(source), *smooth(xs, ys, _window(len(xs))), COLOURS[index % len(COLOURS)]))
    if len(series) < 2:
        return Chart("", "", [])
    return Chart("Loss by source", "nats per supervised token", series, "Moving averages.")


def _aux_loss(run: Run) -> Chart:
    series, window = _by_modality(run, "aux_loss")
    if not any(y for s in series for y in s.ys):
        return Chart("", "", [])
    return Chart("Balancing loss", "auxiliary loss, mean of MoE layers", series, _averaging(window))


# -------------------------------------------------------------------------------------------------------------------- experts


def relative_load(record: Record) -> list[list[float]]:
    """Each layer's expert loads over their mean: 1 everywhere is an even share. Empty where the step has none."""
    layers = record.get("expert_load")
    if not isinstance(layers, list):
        return []
    loads = []
    for layer in layers:
        values = [number(value) or 0.0 for value in layer] if isinstance(layer, list) else []
        even = mean(values)
        if even:
            loads.append([value / even for value in values])
    return loads


def _expert_load(run: Run) -> str:
    loads = [load for record in run.records[-_LOAD_STEPS:] if (load := relative_load(record))]
    loads = [load for load in loads if [len(layer) for layer in load] == [len(layer) for layer in loads[-1]]]
    if not loads:
        return ""
    dense = int(run.setting("model.language.moe.dense_layers", 0))
    rows = []
    for layer in range(len(loads[-1])):
        columns = zip(*(load[layer] for load in loads), strict=True)
        rows.append((f"layer {dense + layer}", [sum(column) / len(loads) for column in columns]))
    note = f"Mean of the last {len(loads)} steps; 1 is an even share. Layers and experts count from 0."
    return load_map("Expert load", "tokens of an expert over the layer's mean", rows, note)


def _expert_violation(run: Run) -> Chart:
    xs: list[float] = []
    rows: list[list[float]] = []
    for record in run.records:
        row = _violations(record)
        if row and (not rows or len(row) == len(rows[0])):
            xs.append(float(record["step"]))
            rows.append(row)
    if not rows:
        return Chart("", "", [])
    worst, middle = [max(row) for row in rows], [sum(row) / len(row) for row in rows]
    window = _window(len(xs))
    series = [Series("worst layer", xs, worst, "c6", "dots", legend="" if window > 1 else None)]
    if window > 1:
        series.append(Series("worst layer, averaged", *smooth(xs, worst, window), "c6", legend="worst layer"))
    if len(rows[0]) > 1:
        series.append(Series("mean of layers, averaged", *smooth(xs, middle, window), "c3", legend="mean of layers"))
    note = f"0 is perfect balance.{f' Dots: each step; lines: mean of up to {window} steps.' if window > 1 else ''}"
    return Chart("Expert max violation", "highest load over the mean, minus 1", series, note, zero=True)


def _violations(record: Record) -> list[float]:
    value: Any = record.get("expert_max_violation")
    if (single := number(value)) is not None:
        return [single]
    if isinstance(value, list):
        return [item for item in map(number, value) if item is not None]
    return [max(layer) - 1.0 for layer in relative_load(record)]


# ------------------------------------------------------------------------------------------------------------- data and speed


def _tiles_per_image(run: Run) -> str:
    counts: Counter[int] = Counter()
    for record in run.records:
        histogram = record.get("tiles_per_image") or record.get("tiles_histogram")
        if isinstance(histogram, Mapping):
            counts.update({int(tiles): int(images) for tiles, images in histogram.items()})
    if not counts or set(counts) == {0}:
        # VL: every image is one tile.
        return ""
    labels = list(range(min(counts), max(counts) + 1))
    images = sum(counts.values())
    average = sum(tiles * n for tiles, n in counts.items()) / images
    note = f"{images:,} images in the run, {average:.2f} local tiles each on average; the thumbnail is one tile more."
    return bars("Tiles per image", "images", [str(tiles) for tiles in labels], [counts[tiles] for tiles in labels], "local tiles", note)


def _speed(run: Run) -> Chart:
    series, window = _by_modality(run, "tokens_per_s", statistic=median)
    return Chart("Throughput", "tokens per second", series, _averaging(window, "median"), zero=True, robust=True)


def _step_time(run: Run) -> Chart:
    series = [
        Series("step", *run.column("step_s"), "c4", "dots"),
        Series("waiting for data", *run.column("data_wait_s"), "c5", "dots"),
    ]
    waited, spent = total(run.records, "data_wait_s"), total(run.records, "step_s")
    note = f"Waiting for data, which comes before the step, took {percent(waited / (waited + spent), 1)} of the run." if spent else ""
    return Chart("Step time", "seconds", series, note, zero=True, robust=True)


def _balance(run: Run) -> Chart:
    imbalance = Series("tile imbalance", *run.column("tile_imbalance", run.of("multimodal")), "c2", "dots")
    fill = Series("pack fill", *run.column("pack_fill"), "c3", "dots")
    series = [s for s in (imbalance, fill) if any(y not in (None, 0.0, 1.0) for y in s.ys)]
    note = "Tile imbalance: most tiles of a rank over the mean of ranks. Pack fill: tokens over capacity."
    return Chart("Balance and packing", "ratio", series, note)


def _bad_samples(run: Run) -> Chart:
    xs, ys = run.column("bad_samples")
    if not any(ys):
        return Chart("", "", [])
    return Chart("Bad samples", "replaced by masked padding, so far", [Series("bad samples", xs, ys, "c6")], zero=True)


def modality_tail(records: Sequence[Record], modality: str) -> tuple[float, float] | None:
    """Mean loss over the first and over the last tenth of a modality's steps (at least one step)."""
    losses = [loss for record in records if record.get("modality") == modality and (loss := number(record.get("loss"))) is not None]
    if not losses:
        return None
    tenth = max(1, len(losses) // 10)
    return sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
