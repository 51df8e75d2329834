"""How a question of a benchmark is put to a model: in its conversation template or as plain text, with or without worked examples.

With options there are two ways. `text`: the prompt is the question alone, and each option's text is scored as the answer to it; models too
small to answer with a letter are measured so (VL §3.2.2). `letter`: the prompt lists the options, and their letters are scored.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dsvl_train.data.tiling import ImageSource
from dsvl_train.evaluation.tasks import TaskItem

IMAGE = "<image>"
"""Where an image goes in a question's text; VL's own tag is put in its place."""


@dataclass(frozen=True)
class Question:
    """One question of a benchmark, however it will be put."""

    text: str
    images: Sequence[ImageSource] = ()
    options: Sequence[str] = ()
    """Empty: the model writes the answer itself."""
    right: int = 0
    answer: str = ""
    """Without options: the whole answer as a worked example shows it."""
    truth: str = ""
    """Without options: what is compared."""
    topic: str = ""
    """What the questions are about, for the heading of a plain prompt; "" = no heading."""
    continues: bool = False
    """The answer goes on with the text instead of answering it."""
    group: str = ""
    where: str = ""


@dataclass(frozen=True)
class Style:
    """How questions are put."""

    plain: bool = False
    """Text without a template, as a base model knows it."""
    options: Literal["text", "letter"] = "text"


def make_item(question: Question, style: Style, shots: Sequence[Question] = ()) -> TaskItem:
    """The question as a task item, after worked examples of the same kind."""
    make = _plain_item if style.plain else _conversation_item
    return make(question, style, shots)


def shots_for(question: Question, pool: Sequence[Question], shots: int) -> list[Question]:
    """The first examples of the question's group; of the whole pool where its group has none.

    Raises:
        ValueError: there are fewer than `shots`.
    """
    chosen = ([one for one in pool if one.group == question.group] or list(pool))[:shots]
    if len(chosen) < shots:
        raise ValueError(f"{question.where}: {shots} worked examples are wanted, and there are {len(chosen)} for it")
    return chosen


def _conversation_item(question: Question, style: Style, shots: Sequence[Question]) -> TaskItem:
    messages = []
    for shot in shots:
        messages += [
            {"role": "user", "content": _asked(shot, style, "\nAnswer with the letter of the right option.")},
            {"role": "assistant", "content": _answer(shot, style)},
        ]
    messages.append({"role": "user", "content": _asked(question, style, "\nAnswer with the letter of the right option.")})
    return _item(question, style, shots, messages, lead="")


def _plain_item(question: Question, style: Style, shots: Sequence[Question]) -> TaskItem:
    kind = "multiple choice questions (with answers)" if question.options else "questions (with answers)"
    parts = [f"The following are {kind} about {question.topic}."] if question.topic else []
    parts += [f"{_framed(shot, style)} {_answer(shot, style)}" for shot in shots]
    parts.append(_framed(question, style))
    return _item(question, style, shots, [{"role": "document", "content": "\n\n".join(parts)}], lead=" ")


def _item(question: Question, style: Style, shots: Sequence[Question], messages: list[dict[str, str]], lead: str) -> TaskItem:
    return TaskItem(
        messages,
        [image for one in (*shots, question) for image in one.images],
        truths=[] if question.options else [question.truth],
        options=[lead + option for option in _options(question, style)],
        right=question.right,
        group=question.group,
        stop="\n\nQuestion:" if style.plain and not question.options else "",
        where=question.where,
    )


def _framed(question: Question, style: Style) -> str:
    if question.continues and not _lettered(question, style):
        return question.text
    return f"Question: {_asked(question, style, '')}\nAnswer:"


def _asked(question: Question, style: Style, instruction: str) -> str:
    if not _lettered(question, style):
        return question.text
    lines = [f"{letter}. {option}" for letter, option in zip(string.ascii_uppercase, question.options, strict=False)]
    return "\n".join([question.text, *lines]) + instruction


def _answer(question: Question, style: Style) -> str:
    return _options(question, style)[question.right] if question.options else question.answer


def _options(question: Question, style: Style) -> list[str]:
    return list(string.ascii_uppercase[: len(question.options)]) if _lettered(question, style) else list(question.options)


def _lettered(question: Question, style: Style) -> bool:
    """Whether letters stand for the options: also where an option is an image, which only a prompt can hold."""
    return bool(question.options) and (style.options == "letter" or any(IMAGE in option for option in question.options))
