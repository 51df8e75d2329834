"""Bits per byte on held-out text: what a model still knows of language, whatever its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from dsvl_train.evaluation.forward import forward_packed
from dsvl_train.evaluation.loading import LoadedModel
from dsvl_train.evaluation.scorers import bits_per_byte


def read_texts(path: Path) -> list[str]:
    """Documents of a JSON lines file, each with a `text`.

    Raises:
        ValueError: a line is not such an object; names file and line.
    """
    texts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            texts.append(json.loads(line)["text"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f'{path}:{number} is not a JSON object with a "text": {error}') from error
    return texts


def evaluate_bits_per_byte(loaded: LoadedModel, texts: list[str], max_len: int, tokens_at_once: int = 4096) -> float:
    """Total negative log-likelihood of the texts in bits, over their UTF-8 bytes.

    A text longer than `max_len` tokens is cut, and each piece starts from the beginning-of-text token alone, so the figure does not
    depend on how texts are packed.
    """
    nll = 0.0
    for group in _grouped(_pieces(loaded, texts, max_len), tokens_at_once):
        ids = [piece[:-1] for piece in group]
        masks = [torch.zeros_like(piece, dtype=torch.bool) for piece in ids]
        labels = [piece[1:] for piece in group]
        for losses_t in forward_packed(loaded, ids, masks, [None] * len(ids), labels):
            nll += float(losses_t.double().sum())
    return bits_per_byte(nll, sum(len(text.encode()) for text in texts))


def _pieces(loaded: LoadedModel, texts: list[str], max_len: int) -> Iterator[Tensor]:
    tokenizer = loaded.processor.tokenizer
    for text in texts:
        ids = tokenizer.encode(text)
        for start in range(0, len(ids), max_len):
            yield torch.tensor([tokenizer.bos_id, *ids[start : start + max_len]])


def _grouped(pieces: Iterator[Tensor], tokens_at_once: int) -> Iterator[list[Tensor]]:
    group: list[Tensor] = []
    for piece in pieces:
        if group and sum(map(len, group)) + len(piece) > tokens_at_once:
            yield group
            group = []
        group.append(piece)
    if group:
        yield group
