"""The index: what it says of a sample is what encoding gives; what cannot be measured is listed; stale ones are not used."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest

from dsvl_train.data.errors import SampleError
from dsvl_train.data.index import ShardIndex, build_index, index_path, load_index, open_index, save_index, stale_reason
from dsvl_train.data.processor import Processor
from dsvl_train.data.sample import parse_sample
from dsvl_train.data.shards import ShardReader, ShardWriter
from dsvl_train.data.sources import ShardSource
from tests.unit.made_data import VL2_FOLDER, VL_FOLDER, bomb, picture, write_mixture

SETTING = "data.sources.m.path"


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_folder(VL2_FOLDER)


def open_at(path: Path, processor: Processor, build: bool = True) -> ShardIndex:
    return open_index(str(path), processor, setting=SETTING, processor_folder="PROC", build=build)


@pytest.mark.parametrize("folder", [VL2_FOLDER, VL_FOLDER])
def test_the_index_agrees_with_encoding(tmp_path: Path, folder: Path) -> None:
    processor = Processor.from_folder(folder)
    keys = write_mixture(tmp_path, 10, shards=3)
    index = build_index(sorted(tmp_path.glob("*.tar")), processor, workers=2)
    assert len(index) == len(keys)
    assert index.images_n.tolist() == [number % 3 for number in range(10)]
    assert np.all(np.diff(index.shard_n) >= 0)
    reader = ShardReader()
    for sample in range(len(index)):
        text, images = index.read(sample, reader)
        measured = processor.encode(parse_sample(text).messages, images).measured()
        row = (index.tokens_n[sample], index.supervised_n[sample], index.visual_n[sample], index.tiles_n[sample])
        assert row == (measured.tokens, measured.supervised_tokens, measured.visual_tokens, measured.tiles)


def test_an_index_survives_its_file_and_holds_no_pickle(tmp_path: Path, processor: Processor) -> None:
    write_mixture(tmp_path, 6)
    index = build_index(sorted(tmp_path.glob("*.tar")), processor)
    save_index(index, tmp_path / "i.npz")
    with np.load(tmp_path / "i.npz", allow_pickle=False) as stored:
        assert all(stored[name].dtype != object for name in stored.files)
    again = load_index(tmp_path / "i.npz")
    for name, value in vars(index).items():
        assert np.array_equal(getattr(again, name), value), name


def test_a_fresh_index_is_used_and_a_stale_one_made_anew(tmp_path: Path, processor: Processor) -> None:
    write_mixture(tmp_path, 6)
    shards = sorted(tmp_path.glob("*.tar"))
    with pytest.raises(FileNotFoundError, match=rf"{SETTING}=.* run: dsvl data index {tmp_path} --processor PROC"):
        open_at(tmp_path, processor, build=False)
    first = open_at(tmp_path, processor)
    path = index_path(shards, processor.fingerprint())
    assert processor.fingerprint()[:12] in path.name
    written = path.stat().st_mtime_ns
    assert len(open_at(tmp_path, processor, build=False)) == len(first)
    assert path.stat().st_mtime_ns == written

    os.utime(shards[0], ns=(0, 12345))
    with pytest.raises(FileNotFoundError, match=f"{shards[0].name} changed"):
        open_at(tmp_path, processor, build=False)
    assert open_at(tmp_path, processor).shard_mtime_ns[0] == 12345

    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(FileNotFoundError, match="not a usable index"):
        open_at(tmp_path, processor, build=False)
    assert len(open_at(tmp_path, processor)) == len(first)

    other = Processor.from_folder(VL2_FOLDER, mask_prompt=False)
    assert stale_reason(first, shards, other.fingerprint()) is not None
    assert len(open_at(tmp_path, other)) == len(first)
    assert len(list(tmp_path.glob("index-*.npz"))) == 2


def test_what_cannot_be_measured_is_listed_with_kind_and_key(tmp_path: Path, processor: Processor) -> None:
    good = [{"role": "user", "content": "<image>hm"}, {"role": "assistant", "content": "yes"}]
    with ShardWriter(tmp_path) as writer:
        writer.write(good, [("png", picture(40, 40))], key="good")
        writer.write(good, [("png", b"no image")], key="broken")
        writer.write(good, [("png", bomb())], key="bomb")
        writer.write(good, [], key="tagless")
        writer.write([{"role": "robot", "content": "x"}], key="role")
        writer.write([{"role": "user", "content": "no answer"}], key="unsupervised")
        writer._tar.write({"__key__": "json", "json": b"{]"})
        writer._tar.write({"__key__": "missing", "json": json.dumps({"messages": good, "images": ["0.png"]}).encode()})
        writer._tar.write({"__key__": "alone", "png": picture(9, 9)})
    index = open_at(tmp_path, processor)
    assert len(index) == 1
    assert {skipped.key: skipped.kind for skipped in index.skipped} == {
        "broken": "image_broken",
        "bomb": "image_bomb",
        "tagless": "image_count",
        "role": "bad_conversation",
        "unsupervised": "nothing_supervised",
        "json": "bad_json",
        "missing": "image_missing",
        "alone": "bad_json",
    }
    assert load_index(next(tmp_path.glob("index-*.npz"))).skipped == index.skipped


def test_an_image_header_beyond_the_first_bytes_is_found(tmp_path: Path, processor: Processor) -> None:
    raw = picture(50, 30, kind="JPEG")
    comment = b"\xff\xfe" + (65_535).to_bytes(2, "big") + bytes(65_533)
    with ShardWriter(tmp_path) as writer:
        messages = [{"role": "document", "content": "<image>x"}]
        writer.write(messages, [("jpg", raw[:2] + comment * 2 + raw[2:])])
        writer.write(messages, [("jpg", raw)])
    index = open_at(tmp_path, processor)
    assert index.skipped == []
    assert index.tokens_n[0] == index.tokens_n[1]


def test_a_cut_shard_keeps_what_is_before_the_cut(tmp_path: Path, processor: Processor) -> None:
    write_mixture(tmp_path, 12, shards=2)
    shards = sorted(tmp_path.glob("*.tar"))
    whole = open_at(tmp_path, processor)
    os.truncate(shards[0], shards[0].stat().st_size // 2)
    index = open_at(tmp_path, processor)
    kept = int((index.shard_n == 0).sum())
    assert 0 < kept < 6
    assert int((index.shard_n == 1).sum()) == 6
    assert index.tokens_n[:kept].tolist() == whole.tokens_n[:kept].tolist()
    assert [(damage.shard, damage.samples >= kept) for damage in index.damaged] == [(shards[0].name, True)]


def test_bytes_that_changed_under_the_index_are_noticed(tmp_path: Path, processor: Processor) -> None:
    write_mixture(tmp_path, 3, shards=1)
    index = open_at(tmp_path, processor)
    shard = next(tmp_path.glob("*.tar"))
    raw = bytearray(shard.read_bytes())
    place = int(index.offset_m[index.first_member_n[1]]) + 30
    raw[place] ^= 1
    shard.write_bytes(raw)
    reader = ShardReader()
    index.read(0, reader)
    with pytest.raises(SampleError, match="changed since it was indexed"):
        index.read(1, reader)
    shard.write_bytes(raw[:-512])
    with pytest.raises(SampleError, match="it had"):
        index.read(0, ShardReader())


def test_samples_that_no_sequence_holds_are_skipped_by_name(tmp_path: Path, processor: Processor) -> None:
    write_mixture(tmp_path, 12)
    index = open_at(tmp_path, processor)
    limit = int(np.median(index.tokens_n))
    source = ShardSource("m", "multimodal", index, processor, ShardReader(), limit)
    assert {skipped.kind for skipped in source.skipped} == {"too_long"}
    assert len(source.skipped) + source.totals()[0] == 12
    assert source.lengths(np.arange(source.totals()[0])).max() <= limit
    assert source.shard_sizes.sum() == source.totals()[0]
    text_only = ShardSource("t", "text", index, processor, ShardReader(), 10_000)
    assert [skipped.kind for skipped in text_only.skipped] == ["image_in_text"] * 8
    assert text_only.tiles(np.arange(4)).tolist() == [0] * 4


def test_progress_is_reported_and_an_unwritable_folder_is_only_a_warning(
    tmp_path: Path, processor: Processor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_mixture(tmp_path, 6, shards=3)
    seen: list[tuple[int, int]] = []
    build_index(sorted(tmp_path.glob("*.tar")), processor, progress=lambda done, shards: seen.append((done, shards)))
    assert seen == [(1, 3), (2, 3), (3, 3)]

    def refuse(index: ShardIndex, path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("dsvl_train.data.index.save_index", refuse)
    with caplog.at_level(logging.WARNING):
        assert len(open_at(tmp_path, processor)) == 6
    assert "kept in memory only" in caplog.text
