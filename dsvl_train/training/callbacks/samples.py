"""Keeps a few of the samples that the model was really trained on, with their tiles and loss mask, to look at."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dsvl_train.data.batch import StepBatch
from dsvl_train.data.processor import Processor
from dsvl_train.data.unpack import Span, UnpackedSample, choose_samples, draw_tiles, unpack_sample
from dsvl_train.reporting.pictures import encode
from dsvl_train.reporting.samples_file import FILE, FOLDER, SampleRecord, read_samples
from dsvl_train.training.callbacks.base import Callback, Metrics, TrainerView
from dsvl_train.training.callbacks.metrics_file import json_line

_log = logging.getLogger(__name__)

STEPS_KEPT = 32
"""Steps whose samples stay: the first of each modality and the newest."""
_SIDE = 768
"""Pixels of a picture's longer side at most."""
_IMAGES = 4
"""Pictures of one sample at most."""


class Samples(Callback):
    """Writes `samples/` of the run folder (`reporting.samples_file`) after the first step of each modality in every
    `logging.samples_every` steps, from the micro-batches of rank 0, which holds the pixels of its data-parallel share in every layout.
    Without modality grouping a step of both is a multimodal one.

    What was drawn after the step that a run goes on from is replaced. Whatever fails gives one warning, and the run goes on without.
    """

    def __init__(self, processor: Processor, source_names: Sequence[str]) -> None:
        self._processor, self._source_names = processor, source_names
        self.drawn: list[SampleRecord] = []
        """What the last step added; mostly nothing."""
        self._records: list[SampleRecord] = []
        self._periods: dict[str, int] = {}
        """By modality, the stretch of samples_every steps that was last looked at."""
        self._warned = False

    def on_run_start(self, trainer: TrainerView) -> None:
        if trainer.is_main:
            self._guard(trainer, lambda: self._restore(trainer))

    def on_step_end(self, trainer: TrainerView, metrics: Metrics) -> None:
        self.drawn = []
        batch = trainer.batch
        if not trainer.is_main or batch is None:
            return
        period = _period(batch.step, trainer.cfg.logging.samples_every)
        if self._periods.get(batch.modality) != period:
            self._periods[batch.modality] = period
            self._guard(trainer, lambda: self._draw(trainer, batch))

    def _restore(self, trainer: TrainerView) -> None:
        self._records = [record for record in read_samples(trainer.run_dir) if record["step"] <= trainer.step]
        for record in self._records:
            self._periods[record["modality"]] = _period(record["step"], trainer.cfg.logging.samples_every)

    def _draw(self, trainer: TrainerView, batch: StepBatch) -> None:
        folder = trainer.run_dir / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        chosen = choose_samples(batch.micro_batches, trainer.cfg.logging.samples)
        drawn = []
        for place, (micro, sample) in enumerate(chosen):
            unpacked = unpack_sample(batch.micro_batches[micro], sample, self._processor)
            drawn.append(self._record(batch, unpacked, folder, f"step_{batch.step:08}_{place}"))
        self._records = keep([*self._records, *drawn])
        _write(folder / FILE, "".join(json_line(record) + "\n" for record in self._records).encode())
        _remove_strangers(folder, self._records)
        self.drawn = drawn

    def _record(self, batch: StepBatch, sample: UnpackedSample, folder: Path, stem: str) -> SampleRecord:
        images: list[dict[str, Any]] = []
        for number, image in enumerate(sample.images):
            images.append({"tiles_wh": list(image.tiles_wh), "tokens": image.tokens})
            picture = draw_tiles(image, _SIDE) if number < _IMAGES else None
            if picture is not None:
                content, kind = encode(picture)
                images[-1]["file"] = f"{stem}_{number}.{'png' if kind == 'PNG' else 'jpg'}"
                _write(folder / images[-1]["file"], content)
        return {
            "step": batch.step,
            "modality": batch.modality,
            "source": self._source_names[sample.source],
            "tokens": sample.tokens,
            "supervised_tokens": sample.supervised_tokens,
            "tiles": sample.tiles,
            "images": images,
            "spans": [_plain(span) for span in sample.spans],
        }

    def _guard(self, trainer: TrainerView, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:
            if not self._warned:
                reason = f"{type(error).__name__}: {error}"
                _log.warning("%s cannot be written (%s); the run goes on without", trainer.run_dir / FOLDER, reason)
            self._warned = True


def keep(records: Sequence[SampleRecord]) -> list[SampleRecord]:
    """The records that stay: of the first step of each modality, and of the newest steps up to `STEPS_KEPT` in all."""
    first: dict[str, int] = {}
    for record in records:
        first.setdefault(record["modality"], record["step"])
    firsts = set(first.values())
    others = sorted({record["step"] for record in records} - firsts)
    kept = firsts.union(others[-(STEPS_KEPT - len(firsts)) :])
    return [record for record in records if record["step"] in kept]


def _period(step: int, every: int) -> int:
    return (step - 1) // every


def _plain(span: Span) -> dict[str, Any]:
    """Without `special` and `image` where it is neither, as most are."""
    plain = asdict(span)
    return {key: value for key, value in plain.items() if key not in ("special", "image") or (value is not None and value is not False)}


def _write(path: Path, content: bytes) -> None:
    """A whole file, or the one that was there."""
    scratch = path.with_name(f".{path.name}.new")
    try:
        scratch.write_bytes(content)
        os.replace(scratch, path)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise


def _remove_strangers(folder: Path, records: Sequence[SampleRecord]) -> None:
    """Pictures of ours that no record names: of steps not kept, or run again."""
    named = {image.get("file") for record in records for image in record["images"]}
    for path in folder.glob("step_*_*_*.*"):
        if path.name not in named:
            path.unlink()
