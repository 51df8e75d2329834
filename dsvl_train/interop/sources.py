"""Stored tensors, read lazily: safetensors, single or sharded, or `.bin` files of plain tensors.

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

from dsvl_train.interop.blocks import TensorInfo, TensorSource

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

_REOPEN_AFTER = 64 * 2**20
"""Bytes read through one memory map before it is dropped: pages that were read count as this process's memory until then."""

_PICKLES = (".bin", ".pth", ".pt")


class SafetensorsFile:
    """One file: its tensors, and reading parts of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: Any = None
        self._read_bytes = 0
        with _open(path) as handle:
            self.metadata: dict[str, str] = handle.metadata() or {}
            names = list(handle.keys())
            self.infos = {name: _info(path, name, handle) for name in names}

    def read(self, name: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        """The region of `size` that begins at `start`."""
        if self._handle is None:
            self._handle = _open(self.path)
        try:
            if tuple(size) == self.infos[name].shape:
                tensor = self._handle.get_tensor(name)
            else:
                tensor = self._handle.get_slice(name)[tuple(slice(at, at + length) for at, length in zip(start, size, strict=True))]
        except (SafetensorError, RuntimeError, OSError) as error:
            raise ValueError(f"{self.path}: cannot read tensor {name}: {error}") from error
        self._read_bytes += tensor.numel() * tensor.element_size()
        if self._read_bytes > _REOPEN_AFTER:
            self.close()
        return tensor

    def close(self) -> None:
        """Let go of the memory map."""
        self._handle, self._read_bytes = None, 0


class SafetensorsSource:
    """The tensors of several safetensors files."""

    def __init__(self, where: Path, files: Sequence[Path]) -> None:
        self.where = str(where)
        self._file: dict[str, SafetensorsFile] = {}
        self._last: SafetensorsFile | None = None
        for path in files:
            file = SafetensorsFile(path)
            for name in file.infos:
                if name in self._file:
                    raise ValueError(f"{path}: tensor {name} is also in {self._file[name].path.name}")
                self._file[name] = file
        self._infos = {name: file.infos[name] for name, file in self._file.items()}

    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor by name."""
        return self._infos

    def read(self, name: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        """The region of `size` that begins at `start`."""
        file = self._file[name]
        if self._last is not None and self._last is not file:
            self._last.close()
        self._last = file
        return file.read(name, start, size)


class BinSource:
    """Tensors of PyTorch `.bin` files, memory-mapped."""

    def __init__(self, where: Path, files: Sequence[Path]) -> None:
        self.where = str(where)
        self._tensors: dict[str, Tensor] = {}
        for file in files:
            for name, tensor in _load_bin(file).items():
                if name in self._tensors:
                    raise ValueError(f"{file}: tensor {name} is in another file too")
                self._tensors[name] = tensor
        self._infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in self._tensors.items()}

    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor by name."""
        return self._infos

    def read(self, name: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        """The region of `size` that begins at `start`."""
        return self._tensors[name][tuple(slice(at, at + length) for at, length in zip(start, size, strict=True))]


def open_weights(path: Path) -> TensorSource:
    """The tensors of a file, or of a model folder: `model.safetensors`, shards by index, or `.bin` files where there is no safetensors.

    Raises:
        ValueError: no weights, a shard that is missing, or a file that is not what its name says; names the file.
    """
    if path.is_file():
        return _source_of(path)(path, [path])
    for index_name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        single = path / index_name.removesuffix(".index.json")
        if single.is_file():
            return _source_of(single)(path, [single])
        if (path / index_name).is_file():
            return _open_sharded(path, path / index_name, _source_of(single))
    for suffix in (".safetensors", *_PICKLES):
        files = sorted(path.glob(f"*{suffix}"))
        if files:
            return _source_of(files[0])(path, files)
    raise ValueError(f"{path} has no weights: neither model.safetensors, nor shards with model.safetensors.index.json, nor .bin files")


def _source_of(file: Path) -> type[SafetensorsSource] | type[BinSource]:
    if file.suffix == ".safetensors":
        return SafetensorsSource
    if file.suffix in _PICKLES:
        return BinSource
    raise ValueError(f"{file}: unknown kind of weights; known are .safetensors, {', '.join(_PICKLES)}")


def _open_sharded(folder: Path, index_file: Path, source: type[SafetensorsSource] | type[BinSource]) -> TensorSource:
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
        known = ", ".join(SAFETENSORS_TYPES)
        raise ValueError(f"{file}: tensor {name} has the type {piece.get_dtype()}, which is not supported; known are {known}")
    return TensorInfo(tuple(piece.get_shape()), dtype)


def _load_bin(file: Path) -> dict[str, Tensor]:
    try:
        loaded = _load_plain(file)
    except Exception as error:  # whatever a broken or malicious pickle brings about
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{file}: refused, it is not a file of plain tensors: {reason[0]}") from error
    if not isinstance(loaded, dict) or not all(isinstance(k, str) and torch.is_tensor(v) for k, v in loaded.items()):
        raise ValueError(f"{file}: expected names and tensors, found something else")
    for name, tensor in loaded.items():
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise ValueError(f"{file}: tensor {name} is sparse or quantised; only plain tensors are supported")
    return loaded


def _load_plain(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
    return torch.load(file, map_location="cpu", weights_only=True)  # torch's format of before 1.6 cannot be mapped
