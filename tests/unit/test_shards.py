"""Samples and shards: strict reading, offsets that are right, damage that is contained and reported."""

from __future__ import annotations

import io
import json
import os
import tarfile
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsvl_train.data.errors import SampleError
from dsvl_train.data.sample import Sample, find_images, parse_sample
from dsvl_train.data.shards import ShardReader, ShardWriter, expand_shards
from dsvl_train.data.storage import RemoteFiles, Unreachable
from dsvl_train.data.tar_scan import Member, group_members, scan_tar, split_name

MESSAGES = [{"role": "user", "content": "<image> What?"}, {"role": "assistant", "content": "Ünïcode 7."}]


def tar_bytes(members: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as tar:
        for name, raw in members:
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    return stream.getvalue()


def write_ten(folder: Path, **settings: Any) -> list[Path]:
    with ShardWriter(folder, **settings) as writer:
        for number in range(10):
            writer.write(MESSAGES, [("png", bytes([number]) * 700)], id=f"made/{number}")
    return writer.shards


# ----------------------------------------------------------------------------------------------------------------- sample


def test_a_sample_survives_its_json() -> None:
    sample = Sample(MESSAGES, ["0.png"], "x/1", {"licence": "none"})
    assert parse_sample(sample.as_json()) == sample
    assert parse_sample(b'{"messages": [{"role": "document", "content": "text"}]}').images == []


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xff\xfe",
        b"[1]",
        b"{",
        b"[" * 100_000,
        b'{"messages": [{"role": "user", "content": "x"}], "n": ' + b"9" * 5000 + b"}",
        b'{"messages": []}',
        b'{"images": []}',
        b'{"messages": "hello"}',
        b'{"messages": [{"role": "user"}]}',
        b'{"messages": [{"role": "user", "content": 3}]}',
        b'{"messages": [{"role": "user", "content": "x", "weight": 1}]}',
        b'{"messages": [{"role": "user", "content": "x"}], "picture": "a"}',
        b'{"messages": [{"role": "user", "content": "x"}], "images": "0.png"}',
        b'{"messages": [{"role": "user", "content": "x"}], "images": [0]}',
        b'{"messages": [{"role": "user", "content": "x"}], "id": 3}',
        b'{"messages": [{"role": "user", "content": "x"}], "meta": []}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    ],
)
def test_anything_but_a_sample_is_bad_json(raw: bytes) -> None:
    with pytest.raises(SampleError) as caught:
        parse_sample(raw)
    assert caught.value.kind == "bad_json"


@given(
    raw=st.binary(max_size=200)
    | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(lambda value: json.dumps(value).encode())
)
def test_no_bytes_make_the_parser_fail_otherwise(raw: bytes) -> None:
    with pytest.raises(SampleError):
        parse_sample(raw)


def test_images_are_found_by_extension_or_by_member_name_and_never_as_paths() -> None:
    assert find_images(["1.png", "a/k.0.png"], "a/k", ["0.png", "1.png"]) == [1, 0]
    for name in ("2.png", "../0.png", "/etc/passwd", "other.0.png"):
        with pytest.raises(SampleError) as caught:
            find_images([name], "a/k", ["0.png"])
        assert caught.value.kind == "image_missing"
    with pytest.raises(SampleError, match=r"k\.0\.PNG is not named"):
        find_images([], "k", ["0.PNG"])
    assert find_images([], "k", ["txt"]) == []


# ---------------------------------------------------------------------------------------------------------------- writing


