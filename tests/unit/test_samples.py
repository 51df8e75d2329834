"""Samples kept to look at: what is drawn is what the model was given."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from made_data import VL2_FOLDER, VL_FOLDER, picture
from PIL import Image
from test_callbacks import Trainer, run_config

from dsvl_train.data.assemble import lay_out, placeholder
from dsvl_train.data.batch import IGNORE_INDEX, MicroBatch, Modality, StepBatch
from dsvl_train.data.processor import Encoded, Processor
from dsvl_train.data.sources import SampleArrays
from dsvl_train.data.unpack import UnpackedImage, choose_samples, draw_tiles, unpack_sample
from dsvl_train.reporting.samples_file import FILE, FOLDER, picture_path, read_samples
from dsvl_train.training.callbacks import Samples
from dsvl_train.training.callbacks.samples import STEPS_KEPT, keep

CONVERSATIONS = [
    ("two images, two turns", 2),
    ("no image", 0),
    ("one image", 1),
]


def messages(words: str, images: int) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": "<image>" * images + words},
        {"role": "assistant", "content": f"seen {images}"},
        {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": "yes"},
    ]


@pytest.fixture(scope="module", params=["vl", "vl2"])
def processor(request: pytest.FixtureRequest) -> Processor:
    return Processor.from_folder({"vl": VL_FOLDER, "vl2": VL2_FOLDER}[request.param], max_tiles=9 if request.param == "vl2" else None)


def encode_all(processor: Processor) -> list[Encoded]:
    encoded = []
    for seed, (words, images) in enumerate(CONVERSATIONS):
        tag = processor.tokenizer.image_token
        said = [{**m, "content": m["content"].replace("<image>", tag)} for m in messages(words, images)]
        encoded.append(processor.encode(said, [picture(900 * (1 + number), 500, seed=seed + number) for number in range(images)]))
    return encoded


def lay(processor: Processor, encoded: list[Encoded], modality: Modality = "multimodal") -> MicroBatch:
    """The samples end to end, a bad sample's place before the last of them; sources 0, 1, 0, 1, …"""
    arrays = [
        SampleArrays(
            one.input_ids.numpy(),
            one.labels.numpy(),
            one.image_mask.numpy(),
            one.tiles_wh.numpy() if one.image_count else None,
            one.pixels.numpy() if one.image_count else None,
        )
        for one in encoded
    ]
    arrays.insert(-1, placeholder(7, processor.tokenizer.pad_id))
    bad = [False] * len(encoded)
    bad.insert(-1, True)
    return lay_out(arrays, bad, [place % 2 for place in range(len(arrays))], modality, processor.image_size)


def test_a_packed_sample_comes_out_as_it_went_in(processor: Processor) -> None:
    encoded = encode_all(processor)
    micro = lay(processor, encoded)
    places = [0, 1, 3]
    for place, one, (_, images) in zip(places, encoded, CONVERSATIONS, strict=True):
        sample = unpack_sample(micro, place, processor)
        assert sample.tokens == len(one.input_ids) and len(sample.images) == images
        assert sample.tiles == (len(one.pixels) if images else 0)
        supervised = [span.supervised for span in sample.spans for _ in range(span.tokens)]
        assert supervised[1:] == (one.labels[1:] != IGNORE_INDEX).tolist()
        drawn = [image.pixels_nchw for image in sample.images]
        if images:
            assert torch.equal(torch.cat(drawn), one.pixels)
            assert [image.tiles_wh for image in sample.images] == [tuple(grid) for grid in one.tiles_wh.tolist()]
        folded = [span for span in sample.spans if span.image is not None]
        assert [span.image for span in folded] == list(range(images))
        assert sum(span.tokens for span in folded) == int(one.image_mask.sum())
        words = "".join(span.text for span in sample.spans if span.image is None)
        assert words == processor.tokenizer.decode(one.input_ids[~one.image_mask])
        answered = "".join(span.text for span in sample.spans if span.supervised)
        assert (
            answered.replace(" ", "").startswith(f"seen{images}") and processor.tokenizer.eos_token in answered and "sure" not in answered
        )


def test_special_tokens_stand_alone(processor: Processor) -> None:
    sample = unpack_sample(lay(processor, encode_all(processor)), 0, processor)
    special = [span for span in sample.spans if span.special]
    assert {span.tokens for span in special} == {1}
    assert special[-1].text == processor.tokenizer.eos_token and special[-1].supervised
    assert all(processor.tokenizer.eos_token not in span.text for span in sample.spans if not span.special)


