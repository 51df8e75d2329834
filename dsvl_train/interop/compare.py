"""How two checkpoints differ: settings, counters, and every tensor, whatever layouts wrote them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsvl_train.checkpoints.folders import CONFIG_FILE, STATE_FILE
from dsvl_train.config.compose import load_run_config, to_plain
from dsvl_train.interop.blocks import TensorSource, read_whole
from dsvl_train.interop.native_source import open_everything


@dataclass(frozen=True)
class TensorDifference:
    """A tensor that both have and that is not the same, bit for bit."""

    name: str
    elements: int
    differing: int
    """Elements that are not the same."""
    largest: float
    """Largest difference of two elements."""
    relative: float
    """Norm of the difference over the norm of the first tensor."""


@dataclass
class Comparison:
    """What differs between two checkpoints."""

    values: list[str] = field(default_factory=list)
    """Settings and counters: `name: first -> second`."""
    presence: list[str] = field(default_factory=list)
    """Tensors that only one has, or that have another shape or type, in words."""
    tensors: list[TensorDifference] = field(default_factory=list)
    same_tensors: int = 0

    @property
    def same(self) -> bool:
        """Nothing differs."""
        return not (self.values or self.presence or self.tensors)


def compare(first: Path, second: Path) -> Comparison:
    """Compare two checkpoint folders; one tensor of each is in memory at a time.

    Raises:
        ValueError: a file cannot be read, or the parts of a tensor do not make a whole; names it.
    """
    found = Comparison(values=[*_settings(first, second), *_counters(first, second)])
    a, b = open_everything(first), open_everything(second)
    for name in sorted(a.infos().keys() | b.infos().keys()):
        apart = _apart(a, b, name)
        if apart:
            found.presence.append(f"{name} {apart}")
            continue
        difference = _difference(name, read_whole(a, name), read_whole(b, name))
        if difference is None:
            found.same_tensors += 1
        else:
            found.tensors.append(difference)
    return found


def _apart(a: TensorSource, b: TensorSource, name: str) -> str:
    if name not in a.infos() or name not in b.infos():
        return "is in the first only" if name in a.infos() else "is in the second only"
    first, second = a.infos()[name], b.infos()[name]
    if first == second:
        return ""
    described = [f"{str(one.dtype).removeprefix('torch.')} {list(one.shape)}" for one in (first, second)]
    return f"is {described[0]} in the first and {described[1]} in the second"


def _difference(name: str, a: Tensor, b: Tensor) -> TensorDifference | None:
    if torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b))):
        return None
    a, b = a.double(), b.double()
    gap = (a - b).abs()
    relative = float(gap.norm() / a.norm()) if float(a.norm()) else float("inf")
    return TensorDifference(name, a.numel(), int((gap != 0).sum()), float(gap.max()), relative)


def _settings(first: Path, second: Path) -> list[str]:
    return _differing(*(dict(_flat(to_plain(load_run_config(folder / CONFIG_FILE)))) for folder in (first, second)))


def _counters(first: Path, second: Path) -> list[str]:
    return _differing(*(dict(_flat(_state(folder / STATE_FILE))) for folder in (first, second)))


def _state(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error


def _differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    absent = "(absent)"
    return [f"{key}: {a.get(key, absent)} -> {b.get(key, absent)}" for key in a | b if a.get(key, absent) != b.get(key, absent)]


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _flat(item, f"{key}.{name}" if key else str(name))
    else:
        yield key, value
