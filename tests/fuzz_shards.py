"""Corrupted shards by the thousand: none may crash or hang the reader, write a file, or cost a sample that it did not touch.

    python -m tests.fuzz_shards --shards 10000        (make fuzz)

A case is a function of its number. It is a small shard in one of three tar dialects, spoiled in one to three ways: bits flipped, blocks
overwritten, cut, bytes lost or added, members swapped or doubled, members with odd names, links, devices, huge or lying sizes, sparse and
pax records. What must hold:

* every sample of which no byte was touched is found under its key, with its bytes (known from making it);
* what is found is what Python's `tarfile` finds when it reads on past errors, where it gets through: the same members, and as many samples
  and bad samples as these make;
* a sample that is gone without trace is in a shard that is reported as damaged;
* every sample that is found can be read and decoded, or is a `SampleError`;
* nothing is opened for writing, made, linked, renamed or removed meanwhile, anywhere.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import random
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from dsvl_train.data.errors import SampleError
from dsvl_train.data.index import hash_sample
from dsvl_train.data.index_build import index_shard
from dsvl_train.data.processes import map_tasks, usable_cores
from dsvl_train.data.processor import Processor
from dsvl_train.data.sample import Sample, parse_sample
from dsvl_train.data.shards import ShardReader
from dsvl_train.data.tar_scan import scan_tar
from tests.unit.made_data import VL2_FOLDER, bomb, picture

BLOCK = 512
SLOWEST_S = 10.0
"""A case may take so long on a busy machine; one that hangs takes for ever."""

# --------------------------------------------------------------------------------------------------------------- the cases


@dataclass
class Piece:
    """Some blocks of a shard: a sample (possibly spoiled), or something between samples."""

    members: list[bytes]
    """Each with its headers and padding."""
    key: str | None = None
    content: int = 0
    """Hash of the sample's bytes."""
    intact: bool = False
    lies: bool = False
    """What it says of others is nonsense, of which every reader makes something else."""


@dataclass
class Case:
    raw: bytes
    intact: dict[str, int]
    """Key -> hash of the samples that were not touched."""
    keys: list[str]
    """Of the samples that only bytes were changed of: a pax record, say, may rename one without a trace."""
    lies: bool = False
    silent: bool = False
    """It lost its end to zeros, which look like the end of a tar: nothing can tell."""
    done: list[str] = field(default_factory=list)


def make_case(number: int) -> Case:
    """The case of a number."""
    rng = random.Random(number)
    dialect = rng.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    pieces = [_sample(rng, place, dialect) for place in range(rng.randint(2, 6))]
    done = []
    for _ in range(rng.randint(0, 2)):
        change = rng.choice(STRUCTURAL)
        change(rng, pieces, dialect)
        done.append(change.__name__)
    raw = bytearray()
    spans: list[tuple[int, int, Piece]] = []
    for piece in pieces:
        start = len(raw)
        raw += b"".join(piece.members)
        spans.append((start, len(raw), piece))
    raw += bytes(rng.choice([1024, 10240 - len(raw) % 10240 + 10240]))
    keys = [piece.key for piece in pieces if piece.key is not None and piece.intact]
    case = Case(b"", {}, keys, lies=any(piece.lies for piece in pieces))
    for _ in range(rng.randint(0 if done else 1, 2)):
        damage = rng.choice(BYTEWISE)
        touched = damage(rng, raw)
        done.append(damage.__name__)
        for start, end, piece in spans:
            # misaligned bytes cannot be found again; the block after a sample says that its last member ended
            piece.intact &= not (touched.start < end and start < touched.stop)
    case.raw, case.done = bytes(raw), done
    case.silent = len(raw.rstrip(b"\0")) < min(spans[-1][1], len(raw)) - BLOCK
    case.intact = {piece.key: piece.content for piece in pieces if piece.intact and piece.key is not None}
    return case


@cache
def _images() -> list[tuple[str, bytes]]:
    sizes = [(20, 20), (60, 30), (30, 90), (45, 44)]
    images = [("png", picture(*size, seed=seed)) for seed, size in enumerate(sizes)]
    images += [("jpg", picture(*size, seed=seed, kind="JPEG")) for seed, size in enumerate(sizes)]
    return [*images, ("webp", picture(33, 33, kind="WEBP")), ("png", bomb())]


