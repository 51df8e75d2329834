"""The index: what it says of a sample is what encoding gives; what cannot be measured is listed; it is built once, in any number of
processes, and goes on after a kill; stale ones are refused with a command that works; a large one costs neither time nor memory."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsvl_train.cli import main
from dsvl_train.data import index_build
from dsvl_train.data.arrays import column, map_arrays, write_arrays
from dsvl_train.data.errors import SampleError
from dsvl_train.data.index import ARRAYS, VERSION, ShardIndex, index_path, load_index, stale_reason
from dsvl_train.data.index_build import build_index, open_index
from dsvl_train.data.loader import open_processor
from dsvl_train.data.processor import Processor
from dsvl_train.data.sample import parse_sample
from dsvl_train.data.shards import ShardReader, ShardWriter
from dsvl_train.data.sources import ShardSource, index_command, open_sources
from tests.unit.made_data import VL2_FOLDER, VL_FOLDER, bomb, config, picture, shards_source, write_mixture

SETTING = "data.sources.m.path"


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_folder(VL2_FOLDER)


def open_at(path: Path, processor: Processor, **settings: Any) -> ShardIndex:
    return open_index(str(path), processor, setting=SETTING, command="COMMAND", **settings)


def index_file(folder: Path) -> Path:
    (file,) = folder.glob("index-*.safetensors")
    return file


@pytest.mark.parametrize("folder", [VL2_FOLDER, VL_FOLDER])
def test_the_index_agrees_with_encoding(tmp_path: Path, folder: Path) -> None:
    processor = Processor.from_folder(folder)
    keys = write_mixture(tmp_path, 10, shards=3)
    index = open_at(tmp_path, processor)
    assert [index.key(sample) for sample in range(len(index))] == keys
    assert index.images_n.tolist() == [number % 3 for number in range(10)]
    assert index.first_sample_s.tolist() == np.searchsorted(index.shard_n, range(4)).tolist()
    reader = ShardReader()
    for sample in range(len(index)):
        text, images = index.read(sample, reader)
        parsed = parse_sample(text)
        encoded = processor.encode(parsed.messages, images)
        measured = encoded.measured()
        row = (index.tokens_n[sample], index.supervised_n[sample], index.visual_n[sample], index.tiles_n[sample])
        assert row == (measured.tokens, measured.supervised_tokens, measured.visual_tokens, measured.tiles)
        sizes = index.image_sizes(sample).tolist()
        assert processor.measure(parsed.messages, sizes) == measured
        turns = index.turns(sample)
        assert len(turns) == len(parsed.messages)
        assert sum(tokens for tokens, _ in turns) == measured.tokens - measured.visual_tokens
        assert sum(supervised for _, supervised in turns) == measured.supervised_tokens
        if len(turns) == 2:  # a question, then its answer: only that is supervised
            assert turns[0][1] == 0 < turns[1][1]
    assert index.tokens == index.tokens_n.sum() and index.tiles == index.tiles_n.sum()


def test_an_index_is_mapped_and_holds_no_pickle(tmp_path: Path, processor: Processor) -> None:
    write_mixture(tmp_path, 6)
    index = open_at(tmp_path, processor)
    for name in ARRAYS:
        array = getattr(index, name)
        assert array.dtype != object
        while array.base is not None and not isinstance(array, np.memmap):
            array = array.base
        assert isinstance(array, np.memmap), f"{name} is in memory"
    from safetensors import safe_open  # what others make of the file

    with safe_open(index_file(tmp_path), framework="numpy") as stored:
        assert set(stored.keys()) == set(ARRAYS)
        assert stored.get_tensor("tokens_n").tolist() == index.tokens_n.tolist()


def test_damaged_files_of_arrays_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_arrays(path, {"x": "y"}, [column("b", np.arange(5, dtype=np.int32)), column("a", np.zeros((0, 2), dtype=np.int64))])
    about, arrays = map_arrays(path)
    assert about == {"x": "y"}
    assert arrays["b"].tolist() == [0, 1, 2, 3, 4] and arrays["a"].shape == (0, 2)
    raw = path.read_bytes()
    broken = [raw[:-1], raw + b"x", raw[:20], b"", raw[:8], (2**62).to_bytes(8, "little") + raw[8:], raw.replace(b"[0,20]", b"[8,28]")]
    broken += [raw.replace(b"I32", b"I33"), raw.replace(b"[5]", b"[6]"), raw.replace(b'"b"', b"'b'"), b"\x05" + bytes(7) + b"[[[[[" * 9]
    for one in broken:
        assert one != raw
        path.write_bytes(one)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            map_arrays(path)


# ------------------------------------------------------------------------------------------------------------------ stale


def run_command(message: str) -> None:
    """Run the command that a message tells the user to run."""
    words = shlex.split(message[message.index("dsvl data index") :])
    assert main(words[1:]) == 0


@pytest.mark.parametrize(
    "settings", [{}, {"mask_prompt": False, "max_tiles": 4, "tile_selection": "paper", "tiling_image_limit": 1, "max_image_pixels": 10**6}]
)
def test_a_run_is_told_the_command_that_makes_its_index(tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = tmp_path / "with blank's"
    write_mixture(folder, 6)
    cfg = config({"m": shards_source(folder)}, **settings)
    processor = open_processor(cfg)
    with pytest.raises(FileNotFoundError, match=r"data\.sources\.m\.path=.*there is no index.*run: dsvl data index") as missing:
        open_sources(cfg, processor, build_index=False)
    run_command(str(missing.value))
    (source,) = open_sources(cfg, processor, build_index=False)
    assert source.totals()[0] == 6

    shard = sorted(folder.glob("*.tar"))[1]
    os.utime(shard, ns=(0, 12345))
    for build in (False, True):  # even a run that may build does not replace what it began with
        with pytest.raises(ValueError, match=f"{shard.name} changed after it was made.*dsvl data index") as stale:
            open_sources(cfg, processor, build_index=build)
    run_command(str(stale.value))
    (source,) = open_sources(cfg, processor, build_index=False)
    assert isinstance(source, ShardSource) and source.index.shard_mtime_ns[1] == 12345
    assert index_command(cfg, "x").count("--") == 1 + len(settings)


def test_damaged_old_and_foreign_indexes_are_not_used(tmp_path: Path, processor: Processor) -> None:
    write_mixture(tmp_path, 6)
    first = open_at(tmp_path, processor)
    path = index_file(tmp_path)
    assert path == index_path(sorted(tmp_path.glob("*.tar")), processor.fingerprint())
    raw = path.read_bytes()
    old = raw.replace(b'\\"version\\": %d' % VERSION, b'\\"version\\": 0')
    assert old != raw
    cut_arrays = raw[:8] + raw[8:].replace(b'"shape":[6]', b'"shape":[9]', 1)
    for broken, reason in ((raw[:200], "not a usable index"), (old, "version 0"), (cut_arrays, "not a usable index")):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=f"{reason}.*COMMAND"):
            open_at(tmp_path, processor)
        assert open_at(tmp_path, processor, rebuild=True).digest == first.digest
    other = Processor.from_folder(VL2_FOLDER, mask_prompt=False)
    assert stale_reason(first, sorted(tmp_path.glob("*.tar")), other.fingerprint()) is not None
    assert len(open_at(tmp_path, other)) == len(first)
    assert len(list(tmp_path.glob("index-*.safetensors"))) == 2


def test_a_fresh_index_is_left_as_it_is(tmp_path: Path, processor: Processor) -> None:
    write_mixture(tmp_path, 6)
    open_at(tmp_path, processor)
    written = index_file(tmp_path).stat().st_mtime_ns
    open_at(tmp_path, processor, rebuild=True)
    assert main(["data", "index", str(tmp_path), "--processor", str(VL2_FOLDER)]) == 0
    assert index_file(tmp_path).stat().st_mtime_ns == written


def test_an_index_may_lie_elsewhere(tmp_path: Path, processor: Processor, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):  # shards of the same names
        write_mixture(tmp_path / name, 4, seed=ord(name))
    for name in ("a", "b"):
        index = open_at(tmp_path / name, processor, index_dir=str(tmp_path / "indexes"))
        assert len(index.read(1, ShardReader())[1]) == 1
        assert list((tmp_path / name).glob("index*")) == []
    assert len(list((tmp_path / "indexes").glob("*.safetensors"))) == 2

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", "x")

    monkeypatch.setattr("dsvl_train.data.index_build.build_index", refuse)
    with pytest.raises(OSError, match=r"Permission denied.*data\.index_dir.*COMMAND"):
        open_at(tmp_path / "a", processor)


# --------------------------------------------------------------------------------------------------------------- building


def test_processes_make_the_same_bytes_as_one(tmp_path: Path, processor: Processor, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mixture(tmp_path, 30, shards=6)
    with (tmp_path / "shard-000002.tar").open("r+b") as stream:  # and what is skipped and damaged
        stream.seek(600)
        stream.write(b"?" * 3000)
    shards = sorted(tmp_path.glob("*.tar"))
    alone, seen = tmp_path / "alone", list[tuple[int, int]]()
    build_index(shards, processor, alone, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 6) for done in range(7)]
    monkeypatch.setattr(index_build, "_BYTES_PER_PROCESS", 1)
    index = build_index(shards, processor, tmp_path / "together", workers=3)
    assert len(index.skipped) + len(index) >= 29 and len(index.damaged) == 1
    assert (tmp_path / "together").read_bytes() == alone.read_bytes()
    assert [path.name for path in tmp_path.glob(".*")] == []


KILLED = """
import sys
from dsvl_train.data import index_build
from dsvl_train.data.processor import Processor

