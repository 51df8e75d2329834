"""The index of shards: all that planning needs, measured once, without decoding an image.

Per sample: its shard, the byte offsets of its members (the .json first, then its images in the order of their tags), tokens, supervised
tokens, visual tokens and tiles. It is made from the JSON and the image headers by `Processor.measure`, so it belongs to one tokenizer,
template and tile geometry: the processor's fingerprint is in its file name and in the file. An index whose shards have since changed in
size or modification time is stale, and made anew.

Samples that cannot be measured have no length, so no plan can hold them: they are listed with kind, shard, key and reason.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsvl_train.data.errors import SampleError
from dsvl_train.data.order import Ints
from dsvl_train.data.processor import Processor
from dsvl_train.data.sample import find_images, parse_sample
from dsvl_train.data.shards import MemberGroup, ShardReader, expand_shards, group_members, scan_tar
from dsvl_train.data.storage import RemoteFiles, is_remote, local_path
from dsvl_train.data.tiling import open_image

log = logging.getLogger(__name__)

VERSION = 1
_HEADER_BYTES = 65_536
"""An image's size nearly always lies within this many first bytes."""
_STAT_THREADS = 32
"""Asking a remote file for its size is all waiting."""

Shard = Path | str
"""A file of this machine, or a URL."""

Progress = Callable[[int, int], None]
"""Called with (shards done, shards)."""


@dataclass(frozen=True)
class SkippedSample:
    """A sample that is in no plan."""

    kind: str
    shard: str
    key: str
    reason: str


@dataclass(frozen=True)
class DamagedShard:
    """A shard that could be read up to `offset` only."""

    shard: str
    offset: int
    reason: str
    samples: int
    """Samples before the damage."""


@dataclass
class ShardIndex:
    """The index of a set of shards. n = samples, m = members."""

    folder: Path | str
    """Of the shards' names; a str is a URL."""
    shards: list[str]
    shard_bytes: Ints
    """[shards]"""
    shard_mtime_ns: Ints
    """[shards]; for URLs `RemoteStat.version`."""
    fingerprint: str
    """Of the processor that measured."""
    shard_n: NDArray[np.int32]
    """[n] number of the sample's shard; ascending."""
    first_member_n: Ints
    """[n + 1] where a sample's members start in the member arrays."""
    offset_m: Ints
    size_m: Ints
    crc_n: NDArray[np.uint32]
    """[n] CRC-32 of the .json: shows bytes that changed under the index."""
    tokens_n: NDArray[np.int32]
    supervised_n: NDArray[np.int32]
    visual_n: NDArray[np.int32]
    tiles_n: NDArray[np.int32]
    skipped: list[SkippedSample] = field(default_factory=list)
    damaged: list[DamagedShard] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.shard_n)

    @property
    def images_n(self) -> Ints:
        """[n] images of each sample."""
        return np.diff(self.first_member_n) - 1

    def read(self, sample: int, reader: ShardReader) -> tuple[bytes, list[bytes]]:
        """The .json and the encoded images of a sample.

        Raises:
            SampleError: `unreadable` - the shard is gone, cut, or no longer what was indexed.
        """
        shard = int(self.shard_n[sample])
        first, end = int(self.first_member_n[sample]), int(self.first_member_n[sample + 1])
        spans = list(zip(self.offset_m[first:end].tolist(), self.size_m[first:end].tolist(), strict=True))
        text, *images = reader.read(f"{self.folder}/{self.shards[shard]}", spans, int(self.shard_bytes[shard]))
        if zlib.crc32(text) != int(self.crc_n[sample]):
            raise SampleError("unreadable", f"{self.where(sample)}: its bytes changed since it was indexed")
        return text, images

    def where(self, sample: int) -> str:
        """Shard and byte offset of a sample, for logs."""
        return f"{self.shards[int(self.shard_n[sample])]}@{int(self.offset_m[self.first_member_n[sample]])}"


_ARRAYS = (
    "shard_bytes",
    "shard_mtime_ns",
    "shard_n",
    "first_member_n",
    "offset_m",
    "size_m",
    "crc_n",
    "tokens_n",
    "supervised_n",
    "visual_n",
    "tiles_n",
)