def test_each_source_has_its_turn_and_bad_places_are_left_out(processor: Processor) -> None:
    encoded = encode_all(processor)
    micro = lay(processor, encoded)
    one_source = lay(processor, encoded)
    one_source.source_s[:] = 0
    assert choose_samples([one_source, micro], 9) == [(0, 0), (1, 1), (0, 1), (1, 3), (0, 3), (1, 0)]
    assert choose_samples([micro], 2) == [(0, 0), (0, 1)] and choose_samples([], 3) == []


def colours_of(drawn: Image.Image) -> list[tuple[int, ...]]:
    """Colours of the middle row of each row of pixels' runs, in their order."""
    pixels = np.asarray(drawn)
    rows = []
    for row in pixels:
        rows.append(tuple(tuple(int(v) for v in row[i]) for i in range(len(row)) if i == 0 or (row[i] != row[i - 1]).any()))
    return [run for i, run in enumerate(rows) if i == 0 or run != rows[i - 1]]


@pytest.mark.parametrize("side", [1000, 90])
def test_tiles_lie_in_their_grid_beside_the_global_view(side: int) -> None:
    tiles = torch.arange(1, 8, dtype=torch.uint8)[:, None, None, None].expand(7, 3, 40, 40) * 30
    drawn = draw_tiles(UnpackedImage((3, 2), 99, tiles), side)
    assert drawn is not None
    if side == 90:
        assert drawn.width <= 90 + 40 and drawn.height <= 90 + 40
    grey, edge, ground = [(value * 30,) * 3 for value in range(8)], (216, 27, 96), (128, 128, 128)
    first = (edge, grey[1], edge, ground, edge, grey[2], edge, grey[3], edge, grey[4], edge)
    second = (ground, edge, grey[5], edge, grey[6], edge, grey[7], edge)
    rows = colours_of(drawn)
    assert first in rows and second in rows and rows.index(first) < rows.index(second)


