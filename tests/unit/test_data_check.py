"""`dsvl data check` finds what a run would skip, as the run does; bad samples are counted once each and listed."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from dsvl_train.cli import main
from dsvl_train.data import check
from dsvl_train.data.bad_samples import BadSample, Tally, TooManyBadSamples, extend_list, restart_list
from dsvl_train.data.check import check_data
from dsvl_train.data.loader import build_data, open_processor
from dsvl_train.data.processor import Processor
from dsvl_train.data.shards import ShardWriter
from dsvl_train.data.sources import open_sources, read_as_planned
from dsvl_train.data.tar_scan import scan_tar
from tests.unit.made_data import VL2_FOLDER, bomb, config, picture, shards_source, text_source, write_corpus, write_mixture

GOOD = [{"role": "user", "content": "<image>hm"}, {"role": "assistant", "content": "yes"}]
BAD = {"broken": "image_broken", "cut": "image_broken", "bomb": "image_bomb", "role": "bad_conversation", "tagless": "image_count"}


def write_bad(folder: Path, shards: int = 3) -> None:
    """Good samples, one of each kind of bad ones in the last shard, and a damaged shard."""
    write_mixture(folder, 6 * shards, shards=shards)
    with ShardWriter(folder, "bad") as writer:
        writer.write(GOOD, [("png", picture(40, 40))], key="good")
        writer.write(GOOD, [("png", b"no image")], key="broken")
        writer.write(GOOD, [("png", picture(40, 40)[:-60])], key="cut")
        writer.write(GOOD, [("png", bomb())], key="bomb")
        writer.write(GOOD, [], key="tagless")
        writer.write([{"role": "robot", "content": "x"}], key="role")


def test_check_lists_what_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_bad(tmp_path / "s")
    out = tmp_path / "report.jsonl"
    command = ["data", "check", str(tmp_path / "s"), "--processor", str(VL2_FOLDER), "--out", str(out), "--workers", "1"]
    assert main(command) == 1
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert {line["key"]: line["kind"] for line in lines} == BAD
    assert {(line["source"], line["shard"]) for line in lines} == {("shards", "bad-000000.tar")}
    assert all(line["message"] for line in lines)
    printed = capsys.readouterr().out
    assert "shards: 19 samples can be used, 5 cannot; 4 shards" in printed
    assert "image_broken: 2" in printed

    assert main([*command, "--seq-len", "60"]) == 1
    assert Counter(json.loads(line)["kind"] for line in out.read_text().splitlines())["too_long"] > 3
    assert main([*command, "--max-tiles-per-sequence", "2"]) == 1
    assert Counter(json.loads(line)["kind"] for line in out.read_text().splitlines())["too_many_tiles"] > 3


def test_check_passes_what_is_whole_and_refuses_what_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_mixture(tmp_path, 4)
    assert main(["data", "check", str(tmp_path), "--processor", str(VL2_FOLDER)]) == 0
    assert "4 samples can be used, 0 cannot" in capsys.readouterr().out
    for wrong in (
        [str(tmp_path / "nowhere"), "--processor", str(VL2_FOLDER)],
        [str(tmp_path)],
        [str(tmp_path), "--processor", str(VL2_FOLDER), "--run", "recipe=demo_vl2/sft"],
        ["--run", "recipe=demo_vl2/nothing"],
    ):
        for action in ("check", "index"):
            assert main(["data", action, *wrong]) == 2
            assert capsys.readouterr().err.startswith("error: ")


def test_a_shard_with_a_hole_is_reported_with_the_rest_of_it_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_mixture(tmp_path, 12, shards=2)
    shard = tmp_path / "shard-000001.tar"
    raw = bytearray(shard.read_bytes())
    header = scan_tar(shard).members[0].offset - 512
    raw[header : header + 512] = b"?" * 512
    shard.write_bytes(raw)
    assert main(["data", "check", str(tmp_path), "--processor", str(VL2_FOLDER)]) == 1
    printed = capsys.readouterr().out
    assert f"shard-000001.tar: damaged at byte {header}" in printed
    assert "11 samples can be used" in printed


def test_processes_and_the_loader_find_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serial, in processes, and what a run over one epoch replaces by padding."""
    write_bad(tmp_path / "s")
    processor = Processor.from_folder(VL2_FOLDER)
    write_corpus(tmp_path / "text", processor)
    sources = {"pictures": shards_source(tmp_path / "s"), "books": text_source(tmp_path / "text")}
    cfg = config(sources, max_bad_fraction=1.0, batch_size=4, seq_len=512, packing=False)
    alone = check_data(cfg, processor, workers=1)
    monkeypatch.setattr(check, "_SAMPLES_PER_TASK", 3)
    seen: list[int] = []
    together = check_data(cfg, processor, workers=2, progress=lambda total: lambda done, _: seen.append(done - total))
    assert alone == together
    assert seen[-1] == 0
    assert [report.name for report in alone] == ["pictures", "books"]
    pictures = alone[0]
    assert (pictures.left_out, len(pictures.bad)) == (4, 5)
    with build_data(cfg, seed=0, max_steps=6, dp_rank=0, dp_size=1) as pipeline:
        steps = list(pipeline)
        assert sum(step.first_seen for step in steps) == pictures.samples == 20
        found = [entry for _, entry in pipeline.bad_samples] + list(pipeline.left_out())
    assert set(found) == set(pictures.bad)