# --------------------------------------------------------------------------------------------------------------- building


@dataclass
class _ShardPart:
    """What one shard gives; one row per sample."""

    rows: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    """CRC, tokens, supervised, visual, tiles."""
    spans: list[list[tuple[int, int]]] = field(default_factory=list)
    skipped: list[SkippedSample] = field(default_factory=list)
    damaged: DamagedShard | None = None


def build_index(
    shards: Sequence[Shard],
    processor: Processor,
    *,
    workers: int = 1,
    progress: Progress | None = None,
    remote: RemoteFiles | None = None,
) -> ShardIndex:
    """Measure every sample of some shards (all in one folder or below it), shards in parallel.

    Raises:
        OSError: a shard cannot be opened at all.
    """
    folder = _common_folder(shards)
    names = _names(shards, folder)
    progress = progress or _log_progress(folder)
    reader = ShardReader(remote=remote)
    with ThreadPoolExecutor(max(workers, 1), thread_name_prefix="index") as pool:
        stats = list(pool.map(partial(_stat, remote=reader.remote), shards))
        waiting = [pool.submit(_index_shard, shard, name, processor, reader) for shard, name in zip(shards, names, strict=True)]
        parts = []
        try:
            for future in waiting:
                parts.append(future.result())
                progress(len(parts), len(shards))
        finally:
            for future in waiting:
                future.cancel()
            reader.close()
    rows = np.asarray([row for part in parts for row in part.rows], dtype=np.int64).reshape(-1, 5)
    spans = [span for part in parts for sample in part.spans for span in sample]
    counts = [len(sample) for part in parts for sample in part.spans]
    where = np.asarray(spans, dtype=np.int64).reshape(-1, 2)
    return ShardIndex(
        folder=folder,
        shards=names,
        shard_bytes=np.asarray([size for size, _ in stats], dtype=np.int64),
        shard_mtime_ns=np.asarray([version for _, version in stats], dtype=np.int64),
        fingerprint=processor.fingerprint(),
        shard_n=np.repeat(np.arange(len(parts), dtype=np.int32), [len(part.rows) for part in parts]),
        first_member_n=np.concatenate([[0], np.cumsum(np.asarray(counts, dtype=np.int64))]).astype(np.int64),
        offset_m=np.ascontiguousarray(where[:, 0]),
        size_m=np.ascontiguousarray(where[:, 1]),
        crc_n=rows[:, 0].astype(np.uint32),
        tokens_n=rows[:, 1].astype(np.int32),
        supervised_n=rows[:, 2].astype(np.int32),
        visual_n=rows[:, 3].astype(np.int32),
        tiles_n=rows[:, 4].astype(np.int32),
        skipped=[skipped for part in parts for skipped in part.skipped],
        damaged=[part.damaged for part in parts if part.damaged is not None],
    )


def _index_shard(path: Shard, name: str, processor: Processor, reader: ShardReader) -> _ShardPart:
    if isinstance(path, str):
        with reader.remote.local_copy(path) as copy:  # all of it is needed, once: in one piece
            return _index_shard(Path(copy), name, processor, ShardReader(max_open=0))
    scan = scan_tar(path)
    part = _ShardPart()
    groups = list(group_members(scan.members))
    for group in groups:
        try:
            spans, row = _measure(group, str(path), scan.size, processor, reader)
        except SampleError as error:
            if error.kind == "unreadable":  # a disk or network that fails now says nothing about the sample
                raise OSError(f"indexing {path}: {error}") from error
            part.skipped.append(SkippedSample(error.kind, name, group.key, str(error)))
            continue
        if row[2] == 0:
            part.skipped.append(SkippedSample("nothing_supervised", name, group.key, "no token of it is supervised: it has no loss"))
            continue
        part.spans.append(spans)
        part.rows.append(row)
    if scan.damage is not None:
        part.damaged = DamagedShard(name, scan.damage.offset, scan.damage.reason, len(groups))
    return part


