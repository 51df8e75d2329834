"""The demo's data: the same for a seed, whole or not there, nothing held out in training, and every sample usable by both families."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the demo's data need scikit-learn: pip install .[demo]")

from data_recipes.demo import images, materials, prepare, samples, texts
from dsvl_train.data.processor import Processor
from dsvl_train.data.sample import parse_sample
from dsvl_train.data.tar_scan import group_members, scan_tar

SCALE = 0.01
LONGEST = 400
"""Tokens of a demo sample at most, in either family: several fit a packed sequence."""
DRAWN = {"align": 800, "pretrain": 800, "sft": 800, "sft_text": 400}
"""Samples of each stage that are looked at."""

Drawn = dict[str, list[samples.DemoSample]]


@pytest.fixture(scope="module")
def both_sides() -> tuple[materials.Materials, materials.Materials]:
    return materials.load_materials()


@pytest.fixture(scope="module")
def drawn(both_sides: tuple[materials.Materials, materials.Materials]) -> Drawn:
    """The first samples of every stage."""
    return {stage: [samples.make_sample(stage, index, 0, both_sides[0]) for index in range(count)] for stage, count in DRAWN.items()}


@pytest.fixture(scope="module")
def make(both_sides: tuple[materials.Materials, materials.Materials]) -> Any:
    """`prepare` at a small scale, with the materials read once for all tests."""

    def prepare_small(out: Path, **settings: Any) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prepare, "load_materials", lambda: both_sides)
            prepare.prepare(out, scale=SCALE, **settings)
        return out

    return prepare_small


@pytest.fixture(scope="module")
def prepared(make: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("demo") / "data", workers=1)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def letters(text: str) -> str:
    return re.sub(r"\W+", "", text).lower()


def words_shown(sample: samples.DemoSample) -> set[str]:
    """Words that a sample's images show, as far as its text tells."""
    if sample.kind in ("caption_digit", "caption_row", "caption_chart", "chart_to_table", "ask_digit", "ask_row", "ask_chart", "ask_docs"):
        return set()
    if sample.kind == "interleaved":
        found = re.findall(r"<image>\n(\w+)\n", sample.messages[0]["content"])
    elif sample.kind in ("ask_word", "ask_page"):
        found = " ".join(m["content"] for m in sample.messages if m["role"] == "assistant").split()
    else:
        found = sample.messages[0]["content"].removeprefix("<image>").split()
    return {word for word in found if len(word) >= 3}


# ---------------------------------------------------------------------------------------------------------------- the folder


def test_same_seed_same_bytes_however_many_workers(make: Any, prepared: Path, tmp_path: Path) -> None:
    again = make(tmp_path / "again", workers=2)
    assert contents(again) == contents(prepared)


def test_another_seed_changes_training_and_not_the_evaluation(make: Any, prepared: Path, tmp_path: Path) -> None:
    first, other = contents(prepared), contents(make(tmp_path / "other", seed=1, workers=1))
    assert set(first) == set(other)
    changed = {name for name in first if first[name] != other[name]}
    assert changed == {"manifest.json"} | {name for name in first if name.endswith(".tar")}


def test_finished_data_are_used_again_and_other_settings_replace_them(make: Any, tmp_path: Path) -> None:
    out = make(tmp_path / "data", workers=1)
    (out / "mark").write_text("still the same folder")
    make(out, workers=2)
    assert (out / "mark").exists()
    make(out, seed=1, workers=1)
    assert not (out / "mark").exists() and (out / "manifest.json").exists()


