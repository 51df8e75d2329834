"""Samples and answers in Weights & Biases: the real one, offline, and what it wrote read back."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from made_data import VL2_FOLDER
from PIL import Image
from test_callbacks import Trainer, run_config
from test_samples import encode_all, lay

from dsvl_train.data.batch import StepBatch
from dsvl_train.data.processor import Processor
from dsvl_train.reporting.samples_file import picture_path, read_samples
from dsvl_train.training.callbacks import Samples, WandbLogger

pytest.importorskip("wandb")

COLUMNS = ["step", "task", "question", "answer", "truth", "score", "picture"]


def example(image: str, **more: Any) -> dict[str, Any]:
    return {"step": 2, "task": "digits", "question": "Which?", "image": image, "answer": "7", "truth": "7", "score": 1.0, **more}


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder after three steps: a text step, an image step followed by an evaluation, and a step with nothing to look at."""
    run_dir = tmp_path_factory.mktemp("run")
    data = run_dir / "wandb_data"
    Image.new("RGB", (900, 300), (9, 90, 200)).save(run_dir / "seven.png")
    (run_dir / "broken.png").write_bytes(b"no picture")
    processor = Processor.from_folder(VL2_FOLDER)
    encoded = encode_all(processor)
    batches = [
        StepBatch(1, "text", [lay(processor, encoded[1:2] * 2, "text")], 0.5, 0.5, 0.5, 1.0),
        StepBatch(2, "multimodal", [lay(processor, encoded)], 0.5, 0.5, 0.5, 1.0),
        StepBatch(3, "text", [], 0.5, 0.5, 0.5, 1.0),
    ]
    evaluation = SimpleNamespace(generations=[])
    samples = Samples(processor, ["pretrain", "text"])
    callbacks = [samples, WandbLogger(samples, evaluation)]
    trainer = Trainer(run_dir, run_config(wandb="offline"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_DATA_DIR", str(data))
        for callback in callbacks:
            callback.on_run_start(trainer)
        for trainer.batch in batches:
            images = [str(run_dir / "seven.png"), str(run_dir / "broken.png"), "", str(run_dir / "gone.png")]
            evaluation.generations = [example(image) for image in images] if trainer.step == 1 else []
            trainer.do_step(callbacks, loss=1.0)
        for callback in callbacks:
            callback.on_run_end(trainer, "finished")
    return run_dir


def media(run_dir: Path, kind: str, name: str) -> list[Path]:
    (folder,) = (run_dir / "log" / "wandb").glob("offline-run-*")
    return sorted((folder / "files" / "media" / kind).glob(f"{name}_*"))


def test_each_step_logs_what_it_has_and_no_more(logged: Path) -> None:
    assert {len(media(logged, "html/samples", modality)) for modality in ("text", "multimodal")} == {1}
    assert len(media(logged, "table", "generations")) == 1


@pytest.mark.parametrize("modality", ["text", "multimodal"])
def test_the_text_and_its_mask_are_those_of_the_run_folder(logged: Path, modality: str) -> None:
    (file,) = media(logged, "html/samples", modality)
    html = file.read_text(encoding="utf-8")
    records = [record for record in read_samples(logged) if record["modality"] == modality]
    marked = [unescape(words) for words in re.findall(r"<mark[^>]*>(.*?)</mark>", html, re.S)]
    assert records and marked == [span["text"] for record in records for span in record["spans"] if span["supervised"]]
    assert html.count("data:image/") == sum(len(record["images"]) for record in records)


def test_pictures_are_those_of_the_run_folder(logged: Path) -> None:
    wanted = [
        path.read_bytes()
        for record in read_samples(logged)
        for image in range(len(record["images"]))
        if (path := picture_path(logged, record, image)) is not None
    ]
    found = [path.read_bytes() for path in media(logged, "images/samples", "pictures")]
    assert len(wanted) == 3 and sorted(found) == sorted(wanted)


def test_the_table_holds_the_answers_and_the_pictures_that_can_be_read(logged: Path) -> None:
    (file,) = media(logged, "table", "generations")
    table = json.loads(file.read_text(encoding="utf-8"))
    assert table["columns"] == COLUMNS
    assert [row[:6] for row in table["data"]] == [[2, "digits", "Which?", "7", "7", 1.0]] * 4
    assert [row[6] is None for row in table["data"]] == [False, True, True, True]
    pictures = []
    for path in (logged / "wandb_data").rglob("*"):
        if path.is_file() and path.read_bytes()[:4] == b"\x89PNG":
            with Image.open(path) as opened:
                pictures.append((opened.size, opened.convert("RGB").getpixel((5, 5))))
    assert set(pictures) == {((384, 128), (9, 90, 200))}, "waiting to be uploaded, scaled down"


def test_captions_bracket_what_is_supervised(logged: Path) -> None:
    """They are in the history, whose file is not compressed."""
    (file,) = (logged / "log" / "wandb").glob("offline-run-*/run-*.wandb")
    history = file.read_bytes().decode("utf-8", errors="replace").replace("\\\\u27e6", "\u27e6").replace("\\\\u27e7", "\u27e7")
    history = history.replace("\\u27e6", "\u27e6").replace("\\u27e7", "\u27e7")
    assert "\u27e6seen 1" in history and "\u27e6sure" not in history and "sure?" in history