def _sample(rng: random.Random, place: int, dialect: int) -> Piece:
    folder = rng.choice(["", "", "a/", "b.c/", "é" * 20 + "/", "deep/" * 30])
    key = f"{folder}{place:04d}"
    images = rng.choices(_images()[:-1] if rng.random() < 0.9 else _images(), k=rng.choice([0, 0, 1, 1, 2]))
    tags = "<image>" * len(images)
    messages = [
        {"role": "user", "content": f"{tags}tile {rng.random()}"},
        {"role": "assistant", "content": "pack " * rng.choice([1, 3, 200])},
    ]
    names = [f"{position}.{extension}" for position, (extension, _) in enumerate(images)]
    text = Sample(messages, names).as_json()
    members = [("json", text), *((name, raw) for name, (_, raw) in zip(names, images, strict=True))]
    rng.shuffle(members)
    written = [_member(f"{key}.{name}", raw, dialect) for name, raw in members]
    usable = all(raw is not _images()[-1][1] for _, raw in images)
    return Piece(written, key, hash_sample([text, *(raw for _, raw in images)]), intact=usable)


def _member(name: str, raw: bytes, dialect: int = tarfile.GNU_FORMAT, **changes: Any) -> bytes:
    """A member's headers, content and padding; `changes` are put into its TarInfo."""
    info = tarfile.TarInfo(name)
    info.size = len(raw)
    for key, value in changes.items():
        setattr(info, key, value)
    return info.tobuf(dialect, "utf-8", "surrogateescape") + raw + bytes(-len(raw) % BLOCK)


def _raw_header(name: bytes, kind: bytes = b"0", size: bytes = b"00000000000\0", magic: bytes = b"ustar\x0000") -> bytes:
    """A header with a valid checksum and anything else."""
    header = bytearray(BLOCK)
    header[: len(name[:100])] = name[:100]
    header[100:108], header[108:116], header[116:124] = b"0000644\0", b"0000000\0", b"0000000\0"
    header[124:136], header[136:148], header[148:156] = size[:12].ljust(12, b"\0"), b"00000000000\0", b" " * 8
    header[156:157], header[257 : 257 + len(magic)] = kind, magic
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


# ------------------------------------------------------------------------------------------------- spoiled between samples


def _insert(rng: random.Random, pieces: list[Piece], member: bytes, *, spoils_next: bool = False, lies: bool = False) -> None:
    place = rng.randint(0, len(pieces))
    pieces.insert(place, Piece([member], lies=lies))
    if spoils_next and place + 1 < len(pieces):
        pieces[place + 1].intact = False