index_build._BYTES_PER_PROCESS = 1
index_build.open_index(sys.argv[1], Processor.from_folder(sys.argv[2]), setting="S", command="C", workers=2)
"""


def test_a_killed_build_leaves_no_process_and_goes_on(tmp_path: Path, processor: Processor) -> None:
    folder, twin = tmp_path / "killed", tmp_path / "whole"
    write_mixture(folder, 1200, shards=150)
    twin.mkdir()
    for shard in folder.glob("*.tar"):
        os.link(shard, twin / shard.name)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    builder = subprocess.Popen([sys.executable, "-c", KILLED, str(folder), str(VL2_FOLDER)], env=environment)
    try:
        deadline = time.monotonic() + 120
        while len(list(folder.glob(".index-*.parts/[!.]*"))) < 5:
            assert builder.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        workers = Path(f"/proc/{builder.pid}/task/{builder.pid}/children").read_text().split()
    finally:
        builder.send_signal(signal.SIGKILL)
        builder.wait()
    assert list(folder.glob("index-*")) == [], "published before it was complete"
    while any(is_python(pid) for pid in workers):
        assert time.monotonic() < deadline, "a worker outlived the build"
        time.sleep(0.05)
    (parts_dir,) = folder.glob(".index-*.parts")
    before = sorted(parts_dir.glob("[!.]*"))
    assert 5 <= len(before) < 150
    before[0].write_bytes(before[0].read_bytes()[:-9])  # a disk that lost its last pages: this part is made anew
    shards = sorted(folder.glob("*.tar"))
    seen: list[int] = []
    path = index_path(shards, processor.fingerprint())
    build_index(shards, processor, path, progress=lambda done, _: seen.append(done))
    assert seen == list(range(len(before) - 1, 151))
    open_at(twin, processor)
    assert path.read_bytes() == index_file(twin).read_bytes()
    assert not parts_dir.exists()


def is_python(pid: str) -> bool:
    try:
        return "python" in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False


def test_a_second_builder_waits_and_uses_what_the_first_made(tmp_path: Path, processor: Processor, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    write_mixture(tmp_path, 4)
    built: list[Path] = []
    first_has_begun, go_on = threading.Event(), threading.Event()
    real = index_build.build_index

    def slow(shards: Any, processor: Processor, path: Path, **settings: Any) -> ShardIndex:
        built.append(path)
        first_has_begun.set()
        assert go_on.wait(30)
        return real(shards, processor, path, **settings)

    monkeypatch.setattr(index_build, "build_index", slow)
    indexes: list[ShardIndex] = []
    threads = [threading.Thread(target=lambda: indexes.append(open_at(tmp_path, processor))) for _ in range(2)]
    threads[0].start()
    assert first_has_begun.wait(30)
    threads[1].start()
    time.sleep(0.2)
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert len(built) == 1 and len(indexes) == 2 and indexes[0].digest == indexes[1].digest


def test_a_shard_that_changes_while_it_is_indexed_is_an_error(
    tmp_path: Path, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_mixture(tmp_path, 4)
    real = index_build.index_shard

    def grow(path: Path, *rest: Any) -> Any:
        part = real(path, *rest)
        os.utime(path, ns=(0, 5))
        return part

    monkeypatch.setattr(index_build, "index_shard", grow)
    with pytest.raises(OSError, match="changed while it was indexed"):
        open_at(tmp_path, processor)
    assert list(tmp_path.glob("index-*")) == []


# ---------------------------------------------------------------------------------------------------------------- samples


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
    assert list(load_index(index_file(tmp_path)).skipped) == index.skipped[:]
    assert index.skipped[-1] == index.skipped[7] and len(index.skipped[2:5]) == 3
    with pytest.raises(IndexError):
        index.skipped[8]


def test_images_above_the_stated_number_of_pixels_are_refused(tmp_path: Path) -> None:
    """From the header: no pixel of the bomb is decoded."""
    processor = Processor.from_folder(VL2_FOLDER, max_image_pixels=2000)
    with ShardWriter(tmp_path) as writer:
        for key, image in (("at", picture(50, 40)), ("above", picture(2001, 1)), ("bomb", bomb())):
            writer.write([{"role": "document", "content": "<image>x"}], [("png", image)], key=key)
    index = open_at(tmp_path, processor)
    assert [index.key(sample) for sample in range(len(index))] == ["at"]
    assert {(one.key, one.kind) for one in index.skipped} == {("above", "image_bomb"), ("bomb", "image_bomb")}
    assert "2001 pixels; data.max_image_pixels allows 2000" in index.skipped[0].reason


def test_a_member_of_gigabytes_is_refused_unread(tmp_path: Path, processor: Processor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_build, "MEMBER_BYTES", 1000)
    with ShardWriter(tmp_path) as writer:
        writer.write([{"role": "document", "content": "x" * 990}], key="large")
        writer.write([{"role": "document", "content": "x" * 900}], key="small")
    index = open_at(tmp_path, processor)
    assert [one.kind for one in index.skipped] == ["too_large"] and index.key(0) == "small"


def test_an_image_header_beyond_the_first_bytes_is_found(tmp_path: Path, processor: Processor) -> None:
    raw = picture(50, 30, kind="JPEG")
    comment = b"\xff\xfe" + (65_535).to_bytes(2, "big") + bytes(65_533)
    with ShardWriter(tmp_path) as writer:
        messages = [{"role": "document", "content": "<image>x"}]
        writer.write(messages, [("jpg", raw[:2] + comment * 2 + raw[2:])])
        writer.write(messages, [("jpg", raw)])
    index = open_at(tmp_path, processor)
    assert len(index.skipped) == 0
    assert index.tokens_n[0] == index.tokens_n[1]


def test_a_cut_shard_keeps_what_is_before_the_cut(tmp_path: Path, processor: Processor) -> None:
    write_mixture(tmp_path, 12, shards=2)
    shards = sorted(tmp_path.glob("*.tar"))
    whole = open_at(tmp_path, processor)
    os.truncate(shards[0], shards[0].stat().st_size // 2)
    index = open_at(tmp_path, processor, rebuild=True)
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
    for sample, member in ((1, 0), (2, 2)):  # a text, and an image
        raw[int(index.offset_m[index.first_member_n[sample] + member]) + 30] ^= 1
    shard.write_bytes(raw)
    reader = ShardReader()
    index.read(0, reader)
    for sample in (1, 2):
        with pytest.raises(SampleError, match="changed since it was indexed") as caught:
            index.read(sample, reader)
        assert caught.value.kind == "changed"
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
    most = int(np.median(index.tiles_n))
    few_tiles = ShardSource("m", "multimodal", index, processor, ShardReader(), limit, most)
    assert {skipped.kind for skipped in few_tiles.skipped} == {"too_long", "too_many_tiles"}
    assert any(f"tiles; data.max_tiles_per_sequence={most}" in skipped.reason for skipped in few_tiles.skipped)
    assert few_tiles.totals()[0] == ((index.tokens_n <= limit) & (index.tiles_n <= most)).sum()
    assert few_tiles.tiles(np.arange(few_tiles.totals()[0])).max() <= most
    text_only = ShardSource("t", "text", index, processor, ShardReader(), 10_000)
    assert [skipped.kind for skipped in text_only.skipped] == ["image_in_text"] * 8
    assert text_only.tiles(np.arange(4)).tolist() == [0] * 4


def test_the_hash_covers_images(tmp_path: Path, processor: Processor) -> None:
    digests = []
    for seed in (0, 0, 1):
        folder = tmp_path / str(len(digests))
        with ShardWriter(folder) as writer:
            for _ in range(2):
                writer.write([{"role": "document", "content": "<image>x"}], [("bmp", picture(20, 20, seed=seed, kind="BMP"))])
        index = open_at(folder, processor)
        assert index.hash_n[0] == index.hash_n[1]
        source = ShardSource("m", "multimodal", index, processor, ShardReader(), 10_000)
        digests.append((int(index.hash_n[0]), index.digest, source.identity()))
    assert digests[0] == digests[1]
    assert not set(digests[0]) & set(digests[2])


@given(lengths=st.lists(st.integers(1, 20), max_size=40), limit=st.integers(0, 20))
def test_sample_numbers_skip_what_is_left_out(lengths: list[int], limit: int) -> None:
    index = made_index(np.asarray(lengths, dtype=np.int32))
    source = ShardSource("m", "multimodal", index, None, None, limit)  # type: ignore[arg-type]
    usable = [number for number, length in enumerate(lengths) if length <= limit]
    assert source.number(np.arange(len(usable))).tolist() == usable
    assert source.shard_sizes.tolist() == [len(usable)]
    assert source.totals()[:2] == (len(usable), sum(lengths[number] for number in usable))
    assert [one.reason for one in source.skipped] == [f"{length} tokens; data.seq_len={limit}" for length in lengths if length > limit]


def made_index(tokens_n: Any) -> ShardIndex:
    """An index of text samples with these lengths, in memory."""
    from dsvl_train.data.index_build import ShardPart

    part = ShardPart("s.tar")
    for number, tokens in enumerate(tokens_n.tolist()):
        part.rows.append((number, tokens, 1, 0, 0))
        part.spans.append([(number, 1)])
        part.turns.append(((tokens, 1),))
        part.keys.append(str(number))
    facts, arrays = part.finish(0, 0)
    return ShardIndex(Path(), ["s.tar"], "", facts["digest"], facts["tokens"], facts["tiles"], [], **arrays)


# ------------------------------------------------------------------------------------------------------------------- size

HUGE = """
import json, sys, time
from pathlib import Path
import numpy as np
from dsvl_train.data.index import load_index
from dsvl_train.data.sources import ShardSource

