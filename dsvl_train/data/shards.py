"""Webdataset tar shards: written by the webdataset library, read by byte offset.

A shard is scanned once, header by header (`tar_scan.py`); from then on a member is one `os.pread` at its offset.
"""

from __future__ import annotations

import glob
import itertools
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import braceexpand

from dsvl_train.data.errors import SampleError
from dsvl_train.data.sample import Sample
from dsvl_train.data.storage import RemoteFiles, Unreachable, is_remote

MERGED_GAP = 8192
"""Members at most this many bytes apart are read together: headers and a small member between them cost less than another read."""

# ----------------------------------------------------------------------------------------------------------------- naming


def expand_shards(pattern: str, setting: str) -> list[Path]:
    """Shards of a folder, a glob or a brace pattern, sorted by name.

    Args:
        setting: name of the setting that holds the pattern, for errors.

    Raises:
        FileNotFoundError: nothing there, or a file that a brace pattern lists is missing.
        ValueError: the pattern names compressed shards, which cannot be read by offset.
    """
    folder = Path(pattern)
    if folder.is_dir():
        shards = sorted(folder.glob("*.tar"))
        if not shards:
            raise FileNotFoundError(f"{setting}={pattern}: the folder holds no *.tar; write shards there, or correct the setting")
        return shards
    try:
        parts = list(braceexpand.braceexpand(pattern)) if "{" in pattern else [pattern]
    except ValueError as error:
        raise ValueError(f"{setting}={pattern}: {error}") from error
    shards = []
    for part in parts:
        found = [Path(match) for match in glob.glob(part)]
        if not found:
            raise FileNotFoundError(f"{setting}={pattern}: {part} does not exist; write shards there, or correct the setting")
        shards += found
    shards = sorted(set(shards))
    for shard in shards:
        if shard.suffix != ".tar":
            raise ValueError(f"{setting}={pattern}: {shard} is not a plain .tar; compressed shards cannot be read by offset: unpack them")
    return shards


# ---------------------------------------------------------------------------------------------------------------- writing


