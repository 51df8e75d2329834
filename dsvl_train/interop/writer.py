"""Writing safetensors tensor by tensor: the memory in use is that of one tensor, however large the model."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from dsvl_train.checkpoints.durable import sync_folder
from dsvl_train.interop.blocks import TensorInfo, TensorSource, read_whole
from dsvl_train.interop.sources import SAFETENSORS_TYPES

INDEX_FILE = "model.safetensors.index.json"
_TYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_TYPES.items()}

ShardName = Callable[[int, int], str]
"""(shard from 1, shards) -> file name."""


class _Sink(Protocol):
    def write(self, data: bytes | memoryview, /) -> object: ...


def five_digits(shard: int, shards: int) -> str:
    """`model-00001-of-00003.safetensors`, as transformers and the released DeepSeek-VL have it."""
    return f"model-{shard:05d}-of-{shards:05d}.safetensors"


def six_digits(shard: int, shards: int) -> str:
    """`model-00001-of-000004.safetensors`, as the released DeepSeek-VL2 has it."""
    return f"model-{shard:05d}-of-{shards:06d}.safetensors"


class CastSource:
    """A source whose floating-point tensors are converted as they are read, but for those that `keep` names."""

    def __init__(self, source: TensorSource, dtype: torch.dtype, keep: Callable[[str], bool]) -> None:
        self.where = source.where
        self._source = source
        self._infos = {
            name: TensorInfo(info.shape, dtype if info.dtype.is_floating_point and not keep(name) else info.dtype)
            for name, info in source.infos().items()
        }

    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor, as it will be read."""
        return self._infos

    def read(self, name: str, start: Sequence[int], size: Sequence[int]) -> torch.Tensor:
        """The region of `size` that begins at `start`."""
        return self._source.read(name, start, size).to(self._infos[name].dtype)


def write_shards(
    folder: Path,
    source: TensorSource,
    *,
    max_bytes: int,
    shard_name: ShardName = five_digits,
    prefix: str = "",
    index: bool = True,
    progress: Callable[[int], Any] = lambda size: None,
) -> None:
    """Write all tensors of a source, in its order.

    Args:
        max_bytes: of a file; a single larger tensor has a file of its own.
        shard_name: names of several files; one file alone is `model.safetensors`.
        prefix: put before each tensor's name.
        index: write `model.safetensors.index.json` beside several files.
        progress: told the bytes of each tensor written.
    """
    infos = source.infos()
    shards = plan_shards(infos, max_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else shard_name(number, len(shards))
        with (folder / file).open("wb") as out:
            stored = {prefix + name: infos[name] for name in names}
            write_safetensors(out, stored, lambda name: read_whole(source, name.removeprefix(prefix)), progress=progress)
        weight_map |= {prefix + name: file for name in names}
    if index and len(shards) > 1:
        total = sum(info.bytes for info in infos.values())
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=2)
        (folder / INDEX_FILE).write_text(text + "\n", encoding="utf-8")


def plan_shards(infos: Mapping[str, TensorInfo], max_bytes: int) -> list[list[str]]:
    """Tensors per file, in order, each file at most `max_bytes`."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, info in infos.items():
        if shards[-1] and filled + info.bytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += info.bytes
    return shards


def write_safetensors(
    file: _Sink,
    infos: Mapping[str, TensorInfo],
    read: Callable[[str], torch.Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int], Any] = lambda size: None,
) -> None:
    """The safetensors format: header length, JSON header, the tensors' bytes without gaps; wide types first, so that all are aligned.

    Args:
        read: name -> the tensor, on the CPU; called once for each, in the order of the file.
    """
    order = sorted(infos, key=lambda name: -infos[name].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    position = 0
    for name in order:
        info = infos[name]
        end = position + info.bytes
        header[name] = {"dtype": _TYPE_NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [position, end]}
        position = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(struct.pack("<Q", len(encoded)))
    file.write(encoded)
    for name in order:
        file.write(read(name).contiguous().reshape(-1).view(torch.uint8).numpy().data)
        progress(infos[name].bytes)


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to write in that gets its name `out` when all is written, and vanishes when something fails.

    Raises:
        ValueError: there is something at `out` already.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists already; give another folder, or remove it")
    unfinished = out.with_name(f".unfinished_{out.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        for file in unfinished.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        for written in [unfinished, *(path for path in unfinished.rglob("*") if path.is_dir())]:
            sync_folder(written)
        os.replace(unfinished, out)
        sync_folder(out.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
