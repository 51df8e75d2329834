"""Where the members of a tar shard lie, found by reading headers alone.

Nothing is extracted, member names are only ever compared, and every size that a header declares is checked against the file before it is
believed. Where the chain of headers breaks (a header overwritten or cut, a size beyond the end, bytes after the end-of-archive mark), the
place is reported as damage and the scan goes on at the next valid header, so that one bad block costs the samples it hit and no others.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

BLOCK = tarfile.BLOCKSIZE
_ZEROS = bytes(BLOCK)
_LONGEST_NAME_RECORD = 1 << 20
"""Bytes of a GNU long name or a pax header at most; real ones have hundreds."""
_WITHOUT_CONTENT = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)
_NAME_RECORDS = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)
_LONGEST_NUMBER = 20
"""Digits of a size in a pax header at most."""
_MAP_GOES_ON, _MAP_STILL_GOES_ON = 482, 504
"""Bytes of a sparse file's header, and of the blocks of its map, that say whether a block of the map follows."""
SEARCH_BYTES = 256 << 20
"""Bytes of a shard that are searched for valid headers after damage, all places together: bounds the time that a damaged file takes."""
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Member:
    """A regular file in a shard: where its bytes lie."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Damage:
    """A place where a shard is no tar."""

    offset: int
    reason: str


@dataclass(frozen=True)
class ShardScan:
    members: list[Member]
    size: int
    """Bytes of the file."""
    damages: list[Damage] = field(default_factory=list)
    """In the order of the file; empty = a whole tar."""

    @property
    def damage(self) -> Damage | None:
        """The first one."""
        return self.damages[0] if self.damages else None


@dataclass(frozen=True)
class MemberGroup:
    """Neighbouring members of one key: a sample."""

    key: str
    members: dict[str, Member]
    """By extension."""
    repeated: str | None = None
    """An extension that occurs twice."""


def scan_tar(path: str | Path) -> ShardScan:
    """Find all members.

    Raises:
        OSError: the file cannot be opened or read.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    try:
        return _Scanner(descriptor, os.fstat(descriptor).st_size).scan()
    finally:
        os.close(descriptor)


def split_name(name: str) -> tuple[str, str]:
    """(key, extension) of a member: webdataset divides at the first dot of the last path component."""
    folder, slash, base = name.rpartition("/")
    key, _, extension = base.partition(".")
    return folder + slash + key, extension


def group_members(members: Sequence[Member]) -> Iterator[MemberGroup]:
    """Samples of a shard: runs of neighbouring members with the same key, as webdataset groups them."""
    group: MemberGroup | None = None
    for member in members:
        key, extension = split_name(member.name)
        if group is None or group.key != key:
            if group is not None:
                yield group
            group = MemberGroup(key, {})
        if extension in group.members:
            group = MemberGroup(key, group.members, extension)
        group.members[extension] = member
    if group is not None:
        yield group


class _Broken(ValueError):
    """The chain of headers breaks here."""


