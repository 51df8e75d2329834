"""The section of results: scores after each stage, and held-out examples with question, answer and truth."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from html import escape
from pathlib import Path
from typing import Any

from dsvl_train.reporting.metrics import number
from dsvl_train.reporting.pictures import SMALL_SIDE, Picture, Pictures
from dsvl_train.reporting.scale import NO_VALUE, compact, percent

EXAMPLES_PER_TASK = 24
_EMBED_SIDE = 640
_TEXT_LIMIT = 1200
SHARE_METRICS = ("exact_match", "contains", "character_accuracy", "anls", "relaxed_number", "last_number", "accuracy")


@dataclass
class Evaluation:
    """One evaluation file, `{"model", "tasks": {name: {"metric", "score", "n"}}, "bits_per_byte", "examples": [...]}`."""

    stage: str
    folder: Path
    """Relative image paths start here."""
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    bits_per_byte: float | None = None
    examples: list[dict[str, Any]] = field(default_factory=list)


def read_evaluation(stage: str, path: Path) -> Evaluation:
    """Raises FileNotFoundError without the file and ValueError where it is not an evaluation."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; an evaluation is an object with tasks, bits_per_byte and examples")
    return Evaluation(stage, path.parent, content.get("tasks") or {}, number(content.get("bits_per_byte")), content.get("examples") or [])


def results_section(evaluations: list[Evaluation], titles: Mapping[str, str], pictures: Pictures) -> str:
    """Scores and examples as HTML; `titles` gives stages their names for people."""
    last = evaluations[-1]
    table = _table(evaluations, titles) if len(evaluations) > 1 else ""
    with_examples = next((evaluation for evaluation in reversed(evaluations) if evaluation.examples), None)
    examples = _examples(with_examples, pictures) if with_examples else ""
    lead = f"Held-out samples, scored after {titles.get(last.stage, last.stage).lower()}."
    return (
        f'<section id="results"><h2>Results</h2><p class="lead">{escape(lead)}</p>{_tiles(evaluations, titles)}{table}{examples}</section>'
    )


def _tiles(evaluations: list[Evaluation], titles: Mapping[str, str]) -> str:
    last = evaluations[-1]
    tiles = [
        f"<div><span>{escape(words_of(name))}</span><b>{_score(task)}</b>"
        f"<small>{escape(words_of(task.get('metric', 'score')))}{_count(task)}</small></div>"
        for name, task in last.tasks.items()
    ]
    if last.bits_per_byte is not None:
        first = next(e for e in evaluations if e.bits_per_byte is not None)
        change = "lower is better"
        if first is not last:
            change = f"{_change(last.bits_per_byte, first.bits_per_byte)} since {titles.get(first.stage, first.stage).lower()}"
        tiles.append(f"<div><span>text</span><b>{last.bits_per_byte:.3f}</b><small>bits per byte, {escape(change)}</small></div>")
    return f'<div class="scores">{"".join(tiles)}</div>' if tiles else ""


