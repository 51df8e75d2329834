"""Named arrays in one file, memory-mapped: what an index is kept in.

The file is a safetensors file (a JSON header, then the bytes of each array), so other tools open it too; it is read here without copying:
an array of gigabytes costs nothing until its elements are asked for, and then only their pages. No pickle. A file appears under its name
when it is complete.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_DTYPES = {name: np.dtype(code) for name, code in (("I64", "<i8"), ("U64", "<u8"), ("I32", "<i4"), ("U8", "|u1"))}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LONGEST_HEADER = 100_000_000
"""Bytes, as in the safetensors library."""


@dataclass(frozen=True)
class Column:
    """An array to write, in pieces that follow each other along its first axis."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    pieces: Iterable[NDArray[Any]]


def column(name: str, array: NDArray[Any]) -> Column:
    """A column of one piece."""
    return Column(name, array.dtype, array.shape, [array])


def write_arrays(path: Path, about: Mapping[str, str], columns: Sequence[Column]) -> None:
    """Write a file; a reader sees all of it or nothing. Pieces are asked for one after another, so memory holds one of them.

    Raises:
        OSError: the folder cannot be written to, or the disk is full.
    """
    columns = sorted(columns, key=lambda one: -one.dtype.itemsize)  # so every array starts at a multiple of its element's size
    header: dict[str, Any] = {"__metadata__": dict(about)}
    end = 0
    for one in columns:
        start, end = end, end + prod(one.shape) * one.dtype.itemsize
        header[one.name] = {"dtype": _NAMES[one.dtype], "shape": list(one.shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    unfinished = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.unfinished")
    try:
        with unfinished.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for one in columns:
                written = 0
                for piece in one.pieces:
                    stream.write(np.ascontiguousarray(piece, dtype=one.dtype).data)
                    written += len(piece)
                assert written == one.shape[0], f"{one.name}: {written} rows written, {one.shape[0]} announced"
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def map_arrays(path: Path) -> tuple[dict[str, str], dict[str, NDArray[Any]]]:
    """What a file says about itself, and its arrays, read-only and memory-mapped.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is cut, or no such file at all.
    """
    raw = _map(path)
    header_bytes = int.from_bytes(raw[:8].tobytes(), "little")
    if len(raw) < 8 or not 2 <= header_bytes <= min(len(raw) - 8, _LONGEST_HEADER):
        raise ValueError(f"{path} is no file of arrays: its first 8 bytes do not give the length of a header")
    body = raw[8 + header_bytes :]
    try:
        header = json.loads(raw[8 : 8 + header_bytes].tobytes())
        about = {str(key): str(value) for key, value in header.pop("__metadata__").items()}
        arrays = {name: _view(body, entry) for name, entry in header.items()}
        expected = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is no file of arrays: {error!r}") from error
    if expected != len(body):
        raise ValueError(f"{path} has {len(raw)} bytes; its header speaks of {8 + header_bytes + expected}")
    return about, arrays


def _map(path: Path) -> NDArray[np.uint8]:
    if path.stat().st_size == 0:  # which cannot be mapped
        return np.empty(0, dtype=np.uint8)
    # a plain array over the map: indexing the memmap class costs several times as much
    return np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))


def _view(body: NDArray[np.uint8], entry: Mapping[str, Any]) -> NDArray[Any]:
    dtype, shape, (start, end) = _DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, start, end)) or end > len(body):
        raise ValueError(f"an array of shape {shape} at {start} to {end} of {len(body)} bytes")
    if prod(shape) * dtype.itemsize != end - start or start % dtype.itemsize:
        raise ValueError(f"an array of shape {shape} and type {entry['dtype']} at {start} to {end}")
    return body[start:end].view(dtype).reshape(shape)