def test_shards_rotate_by_count_and_by_size_and_are_readable_by_others(tmp_path: Path) -> None:
    by_count = write_ten(tmp_path / "a", max_samples=4)
    assert [shard.name for shard in by_count] == ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    assert len(write_ten(tmp_path / "b", max_bytes=5000)) == 4
    with tarfile.open(by_count[2]) as tar:
        assert tar.getnames() == ["000000008.0.png", "000000008.json", "000000009.0.png", "000000009.json"]
    import webdataset

    samples = list(webdataset.WebDataset([str(shard) for shard in by_count], shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"{number:09d}" for number in range(10)]
    assert samples[3]["0.png"] == bytes([3]) * 700
    assert json.loads(samples[3]["json"]) == {"messages": MESSAGES, "images": ["0.png"], "id": "made/3"}


def test_equal_samples_make_equal_bytes(tmp_path: Path) -> None:
    assert write_ten(tmp_path / "a")[0].read_bytes() == write_ten(tmp_path / "b")[0].read_bytes()


def test_an_unfinished_shard_never_appears(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"), ShardWriter(tmp_path, max_samples=2) as writer:
        for _ in range(3):
            writer.write(MESSAGES)
        raise RuntimeError("stop")
    assert [path.name for path in tmp_path.iterdir()] == ["shard-000000.tar"]


def test_an_earlier_run_is_not_mixed_in(tmp_path: Path) -> None:
    write_ten(tmp_path, max_samples=4)
    with pytest.raises(ValueError, match="overwrite"):
        ShardWriter(tmp_path)
    write_ten(tmp_path, overwrite=True)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_key_with_a_dot_is_refused(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        with pytest.raises(ValueError, match="without dots"):
            writer.write(MESSAGES, key="a.b")
        assert writer.write(MESSAGES, key="a.b/c") == "a.b/c"


# ---------------------------------------------------------------------------------------------------------------- finding


def test_folders_globs_and_braces_name_shards(tmp_path: Path) -> None:
    shards = write_ten(tmp_path, max_samples=4)
    for pattern in (str(tmp_path), f"{tmp_path}/*.tar", f"{tmp_path}/shard-00000{{0..2}}.tar"):
        assert expand_shards(pattern, "data.sources.a.path") == shards
    for pattern in (str(tmp_path / "no"), f"{tmp_path}/x*.tar", f"{tmp_path}/shard-00000{{0..3}}.tar"):
        with pytest.raises(FileNotFoundError, match=r"data\.sources\.a\.path="):
            expand_shards(pattern, "data.sources.a.path")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no \*\.tar"):
        expand_shards(str(tmp_path / "empty"), "data.sources.a.path")
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(ValueError, match="unpack"):
        expand_shards(f"{tmp_path}/a.tar.gz", "data.sources.a.path")


# --------------------------------------------------------------------------------------------------------------- scanning


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_offsets_are_right_in_every_tar_dialect(tmp_path: Path, format: int) -> None:
    long = "d" * 90 + "/" + "é" * 40 + ".json"
    members = [("a.json", b"{}"), (long, b"x" * 1500), ("empty.txt", b""), ("z.0.png", b"y" * 512)]
    shard = tmp_path / "x.tar"
    shard.write_bytes(tar_bytes(members, format))
    scan = scan_tar(shard)
    assert scan.damage is None
    raw = shard.read_bytes()
    assert [(member.name, raw[member.offset : member.offset + member.size]) for member in scan.members] == members


def test_only_regular_files_are_members(tmp_path: Path) -> None:
    shard = tmp_path / "x.tar"
    with tarfile.open(shard, "w") as tar:
        for name, type in (("d", tarfile.DIRTYPE), ("link", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE), ("pipe", tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = type, "/etc/passwd", 0
            tar.addfile(info)
        info = tarfile.TarInfo("../../a.json")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"{}"))
    scan = scan_tar(shard)
    assert [member.name for member in scan.members] == ["../../a.json"]
    assert scan.damage is None


@settings(max_examples=60)
@given(cut=st.integers(0, 20_480))
def test_members_before_a_cut_survive(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    members = [(f"{number}.json", bytes([number]) * (number * 313)) for number in range(8)]
    whole = tar_bytes(members)
    shard = tmp_path_factory.mktemp("cut") / "x.tar"
    shard.write_bytes(whole)
    complete = scan_tar(shard).members
    os.truncate(shard, min(cut, len(whole)))
    scan = scan_tar(shard)
    assert scan.members == [member for member in complete if member.offset + member.size <= cut]
    last = complete[-1].offset + -(-complete[-1].size // 512) * 512
    assert (scan.damage is None) == (cut >= last + 512)


@settings(max_examples=150)
@given(data=st.data())
def test_no_damage_makes_the_scanner_fail_or_read_beyond_the_file(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    format = data.draw(st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    raw = bytearray(tar_bytes([(f"{'n' * 80}/{'m' * 60}{number}.json", b"{}" * 200) for number in range(3)], format))
    for place, value in data.draw(st.lists(st.tuples(st.integers(0, len(raw) - 1), st.integers(0, 255)), max_size=6)):
        raw[place] = value
    if data.draw(st.booleans()):  # a header that is valid and lies
        info = tarfile.TarInfo(data.draw(st.sampled_from(["../x.json", "/abs.json", "a\nb.json", "." * 50])))
        info.size = data.draw(st.sampled_from([0, 1, 10**6, 8**11, 2**62, 2**80]))
        info.type = data.draw(st.sampled_from([tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.GNUTYPE_SPARSE, b"Z"]))
        raw = bytearray(info.tobuf(tarfile.GNU_FORMAT)) + raw
    shard = tmp_path_factory.mktemp("bits") / "x.tar"
    shard.write_bytes(raw)
    scan = scan_tar(shard)
    assert all(member.offset > 0 and member.offset + member.size <= len(raw) for member in scan.members)
    assert all(group.members for group in group_members(scan.members))
    for member in scan.members:
        member.name.encode()


def test_pax_sizes_that_lie_are_damage(tmp_path: Path) -> None:
    for size in (b"999999999999", b"-5", b"x"):
        record = b"size=" + size + b"\n"
        record = str(len(record) + 3).encode() + b" " + record
        header = tarfile.TarInfo("p")
        header.type, header.size = tarfile.XHDTYPE, len(record)
        shard = tmp_path / "x.tar"
        shard.write_bytes(header.tobuf() + record.ljust(512, b"\0") + tar_bytes([("a.json", b"{}")]))
        scan = scan_tar(shard)
        assert scan.members == []
        assert scan.damage is not None


def test_a_pax_size_is_the_members_and_not_that_of_a_record_before_it(tmp_path: Path) -> None:
    record = b"10 size=2\n"
    header = tarfile.TarInfo("p")
    header.type, header.size = tarfile.XHDTYPE, len(record)
    longer = tar_bytes([("n" * 120 + ".json", b"{}")], tarfile.PAX_FORMAT)  # which begins with a pax header of its own
    shard = tmp_path / "x.tar"
    shard.write_bytes(header.tobuf() + record.ljust(512, b"\0") + longer)
    scan = scan_tar(shard)
    assert scan.damage is None
    assert [(member.name, member.size) for member in scan.members] == [("n" * 120 + ".json", 2)]


def test_reading_goes_on_after_damage(tmp_path: Path) -> None:
    whole = tar_bytes([(f"{number}.json", bytes([65 + number]) * 700) for number in range(5)])
    shard = tmp_path / "x.tar"
    for hole in (b"?" * 512, bytes(512)):
        shard.write_bytes(whole[: 2 * 1536] + hole + whole[2 * 1536 + 512 :])
        scan = scan_tar(shard)
        assert [member.name for member in scan.members] == ["0.json", "1.json", "3.json", "4.json"]
        assert [damage.offset for damage in scan.damages] == [2 * 1536]
    shard.write_bytes(whole + whole)
    assert [member.name for member in scan_tar(shard).members] == [f"{number}.json" for number in range(5)] * 2
    assert "end-of-archive mark" in scan_tar(shard).damages[0].reason
    with shard.open("r+b") as stream:  # a terabyte of nothing after it: a hole, which costs nothing to make
        stream.truncate(1 << 40)
    scan = scan_tar(shard)
    assert len(scan.members) == 10


def test_members_are_grouped_by_key_as_webdataset_does() -> None:
    assert split_name("a.b/c.0.png") == ("a.b/c", "0.png")
    names = ["a.json", "a.0.png", "b.json", "b.json", "a.json", "noext"]
    groups = list(group_members([Member(name, at, 1) for at, name in enumerate(names)]))
    assert [(group.key, sorted(group.members), group.repeated) for group in groups] == [
        ("a", ["0.png", "json"], None),
        ("b", ["json"], "json"),
        ("a", ["json"], None),
        ("noext", [""], None),
    ]


# ---------------------------------------------------------------------------------------------------------------- reading


def test_reading_refuses_what_the_file_does_not_have(tmp_path: Path) -> None:
    shard = tmp_path / "x.tar"
    shard.write_bytes(b"0123456789")
    reader = ShardReader()
    assert reader.read(str(shard), [(2, 3), (9, 1), (10, 0)], 10) == [b"234", b"9", b""]
    for spans, size in (([(8, 3)], 10), ([(-1, 2)], 10), ([(0, -1)], 10), ([(0, 1)], 9)):
        with pytest.raises(SampleError) as caught:
            reader.read(str(shard), spans, size)
        assert caught.value.kind == "unreadable"
    os.truncate(shard, 4)  # under the open file
    with pytest.raises(SampleError, match="ends at byte 4"):
        reader.read(str(shard), [(2, 3)], 10)
    with pytest.raises(SampleError, match="No such file"):
        reader.read(str(tmp_path / "gone"), [], 0)


def test_a_folder_that_is_gone_is_waited_for_and_ends_the_run(tmp_path: Path) -> None:
    folder, away = tmp_path / "mounted", tmp_path / "away"
    folder.mkdir()
    (folder / "x.tar").write_bytes(b"0123456789")
    folder.rename(away)
    coming_back = threading.Timer(0.1, lambda: away.rename(folder))
    coming_back.start()
    patient = ShardReader(remote=RemoteFiles(retries=20, first_pause_s=0.05))
    assert patient.read(str(folder / "x.tar"), [(2, 3)], 10) == [b"234"]
    patient.close()
    folder.rename(away)
    remote = RemoteFiles(retries=1, first_pause_s=0.01)
    with pytest.raises(Unreachable, match=r"mounted is gone, and did not come back in \d+ s \(data\.read_retries=1\)"):
        ShardReader(remote=remote).read(str(folder / "x.tar"), [(2, 3)], 10)
    with pytest.raises(SampleError, match="mounted is gone"):
        ShardReader(remote=remote, skip_unreachable=True).read(str(folder / "x.tar"), [(2, 3)], 10)


def test_threads_share_a_reader_that_keeps_few_files_open(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"{number}").write_bytes(bytes([number]) * 100)
    reader = ShardReader(max_open=3)
    wrong: list[int] = []

    def work(start: int) -> None:
        for step in range(200):
            number = (start * 5 + step) % 12
            if reader.read(str(tmp_path / f"{number}"), [(50, 10)], 100) != [bytes([number]) * 10]:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(reader._open) <= 3
    reader.close()
    assert len(reader._open) == 0