def _table(evaluations: list[Evaluation], titles: Mapping[str, str]) -> str:
    names: dict[str, str] = {}
    for evaluation in evaluations:
        for name, task in evaluation.tasks.items():
            names[name] = str(task.get("metric", "score"))
    heads = "".join(f"<th>{escape(titles.get(evaluation.stage, evaluation.stage))}</th>" for evaluation in evaluations)
    rows = []
    for name, metric in names.items():
        scores = "".join(f"<td>{_score(e.tasks.get(name, {}))}</td>" for e in evaluations)
        rows.append(f"<tr><td>{escape(words_of(name))} <small>{escape(words_of(metric))}</small></td>{scores}</tr>")
    base = next((e.bits_per_byte for e in evaluations if e.bits_per_byte is not None), None)
    if base is not None:
        cells = []
        for index, evaluation in enumerate(evaluations):
            value = evaluation.bits_per_byte
            change = f" <small>{_change(value, base)}</small>" if value is not None and index else ""
            cells.append(f"<td>{NO_VALUE if value is None else f'{value:.3f}'}{change}</td>")
        rows.append(f"<tr><td>text <small>bits per byte, lower is better</small></td>{''.join(cells)}</tr>")
    return (
        f'<div class="table-box"><table class="plain"><thead><tr><th>After</th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _examples(evaluation: Evaluation, pictures: Pictures) -> str:
    by_task: dict[str, list[dict[str, Any]]] = {}
    for example in evaluation.examples:
        task = str(example.get("task", "examples"))
        if evaluation.tasks.get(task, {}).get("metric") != "perplexity":  # held-out samples have no answer to show
            by_task.setdefault(task, []).append(example)
    parts = []
    for task, examples in by_task.items():
        shown = examples[:EXAMPLES_PER_TASK]
        shown_pictures = [_picture(example.get("image"), evaluation.folder, pictures) for example in shown]
        cards = "".join(_card(example, picture.html) for example, picture in zip(shown, shown_pictures, strict=True))
        right = sum((number(example.get("score")) or 0.0) >= 1.0 for example in examples)
        more = f", the first {len(shown)} shown" if len(shown) < len(examples) else ""
        side = max(picture.side for picture in shown_pictures)
        size = " large" if side > 400 else " tiny" if 0 < side <= SMALL_SIDE else ""
        parts.append(
            f"<h3>{escape(words_of(task).capitalize())}: {right} of {len(examples)} examples fully right{more}</h3>"
            f'<div class="examples{size}">{cards}</div>'
        )
    return "".join(parts)


def _card(example: Mapping[str, Any], picture: str) -> str:
    score = number(example.get("score")) or 0.0
    look = look_of(score)
    answer, truth = cut(example.get("answer")), cut(example.get("truth"))
    below = "" if look == "good" and answer == truth else f'<p class="truth"><span>truth</span> {escape(truth)}</p>'
    partial = f' <span class="empty">({percent(score)})</span>' if look == "part" else ""
    shown = _marked(answer, truth) if look == "part" else escape(answer)
    return (
        f'<div class="example {look}"><div class="image">{picture}</div>'
        f'<div class="words"><p class="question">{escape(cut(example.get("question")))}</p>'
        f'<p class="answer">{shown or "<span class=empty>no answer</span>"}{partial}</p>{below}</div></div>'
    )


def look_of(score: float) -> str:
    """The class of the style sheet for an answer of this score."""
    return "good" if score >= 1.0 else "bad" if score <= 0.0 else "part"


def _marked(answer: str, truth: str) -> str:
    """The answer with the characters that the truth does not have in <del>."""
    parts = []
    for kind, start, end, _, _ in SequenceMatcher(None, answer, truth, autojunk=False).get_opcodes():
        piece = escape(answer[start:end])
        parts.append(piece if kind == "equal" else f"<del>{piece}</del>" if piece else "")
    return "".join(parts)


def _picture(image: object, folder: Path, pictures: Pictures) -> Picture:
    """Paths are relative to the evaluation's file, or to where the evaluation was started."""
    if not image:
        return Picture('<span class="missing">no image</span>')
    return pictures.embed([folder / str(image), Path(str(image))], _EMBED_SIDE, "held-out image")


def _score(task: Mapping[str, Any]) -> str:
    score = number(task.get("score"))
    if score is None:
        return NO_VALUE
    return percent(score, 1) if task.get("metric") in SHARE_METRICS and 0.0 <= score <= 1.0 else compact(score)


def _count(task: Mapping[str, Any]) -> str:
    return f", n = {int(n):,}" if (n := number(task.get("n"))) is not None else ""


def _change(value: float | None, base: float | None) -> str:
    return "" if value is None or not base else f"{100 * (value / base - 1):+.1f}%".replace("-", "\u2212")


def words_of(name: object) -> str:
    """A name of a task or metric as people write it."""
    return str(name).replace("_", " ")


def cut(text: object, limit: int = _TEXT_LIMIT) -> str:
    """At most so many characters of a text."""
    words = "" if text is None else str(text)
    return words if len(words) <= limit else words[:limit] + " …"
