"""Bytes of shards that are not on this machine: any URL that fsspec knows (`s3://`, `http(s)://`, `gs://`, `memory://`, …).

Training reads ranges, one request per sample, never whole shards: every rank needs other samples of the same shard, so that whole shards
would travel once per node. With a cache on a local disk (`data.cache_dir`), ranges are widened to blocks, which are kept for neighbours
and later epochs. Indexing needs all of a shard once, and takes it in one piece (`local_copy`).

A request that fails is repeated with growing pauses; what cannot be had then is `Unreachable`.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import braceexpand

from dsvl_train.data.block_cache import COPY_PREFIX, BlockCache

T = TypeVar("T")

BLOCK_BYTES = 1 << 20
"""Bytes of a cached block; `benchmarks/slow_storage.py` compares sizes."""
_COPY_BYTES = 16 << 20
_LONGEST_PAUSE_S = 30.0
_MAGIC = "*?["


class Unreachable(OSError):
    """A remote file that cannot be read now, after all repetitions; names the URL and the reason."""


def is_remote(path: str) -> bool:
    """Whether a shard's path is a URL of other than this machine's files."""
    return "://" in path and not path.startswith("file://")


def local_path(path: str) -> str:
    """The path on this machine that a path or a `file://` URL names."""
    return path.removeprefix("file://") if path.startswith("file://") else path


@dataclass(frozen=True)
class RemoteStat:
    """What is known of a remote file without reading it."""

    size: int
    version: int
    """Changes when the content does: from ETag, checksum or time of change, as far as the storage tells."""


class RemoteFiles:
    """Reads remote files from any thread."""

    def __init__(
        self,
        cache: BlockCache | None = None,
        *,
        retries: int = 4,
        timeout_s: float = 60.0,
        first_pause_s: float = 0.5,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        """
        Args:
            retries: repetitions of a failed request.
            timeout_s: seconds that one request may take, where the file system lets us limit it (http, s3 and other asynchronous ones).
            first_pause_s: seconds before the first repetition; they double from one to the next, up to 30, with some jitter.
        """
        self.cache, self.retries, self.timeout_s, self.first_pause_s = cache, retries, timeout_s, first_pause_s
        self.block_bytes = block_bytes
        self.requests = 0
        """Requests made so far, repetitions included; for tests and benchmarks."""
        self._stats: dict[str, RemoteStat] = {}
        self._block_locks = [threading.Lock() for _ in range(64)]

    def __getstate__(self) -> dict[str, Any]:
        """Its settings travel to another process; what it knows, and its locks, do not."""
        return {**vars(self), "requests": 0, "_stats": {}, "_block_locks": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._block_locks = [threading.Lock() for _ in range(64)]

    def stat(self, url: str) -> RemoteStat:
        """Size and version of a file; asked for once.

        Raises:
            Unreachable: it is not there, or cannot be asked.
        """
        known = self._stats.get(url)
        if known is None:
            filesystem, path = _filesystem(url)
            known = _as_stat(url, self._insist(url, "asking for its size", lambda: filesystem.info(path, **self._limit(filesystem))))
            self._stats[url] = known
        return known

    def read(self, url: str, offset: int, length: int) -> bytes:
        """Bytes of a range that lies within the file.

        Raises:
            Unreachable: as `stat`, or the server does not serve ranges.
        """
        if length == 0:
            return b""
        if self.cache is None:
            return self._fetch(url, offset, length)
        first, last = offset // self.block_bytes, (offset + length - 1) // self.block_bytes
        whole = b"".join(self._blocks(url, first, last))
        start = offset - first * self.block_bytes
        return whole[start : start + length]

    @contextmanager
    def local_copy(self, url: str) -> Iterator[str]:
        """A file on this machine with the content of a remote one, removed afterwards; it does not count as cached.

        Raises:
            Unreachable: as `read`.
        """
        size = self.stat(url).size
        folder = None if self.cache is None else self.cache.folder
        # It is removed when it is closed; only a killed process leaves one, which the next BlockCache finds.
        with tempfile.NamedTemporaryFile(dir=folder, prefix=COPY_PREFIX, suffix=".tar") as copy:
            for offset in range(0, size, _COPY_BYTES):
                copy.write(self._fetch(url, offset, min(_COPY_BYTES, size - offset)))
            copy.flush()
            yield copy.name

    def expand(self, pattern: str, setting: str) -> list[str]:
        """URLs of the shards of a remote folder, glob or brace pattern, sorted. What a brace pattern lists is not asked for.

        Raises:
            FileNotFoundError: a folder or glob without shards.
            ValueError: a name that is no plain .tar, or a protocol that is not installed.
        """
        try:
            parts = list(braceexpand.braceexpand(pattern)) if "{" in pattern else [pattern]
        except ValueError as error:
            raise ValueError(f"{setting}={pattern}: {error}") from error
        shards: set[str] = set()
        for part in parts:
            shards.update(self._expand_one(part, pattern, setting))
        for shard in sorted(shards):
            if not shard.endswith(".tar"):
                raise ValueError(
                    f"{setting}={pattern}: {shard} is not a plain .tar; compressed shards cannot be read by offset: unpack them"
                )
        return sorted(shards)

    def _expand_one(self, part: str, pattern: str, setting: str) -> Sequence[str]:
        if ".tar" in part.rpartition("/")[2] and not any(letter in part for letter in _MAGIC):
            return [part]
        filesystem, path = _filesystem(part)
        glob = path if any(letter in path for letter in _MAGIC) else path.rstrip("/") + "/*.tar"
        found = self._insist(part, "listing it", lambda: filesystem.glob(glob))
        if not found:
            raise FileNotFoundError(f"{setting}={pattern}: no shards at {part}; write shards there, or correct the setting")
        return [filesystem.unstrip_protocol(name) for name in found]

    # -------------------------------------------------------------------------------------------------------------- blocks

    def _blocks(self, url: str, first: int, last: int) -> list[bytes]:
        """Neighbouring blocks; those that are not cached come in one request."""
        assert self.cache is not None
        stat = self.stat(url)
        keys = [f"{url}\n{stat.size}\n{stat.version}\n{self.block_bytes}\n{block}" for block in range(first, last + 1)]
        found = [self.cache.get(key) for key in keys]
        missing = [place for place, content in enumerate(found) if content is None]
        if not missing:
            return [content for content in found if content is not None]
        with self._block_locks[hash(keys[missing[0]]) % len(self._block_locks)]:  # one thread of this process fetches, others find it
            found = [self.cache.get(key) if content is None else content for key, content in zip(keys, found, strict=True)]
            missing = [place for place, content in enumerate(found) if content is None]
            if missing:
                start = (first + missing[0]) * self.block_bytes
                end = min((first + missing[-1] + 1) * self.block_bytes, stat.size)
                raw = self._fetch(url, start, end - start)
                for place in missing:
                    begin = (place - missing[0]) * self.block_bytes
                    found[place] = raw[begin : begin + self.block_bytes]
                    self.cache.put(keys[place], raw[begin : begin + self.block_bytes])
        return [content for content in found if content is not None]

    # ------------------------------------------------------------------------------------------------------------ requests

    def _fetch(self, url: str, offset: int, length: int) -> bytes:
        """One request for one range."""
        filesystem, path = _filesystem(url)

        def fetch() -> bytes:
            raw = filesystem.cat_file(path, start=offset, end=offset + length, **self._limit(filesystem))
            if len(raw) > length:
                raise Unreachable(
                    f"{url}: asked for {length} bytes, the server sent {len(raw)}: it does not serve ranges; use one that does"
                )
            if len(raw) < length:
                raise EOFError(f"{len(raw)} of {length} bytes arrived")
            return bytes(raw)

        return self._insist(url, f"reading bytes {offset} to {offset + length}", fetch)

    def _limit(self, filesystem: Any) -> dict[str, float]:
        """The time limit, for file systems whose calls take one."""
        return {"timeout": self.timeout_s} if filesystem.async_impl else {}

    def _insist(self, url: str, doing: str, call: Callable[[], T]) -> T:
        started = time.monotonic()
        for attempt in range(self.retries + 1):
            self.requests += 1
            try:
                return call()
            except (FileNotFoundError, PermissionError) as error:  # an answer: asking again does not change it
                raise Unreachable(f"{url}: {doing} failed: {type(error).__name__}: {error}") from error
            except (Unreachable, AssertionError, MemoryError):
                raise
            except Exception as error:  # file systems raise what their libraries do; nothing of ours runs inside
                if attempt == self.retries:
                    seconds = time.monotonic() - started
                    raise Unreachable(
                        f"{url}: {doing} failed {attempt + 1} times in {seconds:.0f} s, the last time with {type(error).__name__}: {error}"
                    ) from error
            self.pause(attempt)
        raise AssertionError("unreachable code")

    def pause(self, attempt: int) -> None:
        """Wait before asking again after the failed `attempt`, counted from 0."""
        time.sleep(min(self.first_pause_s * 2**attempt, _LONGEST_PAUSE_S) * random.uniform(0.5, 1.0))


def _filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL (it keeps one per kind and server), and the path within it."""
    import fsspec  # late: runs on local files do not need it

    try:
        filesystem, path = fsspec.url_to_fs(url)
    except ImportError as error:
        raise ValueError(f"{url}: {error}; install what remote shards need: pip install 'dsvl_train[remote]'") from error
    except ValueError as error:
        raise ValueError(f"{url} cannot be opened: {error}") from error
    return filesystem, path


