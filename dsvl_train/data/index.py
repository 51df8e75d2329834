"""The index of shards: all that planning needs, measured once, without decoding an image.

Per sample: its shard, its key, the byte offsets of its members (the .json first, then its images in the order of their tags), a hash of
their bytes, tokens, supervised tokens, both also per turn, the images' sizes, and what geometry makes of them: visual tokens and tiles. A
sample without images is of the text modality. Its source is the setting that names the shards; one index may serve several.

An index is one file of memory-mapped arrays (`arrays.py`), so it may be larger than memory and costs nothing to open. It belongs to one
tokenizer, template and tile geometry: the processor's fingerprint is in its name and in the file. Shards that have since changed in size or
modification time make it stale, and a stale index is never used.

Samples that cannot be measured have no length, so no plan can hold them: they are listed with kind, shard, key and reason. `index_build.py`
makes the index.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from dsvl_train.data.arrays import map_arrays
from dsvl_train.data.errors import SampleError
from dsvl_train.data.order import Ints
from dsvl_train.data.shards import ShardReader
from dsvl_train.data.storage import RemoteFiles

Shard = Path | str
"""A file of this machine, or a URL."""
_STAT_THREADS = 32
"""Asking a remote file for its size is all waiting."""

log = logging.getLogger(__name__)

VERSION = 2
_CHUNK = 1 << 22
"""Samples that a pass over a whole index takes into memory at once."""


@dataclass(frozen=True)
class SkippedSample:
    """A sample that is in no plan."""

    kind: str
    shard: str
    key: str
    reason: str


@dataclass(frozen=True)
class DamagedShard:
    """A shard that is not a whole tar."""

    shard: str
    offset: int
    """Of the first damage."""
    reason: str
    places: int
    samples: int
    """That were found in spite of it."""


class SkippedSamples(Sequence[SkippedSample]):
    """The samples that an index leaves out, read from the file one by one: there may be millions."""

    def __init__(self, text: NDArray[np.uint8], first_k: Ints) -> None:
        self._text, self._first_k = text, first_k

    def __len__(self) -> int:
        return len(self._first_k) - 1

    @overload
    def __getitem__(self, place: int) -> SkippedSample: ...
    @overload
    def __getitem__(self, place: slice) -> list[SkippedSample]: ...
    def __getitem__(self, place: int | slice) -> SkippedSample | list[SkippedSample]:
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        start, end = self._first_k[place % len(self)], self._first_k[place % len(self) + 1]
        return SkippedSample(**json.loads(self._text[start:end].tobytes()))

    @staticmethod
    def pack(skipped: Sequence[SkippedSample]) -> tuple[NDArray[np.uint8], Ints]:
        """The two arrays that hold these."""
        return pack_texts([json.dumps(asdict(one)) for one in skipped])


def pack_texts(texts: Sequence[str]) -> tuple[NDArray[np.uint8], Ints]:
    """Texts as UTF-8 end to end, and where each begins (one more for the end)."""
    raw = [text.encode("utf-8", "surrogatepass") for text in texts]
    first = np.concatenate([[0], np.cumsum([len(one) for one in raw], dtype=np.int64)]).astype(np.int64)
    return np.frombuffer(b"".join(raw), dtype=np.uint8), first


@dataclass
class ShardIndex:
    """The index of a set of shards. n = samples, s = shards, m = members, i = images, t = turns, k = samples left out."""

    folder: Path | str
    """Of the shards' names."""
    shards: list[str]
    fingerprint: str
    """Of the processor that measured."""
    digest: str
    """Hash of everything measured, and of all samples' bytes."""
    tokens: int
    """Of all samples."""
    tiles: int
    damaged: list[DamagedShard]

    shard_bytes: Ints
    """[s]"""
    shard_mtime_ns: Ints
    """[s]"""
    first_sample_s: Ints
    """[s + 1] samples of the shards before it."""
    shard_n: NDArray[np.int32]
    """[n] number of the sample's shard; ascending."""
    first_member_n: Ints
    """[n + 1] where a sample's members start in the member arrays; less n, where its images start in `image_wh_i`."""
    offset_m: Ints
    size_m: Ints
    image_wh_i: NDArray[np.int32]
    """[i, 2] width and height, pixels."""
    hash_n: NDArray[np.uint64]
    """[n] of all bytes of a sample, images included (`hash_sample`): equal samples have equal hashes, and changed bytes show."""
    tokens_n: NDArray[np.int32]
    """[n] visual tokens included."""
    supervised_n: NDArray[np.int32]
    visual_n: NDArray[np.int32]
    tiles_n: NDArray[np.int32]
    first_turn_n: Ints
    """[n + 1] where a sample's turns start in the turn arrays."""
    turn_tokens_t: NDArray[np.int32]
    """[t] text tokens of a message; those of a sample sum to tokens_n - visual_n."""
    turn_supervised_t: NDArray[np.int32]
    key_text: NDArray[np.uint8]
    first_key_n: Ints
    """[n + 1] where a sample's key starts in `key_text`."""
    skipped_text: NDArray[np.uint8]
    first_skipped_k: Ints
    """[k + 1]"""

    def __len__(self) -> int:
        return len(self.tokens_n)

    @cached_property
    def skipped(self) -> SkippedSamples:
        """What is left out."""
        return SkippedSamples(self.skipped_text, self.first_skipped_k)

    @property
    def images_n(self) -> Ints:
        """[n] images of each sample; in memory."""
        return np.diff(self.first_member_n) - 1

    def image_sizes(self, sample: int) -> NDArray[np.int32]:
        """[i, 2] (width, height) of a sample's images."""
        return self.image_wh_i[self.first_member_n[sample] - sample : self.first_member_n[sample + 1] - sample - 1]

    def turns(self, sample: int) -> list[tuple[int, int]]:
        """(text tokens, supervised tokens) of a sample's messages."""
        place = slice(self.first_turn_n[sample], self.first_turn_n[sample + 1])
        return list(zip(self.turn_tokens_t[place].tolist(), self.turn_supervised_t[place].tolist(), strict=True))

    def key(self, sample: int) -> str:
        """The name that a sample's members share."""
        return self.key_text[self.first_key_n[sample] : self.first_key_n[sample + 1]].tobytes().decode("utf-8", "surrogatepass")

    def shard(self, sample: int) -> str:
        """The name of a sample's shard."""
        return self.shards[int(self.shard_n[sample])]

    def where(self, sample: int) -> str:
        """Shard and byte offset of a sample, for logs."""
        return f"{self.shard(sample)}@{int(self.offset_m[self.first_member_n[sample]])}"

    def read(self, sample: int, reader: ShardReader) -> tuple[bytes, list[bytes]]:
        """The .json and the encoded images of a sample.

        Raises:
            SampleError: `unreadable` - the shard is gone, cut, or of another size. `changed` - these are not the bytes that were indexed.
        """
        shard = int(self.shard_n[sample])
        first, end = int(self.first_member_n[sample]), int(self.first_member_n[sample + 1])
        spans = list(zip(self.offset_m[first:end].tolist(), self.size_m[first:end].tolist(), strict=True))
        members = reader.read(f"{self.folder}/{self.shards[shard]}", spans, int(self.shard_bytes[shard]))
        if hash_sample(members) != int(self.hash_n[sample]):
            raise SampleError("changed", f"{self.where(sample)}: its bytes changed since it was indexed, and the shard's time did not")
        return members[0], members[1:]

    def unfit(self, seq_len: int, *, images: bool, max_tiles: int | None = None) -> Ints:
        """Numbers of the samples of more than `seq_len` tokens or `max_tiles` tiles and, unless `images`, of those with images; one pass,
        in pieces."""
        found = [np.empty(0, dtype=np.int64)]
        for start in range(0, len(self), _CHUNK):
            end = min(start + _CHUNK, len(self))
            unfit_n = self.tokens_n[start:end] > seq_len
            if max_tiles is not None:
                unfit_n |= self.tiles_n[start:end] > max_tiles
            if not images:
                unfit_n |= np.diff(self.first_member_n[start : end + 1]) > 1
            found.append(np.flatnonzero(unfit_n) + start)
        return np.concatenate(found)