def test_interrupted_data_are_not_taken_for_whole(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare, "_write_eval", interrupt)
        make(tmp_path / "data", workers=1)
    assert not (tmp_path / "data").exists()
    make(tmp_path / "data", workers=1)
    assert (tmp_path / "data" / "manifest.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    assert prepare.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path} is not empty and was not made by this recipe; choose another --out\n"
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


# --------------------------------------------------------------------------------------------------------------- no leaks


def test_digits_are_divided_by_scan(both_sides: tuple[materials.Materials, materials.Materials]) -> None:
    train, held = ({digit.scan.astype(np.uint8).tobytes() for digit in side.digits} for side in both_sides)
    assert not train & held
    assert len(held) == len(both_sides[1].digits) == 300 and len(both_sides[0].digits) == 1497
    assert np.bincount([digit.label for digit in both_sides[1].digits]).tolist() == [30] * 10


def test_no_training_image_shows_a_held_out_word(both_sides: tuple[materials.Materials, materials.Materials], drawn: Drawn) -> None:
    shown = {word for stage in drawn.values() for sample in stage for word in words_shown(sample)}
    assert len(shown) > 300
    assert not [word for word in shown if materials.is_held_out_word(word)]
    assert len(both_sides[1].words) >= 100 and not set(both_sides[1].words) & set(both_sides[0].words)
    assert all(any(map(materials.is_held_out_word, passage)) for passage in both_sides[1].passages)


def test_no_training_text_repeats_a_held_out_one(both_sides: tuple[materials.Materials, materials.Materials]) -> None:
    train, held = both_sides
    assert not {d.group for d in train.documents} & {d.group for d in held.documents}
    held_text = letters(" ".join(d.text for d in held.documents))
    repeated = [d.name for d in train.documents for key in texts.paragraph_keys(d.text) if key in held_text]
    assert not repeated
    answers = [letters(texts.first_sentence(entry.text)) for entry in train.entries]
    assert not [answer for answer in answers if len(answer) >= 40 and answer in held_text]
    size = sum(len(d.text.encode()) for d in held.documents)
    assert 40_000 < size <= texts.HELD_OUT_BYTES, "enough for a steady figure of bits per byte"


def test_charts_are_divided_by_column(both_sides: tuple[materials.Materials, materials.Materials]) -> None:
    train, held = ({(chart.table, chart.title) for chart in side.charts} for side in both_sides)
    assert held and not train & held
    for chart in [*both_sides[0].charts, *both_sides[1].charts]:
        ordered = sorted(chart.heights)
        assert 2 <= len(ordered) <= 4 and ordered[-1] == 1.0
        assert ordered[-1] - ordered[-2] >= 0.11 and ordered[1] - ordered[0] >= 0.11, "highest and lowest can be seen"


# ---------------------------------------------------------------------------------------------------------------- samples


@pytest.mark.parametrize("family", ["vl2", "vl"])
def test_every_kind_of_sample_encodes_and_is_short(prepared: Path, drawn: Drawn, family: str) -> None:
    processor = Processor.from_folder(prepared / f"processor_{family}")
    for stage, stage_samples in drawn.items():
        measured = [processor.measure(s.messages, [image.size for image in s.images]) for s in stage_samples]
        lengths = np.array([m.tokens for m in measured])
        print(f"{family} {stage}: tokens at 5, 50, 95, 100 %: {np.percentile(lengths, [5, 50, 95, 100]).astype(int).tolist()}")
        assert lengths.max() <= LONGEST
        assert min(m.supervised_tokens for m in measured) >= 1
        for sample, expected in list(zip(stage_samples, measured, strict=True))[::8]:
            assert processor.encode(sample.messages, sample.images).measured() == expected


def test_vl2_pages_and_rows_are_tiled_without_scaling(prepared: Path, drawn: Drawn) -> None:
    processor = Processor.from_folder(prepared / "processor_vl2")
    tiles = set()
    for sample in [*drawn["pretrain"], *drawn["sft"]]:
        for image in sample.images:
            assert image.mode == "L" and image.width % images.TILE == 0 and image.height % images.TILE == 0
        if len(sample.images) == 1:
            ((wide, high),) = processor.encode(sample.messages, sample.images).tiles_wh.tolist()
            assert (wide * images.TILE, high * images.TILE) == sample.images[0].size
            tiles.add(wide * high)
    assert {1, 2, 3, 4, 6, 9} <= tiles


def test_mixtures_are_shares_and_digits_are_a_large_part(drawn: Drawn) -> None:
    for stage, mixture in samples.MIXTURES.items():
        assert sum(share for _, share in mixture) == pytest.approx(1.0), stage
    for stage in ("align", "pretrain", "sft"):
        of_digits = sum(s.kind in ("caption_digit", "caption_row", "ask_digit", "ask_row") for s in drawn[stage])
        assert of_digits > 0.4 * len(drawn[stage])
    assert {"system", "user", "assistant"} == {m["role"] for s in drawn["sft"] for m in s.messages}
    assert {2, 4} <= {sum(m["role"] != "system" for m in s.messages) for s in drawn["sft"]}, "single- and multi-turn"
    assert {1, 2, 3} == {len(s.images) for s in drawn["sft"]}


def test_shards_hold_the_samples(prepared: Path, both_sides: tuple[materials.Materials, materials.Materials]) -> None:
    for stage in samples.MIXTURES:
        shards = sorted((prepared / stage).glob("*.tar"))
        raw = shards[0].read_bytes()
        group = next(iter(group_members(scan_tar(shards[0]).members)))
        member = group.members["json"]
        sample = parse_sample(raw[member.offset : member.offset + member.size])
        expected = samples.make_sample(stage, 0, 0, both_sides[0])
        assert sample.messages == expected.messages and len(sample.images) == len(expected.images)


def test_a_digit_is_drawn_upright_and_in_the_middle() -> None:
    scan = np.zeros((8, 8))
    scan[1, 1:7] = 16  # a bar at the top
    drawn_scan = 255 - np.asarray(images.digit_image(scan), dtype=float)
    rows, columns = drawn_scan.sum(axis=1), drawn_scan.sum(axis=0)
    assert drawn_scan.shape == (48, 48)
    assert abs(float(rows @ np.arange(48) / rows.sum()) - (4 + 1.5 * 5 - 0.5)) < 1, "row 1 of 8, each 5 pixels, 4 pixels of margin"
    assert abs(float(columns @ np.arange(48) / columns.sum()) - 23.5) < 1
    turned = images.digit_image(scan, images.Jitter(angle=90))
    assert (255 - np.asarray(turned, dtype=float)).sum(axis=0).argmax() not in range(18, 30), "a quarter turn puts the bar on a side"


# -------------------------------------------------------------------------------------------------------------- evaluation


def test_evaluation_asks_in_words_that_training_uses(prepared: Path, drawn: Drawn) -> None:
    asked = {m["content"] for s in drawn["sft"] for m in s.messages if m["role"] == "user"}
    for task in ("digits", "words", "charts", "pages"):
        items = json_lines(prepared / "eval" / f"{task}.jsonl")
        assert items
        for item in items:
            assert item["task"] == task and item["metric"] in ("exact_match", "character_accuracy") and item["answer"]
            assert [message["role"] for message in item["messages"]] == ["user"]
            assert item["messages"][0]["content"] in asked
            assert [(prepared / "eval" / image).is_file() for image in item["images"]] == [True]


def test_full_evaluation_sets_are_held_out(both_sides: tuple[materials.Materials, materials.Materials]) -> None:
    held = both_sides[1]
    assert [answer for _, _, answer in prepare._digit_items(held)] == [str(digit.label) for digit in held.digits]
    words = [answer for _, _, answer in prepare._word_items(held)]
    assert len(words) == len(set(words)) == 100 and all(map(materials.is_held_out_word, words))
    charts = [answer for _, _, answer in prepare._chart_items(held)]
    assert len(charts) == 60 and set(charts) <= set("234ABCD")
    pages = [answer for _, _, answer in prepare._page_items(held)]
    assert len(pages) == 20 and all(any(map(materials.is_held_out_word, page.split())) for page in pages)


def test_text_for_bits_per_byte_is_the_held_out_one(prepared: Path, both_sides: tuple[materials.Materials, materials.Materials]) -> None:
    assert [line["text"] for line in json_lines(prepared / "text" / "heldout.jsonl")] == [d.text for d in both_sides[1].documents]
    card = json.loads((prepared / "text" / "train.json").read_text())
    assert card["documents"] == len(both_sides[0].documents)
    assert card["bytes"] == sum(len(d.text.encode()) for d in both_sides[0].documents)
    assert card["tokens"] < card["bytes"] / 2.4, "a byte-level BPE of 2048 entries packs about 3 bytes of English into a token"


def test_both_families_share_one_tokenizer_within_its_limit(prepared: Path) -> None:
    vl2, vl = (Processor.from_folder(prepared / f"processor_{family}").tokenizer for family in ("vl2", "vl"))
    assert vl2.vocab_size == vl.vocab_size <= 2048
    text = "The with statement is used to wrap the execution of a block."
    assert vl2.encode(text) == vl.encode(text) and vl2.decode(vl2.encode(text)) == text


# ------------------------------------------------------------------------------------------------------------------ texts


def test_first_sentence() -> None:
    assert texts.first_sentence("Join two\npaths.  Then more.\n\nAnd more.") == "Join two paths."
    assert texts.first_sentence("Return x.y of it") == "Return x.y of it"


def test_clean_text_has_plain_paragraphs() -> None:
    assert texts.clean("Title\n*****\n\n\n\n   Body \r\n\n") == "Title\n\n\n   Body".replace("\n\n\n", "\n\n")


def test_documents_are_short_and_named_after_their_group(both_sides: tuple[materials.Materials, materials.Materials]) -> None:
    for document in [*both_sides[0].documents, *both_sides[1].documents]:
        assert texts.MIN_DOCUMENT_CHARS <= len(document.text) <= texts.MAX_DOCUMENT_CHARS + 80
        assert document.name.rpartition("#")[0] == document.group