class ShardWriter:
    """Writes samples into `<folder>/<prefix>-000000.tar`, …; a shard appears under its name only when it is complete.

    Use as a context manager; an exception inside leaves the finished shards and removes the unfinished one. Equal samples give equal bytes.
    """

    def __init__(
        self, folder: str | Path, prefix: str = "shard", *, max_samples: int = 10_000, max_bytes: int = 1 << 30, overwrite: bool = False
    ):
        """
        Args:
            max_samples: samples of a shard at most.
            max_bytes: a shard that has reached this many bytes takes no further sample.
            overwrite: remove `<prefix>-*.tar` of an earlier run first.

        Raises:
            ValueError: shards of this prefix exist and `overwrite` is False.
        """
        self.folder, self.prefix = Path(folder), prefix
        self.max_samples, self.max_bytes = max_samples, max_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        existing = sorted(self.folder.glob(f"{prefix}-*.tar"))
        if existing and not overwrite:
            raise ValueError(
                f"{existing[0]} exists: a mixture of two runs is no data set; remove the folder's shards or pass overwrite=True"
            )
        for shard in existing:
            shard.unlink()
        self.shards: list[Path] = []
        self.samples = 0
        self._stream: BinaryIO | None = None
        self._tar: Any = None
        self._in_shard = 0

    def write(
        self,
        messages: Sequence[Mapping[str, str]],
        images: Sequence[tuple[str, bytes]] = (),
        *,
        key: str | None = None,
        id: str | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> str:
        """Add a sample; returns its key.

        Args:
            images: (extension, encoded bytes) of each image in the order of the tags: ("png", b"...").
            key: name within the shard, without dots; default: the running number.

        Raises:
            ValueError: a key with a dot in its last component.
        """
        key = f"{self.samples:09d}" if key is None else key
        if not key or "." in key.rpartition("/")[2]:
            raise ValueError(f"sample key {key!r}: webdataset takes what follows the first dot for the extension; use a key without dots")
        if self._stream is not None and (self._in_shard >= self.max_samples or self._stream.tell() >= self.max_bytes):
            self._finish_shard()
        if self._stream is None:
            self._start_shard()
        members = {f"{position}.{extension}": raw for position, (extension, raw) in enumerate(images)}
        sample = Sample([dict(message) for message in messages], list(members), id, dict(meta or {}))
        self._tar.write({"__key__": key, "json": sample.as_json(), **members})
        self._in_shard += 1
        self.samples += 1
        return key

    def close(self) -> None:
        """Finish the last shard."""
        if self._stream is not None:
            self._finish_shard()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if error_type is None:
            self.close()
        elif self._stream is not None:
            self._tar.close()
            self._stream.close()
            self._unfinished.unlink(missing_ok=True)

    @property
    def _unfinished(self) -> Path:
        return self.folder / f".{self.prefix}-{len(self.shards):06d}.unfinished"

    def _start_shard(self) -> None:
        from webdataset import TarWriter  # imported late: it is slow, and readers don't need it

        self._stream = self._unfinished.open("wb")
        self._tar = TarWriter(self._stream, encoder=False, compress=False, mtime=0.0)
        self._in_shard = 0

    def _finish_shard(self) -> None:
        assert self._stream is not None
        self._tar.close()
        self._stream.close()
        self._stream = None
        shard = self.folder / f"{self.prefix}-{len(self.shards):06d}.tar"
        os.replace(self._unfinished, shard)
        self.shards.append(shard)


# ---------------------------------------------------------------------------------------------------------------- reading


class ShardReader:
    """Reads members by offset from several threads, from this machine's files and, through `remote`, from URLs.

    Members that lie close together come in one read, so a sample costs one. Of this machine's files a bounded number stays open: threads
    share a file's descriptor, and the one that was not used for longest is closed first.
    """

    def __init__(self, max_open: int = 256, remote: RemoteFiles | None = None, *, skip_unreachable: bool = False) -> None:
        """
        Args:
            max_open: files open at most, besides those being read; a shuffle block should not have more shards.
            remote: reads URLs; default: one without cache.
            skip_unreachable: what cannot be reached is a bad sample, not the end of the run.
        """
        self.max_open = max_open
        self.remote = remote or RemoteFiles()
        self.skip_unreachable = skip_unreachable
        self.opens = self.reads = 0
        """Files opened and reads made so far, of this machine's files."""
        self._lock = threading.Lock()
        self._open: OrderedDict[str, _OpenFile] = OrderedDict()  # least recently used first

    def read(self, path: str, spans: Sequence[tuple[int, int]], expected_size: int) -> list[bytes]:
        """Bytes of the (offset, size) spans of one shard.

        Args:
            path: a file's path, or a URL.
            expected_size: bytes the shard had when it was indexed.

        Raises:
            SampleError: `unreadable` - the file is gone, has another size, or a read fails.
            Unreachable: a URL cannot be read, or a file's whole folder is gone, and `skip_unreachable` is False.
        """
        try:
            if is_remote(path):
                return self._read_remote(path, spans, expected_size)
            return self._read_local(path, spans, expected_size)
        except Unreachable as error:
            if not self.skip_unreachable:
                raise
            raise SampleError("unreadable", str(error)) from error
        except OSError as error:
            raise SampleError("unreadable", f"{path}: {error}") from error

    def close(self) -> None:
        """Close all files that nobody reads."""
        with self._lock:
            idle = [path for path, file in self._open.items() if not file.users]
            files = [self._open.pop(path) for path in idle]
        for file in files:
            os.close(file.descriptor)

    def _read_remote(self, url: str, spans: Sequence[tuple[int, int]], expected_size: int) -> list[bytes]:
        _check_spans(url, spans, self.remote.stat(url).size, expected_size)
        return _read_merged(spans, partial(self.remote.read, url))

    def _read_local(self, path: str, spans: Sequence[tuple[int, int]], expected_size: int) -> list[bytes]:
        """A folder that is gone is a file system that is away, perhaps for a moment: it is asked again, like a server. A file that is gone
        while its folder is there is one bad file."""
        started, was_gone, folder = time.monotonic(), False, os.path.dirname(os.path.abspath(path))
        for attempt in itertools.count():
            try:
                with self._borrow(path) as file:
                    _check_spans(path, spans, file.size, expected_size)
                    return _read_merged(spans, partial(self._read_exactly, file.descriptor, path))
            except OSError as error:
                is_gone = not os.path.isdir(folder)
                if not (is_gone or was_gone):
                    raise
                was_gone = is_gone
                if attempt >= self.remote.retries:
                    seconds = time.monotonic() - started
                    raise Unreachable(
                        f"{path}: {error}. The folder {folder} is gone, and did not come back in {seconds:.0f} s "
                        f"(data.read_retries={attempt}): mount it again, and the same command goes on from the last checkpoint"
                    ) from error
            self.remote.pause(attempt)
        raise AssertionError("unreachable code")

    @contextmanager
    def _borrow(self, path: str) -> Iterator[_OpenFile]:
        """An open file that stays open for the time."""
        with self._lock:
            file = self._open.get(path)
            if file is not None:
                file.users += 1
                self._open.move_to_end(path)
        if file is None:
            file = self._add(path)
        try:
            yield file
        finally:
            with self._lock:
                file.users -= 1
                idle = [path for path, file in self._open.items() if not file.users] if len(self._open) > self.max_open else []
                surplus = [self._open.pop(path) for path in idle[: max(len(self._open) - self.max_open, 0)]]
            for file in surplus:
                os.close(file.descriptor)

    def _add(self, path: str) -> _OpenFile:
        """Open a file, without the lock: opening may take long. If another thread was faster, its file is used."""
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        mine = _OpenFile(descriptor, os.fstat(descriptor).st_size)
        with self._lock:
            self.opens += 1
            file = self._open.setdefault(path, mine)
            file.users += 1
            self._open.move_to_end(path)
        if file is not mine:
            os.close(descriptor)
        return file

    def _read_exactly(self, descriptor: int, path: str, offset: int, length: int) -> bytes:
        self.reads += 1
        raw = os.pread(descriptor, length, offset)
        while len(raw) < length:
            more = os.pread(descriptor, length - len(raw), offset + len(raw))
            if not more:
                raise SampleError("unreadable", f"{path}: ends at byte {offset + len(raw)}, in the middle of a member")
            raw += more
        return raw


@dataclass
class _OpenFile:
    descriptor: int
    size: int
    """Bytes when it was opened."""
    users: int = 0


def _check_spans(path: str, spans: Sequence[tuple[int, int]], size: int, expected_size: int) -> None:
    if size != expected_size:
        raise SampleError("unreadable", f"{path} has {size} bytes; it had {expected_size} when it was indexed")
    for offset, length in spans:
        if offset < 0 or length < 0 or offset + length > size:
            raise SampleError("unreadable", f"{path}: bytes {offset} to {offset + length} are beyond its {size}")


def merge_spans(spans: Sequence[tuple[int, int]], gap: int = MERGED_GAP) -> list[tuple[int, int]]:
    """The (offset, size) reads, ascending, that cover all spans and nothing between spans more than `gap` bytes apart."""
    merged: list[tuple[int, int]] = []
    for offset, length in sorted(span for span in spans if span[1]):
        if merged and offset <= sum(merged[-1]) + gap:
            start, size = merged[-1]
            merged[-1] = (start, max(size, offset + length - start))
        else:
            merged.append((offset, length))
    return merged


def _read_merged(spans: Sequence[tuple[int, int]], read: Callable[[int, int], bytes]) -> list[bytes]:
    """Contents of spans with few reads."""
    pieces = [(offset, read(offset, length)) for offset, length in merge_spans(spans)]
    found = []
    for offset, length in spans:
        start, raw = next(((at, raw) for at, raw in pieces if at <= offset and offset + length <= at + len(raw)), (offset, b""))
        found.append(raw[offset - start : offset - start + length])
    return found
