"""Tasks answered by generation: JSON lines of a conversation, image files and the true answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dsvl_train.data.processor import Encoded
from dsvl_train.evaluation.generation import generate
from dsvl_train.evaluation.loading import LoadedModel
from dsvl_train.evaluation.scorers import SCORERS


@dataclass
class TaskItem:
    """One question."""

    messages: list[dict[str, str]]
    """The conversation; its last turn is the user's."""
    images: list[Path]
    answer: str
    """The truth."""


@dataclass
class TaskResult:
    """Scores of one task."""

    metric: str
    score: float
    """Mean over the items."""
    n: int
    examples: list[dict[str, Any]] = field(default_factory=list)
    """Every item's question, answer, truth, score and first image."""


def read_task(path: Path) -> tuple[str, list[TaskItem]]:
    """Read a task file. Returns the metric (each line's `metric`, exact_match by default) and the items.

    Raises:
        ValueError: a line lacks a field, names an unknown metric, or names an image that is not there; names file and line.
    """
    metric, items = "exact_match", []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            images = [path.parent / name for name in record.get("images", [])]
            items.append(TaskItem(record["messages"], images, record["answer"]))
            metric = record.get("metric", metric)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}:{number} is not a task item (messages, images, answer): {error!r}") from error
        if metric not in SCORERS:
            raise ValueError(f"{path}:{number} has metric {metric!r}; choose from {', '.join(SCORERS)}")
        for image in images:
            if not image.is_file():
                raise ValueError(f"{path}:{number} names the image {image}, which is not there")
    if not items:
        raise ValueError(f"{path} holds no task item")
    return metric, items


def evaluate_task(loaded: LoadedModel, metric: str, items: Sequence[TaskItem], max_new_tokens: int, batch: int = 32) -> TaskResult:
    """Answer every item greedily and score it."""
    examples: list[dict[str, Any]] = []
    for start in tqdm(range(0, len(items), batch), desc="answering", leave=False, disable=None):
        group = items[start : start + batch]
        answers = generate(loaded, [_prompt(loaded, item) for item in group], max_new_tokens)
        for item, ids in zip(group, answers, strict=True):
            answer = loaded.processor.tokenizer.decode(ids).strip()
            examples.append(
                {
                    "question": item.messages[-1]["content"],
                    "image": str(item.images[0]) if item.images else "",
                    "answer": answer,
                    "truth": item.answer,
                    "score": SCORERS[metric](answer, item.answer),
                }
            )
    return TaskResult(metric, sum(example["score"] for example in examples) / len(examples), len(examples), examples)


def _prompt(loaded: LoadedModel, item: TaskItem) -> Encoded:
    messages = [*item.messages, {"role": "assistant", "content": ""}]
    return loaded.processor.encode(messages, item.images, inference=True)