def _as_stat(url: str, info: dict[str, Any]) -> RemoteStat:
    size = info.get("size")
    if not isinstance(size, int):
        raise Unreachable(f"{url}: the server does not tell its size")
    names = ("ETag", "etag", "Content-MD5", "Digest", "LastModified", "Last-Modified", "mtime", "created")
    known = "\n".join(f"{name}={info[name]}" for name in names if info.get(name) is not None)
    return RemoteStat(size, int.from_bytes(hashlib.sha256(known.encode()).digest()[:7], "little"))


def open_remote_files(cache_dir: str | None, cache_gb: float, retries: int) -> RemoteFiles:
    """Remote files as data.cache_dir, data.cache_gb and data.read_retries say.

    Raises:
        ValueError: the cache folder cannot be used, or its disk is smaller than the cache may grow.
    """
    if cache_dir is None or cache_gb == 0:
        return RemoteFiles(retries=retries)
    max_bytes = int(cache_gb * 1e9)
    cache = BlockCache(cache_dir, max_bytes)
    disk = shutil.disk_usage(cache.folder).total
    if max_bytes > disk:
        raise ValueError(f"data.cache_gb={cache_gb:g}: the disk of data.cache_dir={cache_dir} has {disk / 1e9:.0f} GB; set it lower")
    return RemoteFiles(cache, retries=retries, block_bytes=BLOCK_BYTES)
