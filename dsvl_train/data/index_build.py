"""Making an index: shard by shard, in processes of its own, so that an interrupted build goes on where it was.

    shard -> scan headers, read and hash members, measure -> a part, published atomically in `.INDEX.parts/`
    all parts -> one file of arrays, published atomically; the parts are removed

A part is known by its shard's name, size and time of change, so parts of shards that changed meanwhile are made anew. Two processes that
want the same index build it once: the second waits for the first.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsvl_train.data.arrays import Column, column, map_arrays, write_arrays
from dsvl_train.data.errors import SampleError
from dsvl_train.data.index import (
    ARRAYS,
    VERSION,
    DamagedShard,
    Shard,
    ShardIndex,
    SkippedSample,
    SkippedSamples,
    common_folder,
    find_index,
    hash_sample,
    index_path,
    load_index,
    pack_texts,
    shard_names,
    shard_state,
)
from dsvl_train.data.processes import map_tasks
from dsvl_train.data.processor import Measured, Processor
from dsvl_train.data.sample import find_images, parse_sample
from dsvl_train.data.shards import ShardReader, expand_shards
from dsvl_train.data.storage import RemoteFiles, is_remote, local_path
from dsvl_train.data.tar_scan import MemberGroup, scan_tar
from dsvl_train.data.tar_scan import group_members as groups_of
from dsvl_train.data.tiling import open_image

log = logging.getLogger(__name__)

MEMBER_BYTES = 1 << 30
"""A member of more bytes is refused unread: no image or conversation has a gigabyte."""
_BYTES_PER_PROCESS = 64 << 20
"""A process takes seconds to start: one for each so many bytes of shards at most."""

Progress = Callable[[int, int], None]
"""Called with (shards done, shards)."""


def open_index(
    pattern: str,
    processor: Processor,
    *,
    setting: str,
    command: str,
    build: bool = True,
    rebuild: bool = False,
    workers: int = 1,
    index_dir: str | None = None,
    remote: RemoteFiles | None = None,
) -> ShardIndex:
    """The index of a folder, glob or brace pattern of shards: opened if it is fresh, built and stored if there is none.

    Args:
        setting: name of the setting that holds the pattern, for errors.
        command: what to run to make the index, for errors.
        build: False = never build.
        rebuild: build in place of a stale one too.
        index_dir: folder for the index; None = beside the shards.

    Raises:
        FileNotFoundError: no shards, or no index and `build` is False; names the setting and the command.
        ValueError: the index is stale or damaged and `rebuild` is False; names the reason and the command.
        OSError: the index cannot be written, or a shard not be read.
    """
    remote = remote or RemoteFiles()
    shards = _find_shards(pattern, setting, index_dir, remote)
    index, problem = find_index(shards, processor.fingerprint(), index_dir, remote)
    if index is not None:
        return index
    if problem and not rebuild:
        raise ValueError(f"{setting}={pattern}: the index cannot be used: {problem}. Make it anew with: {command}")
    if not build:
        raise FileNotFoundError(f"{setting}={pattern}: there is no index of these shards for this processor; run: {command}")
    path = index_path(shards, processor.fingerprint(), index_dir)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _only_builder(path):
            index, _ = find_index(shards, processor.fingerprint(), index_dir, remote)  # another process may just have made it
            if index is None:
                log.info("%s=%s: indexing %d shards (%s)", setting, pattern, len(shards), problem or "there is no index yet")
                index = build_index(shards, processor, path, workers=workers, remote=remote)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise OSError(
            f"{setting}={pattern}: the index cannot be written to {path.parent} ({error.strerror}); set data.index_dir (--index-dir) to a "
            f"folder that all ranks can read, or run this where it can be written: {command}"
        ) from error
    return index


def _find_shards(pattern: str, setting: str, index_dir: str | None, remote: RemoteFiles) -> list[Shard]:
    if not is_remote(pattern):
        return [shard.absolute() for shard in expand_shards(local_path(pattern), setting)]
    if index_dir is None:
        raise ValueError(
            f"{setting}={pattern}: an index cannot lie beside remote shards; set data.index_dir to a folder that all ranks see"
        )
    return list(remote.expand(pattern, setting))


def build_index(
    shards: Sequence[Shard],
    processor: Processor,
    path: Path,
    *,
    workers: int = 1,
    progress: Progress | None = None,
    remote: RemoteFiles | None = None,
) -> ShardIndex:
    """Measure every sample of some shards (all in one folder or below it) and store the index at `path`.

    Args:
        workers: processes at most; small shards are indexed by fewer, or in this one.

    Raises:
        OSError: a shard cannot be opened, or changed while it was indexed.
        WorkerDied: a process was killed; what is done already is kept.
    """
    folder = common_folder(shards)
    remote = remote or RemoteFiles()
    tasks = [_ShardTask.of(shard, name, remote) for shard, name in zip(shards, shard_names(shards, folder), strict=True)]
    parts_dir = path.with_name(f".{path.stem}.parts")
    parts_dir.mkdir(exist_ok=True)
    missing = [task for task in tasks if not task.is_done(parts_dir)]
    if len(missing) < len(tasks):
        log.info("%d of %d shards were indexed before the last build was interrupted", len(tasks) - len(missing), len(tasks))
    report = progress or show_progress("indexing", len(tasks) - len(missing), len(tasks), "shard")
    processes = min(workers, len(missing), sum(task.size for task in missing) // _BYTES_PER_PROCESS + 1)
    report(len(tasks) - len(missing), len(tasks))
    for done, _ in enumerate(
        map_tasks(partial(_prepare, processor, parts_dir, remote), missing, processes), start=len(tasks) - len(missing) + 1
    ):
        report(done, len(tasks))
    _join(path, [task.part(parts_dir) for task in tasks], processor.fingerprint(), [task.name for task in tasks])
    shutil.rmtree(parts_dir, ignore_errors=True)
    return load_index(path, folder)


@contextmanager
def _only_builder(path: Path) -> Iterator[None]:
    """Keeps other processes from building the same index. A killed process holds nothing."""
    with path.with_name(f".{path.stem}.lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process is making %s: waiting for it", path)
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError as error:  # file systems without locks
            log.warning("%s cannot be locked (%s): make sure that only one process indexes these shards", path.parent, error)
        yield


# ------------------------------------------------------------------------------------------------------------- one shard


@dataclass(frozen=True)
class _ShardTask:
    """A shard as it was when the build began."""

    path: Shard
    name: str
    size: int
    mtime_ns: int
    """Or what else tells its version (`index.shard_state`)."""

    @classmethod
    def of(cls, path: Shard, name: str, remote: RemoteFiles) -> _ShardTask:
        return cls(path, name, *shard_state(path, remote))

    def part(self, parts_dir: Path) -> Path:
        key = hashlib.sha256(f"{VERSION}\n{self.size}\n{self.mtime_ns}\n{self.name}".encode()).hexdigest()
        return parts_dir / f"{key[:24]}.safetensors"

    def is_done(self, parts_dir: Path) -> bool:
        """Whether its part is there, and whole."""
        try:
            map_arrays(self.part(parts_dir))
        except (OSError, ValueError):
            return False
        return True


def _prepare(processor: Processor, parts_dir: Path, remote: RemoteFiles) -> Callable[[_ShardTask], None]:
    reader = ShardReader(max_open=1)

    def work(task: _ShardTask) -> None:
        if isinstance(task.path, str):
            with remote.local_copy(task.path) as copy:  # all of it is needed, once: in one piece
                part = index_shard(Path(copy), task.name, processor, ShardReader(max_open=0))
        else:
            part = index_shard(task.path, task.name, processor, reader)
        if _ShardTask.of(task.path, task.name, remote) != task:
            raise OSError(f"{task.path} changed while it was indexed: run again when it is complete")
        facts, arrays = part.finish(task.size, task.mtime_ns)
        write_arrays(task.part(parts_dir), {"part": json.dumps(facts)}, [column(name, array) for name, array in arrays.items()])

    return work


@dataclass
class ShardPart:
    """What one shard gives, sample by sample."""

    name: str
    rows: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    """Hash, tokens, supervised, visual, tiles."""
    spans: list[list[tuple[int, int]]] = field(default_factory=list)
    sizes_wh: list[tuple[int, int]] = field(default_factory=list)
    turns: list[tuple[tuple[int, int], ...]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    skipped: list[SkippedSample] = field(default_factory=list)
    damaged: DamagedShard | None = None

    def add(self, key: str, spans: list[tuple[int, int]], content: int, sizes_wh: Sequence[tuple[int, int]], measured: Measured) -> None:
        self.keys.append(key)
        self.spans.append(spans)
        self.sizes_wh += sizes_wh
        self.rows.append((content, measured.tokens, measured.supervised_tokens, measured.visual_tokens, measured.tiles))
        self.turns.append(measured.turns)

    def finish(self, size: int, mtime_ns: int) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Facts and arrays, as the index of one shard has them."""
        rows = np.asarray([row[1:] for row in self.rows], dtype=np.int32).reshape(-1, 4)
        spans = np.asarray([span for sample in self.spans for span in sample], dtype=np.int64).reshape(-1, 2)
        turns = np.asarray([turn for sample in self.turns for turn in sample], dtype=np.int32).reshape(-1, 2)
        key_text, first_key_n = pack_texts(self.keys)
        skipped_text, first_skipped_k = SkippedSamples.pack(self.skipped)
        arrays: dict[str, NDArray[Any]] = {
            "shard_bytes": np.asarray([size], dtype=np.int64),
            "shard_mtime_ns": np.asarray([mtime_ns], dtype=np.int64),
            "first_sample_s": np.asarray([0, len(rows)], dtype=np.int64),
            "shard_n": np.zeros(len(rows), dtype=np.int32),
            "first_member_n": _starts(self.spans),
            "offset_m": spans[:, 0],
            "size_m": spans[:, 1],
            "image_wh_i": np.asarray(self.sizes_wh, dtype=np.int32).reshape(-1, 2),
            "hash_n": np.asarray([row[0] for row in self.rows], dtype=np.uint64),
            "tokens_n": rows[:, 0],
            "supervised_n": rows[:, 1],
            "visual_n": rows[:, 2],
            "tiles_n": rows[:, 3],
            "first_turn_n": _starts(self.turns),
            "turn_tokens_t": turns[:, 0],
            "turn_supervised_t": turns[:, 1],
            "key_text": key_text,
            "first_key_n": first_key_n,
            "skipped_text": skipped_text,
            "first_skipped_k": first_skipped_k,
        }
        digest = hashlib.blake2b(digest_size=16)
        for name in ("hash_n", "first_member_n", "offset_m", "size_m", "tokens_n", "tiles_n"):
            digest.update(np.ascontiguousarray(arrays[name]).tobytes())
        facts = {
            "digest": digest.hexdigest(),
            "tokens": int(rows[:, 0].sum(dtype=np.int64)),
            "tiles": int(rows[:, 3].sum(dtype=np.int64)),
            "damaged": None if self.damaged is None else asdict(self.damaged),
        }
        return facts, arrays