ARRAYS = (
    "shard_bytes",
    "shard_mtime_ns",
    "first_sample_s",
    "shard_n",
    "first_member_n",
    "offset_m",
    "size_m",
    "image_wh_i",
    "hash_n",
    "tokens_n",
    "supervised_n",
    "visual_n",
    "tiles_n",
    "first_turn_n",
    "turn_tokens_t",
    "turn_supervised_t",
    "key_text",
    "first_key_n",
    "skipped_text",
    "first_skipped_k",
)
"""The arrays of a ShardIndex, as they are named in its file."""


def hash_sample(members: Sequence[bytes]) -> int:
    """64 bits of all members' bytes, the .json first."""
    digest = hashlib.blake2b(digest_size=8)
    for member in members:
        digest.update(len(member).to_bytes(8, "little"))
        digest.update(member)
    return int.from_bytes(digest.digest(), "little")


# ----------------------------------------------------------------------------------------------------------------- on disk


def common_folder(shards: Sequence[Shard]) -> Path | str:
    """The folder that all shards lie in or below; of URLs, a URL."""
    urls = [shard for shard in shards if isinstance(shard, str)]
    if urls:
        protocol = urls[0].partition("://")[0]
        return f"{protocol}://{os.path.commonpath([url.partition('://')[2].rpartition('/')[0] for url in urls])}"
    parents = [shard.absolute().parent for shard in shards if isinstance(shard, Path)]
    return Path(os.path.commonpath(parents)) if parents else Path()


