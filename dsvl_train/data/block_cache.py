"""A bounded cache of byte blocks on a local disk, shared by any number of processes of one machine.

A block is a file named by the SHA-256 of its key, in one of 256 folders; it appears under its name complete, and ends with a CRC-32 of its
content, so that what a crash or a disk spoiled is read anew. The least recently used blocks go first. `max_bytes` holds at any moment: a
block's bytes are reserved, as an empty file of its size, before they are written, under a lock of the folder. The folder has to be on a
local file system (for `flock`).
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import time
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

log = logging.getLogger(__name__)

COPY_PREFIX = "copy-"
"""Of temporary files beside the blocks, which do not count."""
_CRC_BYTES = 4
_UNFINISHED = ".unfinished"
_ABANDONED_AFTER_S = 3600.0
"""Unfinished files and copies older than this belong to a process that died."""
_EVICT_TO = 0.9
"""An eviction goes down to this share of the bound, so that it is rare."""


class BlockCache:
    """Blocks by key."""

    def __init__(self, folder: str | Path, max_bytes: int) -> None:
        """
        Args:
            folder: made if it is not there; nothing else should be in it.
            max_bytes: of all blocks together.

        Raises:
            ValueError: the folder cannot be made or written.
        """
        self.folder, self.max_bytes = Path(folder), max_bytes
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with self._locked():
                for copy in self.folder.glob(f"{COPY_PREFIX}*"):
                    if copy.stat().st_mtime < time.time() - _ABANDONED_AFTER_S:
                        copy.unlink(missing_ok=True)
        except OSError as error:
            raise ValueError(f"data.cache_dir={folder} cannot be used: {error}; name a writable folder on a local disk") from error
        self._has_warned = False

    def get(self, key: str) -> bytes | None:
        """A block's content; None when it is not there (any more) or spoiled."""
        path = self._path(key)
        try:
            raw = path.read_bytes()
        except OSError:
            return None
        content, crc = raw[:-_CRC_BYTES], raw[-_CRC_BYTES:]
        if len(raw) < _CRC_BYTES or zlib.crc32(content) != int.from_bytes(crc, "little"):
            path.unlink(missing_ok=True)
            return None
        with suppress(OSError):  # evicted by another process since it was read
            os.utime(path)
        return content

    def put(self, key: str, content: bytes) -> None:
        """Keep a block. A disk that refuses costs the cache, not the run: it is logged once."""
        path, size = self._path(key), len(content) + _CRC_BYTES
        if size > self.max_bytes or path.exists():
            return
        unfinished = path.with_name(f"{uuid.uuid4().hex}{_UNFINISHED}")
        try:
            path.parent.mkdir(exist_ok=True, mode=0o700)
            with self._locked():
                self._reserve(unfinished, size)
            with unfinished.open("r+b") as stream:
                stream.write(content)
                stream.write(zlib.crc32(content).to_bytes(_CRC_BYTES, "little"))
            with self._locked():  # who counts the files may see a block under both names or under none otherwise
                os.replace(unfinished, path)
        except OSError as error:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
            if not self._has_warned:
                self._has_warned = True
                log.warning("data.cache_dir=%s: a block could not be kept (%s); reading goes on without", self.folder, error)

    def used_bytes(self) -> int:
        """Bytes of all files in the cache now."""
        return sum(size for _, size, _ in self._files())

    # --------------------------------------------------------------------------------------------------------------- bound

    def _reserve(self, unfinished: Path, size: int) -> None:
        """Make room, and a file of `size` that counts from now on. Under the lock.

        The count in the file `bytes` may only be too high (a block published twice, a process that died): finding it above the bound, an
        eviction counts anew.
        """
        counter = self.folder / "bytes"
        try:
            used = int(counter.read_text())
        except (OSError, ValueError):
            used = self.max_bytes  # unknown: count
        if used + size > self.max_bytes:
            used = self._evict(size)
        with unfinished.open("wb") as stream:
            stream.truncate(size)
        counter.write_text(str(used + size))

    def _evict(self, size: int) -> int:
        """Remove what was used least recently until `size` more bytes fit; returns what is left."""
        files = sorted(self._files())
        used = sum(length for _, length, _ in files)
        goal = max(min(self.max_bytes - size, int(self.max_bytes * _EVICT_TO)), 0)
        if used + size <= self.max_bytes:
            return used
        too_old = time.time_ns() - int(_ABANDONED_AFTER_S * 1e9)
        for used_ns, length, path in files:
            if used <= goal:
                break
            if path.name.endswith(_UNFINISHED) and used_ns > too_old:
                continue
            path.unlink(missing_ok=True)
            used -= length
        return used

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """(last use in ns, bytes, path) of every block, finished or not."""
        for part in self.folder.iterdir():
            if len(part.name) != 2 or not part.is_dir():
                continue
            for path in part.iterdir():
                with suppress(FileNotFoundError):
                    stat = path.stat()
                    yield stat.st_mtime_ns, stat.st_size, path

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield  # closing the file releases the lock, also when the process dies

    def _path(self, key: str) -> Path:
        name = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / name[:2] / name
