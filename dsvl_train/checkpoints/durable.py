"""Files that are on the disk when a call returns, not just on their way to it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

_PIECE = 4 * 2**20
"""Bytes that are hashed and then written while they are still in the processor's cache. Both let other Python threads run."""


@dataclass(frozen=True)
class FileEntry:
    """What a file holds."""

    bytes: int
    sha256: str


class HashedFile:
    """A new file that is hashed as it is written, and durable once its context is left without an error."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb")
        self._hash = hashlib.sha256()
        self._bytes = 0

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._file:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())

    def write(self, data: bytes | memoryview) -> None:
        """Append."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _PIECE):
            piece = view[start : start + _PIECE]
            self._hash.update(piece)
            self._file.write(piece)
        self._bytes += len(view)

    @property
    def entry(self) -> FileEntry:
        """What was written so far."""
        return FileEntry(self._bytes, self._hash.hexdigest())


def write_file(path: Path, data: bytes) -> FileEntry:
    """A new durable file."""
    with HashedFile(path) as file:
        file.write(data)
    return file.entry


def hash_file(path: Path) -> FileEntry:
    """Read a file once.

    Raises:
        OSError: it cannot be read.
    """
    sha256, size = hashlib.sha256(), 0
    buffer = bytearray(_PIECE)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            sha256.update(memoryview(buffer)[:count])
            size += count
    return FileEntry(size, sha256.hexdigest())


@contextmanager
def replacing(path: Path, text: str) -> Iterator[None]:
    """Give a small file new content when the context is left without an error: whoever reads it, whenever power fails, finds the old or
    the new one. The new one is on the disk before the context is entered, so that a full disk is met before, not after, what it tells of.
    """
    scratch = path.with_name(f".{path.name}.new")
    write_file(scratch, text.encode())
    yield
    os.replace(scratch, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
