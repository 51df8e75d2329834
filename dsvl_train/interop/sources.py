"""Stored tensors of others, read lazily: safetensors, single or sharded, or `.bin` files of plain tensors.

No code in a file is ever run: safetensors holds none, and `.bin` goes through `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dsvl_train.interop.blocks import TensorInfo

SAFETENSORS_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types of the safetensors format that torch has."""

_REOPEN_AFTER = 256 * 2**20
"""Bytes read through one memory map before it is dropped: pages that were read count as this process's memory until then."""


class SafetensorsSource:
    """All `.safetensors` files of a folder, or those that its index names."""

    def __init__(self, folder: Path, files: Sequence[Path]) -> None:
        self.where = str(folder)
        self._infos: dict[str, TensorInfo] = {}
        self._file: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        self._read_bytes = 0
        for file in files:
            with _open(file) as handle:
                for name in handle.keys():
                    if name in self._file:
                        raise ValueError(f"{file}: tensor {name} is also in {self._file[name].name}")
                    self._infos[name] = _info(file, name, handle)
                    self._file[name] = file

    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor by name."""
        return self._infos

    def read(self, name: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        """The region of `size` that begins at `start`."""
        file = self._file[name]
        if self._read_bytes > _REOPEN_AFTER:
            self.close()
        if file not in self._open:
            self._open[file] = _open(file)
        handle = self._open[file]
        info = self._infos[name]
        try:
            if tuple(size) == info.shape:
                tensor = handle.get_tensor(name)
            else:
                tensor = handle.get_slice(name)[tuple(slice(at, at + length) for at, length in zip(start, size, strict=True))]
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{file}: cannot read tensor {name}: {error}") from error
        self._read_bytes += tensor.numel() * tensor.element_size()
        return tensor

    def close(self) -> None:
        """Let go of the files."""
        self._open.clear()
        self._read_bytes = 0


class BinSource:
    """Tensors of PyTorch `.bin` files, memory-mapped."""

    def __init__(self, folder: Path, files: Sequence[Path]) -> None:
        self.where = str(folder)
        self._tensors: dict[str, Tensor] = {}
        for file in files:
            for name, tensor in _load_bin(file).items():
                if name in self._tensors:
                    raise ValueError(f"{file}: tensor {name} is in another file too")
                self._tensors[name] = tensor

    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor by name."""
        return {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in self._tensors.items()}

    def read(self, name: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        """The region of `size` that begins at `start`."""
        return self._tensors[name][tuple(slice(at, at + length) for at, length in zip(start, size, strict=True))]


def open_weights(folder: Path) -> SafetensorsSource | BinSource:
    """The tensors of a model folder: `model.safetensors`, its shards by index, or `.bin` files where there is no safetensors.

    Raises:
        ValueError: no weights, a shard that is missing, or a file that is not what its name says; names the file.
    """
    for index_name, single, source in (
        ("model.safetensors.index.json", "model.safetensors", SafetensorsSource),
        ("pytorch_model.bin.index.json", "pytorch_model.bin", BinSource),
    ):
        if (folder / index_name).is_file():
            return _open_sharded(folder, folder / index_name, source)
        if (folder / single).is_file():
            return source(folder, [folder / single])
        loose = sorted(folder.glob(f"*{Path(single).suffix}"))
        if loose:
            return source(folder, loose)
    raise ValueError(f"{folder} has no weights: neither model.safetensors, nor shards with model.safetensors.index.json, nor .bin files")


def _open_sharded(folder: Path, index_file: Path, source: type) -> Any:
    try:
        weight_map = json.loads(index_file.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index_file}: not an index of shards: {error}") from error
    files = []
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{index_file}: {name!r} is not a file name")
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing; {index_file.name} names it")
        files.append(folder / name)
    opened = source(folder, files)
    missing = [tensor for tensor in weight_map if tensor not in opened.infos()]
    if missing:
        raise ValueError(f"{folder / weight_map[missing[0]]}: tensor {missing[0]} is missing; {index_file.name} says it is there")
    return opened


def _open(file: Path) -> Any:
    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{file}: not a whole safetensors file: {error}") from error


def _info(file: Path, name: str, handle: Any) -> TensorInfo:
    piece = handle.get_slice(name)
    dtype = SAFETENSORS_TYPES.get(piece.get_dtype())
    if dtype is None:
        raise ValueError(f"{file}: tensor {name} has the type {piece.get_dtype()}, which is not supported; known are {list(SAFETENSORS_TYPES)}")
    return TensorInfo(tuple(piece.get_shape()), dtype)


def _load_bin(file: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a broken or malicious pickle brings about
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{file}: refused, it is not a file of plain tensors: {reason[0]}") from error
    if not isinstance(loaded, dict) or not all(isinstance(k, str) and torch.is_tensor(v) for k, v in loaded.items()):
        raise ValueError(f"{file}: expected names and tensors, found something else")
    return loaded