def shard_names(shards: Sequence[Shard], folder: Path | str) -> list[str]:
    """Names of shards within their common folder."""
    return [shard[len(str(folder)) + 1 :] if isinstance(shard, str) else str(shard.absolute().relative_to(folder)) for shard in shards]


def shard_state(shard: Shard, remote: RemoteFiles) -> tuple[int, int]:
    """(bytes, a number that changes with the content: nanoseconds of a file's last change, or `RemoteStat.version`)."""
    if isinstance(shard, str):
        found = remote.stat(shard)
        return found.size, found.version
    stat = shard.stat()
    return stat.st_size, stat.st_mtime_ns


def index_path(shards: Sequence[Shard], fingerprint: str, index_dir: str | None = None) -> Path:
    """Where the index of these shards for this processor lies: beside them, or in `index_dir`, where their folder is part of its name."""
    folder = common_folder(shards)
    names = "\n".join(shard_names(shards, folder))
    if index_dir is not None:
        names = f"{folder}\n{names}"
    file = f"index-{fingerprint[:12]}-{hashlib.sha256(names.encode()).hexdigest()[:8]}.safetensors"
    return Path(folder if index_dir is None else index_dir) / file


def load_index(path: Path, folder: Path | str | None = None) -> ShardIndex:
    """Open an index; nothing is read but its header.

    Args:
        folder: of the shards' names; default: where the index lies.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is damaged or of another version.
    """
    try:
        about, arrays = map_arrays(path)
        facts = json.loads(about["index"])
        if facts["version"] != VERSION:
            raise ValueError(f"version {facts['version']}; this code reads {VERSION}")
        index = ShardIndex(
            folder=path.absolute().parent if folder is None else folder,
            shards=[str(name) for name in facts["shards"]],
            fingerprint=str(facts["fingerprint"]),
            digest=str(facts["digest"]),
            tokens=int(facts["tokens"]),
            tiles=int(facts["tiles"]),
            damaged=[DamagedShard(**damaged) for damaged in facts["damaged"]],
            **{name: arrays[name] for name in ARRAYS},
        )
        _check_shapes(index)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a usable index: {error}") from error
    return index


def _check_shapes(index: ShardIndex) -> None:
    """That the arrays belong together; their ends alone are looked at."""
    samples, shards = len(index), len(index.shards)
    of_samples = (index.shard_n, index.hash_n, index.supervised_n, index.visual_n, index.tiles_n)
    images = len(index.offset_m) - samples
    ends = (
        (index.first_sample_s, shards, samples),
        (index.first_member_n, samples, len(index.offset_m)),
        (index.first_turn_n, samples, len(index.turn_tokens_t)),
        (index.first_key_n, samples, len(index.key_text)),
        (index.first_skipped_k, len(index.first_skipped_k) - 1, len(index.skipped_text)),
    )
    fits = (
        all(len(array) == samples for array in of_samples)
        and len(index.shard_bytes) == len(index.shard_mtime_ns) == shards
        and len(index.size_m) == len(index.offset_m)
        and len(index.turn_supervised_t) == len(index.turn_tokens_t)
        and index.image_wh_i.shape == (images, 2)
        and all(len(first) == count + 1 and int(first[-1]) == last for first, count, last in ends)
    )
    if not fits:
        raise ValueError("its arrays do not belong together")


def stale_reason(index: ShardIndex, shards: Sequence[Shard], fingerprint: str, remote: RemoteFiles | None = None) -> str | None:
    """Why an index does not describe these shards as they are now; None when it does."""
    if index.fingerprint != fingerprint:
        return "it was made with another processor (tokenizer, template, tiling or mask settings)"
    names = shard_names(shards, index.folder)
    if names != index.shards:
        return f"it describes {len(index.shards)} shards; there are {len(names)}, or their names differ"
    with ThreadPoolExecutor(_STAT_THREADS) as pool:
        found = pool.map(partial(shard_state, remote=remote or RemoteFiles()), shards)
        for name, now, size, version in zip(names, found, index.shard_bytes.tolist(), index.shard_mtime_ns.tolist(), strict=True):
            if now != (size, version):
                return f"{name} changed after it was made"
    return None


def find_index(
    shards: Sequence[Shard], fingerprint: str, index_dir: str | None = None, remote: RemoteFiles | None = None
) -> tuple[ShardIndex | None, str]:
    """The fresh index of some shards, or None and why there is none ("" = no file at all)."""
    path = index_path(shards, fingerprint, index_dir)
    try:
        index = load_index(path, common_folder(shards))
    except FileNotFoundError:
        return None, ""
    except ValueError as error:
        return None, str(error)
    reason = stale_reason(index, shards, fingerprint, remote)
    return (None, f"{path.name} is stale: {reason}") if reason else (index, "")