def anonymous_mb():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) / 1024

before, start = anonymous_mb(), time.perf_counter()
index = load_index(Path(sys.argv[1]))
opened = time.perf_counter() - start
last = len(index) - 1
row = [index.key(last), index.turns(last), index.image_sizes(last).tolist(), index.where(last), int(index.hash_n[last])]
looked = anonymous_mb() - before
source = ShardSource("m", "multimodal", index, None, None, 2048)
lengths = source.lengths(np.asarray([0, len(index) // 2, last - 1])).tolist()
print(json.dumps({"samples": len(index), "open_s": opened, "looked_mb": looked, "source_mb": anonymous_mb() - before, "row": row,
                  "lengths": lengths, "totals": source.totals()}))
"""


def write_huge_index(path: Path, samples: int) -> None:
    """An index of many samples, one image and two turns each: its header, and holes but for the last sample's rows."""
    facts = {"version": VERSION, "shards": ["s.tar"], "fingerprint": "", "digest": "", "tokens": samples, "tiles": 0, "damaged": []}
    lengths = {"shard_bytes": 1, "shard_mtime_ns": 1, "first_sample_s": 2, "skipped_text": 0, "first_skipped_k": 1, "key_text": 9 * samples}
    per_sample = {"offset_m": 2, "size_m": 2, "turn_tokens_t": 2, "turn_supervised_t": 2}
    small = {"shard_n", "tokens_n", "supervised_n", "visual_n", "tiles_n", "turn_tokens_t", "turn_supervised_t", "image_wh_i"}
    header: dict[str, Any] = {"__metadata__": {"index": json.dumps(facts)}}
    end, last = 0, samples - 1
    for name in sorted(ARRAYS, key=lambda name: (name in small, name.endswith("_text"))):
        starts = name.startswith("first_") and name.endswith("_n")
        rows = lengths.get(name, per_sample.get(name, 1) * samples + starts)
        shape = [rows, 2] if name == "image_wh_i" else [rows]
        kind = "U8" if name.endswith("_text") else "I32" if name in small else "U64" if name == "hash_n" else "I64"
        start, end = end, end + int(np.prod(shape)) * {"U8": 1, "I32": 4}.get(kind, 8)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)
    raw = np.memmap(path, dtype=np.uint8, mode="r+", offset=8 + len(text))
    view = {name: raw[slice(*entry["data_offsets"])] for name, entry in header.items() if name != "__metadata__"}
    arrays = {name: part.view("<i4" if name in small else "u1" if name.endswith("_text") else "<i8") for name, part in view.items()}
    arrays["first_sample_s"][1] = samples
    for name, per in (("first_member_n", 2), ("first_turn_n", 2), ("first_key_n", 9)):
        arrays[name][-2:] = [last * per, samples * per]
    arrays["key_text"][-9:] = np.frombuffer(b"the-last1", dtype=np.uint8)
    arrays["turn_tokens_t"][-2:] = [7, 8]
    arrays["offset_m"][-2:] = [512, 2048]
    arrays["image_wh_i"][-2:] = [640, 480]
    arrays["hash_n"][-1] = 99
    arrays["tokens_n"][:2] = [11, 5000]
    raw.flush()


def test_a_hundred_million_samples_open_at_once_and_stay_on_disk(tmp_path: Path) -> None:
    samples = 100_000_000
    path = tmp_path / "index-x.safetensors"
    write_huge_index(path, samples)
    assert path.stat().st_size > 10e9
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", HUGE, str(path)], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["samples"] == samples
    assert found["row"] == ["the-last1", [[7, 0], [8, 0]], [[640, 480]], "s.tar@512", 99]
    assert found["lengths"] == [11, 0, 0] and found["totals"][0] == samples - 1  # one is too long
    assert found["open_s"] < 0.5
    assert found["looked_mb"] < 20
    assert found["source_mb"] < 100