def test_check_takes_the_settings_of_a_run(tmp_path: Path) -> None:
    """The index is the one that such a run asks for."""
    write_mixture(tmp_path / "s", 6)
    write_corpus(tmp_path / "text", Processor.from_folder(VL2_FOLDER))
    overrides = [
        "recipe=demo_vl2/pretrain",
        f"data.processor={VL2_FOLDER}",
        f"data.sources.pretrain.path={tmp_path}/s",
        f"data.sources.text.path={tmp_path}/text",
        "data.max_tiles=4",
        "data.seq_len=512",
    ]
    for action in ("index", "check"):
        assert main(["data", action, "--run", *overrides]) == 0
    from dsvl_train.config.compose import compose_run

    cfg = compose_run(overrides).data
    assert len(open_sources(cfg, open_processor(cfg), build_index=False)) == 2


def test_a_sample_that_is_not_as_long_as_planned_is_bad(tmp_path: Path) -> None:
    write_mixture(tmp_path, 3)
    cfg = config({"m": shards_source(tmp_path)})
    (source,) = open_sources(cfg, open_processor(cfg))
    tokens, tiles = int(source.index.tokens_n[1]), int(source.index.tiles_n[1])  # type: ignore[attr-defined]
    assert not isinstance(read_as_planned(source, 1, tokens, tiles), BadSample)
    for wrong in ((tokens + 1, tiles), (tokens, tiles + 1)):
        bad = read_as_planned(source, 1, *wrong)
        assert isinstance(bad, BadSample)
        assert (bad.kind, bad.source, bad.key) == ("plan_mismatch", "m", "000000001")


# ---------------------------------------------------------------------------------------------------------------- the tally


def bad(number: int, kind: str = "image_broken", source: str = "m") -> BadSample:
    return BadSample(kind, source, "s.tar", str(number), "why")


def test_a_sample_counts_once_however_often_it_is_read() -> None:
    tally = Tally(0.5)
    assert tally.add([bad(1), bad(2), bad(1)], 40) == [bad(1), bad(2)]
    assert tally.add([bad(2), bad(2, source="other")], 0) == [bad(2, source="other")]
    assert (tally.total, tally.seen) == (3, 40)
    assert tally.by_source() == {"m": {"image_broken": 2}, "other": {"image_broken": 1}}


def test_too_many_stop_the_run_and_few_do_not() -> None:
    tally = Tally(0.1)
    tally.add(map(bad, range(10)), 20)
    tally.check(1)  # half of them, but only ten
    tally.add([bad(10)], 90)
    tally.check(2)  # 11 of 110
    tally.add([bad(11, "unreadable")], 0)
    with pytest.raises(TooManyBadSamples) as caught:
        tally.check(3, bad(11))
    for part in ("12 of 110", "by step 3", "m image_broken 11", "m unreadable 1", "s.tar:11", "data.max_bad_fraction=0.1"):
        assert part in str(caught.value)


def test_the_list_goes_back_to_the_checkpoint_and_survives_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "bad_samples.jsonl"
    assert restart_list(path, 0, [bad(100, "too_long")]) == []
    extend_list(path, 3, [bad(1), bad(2)])
    extend_list(path, 7, [bad(3)])
    with path.open("a") as stream:
        stream.write('{"step": 9, "ki')
    assert restart_list(path, 5, [bad(100, "too_long")]) == [bad(1), bad(2)]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["key"], line["kind"]) for line in lines] == [
        (0, "100", "too_long"),
        (3, "1", "image_broken"),
        (3, "2", "image_broken"),
    ]
    assert set(lines[0]) == {"step", "source", "shard", "key", "kind", "message"}
    tally = Tally(0.5, restart_list(path, 5, []), total=2, seen=9)
    assert (tally.total, tally.seen) == (2, 9)
    os.unlink(path)
    assert Tally(0.5, restart_list(path, 5, []), total=2, seen=9).total == 2  # the list is lost, the count is not