def _starts(ragged: Sequence[Sequence[Any]]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum([len(one) for one in ragged], dtype=np.int64)]).astype(np.int64)


def index_shard(path: Path, name: str, processor: Processor, reader: ShardReader) -> ShardPart:
    """Measure the samples of one shard.

    Raises:
        OSError: it cannot be read.
    """
    scan = scan_tar(path)
    part = ShardPart(name)
    groups = list(groups_of(scan.members))
    for group in groups:
        try:
            spans, content, sizes_wh, measured = _measure(group, str(path), scan.size, processor, reader)
        except SampleError as error:
            if error.kind == "unreadable":  # a disk or network that fails now says nothing about the sample
                raise OSError(f"indexing {path}: {error}") from error
            part.skipped.append(SkippedSample(error.kind, name, group.key, str(error)))
            continue
        if measured.supervised_tokens == 0:
            part.skipped.append(SkippedSample("nothing_supervised", name, group.key, "no token of it is supervised: it has no loss"))
            continue
        part.add(group.key, spans, content, sizes_wh, measured)
    if scan.damage is not None:
        part.damaged = DamagedShard(name, scan.damage.offset, scan.damage.reason, len(scan.damages), len(groups))
    return part


def _measure(
    group: MemberGroup, path: str, size: int, processor: Processor, reader: ShardReader
) -> tuple[list[tuple[int, int]], int, list[tuple[int, int]], Measured]:
    """Spans of a sample's members (the .json, then its images), the hash of their bytes, the images' sizes, and the sample's."""
    if group.repeated is not None:
        raise SampleError("bad_json", f"the member {group.key}.{group.repeated} occurs twice")
    text_member = group.members.get("json")
    if text_member is None:
        raise SampleError("bad_json", f"no {group.key}.json among its members {sorted(group.members)}")
    for member in group.members.values():
        if member.size > MEMBER_BYTES:
            raise SampleError("too_large", f"{member.name} has {member.size} bytes; a member may have {MEMBER_BYTES}")
    (text,) = reader.read(path, [(text_member.offset, text_member.size)], size)
    sample = parse_sample(text)
    others = [member for extension, member in group.members.items() if extension != "json"]
    extensions = [extension for extension in group.members if extension != "json"]
    images = [others[position] for position in find_images(sample.images, group.key, extensions)]
    content = [text, *reader.read(path, [(image.offset, image.size) for image in images], size)]
    sizes_wh = [open_image(image, processor.max_image_pixels).size for image in content[1:]]
    measured = processor.measure(sample.messages, sizes_wh)
    return [(member.offset, member.size) for member in (text_member, *images)], hash_sample(content), sizes_wh, measured