def odd_names(rng: random.Random, pieces: list[Piece], dialect: int) -> None:
    """Members named to escape, to hide, or to be no text."""
    names = [
        "../../escape.json",
        "/etc/escape.json",
        "..",
        ".",
        "a/../../b.0.png",
        ".hidden",
        "..json",
        "new\nline.json",
        "C:\\windows.json",
        "~/home.json",
        "x" * 400 + ".json",
        "no_extension",
        "\udcff\udcfe.json",
        "nul\0byte.json",
        "key.json.json.json",
        "//host/share.json",
    ]
    name = rng.choice(names)
    content = rng.choice([b"", b"{}", b'{"messages": [{"role": "document", "content": "pack tile rank"}]}', b"\xff" * 700])
    if "\0" in name or (dialect == tarfile.USTAR_FORMAT and len(name) > 100):
        _insert(
            rng,
            pieces,
            _raw_header(name.encode("utf-8", "surrogateescape"), size=b"%011o\0" % len(content))
            + content.ljust(1024, b"\0")[: -(-len(content) // BLOCK) * BLOCK],
        )
    else:
        _insert(rng, pieces, _member(name, content, dialect))


def links_and_devices(rng: random.Random, pieces: list[Piece], dialect: int) -> None:
    """Everything in a tar that is no regular file."""
    kinds = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, tarfile.CONTTYPE]
    kind = rng.choice(kinds)
    _insert(rng, pieces, _member("trap.json", b"", dialect, type=kind, linkname="/etc/passwd", devmajor=1, devminor=3, mode=0o4777))


def huge_sizes(rng: random.Random, pieces: list[Piece], dialect: int) -> None:
    """A header that declares more than the file has."""
    declared = [
        b"77777777777\0",
        b"\x80" + (2**62).to_bytes(11, "big"),
        b"\x80" + (2**80).to_bytes(11, "big"),
        b"\xff" * 12,
        b"00004000000\0",
    ]
    kind = rng.choice([b"0", b"0", b"L", b"x", b"g", b"S", b"7", b"Z"])
    _insert(rng, pieces, _raw_header(b"huge.json", kind, rng.choice(declared)), spoils_next=kind in b"Lx", lies=True)


def pax_records(rng: random.Random, pieces: list[Piece], dialect: int) -> None:
    """Pax headers that rename, resize, make sparse, or are malformed: they spoil the sample that follows."""
    records = [
        b"path=../../../evil.json",
        b"size=0",
        b"size=999999999999999999999999",
        b"size=-7",
        b"size=" + b"9" * 5000,
        b"size=x",
        b"GNU.sparse.major=1\n30 GNU.sparse.realsize=999999",
        b"GNU.sparse.map=0,1,1000000000,1",
        b"path=" + b"p" * 5000,
        b"hdrcharset=BINARY",
        b"mtime=nan",
        b"path=\xff\xfe\x00.json",
    ]
    body = rng.choice(records)
    whole = b" " + body + b"\n"
    length = next(count for count in itertools.count(len(whole)) if count == len(str(count)) + len(whole))
    record = str(length).encode() + whole
    if rng.random() < 0.3:
        record = rng.choice(
            [b"", b"\0" * 40, b"12", b"99999 path=a\n", b"0 path=a\n", b"-5 path=a\n", b"7 path\n", record[:-1], b"\xff" * 30]
        )
    kind = rng.choice([tarfile.XHDTYPE, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE])
    header = _raw_header(b"pax", kind, b"%011o\0" % len(record))
    lies = kind == tarfile.XGLTYPE or not body.startswith((b"path", b"mtime")) or record != str(length).encode() + whole
    _insert(rng, pieces, header + record + bytes(-len(record) % BLOCK), spoils_next=True, lies=lies)


def sparse_members(rng: random.Random, pieces: list[Piece], dialect: int) -> None:
    """GNU's old sparse format, with a map of holes."""
    header = bytearray(_raw_header(b"sparse.json", b"S", b"00000001000\0", magic=b"ustar  \0"))
    header[386:410] = b"00000000000\0" + b"00000001000\0"
    header[482] = rng.choice([0, 0, 1])
    header[483:495] = b"77777777777\0"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    rest_of_map = bytes(BLOCK) if header[482] else b""
    _insert(rng, pieces, bytes(header) + rest_of_map + b"z" * BLOCK)


def long_links(rng: random.Random, pieces: list[Piece], dialect: int) -> None:
    """GNU long names without the member they are for, or for the next one."""
    name = rng.choice([b"../" * 200 + b"x.json", b"", b"\xff" * 300, b"n" * 2000])
    header = _raw_header(b"././@LongLink", rng.choice([b"L", b"K"]), b"%011o\0" % len(name))
    _insert(rng, pieces, header + name + bytes(-len(name) % BLOCK), spoils_next=True)


def swap_members(rng: random.Random, pieces: list[Piece], dialect: int) -> None:
    """Two members change places, within a sample or between two."""
    samples = [piece for piece in pieces if piece.key is not None]
    one, other = rng.choice(samples), rng.choice(samples)
    at, there = rng.randrange(len(one.members)), rng.randrange(len(other.members))
    one.members[at], other.members[there] = other.members[there], one.members[at]
    if one is not other:
        one.intact = other.intact = False


def double_member(rng: random.Random, pieces: list[Piece], dialect: int) -> None:
    """A member stands there twice."""
    sample = rng.choice([piece for piece in pieces if piece.key is not None])
    sample.members.append(rng.choice(sample.members))
    sample.intact = False


def lose_member(rng: random.Random, pieces: list[Piece], dialect: int) -> None:
    """A member is missing; the sample that had it may stand empty."""
    sample = rng.choice([piece for piece in pieces if piece.key is not None])
    if len(sample.members) > 1:
        del sample.members[rng.randrange(len(sample.members))]
        sample.intact = False


def join_archives(rng: random.Random, pieces: list[Piece], dialect: int) -> None:
    """An end-of-archive mark in the middle, as concatenated tars have."""
    _insert(rng, pieces, bytes(BLOCK * rng.choice([1, 2, 3, 40])))


STRUCTURAL: list[Callable[[random.Random, list[Piece], int], None]] = [
    odd_names,
    links_and_devices,
    huge_sizes,
    pax_records,
    sparse_members,
    long_links,
    swap_members,
    double_member,
    lose_member,
    join_archives,
]

# --------------------------------------------------------------------------------------------------------- spoiled anywhere


def _flip(rng: random.Random, raw: bytearray) -> range:
    """One bit to a few."""
    at = rng.randrange(max(len(raw), 1))
    end = min(at + rng.choice([1, 1, 4, 64]), len(raw))
    for place in range(at, end):
        raw[place] ^= 1 << rng.randrange(8)
    return range(at, end)


def _garbage(rng: random.Random, raw: bytearray) -> range:
    at = rng.randrange(max(len(raw), 1))
    end = min(at + rng.choice([30, 512, 3000, 20000]), len(raw))
    raw[at:end] = rng.randbytes(end - at)
    return range(at, end)


def _zero(rng: random.Random, raw: bytearray) -> range:
    at = rng.randrange(max(len(raw), 1))
    end = min(at + rng.choice([512, 1024, 3000, 20000]), len(raw))
    raw[at:end] = bytes(end - at)
    return range(at, end)


def _cut(rng: random.Random, raw: bytearray) -> range:
    at, whole = rng.randrange(len(raw) + 1), len(raw)
    del raw[at:]
    return range(at, whole)


def _lose_bytes(rng: random.Random, raw: bytearray) -> range:
    """What follows stands at other places, and not on blocks' borders."""
    at, whole = rng.randrange(max(len(raw), 1)), len(raw)
    del raw[at : at + rng.choice([1, 7, 100, 513])]
    return range(at, whole)


def _add_bytes(rng: random.Random, raw: bytearray) -> range:
    at, whole = rng.randrange(max(len(raw), 1)), len(raw)
    raw[at:at] = rng.randbytes(rng.choice([1, 7, 100, 513]))
    return range(at, whole)


BYTEWISE: list[Callable[[random.Random, bytearray], range]] = [_flip, _flip, _garbage, _zero, _cut, _lose_bytes, _add_bytes]

# -------------------------------------------------------------------------------------------------------------- the checks


@dataclass
class Outcome:
    """What one case gave."""

    found: int
    skipped: Counter[str]
    damaged: bool
    intact: int
    compared: bool
    """`tarfile` got through, so its members were compared."""
    seconds: float


def check_case(number: int, folder: Path, processor: Processor) -> Outcome:
    """Run one case in `folder`; AssertionError names what did not hold."""
    case = make_case(number)
    shard = folder / f"{number}.tar"
    shard.write_bytes(case.raw)
    label = f"case {number} ({', '.join(case.done)})"
    reader = ShardReader()
    started = time.perf_counter()
    try:
        with no_file_is_written():
            part = index_shard(shard, shard.name, processor, reader)
            contents = [_read(reader, shard, len(case.raw), spans) for spans in part.spans]
        seconds = time.perf_counter() - started
        found = Counter(zip(part.keys, (row[0] for row in part.rows), strict=True))
        for key, content in case.intact.items():
            assert found[key, content] == 1, f"{label}: {key} was not touched, and is not found"
        for content, row in zip(contents, part.rows, strict=True):
            assert hash_sample(content) == row[0], f"{label}: the offsets are not those of what was measured"
            if row[0] not in case.intact.values():
                _decode(processor, content)
        listed = {*part.keys, *(one.key for one in part.skipped)}
        lost = [key for key in case.keys if key not in listed]
        groups = len(part.keys) + len(part.skipped)  # a long name has no checksum: a sample may stand under another one
        told = part.damaged is not None or case.silent or groups >= len(case.keys)
        assert not lost or told, f"{label}: {lost} are gone, and nothing says so"
        assert seconds < SLOWEST_S, f"{label}: {seconds:.1f} s"
        compared = not case.lies and _compare_with_tarfile(label, case.raw, shard, groups)
        return Outcome(
            len(part.keys), Counter(one.kind for one in part.skipped), part.damaged is not None, len(case.intact), compared, seconds
        )
    finally:
        reader.close()
        shard.unlink()


def _read(reader: ShardReader, shard: Path, size: int, spans: list[tuple[int, int]]) -> list[bytes]:
    return reader.read(str(shard), spans, size)


def _decode(processor: Processor, content: list[bytes]) -> None:
    """All that may go wrong with a sample is a SampleError."""
    with suppress(SampleError):
        processor.encode(parse_sample(content[0]).messages, content[1:])


def _compare_with_tarfile(label: str, raw: bytes, shard: Path, samples: int) -> bool:
    """Members as Python's tarfile finds them with `ignore_zeros`, which skips blocks that are no headers; False where it gives up."""
    members: list[tuple[str, int, int]] = []
    try:
        with tarfile.open(fileobj=io.BytesIO(raw), ignore_zeros=True, encoding="utf-8", errors="backslashreplace") as tar:
            for info in tar:
                if info.isreg() and not info.issparse():
                    members.append((info.name, info.offset_data, info.size))
    except Exception:
        return False
    if any(size < 0 or start + size > len(raw) for _, start, size in members):  # which it does not check
        return False
    if any(not raw[start - BLOCK + 148 : start - BLOCK + 156].strip(b" \0") for _, start, _ in members):
        return False  # it takes no checksum for 0, and garbage may sum to that
    ours = [(member.name, member.offset, member.size) for member in scan_tar(shard).members]
    assert [place for _, *place in ours] == [place for _, *place in members], f"{label}: members {ours}; tarfile finds {members}"
    keys = [_key(name) for name, *_ in ours]
    assert samples == sum(1 for _ in itertools.groupby(keys)), f"{label}: {samples} samples, good or bad, of keys {keys}"
    return True


def _key(name: str) -> str:
    folder, base = os.path.split(name)
    return f"{folder}\0{base.split('.')[0]}" if "/" in name else base.split(".")[0]


_WRITING = {"os.mkdir", "os.rename", "os.link", "os.symlink", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.chown", "os.utime"}
_WRITING |= {
    "shutil.copyfile",
    "shutil.move",
    "tempfile.mkstemp",
    "tempfile.mkdtemp",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "socket.connect",
}
_written: list[str] = []
_watching = False
_hooked = False


@contextmanager
def no_file_is_written() -> Iterator[None]:
    """Fails when anything in this process opens a file for writing or changes one, wherever it lies."""
    global _watching, _hooked
    if not _hooked:
        sys.addaudithook(_watch)  # for good: hooks cannot be taken back
        _hooked = True
    _written.clear()
    _watching = True
    try:
        yield
    finally:
        _watching = False
    assert not _written, f"written or changed: {_written}"


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching:
        return
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    if writes or event in _WRITING:
        _written.append(f"{event} {arguments!r}")


# ----------------------------------------------------------------------------------------------------------------- running


def prepare(folder: Path) -> Callable[[int], Outcome]:
    processor = Processor.from_folder(VL2_FOLDER)
    own = Path(tempfile.mkdtemp(dir=folder))
    processor.measure([{"role": "document", "content": "x"}], [])  # loads what is loaded once
    return partial(check_case, folder=own, processor=processor)


def summarise(outcomes: list[Outcome]) -> str:
    skipped = sum((outcome.skipped for outcome in outcomes), Counter())
    kinds = ", ".join(f"{kind} {count}" for kind, count in skipped.most_common())
    lines = [
        f"{len(outcomes)} corrupted shards; no crash, no hang, no file written; slowest {max(one.seconds for one in outcomes):.2f} s",
        f"all {sum(one.intact for one in outcomes)} untouched samples found, among {sum(one.found for one in outcomes)}",
        f"{skipped.total()} bad samples: {kinds}",
        f"{sum(one.damaged for one in outcomes)} shards reported as damaged",
        f"{sum(one.compared for one in outcomes)} shards read by tarfile too: the same members, and as many samples",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--workers", type=int, default=usable_cores())
    arguments = parser.parse_args()
    cases = range(arguments.first, arguments.first + arguments.shards)
    with tempfile.TemporaryDirectory() as folder:
        print(summarise(list(map_tasks(partial(prepare, Path(folder)), cases, arguments.workers))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