def _measure(
    group: MemberGroup, path: str, size: int, processor: Processor, reader: ShardReader
) -> tuple[list[tuple[int, int]], tuple[int, int, int, int, int]]:
    """Spans of a sample's members (the .json, then its images), and its row."""
    if group.repeated is not None:
        raise SampleError("bad_json", f"the member {group.key}.{group.repeated} occurs twice")
    text_member = group.members.get("json")
    if text_member is None:
        raise SampleError("bad_json", f"no {group.key}.json among its members {sorted(group.members)}")
    (text,) = reader.read(path, [(text_member.offset, text_member.size)], size)
    sample = parse_sample(text)
    others = [member for extension, member in group.members.items() if extension != "json"]
    extensions = [extension for extension in group.members if extension != "json"]
    images = [others[position] for position in find_images(sample.images, group.key, extensions)]
    sizes_wh = [_image_size(path, size, (image.offset, image.size), processor.max_image_pixels, reader) for image in images]
    measured = processor.measure(sample.messages, sizes_wh)
    spans = [(member.offset, member.size) for member in (text_member, *images)]
    return spans, (zlib.crc32(text), measured.tokens, measured.supervised_tokens, measured.visual_tokens, measured.tiles)


def _image_size(path: str, size: int, span: tuple[int, int], max_pixels: int, reader: ShardReader) -> tuple[int, int]:
    """(width, height) from an image's header: from its first bytes, or from the whole file where they are not enough."""
    offset, length = span
    (head,) = reader.read(path, [(offset, min(length, _HEADER_BYTES))], size)
    try:
        return open_image(head, max_pixels).size
    except SampleError as error:
        if error.kind != "image_broken" or length <= _HEADER_BYTES:
            raise
    (whole,) = reader.read(path, [span], size)
    return open_image(whole, max_pixels).size


def _common_folder(shards: Sequence[Shard]) -> Path | str:
    urls = [shard for shard in shards if isinstance(shard, str)]
    if urls:
        protocol = urls[0].partition("://")[0]
        return f"{protocol}://{os.path.commonpath([url.partition('://')[2].rpartition('/')[0] for url in urls])}"
    parents = [shard.absolute().parent for shard in shards if isinstance(shard, Path)]
    return Path(os.path.commonpath(parents)) if parents else Path()


def _names(shards: Sequence[Shard], folder: Path | str) -> list[str]:
    """Of the shards within their common folder."""
    return [shard[len(str(folder)) + 1 :] if isinstance(shard, str) else str(shard.absolute().relative_to(folder)) for shard in shards]


def _stat(shard: Shard, remote: RemoteFiles) -> tuple[int, int]:
    """(bytes, a number that changes with the content)."""
    if isinstance(shard, str):
        found = remote.stat(shard)
        return found.size, found.version
    stat = shard.stat()
    return stat.st_size, stat.st_mtime_ns