# -------------------------------------------------------------------------------------------------------------- all shards

_STARTS = {
    "first_sample_s": "tokens_n",
    "first_member_n": "offset_m",
    "first_turn_n": "turn_tokens_t",
    "first_key_n": "key_text",
    "first_skipped_k": "skipped_text",
}
"""Arrays of places where something starts -> the array that they are places in."""


def _join(path: Path, parts: Sequence[Path], fingerprint: str, names: Sequence[str]) -> None:
    """Write the index of all shards from their parts, array by array; memory holds one part of one array."""
    rows: dict[str, list[tuple[int, ...]]] = {name: [] for name in ARRAYS}
    dtypes: dict[str, np.dtype[Any]] = {}
    facts = []
    for part in parts:
        about, arrays = map_arrays(part)
        facts.append(json.loads(about["part"]))
        for name in ARRAYS:
            rows[name].append(arrays[name].shape)
            dtypes[name] = arrays[name].dtype
    whole = {
        "version": VERSION,
        "fingerprint": fingerprint,
        "shards": list(names),
        "digest": hashlib.blake2b("".join(one["digest"] for one in facts).encode(), digest_size=16).hexdigest(),
        "tokens": sum(one["tokens"] for one in facts),
        "tiles": sum(one["tiles"] for one in facts),
        "damaged": [one["damaged"] for one in facts if one["damaged"] is not None],
    }
    columns = []
    for name in ARRAYS:
        lengths = [shape[0] for shape in rows[_STARTS.get(name, name)]]
        columns.append(Column(name, dtypes[name], _joined_shape(name, rows[name]), _pieces(name, parts, lengths)))
    write_arrays(path, {"index": json.dumps(whole)}, columns)


