"""What must hold before anything is read or written: the tensors are those of the configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from dsvl_train.config.schema import ModelConfig
from dsvl_train.interop.blocks import Shape, TensorSource

NOT_WEIGHTS = ("*rotary_emb.inv_freq", "*.position_ids", "position_ids")
"""Buffers that older writers stored; they follow from the configuration."""

_SHOWN = 5


def check_tensors(source: TensorSource, wanted: Mapping[str, Shape]) -> None:
    """The source has exactly the wanted tensors, each of the wanted shape, of floating-point numbers.

    Raises:
        ValueError: naming the tensor.
    """
    infos = source.infos()
    for name, shape in wanted.items():
        if name in infos and infos[name].shape != shape:
            stored = list(infos[name].shape)
            raise ValueError(f"{source.where}: tensor {name} has the shape {stored}; the configuration asks for {list(shape)}")
        if name in infos and not infos[name].dtype.is_floating_point:
            raise ValueError(f"{source.where}: tensor {name} holds {infos[name].dtype}; a weight is floating point")
    missing = [name for name in wanted if name not in infos]
    unexpected = [name for name in infos if name not in wanted and not any(fnmatchcase(name, pattern) for pattern in NOT_WEIGHTS)]
    if missing:
        also = f" (and there is {some(unexpected)}, which it does not ask for)" if unexpected else ""
        raise ValueError(f"{source.where}: {len(missing)} tensor(s) that the configuration asks for are missing: {some(missing)}{also}")
    if unexpected:
        raise ValueError(f"{source.where}: {len(unexpected)} tensor(s) have no place in the configured model: {some(unexpected)}")


def some(names: Iterable[str]) -> str:
    """The first names, and how many more."""
    names = list(names)
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def differences(wanted: ModelConfig, stored: ModelConfig) -> list[str]:
    """Settings that make two models different, each as a clause; names, initialisation and context length make none."""
    return list(_differing(_essence(wanted), _essence(stored), "model"))


def _essence(model: ModelConfig) -> dict[str, Any]:
    plain = dataclasses.asdict(model)
    del plain["name"]
    language = plain["language"]
    for irrelevant in ("max_positions", "init_std"):
        del language[irrelevant]
    language["kv_heads"] = None if language["mla"] is not None else language["kv_heads"] or language["heads"]
    siglip = plain["vision"]["siglip"]
    siglip["mlp_ratio"] = int(siglip["width"] * siglip["mlp_ratio"])
    return plain


def _differing(wanted: Any, stored: Any, key: str) -> Iterable[str]:
    if isinstance(wanted, dict) and isinstance(stored, dict):
        for name in wanted:
            yield from _differing(wanted[name], stored[name], f"{key}.{name}")
    elif wanted != stored:
        yield f"{key} is {stored!r} there and {wanted!r} here"


def require_same_model(wanted: ModelConfig, stored: ModelConfig, where: str) -> None:
    """The stored weights fit the wanted model.

    Raises:
        ValueError: they do not; names the settings that differ.
    """
    differing = differences(wanted, stored)
    if differing:
        raise ValueError(f"{where} holds another model than the run's: {'; '.join(differing)}. Make the model group agree with it")
