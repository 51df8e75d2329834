"""Evaluation in the loop: scores over the steps, and how answers to the same questions change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from dsvl_train.reporting.charts import COLOURS, Chart, Series
from dsvl_train.reporting.evaluation_section import SHARE_METRICS, cut, look_of, words_of
from dsvl_train.reporting.metrics import number
from dsvl_train.reporting.pictures import Pictures
from dsvl_train.reporting.runs import Run

_PREFIX, _SECONDS, _TEXT = "eval/", "eval/seconds", "bits_per_byte"
_TEXT_TITLE = "Held-out text"
_STEPS_SHOWN = 6
_TEXT_LIMIT = 300
_PICTURE_SIDE = 240


def evaluation_charts(run: Run) -> list[Chart]:
    """A chart per task, its groups beside it, and one of the held-out text."""
    metrics = _metrics(run)
    keys = dict.fromkeys(key for record in run.records for key in record if key.startswith(_PREFIX) and key != _SECONDS)
    by_task: dict[str, list[str]] = {}
    for key in keys:
        by_task.setdefault(_task_of(key.removeprefix(_PREFIX), metrics), []).append(key)
    return [_chart(run, task, of_task, metrics.get(task, "")) for task, of_task in by_task.items()]


def _metrics(run: Run) -> dict[str, str]:
    """Task -> what it is judged by."""
    tasks = [record["tasks"] for record in run.evaluations if isinstance(record.get("tasks"), dict)]
    return {name: str(task.get("metric", "")) for of_step in tasks for name, task in of_step.items() if isinstance(task, dict)}


def _task_of(name: str, known: dict[str, str]) -> str:
    """The task of TASK or TASK/GROUP; both may have slashes in them."""
    of = [task for task in known if name == task or name.startswith(f"{task}/")]
    return max(of, key=len) if of else name.partition("/")[0]


def _chart(run: Run, task: str, keys: Sequence[str], metric: str) -> Chart:
    whole = f"{_PREFIX}{task}"
    groups = [key for key in keys if key != whole]
    shown = groups[: len(COLOURS)]
    title = _TEXT_TITLE if task == _TEXT else words_of(task).capitalize()
    series = [
        Series(words_of(key.removeprefix(f"{whole}/")), *run.column(key), colour, "marked")
        for key, colour in zip(shown, COLOURS, strict=False)
    ]
    series.append(Series("all" if groups else title.lower(), *run.column(whole), "ink" if groups else "c3", "marked"))
    note = f"The first {len(shown)} of {len(groups)} groups." if len(shown) < len(groups) else ""
    if task == _TEXT:
        return Chart(title, "bits per byte, lower is better", series, note)
    unit = f"{words_of(metric)}, lower is better" if metric == "perplexity" else words_of(metric)
    inside = all(0 <= y <= 1 for s in series for y in s.ys if y is not None)
    return Chart(title, unit, series, note, share=metric in SHARE_METRICS and inside)


# --------------------------------------------------------------------------------------------------------------- generations


@dataclass
class _Question:
    """One question of a task and what was answered after which step."""

    question: str
    truth: str
    image: str
    answers: dict[int, tuple[str, float]] = field(default_factory=dict)
    """Step -> (answer, score)."""


def answers_part(run: Run, pictures: Pictures) -> str:
    """A table per task, a line per question and a column per step; "" where nothing was answered."""
    parts = []
    for task, metric in _metrics(run).items():
        questions = [] if metric == "perplexity" else _questions(run, task)
        steps = _spread(sorted({step for question in questions for step in question.answers}))
        if questions and steps:
            parts.append(f"<h4>{escape(words_of(task).capitalize())}, answers after steps</h4>{_table(questions, steps, pictures)}")
    return "".join(parts)


def _questions(run: Run, task: str) -> list[_Question]:
    found: dict[tuple[int, str, str, str], _Question] = {}
    for record in run.evaluations:
        of_task = record["tasks"].get(task) if isinstance(record.get("tasks"), dict) else None
        examples = of_task.get("examples") if isinstance(of_task, dict) else None
        for place, example in enumerate(examples if isinstance(examples, list) else []):
            if isinstance(example, dict):
                question, truth, image, answer = (_text(example.get(name)) for name in ("question", "truth", "image", "answer"))
                same = found.setdefault((place, question, truth, image), _Question(question, truth, image))
                same.answers[record["step"]] = (answer, number(example.get("score")) or 0.0)
    return list(found.values())


def _table(questions: Sequence[_Question], steps: Sequence[int], pictures: Pictures) -> str:
    with_pictures = any(question.image for question in questions)
    heads = [*([""] if with_pictures else []), "Question", "Truth", *(f"{step:,}" for step in steps)]
    rows = []
    for question in questions:
        first = f'<td class="picture">{_picture(question, pictures)}</td>' if with_pictures else ""
        words = "".join(f"<td>{escape(cut(text, _TEXT_LIMIT))}</td>" for text in (question.question, question.truth))
        rows.append(f"<tr>{first}{words}{''.join(_cell(question.answers.get(step)) for step in steps)}</tr>")
    return (
        f'<div class="table-box"><table class="plain answers"><thead><tr>{"".join(f"<th>{head}</th>" for head in heads)}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _picture(question: _Question, pictures: Pictures) -> str:
    return pictures.embed([Path(question.image)], _PICTURE_SIDE, "held-out image").html if question.image else ""


def _cell(answered: tuple[str, float] | None) -> str:
    if answered is None:
        return "<td></td>"
    answer, score = answered
    words = escape(cut(answer, _TEXT_LIMIT)) or '<span class="empty">no answer</span>'
    return f'<td class="{look_of(score)}"><span class="answer">{words}</span></td>'


def _spread(steps: Sequence[int]) -> list[int]:
    """At most `_STEPS_SHOWN` of the steps, evenly, the first and the last among them."""
    if len(steps) <= _STEPS_SHOWN:
        return list(steps)
    return [steps[round(place * (len(steps) - 1) / (_STEPS_SHOWN - 1))] for place in range(_STEPS_SHOWN)]


def _text(value: Any) -> str:
    return "" if value is None else str(value)