def _log_progress(folder: Path | str) -> Progress:
    """A line in the log every few seconds, and one at the end of anything that took long."""
    start = last = time.monotonic()

    def report(done: int, shards: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > 5 or (done == shards and now - start > 5):
            last = now
            log.info("indexing %s: %d of %d shards, %.0f s", folder, done, shards, now - start)

    return report


# ----------------------------------------------------------------------------------------------------------------- on disk


def index_path(shards: Sequence[Shard], fingerprint: str, index_dir: str | None = None) -> Path:
    """Where the index of these shards for this processor lies: beside them, or in `index_dir`, where their folder is part of its name."""
    folder = _common_folder(shards)
    names = "\n".join(_names(shards, folder))
    if index_dir is not None:
        names = f"{folder}\n{names}"
    return (
        Path(folder if index_dir is None else index_dir) / f"index-{fingerprint[:12]}-{hashlib.sha256(names.encode()).hexdigest()[:8]}.npz"
    )


def save_index(index: ShardIndex, path: Path) -> None:
    """Write an index; a reader sees all of it or nothing."""
    about = {
        "version": VERSION,
        "fingerprint": index.fingerprint,
        "folder": str(index.folder) if isinstance(index.folder, str) else None,
        "shards": index.shards,
        "skipped": [asdict(skipped) for skipped in index.skipped],
        "damaged": [asdict(damaged) for damaged in index.damaged],
    }
    arrays: dict[str, Any] = {name: getattr(index, name) for name in _ARRAYS}
    arrays["about"] = np.frombuffer(json.dumps(about).encode(), dtype=np.uint8)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with unfinished.open("wb") as stream:
            np.savez(stream, **arrays)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def load_index(path: Path, folder: Path | None = None) -> ShardIndex:
    """Read an index.

    Args:
        folder: of the shards, where the index does not lie beside them; URLs it knows itself.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is damaged or of another version.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in (*_ARRAYS, "about")}
        about = json.loads(arrays.pop("about").tobytes())
        if about["version"] != VERSION:
            raise ValueError(f"version {about['version']}; this code reads {VERSION}")
        index = ShardIndex(
            folder=folder or about.get("folder") or path.absolute().parent,
            shards=about["shards"],
            fingerprint=about["fingerprint"],
            skipped=[SkippedSample(**skipped) for skipped in about["skipped"]],
            damaged=[DamagedShard(**damaged) for damaged in about["damaged"]],
            **arrays,
        )
    except FileNotFoundError:
        raise
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a usable index: {error}") from error
    return index


def stale_reason(index: ShardIndex, shards: Sequence[Shard], fingerprint: str, remote: RemoteFiles | None = None) -> str | None:
    """Why an index does not describe these shards as they are now; None when it does."""
    if index.fingerprint != fingerprint:
        return "it was made with another processor (tokenizer, template, tiling or mask settings)"
    names = _names(shards, index.folder)
    if names != index.shards:
        return f"it describes {len(index.shards)} shards; there are {len(names)}, or their names differ"
    with ThreadPoolExecutor(_STAT_THREADS) as pool:
        found = pool.map(partial(_stat, remote=remote or RemoteFiles()), shards)
        for name, now, size, version in zip(names, found, index.shard_bytes.tolist(), index.shard_mtime_ns.tolist(), strict=True):
            if now != (size, version):
                return f"{name} changed after it was made"
    return None


def open_index(
    pattern: str,
    processor: Processor,
    *,
    setting: str,
    processor_folder: str,
    build: bool = True,
    workers: int = 1,
    index_dir: str | None = None,
    remote: RemoteFiles | None = None,
) -> ShardIndex:
    """The index of a folder, glob or brace pattern of shards: loaded if it is fresh, else built and stored (one process only must build).

    Args:
        setting: name of the setting that holds the pattern, for errors.
        build: False = never build.
        index_dir: where indexes lie; None = beside the shards, which URLs cannot have.
        remote: reads URLs.

    Raises:
        FileNotFoundError: no shards, or no fresh index and `build` is False; names the setting and the command to run.
        ValueError: URLs without `index_dir`.
        Unreachable: a URL cannot be read.
    """
    remote = remote or RemoteFiles()
    shards: list[Shard]
    if is_remote(pattern):
        if index_dir is None:
            raise ValueError(
                f"{setting}={pattern}: an index cannot lie beside remote shards; set data.index_dir to a folder that all ranks see"
            )
        shards = list(remote.expand(pattern, setting))
    else:
        shards = [shard.absolute() for shard in expand_shards(local_path(pattern), setting)]
    path = index_path(shards, processor.fingerprint(), index_dir)
    folder = _common_folder(shards)
    try:
        index = load_index(path, folder if isinstance(folder, Path) else None)
        reason = stale_reason(index, shards, processor.fingerprint(), remote)
        if reason is None:
            return index
    except FileNotFoundError:
        reason = "there is none"
    except ValueError as error:
        reason = str(error)
    if not build:
        raise FileNotFoundError(
            f"{setting}={pattern}: no index to use ({reason}); run: dsvl data index {pattern} --processor {processor_folder}"
            + (f" --index-dir {index_dir}" if index_dir else "")
        )
    log.info("%s=%s: indexing %d shards (%s)", setting, pattern, len(shards), reason)
    index = build_index(shards, processor, workers=workers, remote=remote)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_index(index, path)
    except OSError as error:
        log.warning("%s=%s: the index could not be stored at %s (%s); it is kept in memory only", setting, pattern, path, error)
    return index