def test_a_single_tile_is_drawn_pixel_by_pixel() -> None:
    tile = torch.randint(0, 256, (1, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    drawn = draw_tiles(UnpackedImage((0, 0), 36, tile), 768)
    assert drawn is not None
    inner = np.asarray(drawn)[3:-3, 3:-3]
    assert np.array_equal(inner, tile[0].permute(1, 2, 0).numpy())
    assert draw_tiles(UnpackedImage((0, 0), 36, None), 768) is None


# -------------------------------------------------------------------------------------------------------------------- callback


def do_steps(
    trainer: Trainer, callback: Samples, processor: Processor, to_step: int, modalities: str = "tm", micro: MicroBatch | None = None
) -> list[int]:
    """Steps up to `to_step`, their modalities in turn (t, m); the steps that drew."""
    encoded = encode_all(processor) if micro is None else []
    of = {"t": lay(processor, encoded[1:2] * 2, "text"), "m": lay(processor, encoded)} if micro is None else {"t": micro, "m": micro}
    drew = []
    callback.on_run_start(trainer)
    while trainer.step < to_step:
        letter = modalities[trainer.step % len(modalities)]
        modality: Modality = "text" if letter == "t" else "multimodal"
        trainer.batch = StepBatch(trainer.step + 1, modality, [of[letter]], 0.5, 0.5, 0.5, 1.0)
        trainer.do_step([callback], modality=modality)
        drew += [trainer.step] if callback.drawn else []
    return drew


def sample_run(run_dir: Path, step: int = 0, **settings: int) -> Trainer:
    return Trainer(run_dir, run_config(**settings), step=step)


def files(run_dir: Path) -> set[str]:
    return {path.name for path in (run_dir / FOLDER).iterdir()}


@pytest.fixture(scope="module")
def vl2() -> Processor:
    return Processor.from_folder(VL2_FOLDER)


def test_the_first_step_of_each_modality_in_each_period_is_drawn(tmp_path: Path, vl2: Processor) -> None:
    callback = Samples(vl2, ["pretrain", "text"])
    assert do_steps(sample_run(tmp_path, samples=2, samples_every=5), callback, vl2, 12) == [1, 2, 6, 7, 11, 12]
    records = read_samples(tmp_path)
    assert [record["step"] for record in records] == [1, 1, 2, 2, 6, 6, 7, 7, 11, 11, 12, 12]
    assert [record["source"] for record in records[2:4]] == ["pretrain", "text"]
    named = {image["file"] for record in records for image in record["images"]}
    assert files(tmp_path) == named | {FILE} and named
    first = records[2]
    assert first["tokens"] == sum(span["tokens"] for span in first["spans"]) and first["supervised_tokens"] > 0
    path = picture_path(tmp_path, first, 0)
    assert (path is not None and path.name == "step_00000002_0_0.png") or path.name == "step_00000002_0_0.jpg"
    with Image.open(path) as opened:
        assert max(opened.size) > 100


def test_a_resumed_run_repeats_no_sample(tmp_path: Path, vl2: Processor) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    do_steps(sample_run(straight, samples_every=4), Samples(vl2, ["a", "b"]), vl2, 14)
    do_steps(sample_run(stopped, samples_every=4), Samples(vl2, ["a", "b"]), vl2, 10)
    # step 9 and 10 drew; the run goes on from the checkpoint of step 9
    do_steps(sample_run(stopped, step=9, samples_every=4), Samples(vl2, ["a", "b"]), vl2, 14)
    assert (stopped / FOLDER / FILE).read_bytes() == (straight / FOLDER / FILE).read_bytes()
    assert files(stopped) == files(straight)
    do_steps(sample_run(stopped, samples_every=4, samples=1), Samples(vl2, ["a", "b"]), vl2, 1)
    assert {record["step"] for record in read_samples(stopped)} == {1} and files(stopped) == {FILE}


def test_few_steps_are_kept_and_the_first_of_each_modality_among_them(tmp_path: Path, vl2: Processor) -> None:
    text = lay(vl2, encode_all(vl2)[1:2] * 2, "text")
    drew = do_steps(sample_run(tmp_path, samples=1, samples_every=1), Samples(vl2, ["a", "b"]), vl2, 100, "ttttm", micro=text)
    assert len(drew) == 100
    steps = [record["step"] for record in read_samples(tmp_path)]
    assert steps == [1, 5, *range(100 - STEPS_KEPT + 3, 101)] and len(steps) == STEPS_KEPT
    assert keep([]) == []


def test_pictures_of_steps_that_are_not_kept_are_removed(tmp_path: Path, vl2: Processor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsvl_train.training.callbacks.samples.STEPS_KEPT", 2)
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "notes.txt").write_text("somebody's own")
    do_steps(sample_run(tmp_path, samples=1, samples_every=1), Samples(vl2, ["a", "b"]), vl2, 4, "m")
    assert {name[:13] for name in files(tmp_path)} == {"step_00000001", "step_00000004", "samples.jsonl", "notes.txt"}


def test_other_ranks_draw_nothing(tmp_path: Path, vl2: Processor) -> None:
    trainer = Trainer(tmp_path, run_config(), is_main=False)
    assert do_steps(trainer, Samples(vl2, ["a", "b"]), vl2, 3) == [] and list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_costs_one_warning_and_comes_later(tmp_path: Path, vl2: Processor, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / FOLDER).write_text("in the way")
    callback, trainer = Samples(vl2, ["a", "b"]), sample_run(tmp_path, samples_every=2)
    with caplog.at_level(logging.WARNING):
        assert do_steps(trainer, callback, vl2, 6) == []
    assert caplog.text.count("cannot be written") == len(caplog.records) == 1 and "samples" in caplog.text
    (tmp_path / FOLDER).unlink()
    assert do_steps(trainer, callback, vl2, 8) == [7, 8]
    assert [path for path in (tmp_path / FOLDER).iterdir() if path.name.startswith(".")] == []


def test_a_file_of_samples_is_read_whatever_is_in_it(tmp_path: Path) -> None:
    good = {"step": 1, "modality": "text", "spans": [{"text": "a", "tokens": 1, "supervised": True}], "images": [{"file": "../x.png"}, 3]}
    (tmp_path / FOLDER).mkdir()
    lines = [json.dumps(good), "{", "[]", '{"step": 1}', json.dumps({**good, "spans": [1]}), '{"step": 2, "modal']
    (tmp_path / FOLDER / FILE).write_text("\n".join(lines))
    assert read_samples(tmp_path) == [good] and read_samples(tmp_path / "nowhere") == []
    assert [picture_path(tmp_path, good, image) for image in (0, 1, 2)] == [None] * 3


def test_a_text_step_has_no_pictures(tmp_path: Path, vl2: Processor) -> None:
    do_steps(sample_run(tmp_path), Samples(vl2, ["a", "b"]), vl2, 1)
    records = read_samples(tmp_path)
    assert records and all(record["images"] == [] and record["tiles"] == 0 for record in records)
    assert all(math.isfinite(record["tokens"]) for record in records)