def _joined_shape(name: str, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    shared = len(shapes) - 1 if name in _STARTS else 0  # the end of one part's places is the start of the next one's
    return (sum(shape[0] for shape in shapes) - shared, *shapes[0][1:])


def _pieces(name: str, parts: Sequence[Path], lengths: Sequence[int]) -> Iterator[NDArray[Any]]:
    """One array's pieces; places and shard numbers count on from part to part."""
    before = 0
    for number, (part, length) in enumerate(zip(parts, lengths, strict=True)):
        piece = map_arrays(part)[1][name]
        if name in _STARTS:
            yield (piece if number == len(parts) - 1 else piece[:-1]) + before
            before += length
        else:
            yield piece + np.int32(number) if name == "shard_n" else piece


def show_progress(what: str, done: int, total: int, unit: str) -> Progress:
    """A bar on a terminal; elsewhere a line in the log every few seconds, and at the end of anything that took long."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        bar = tqdm(total=total, initial=done, desc=what, unit=unit, dynamic_ncols=True)

        def show(now_done: int, _: int) -> None:
            bar.update(now_done - bar.n)
            if now_done == total:
                bar.close()

        return show
    start = last = time.monotonic()

    def report(now_done: int, all_: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > 5 or (now_done == all_ and now - start > 5):
            last = now
            log.info("%s: %d of %d %ss, %.0f s", what, now_done, all_, unit, now - start)

    return report
