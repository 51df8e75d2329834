"""Held-out text, for bits per byte: what a model still knows of language, whatever its tokenizer."""

from __future__ import annotations

from pathlib import Path

from dsvl_train.evaluation.samples import read_records


def read_texts(path: str | Path) -> list[str]:
    """Documents of a JSON lines file, each with a `text`.

    Raises:
        ValueError: a line is not such an object; names file and line. FileNotFoundError: no such file.
    """
    texts = []
    for where, record in read_records(path):
        if not isinstance(record.get("text"), str):
            raise ValueError(f'{where} is not an object with a "text"')
        texts.append(record["text"])
    return texts
