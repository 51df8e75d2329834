"""Tasks: what a model is asked, and how it is judged. A task file is JSON lines (or a JSON list) of one of three kinds:

* a question with options, each scored as the answer: `{"messages", "images", "options": ["a cat", "a dog"], "answer": 1}`;
* a question answered by generation: `{"messages", "images", "answer": "7"}`, or a list of answers any of which will do, and `"metric"`, a
  name of `scorers.SCORERS` (exact_match where it is left out);
* a held-out sample: `{"messages", "images"}` that ends with an answer, or one `document`; its perplexity is measured.

`images` are files beside the task file. `messages` end with the user's turn, or are one message of the role `document`, which the answer
goes on with and no template surrounds: that is how a base model is asked. Each line may say its `group` (a subject, a source), for scores
of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from dsvl_train.data.conversation import ROLES
from dsvl_train.data.tiling import ImageSource
from dsvl_train.evaluation.samples import FileSample, parse_sample, read_records
from dsvl_train.evaluation.scorers import SCORERS

T = TypeVar("T")

ACCURACY, PERPLEXITY, BITS_PER_BYTE = "accuracy", "perplexity", "bits_per_byte"
"""Metrics of scored options, of held-out samples and of held-out texts; all others are generation's."""


@dataclass(frozen=True)
class TaskItem:
    """One question, or one held-out sample."""

    messages: list[dict[str, str]]
    """Up to the user's last turn, or one document; a held-out sample's are whole."""
    images: Sequence[ImageSource] = ()
    truths: Sequence[str] = ()
    """Answered by generation: answers, any of which will do."""
    options: Sequence[str] = ()
    right: int = 0
    """The right option."""
    group: str = ""
    stop: str = ""
    """What ends a generated answer besides the end token, cut off with all that follows it; "" = nothing."""
    where: str = ""
    """File and place, for messages."""


@dataclass(frozen=True)
class Task:
    """Questions judged alike."""

    metric: str
    """`ACCURACY`, `PERPLEXITY`, or a name of `scorers.SCORERS`."""
    items: Sequence[TaskItem]

    @property
    def generates(self) -> bool:
        """Whether the model writes the answers itself."""
        return self.metric in SCORERS

    @property
    def has_images(self) -> bool:
        return any(item.images for item in self.items)


@dataclass
class TaskResult:
    """Scores of one task."""

    metric: str
    score: float
    """Mean over the items; perplexity and bits per byte: of all of them together."""
    n: int
    groups: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Group -> score and number of its items; empty where no item has a group."""
    examples: list[dict[str, Any]] = field(default_factory=list)
    """Items with question, first image, answer, truth and score, in their order."""

    def summary(self) -> dict[str, Any]:
        """All but the examples, as JSON has it."""
        summary: dict[str, Any] = {"metric": self.metric, "score": self.score, "n": self.n}
        if self.groups:
            summary["groups"] = {group: {"score": score, "n": n} for group, (score, n) in self.groups.items()}
        return summary


def read_task(path: str | Path) -> Task:
    """Read a task file.

    Raises:
        ValueError: a line is of no kind or of another kind than the first, or names an image that is not there; names file and sample.
        FileNotFoundError: no such file.
    """
    metric, items = None, []
    for where, record in read_records(path):
        kind, item = _parse_item(record, parse_sample(record, Path(path), where))
        if metric not in (None, kind):
            raise ValueError(f"{where} is judged by {kind}, those before by {metric}: a task file has one kind of line and one metric")
        metric = kind
        items.append(item)
    assert metric is not None
    return Task(metric, items)


def spread(items: Sequence[T], limit: int | None) -> list[T]:
    """At most `limit` of the items, evenly over their order: files are sorted by subject."""
    if limit is None or len(items) <= limit:
        return list(items)
    return [items[position * len(items) // limit] for position in range(limit)]


def _parse_item(record: dict[str, Any], sample: FileSample) -> tuple[str, TaskItem]:
    """(metric, item)"""
    where, group, answer = sample.where, record.get("group", ""), record.get("answer")
    if not isinstance(group, str):
        raise ValueError(f"{where}: `group` must be a text, found {group!r:.200}")
    if "options" in record:
        options = record["options"]
        if not isinstance(options, list) or len(options) < 2 or not all(isinstance(option, str) and option.strip() for option in options):
            raise ValueError(f"{where}: `options` must be a list of at least two texts, none of them blank, found {options!r:.200}")
        right = options.index(answer) if isinstance(answer, str) and answer in options else answer
        if not isinstance(right, int) or isinstance(right, bool) or not 0 <= right < len(options):
            raise ValueError(
                f"{where}: `answer` must be one of the options, or its place from 0 to {len(options) - 1}, found {answer!r:.200}"
            )
        return ACCURACY, TaskItem(_question(sample), sample.images, options=options, right=right, group=group, where=where)
    if answer is None:
        if sample.is_prompt or ROLES[sample.messages[-1]["role"]] not in ("assistant", "document"):
            raise ValueError(f"{where} has neither `answer` nor `options`, and its messages do not end with an answer to measure")
        return PERPLEXITY, TaskItem(sample.messages, sample.images, group=group, where=where)
    metric = record.get("metric", "exact_match")
    if metric not in SCORERS:
        raise ValueError(f"{where} has metric {metric!r}; choose from {', '.join(SCORERS)}")
    truths = [answer] if isinstance(answer, str) else answer
    if not isinstance(truths, list) or not truths or not all(isinstance(truth, str) for truth in truths):
        raise ValueError(f"{where}: `answer` must be a text, or a list of texts any of which will do, found {answer!r:.200}")
    return metric, TaskItem(_question(sample), sample.images, truths=truths, group=group, where=where)


def _question(sample: FileSample) -> list[dict[str, str]]:
    """The messages without the empty answer that may end them."""
    messages = sample.messages[:-1] if sample.is_prompt else sample.messages
    if not messages or ROLES[messages[-1]["role"]] not in ("user", "document"):
        raise ValueError(f"{sample.where}: the messages of a question end with the user's turn, or are one document")
    return messages