class _Scanner:
    """Goes from header to header; what a name record said is for the header after it."""

    def __init__(self, descriptor: int, size: int) -> None:
        self.descriptor, self.size = descriptor, size
        self.members: list[Member] = []
        self.damages: list[Damage] = []
        self.searched = 0
        self.next_name: str | None = None
        self.next_size: int | None = None
        self.next_sparse = False

    def scan(self) -> ShardScan:
        at: int | None = 0
        while at is not None:
            header = os.pread(self.descriptor, BLOCK, at)
            if header == _ZEROS:
                after = self._after_zeros(at)
                if after is None:
                    break
                self.damages.append(Damage(at, f"an end-of-archive mark or zeros, with {self.size - after} bytes after it at {after}"))
                self._forget()
                at = self._next_header(after)
                continue
            try:
                at = self._step(header, at)
            except _Broken as error:
                self.damages.append(Damage(at, str(error)))
                self._forget()
                at = self._next_header(at + BLOCK)
        return ShardScan(self.members, self.size, self.damages)

    def _step(self, header: bytes, at: int) -> int:
        """Take in one header; returns where the next one is."""
        if not header:
            raise _Broken("the file ends without an end-of-archive mark")
        if not _has_checksum(header):  # which frombuf takes for 0, and one block in thousands has that sum
            raise _Broken("not a tar header: no checksum")
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "backslashreplace")
        except tarfile.HeaderError as error:
            raise _Broken(f"not a tar header: {error}") from error
        start = at + BLOCK if info.type != tarfile.GNUTYPE_SPARSE else self._after_map(header, at)
        length = info.size if self.next_size is None or info.type in _NAME_RECORDS else self.next_size
        if info.type in _WITHOUT_CONTENT:
            length = 0
        if length < 0 or start + length > self.size:
            raise _Broken(f"{info.name!r} declares {length} bytes; {max(self.size - start, 0)} are left in the file")
        if info.type in _NAME_RECORDS:
            if length > _LONGEST_NAME_RECORD:
                raise _Broken(f"a name record of {length} bytes")
            self._remember(info.type, os.pread(self.descriptor, length, start))
        else:
            if info.isreg() and info.type != tarfile.GNUTYPE_SPARSE and not self.next_sparse:
                self.members.append(Member(info.name if self.next_name is None else self.next_name, start, length))
            self._forget()
        return start + -(-length // BLOCK) * BLOCK

    def _after_map(self, header: bytes, at: int) -> int:
        """Where the content of a file with holes begins: its map may go on in blocks of their own."""
        more = header[_MAP_GOES_ON]
        while more and at < self.size:
            at += BLOCK
            more = (os.pread(self.descriptor, BLOCK, at) + _ZEROS)[_MAP_STILL_GOES_ON]
        return at + BLOCK

    def _remember(self, kind: bytes, record: bytes) -> None:
        """What a name record says of the next member. Those for all members (`XGLTYPE`) and for links say nothing that is needed."""
        if kind == tarfile.GNUTYPE_LONGNAME:
            self.next_name = record.partition(b"\0")[0].decode("utf-8", "backslashreplace")
        elif kind in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            records = _pax_records(record)
            self.next_name = records.get("path", self.next_name)
            self.next_sparse |= any(key.startswith("GNU.sparse.") for key in records)
            if "size" in records:
                size = records["size"]
                self.next_size = int(size) if size.isascii() and size.isdigit() and len(size) <= _LONGEST_NUMBER else -1

    def _forget(self) -> None:
        self.next_name = self.next_size = None
        self.next_sparse = False

    def _after_zeros(self, at: int) -> int | None:
        """The first block from `at` on that is not zeros; None = only zeros are left, or more than are looked at."""
        while at < self.size and self.searched < SEARCH_BYTES:
            chunk = os.pread(self.descriptor, _CHUNK, at)
            self.searched += len(chunk)
            rest = len(chunk.lstrip(b"\0"))
            if rest or not chunk:
                return at + (len(chunk) - rest) // BLOCK * BLOCK if rest else None
            at += len(chunk)
        return None

    def _next_header(self, at: int) -> int | None:
        """The next block that is a valid header; None = there is none, or too much was searched."""
        while at < self.size and self.searched < SEARCH_BYTES:
            chunk = os.pread(self.descriptor, _CHUNK, at)
            self.searched += len(chunk)
            for start in range(0, len(chunk) - BLOCK + 1, BLOCK):
                if _has_checksum(chunk, start):
                    try:
                        tarfile.TarInfo.frombuf(chunk[start : start + BLOCK], "utf-8", "backslashreplace")
                    except tarfile.HeaderError:
                        continue
                    return at + start
            at += max(len(chunk) // BLOCK * BLOCK, BLOCK)
        return None


def _has_checksum(chunk: bytes, start: int = 0) -> bool:
    """Whether a header's checksum field holds digits: a cheap look before the sum is computed."""
    return chunk[start + 148 : start + 156].partition(b"\0")[0].strip().isdigit()


def _pax_records(raw: bytes) -> dict[str, str]:
    """`path`, `size` and sparse keys of a pax header: records of "LENGTH KEY=VALUE\\n"; stops at the first that is malformed."""
    records: dict[str, str] = {}
    while raw:
        digits, space, _ = raw[:20].partition(b" ")
        if not space or not digits.isdigit() or not len(digits) < int(digits) <= len(raw):
            break
        key, equals, value = raw[len(digits) + 1 : int(digits)].partition(b"=")
        if equals and (key in (b"path", b"size") or key.startswith(b"GNU.sparse.")):
            records[key.decode("utf-8", "backslashreplace")] = value.removesuffix(b"\n").decode("utf-8", "backslashreplace")
        raw = raw[int(digits) :]
    return records
