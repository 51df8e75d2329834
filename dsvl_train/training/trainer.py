"""The one training loop: language model, alignment, pretraining and fine-tuning differ by configuration alone."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dsvl_train.config.schema import RunConfig
from dsvl_train.data.bad_samples import TooManyBadSamples
from dsvl_train.data.batch import StepBatch
from dsvl_train.data.loader import DataPipeline
from dsvl_train.models.vlm import VisionLanguageModel
from dsvl_train.parallel.startup import World
from dsvl_train.training.bad_samples import BadSampleWatch
from dsvl_train.training.callbacks import Callback, Metrics
from dsvl_train.training.checkpoint import CheckpointError, Saver, TrainState
from dsvl_train.training.engine import Optimiser
from dsvl_train.training.guards import TrainingDiverged, note_step
from dsvl_train.training.interrupt import StopRequest
from dsvl_train.training.schedules import learning_rate
from dsvl_train.training.step import BatchCounts, TrainStep
from dsvl_train.training.watchdog import Watchdog

log = logging.getLogger(__name__)

_SAVING_PATIENCE = 4.0
"""Saving may take so many times guard.hang_s: storage has slow hours."""

TOTALS = ("tokens", "supervised_tokens", "tiles")
"""Counts of a batch that are summed over the run."""

_RAISED_BY_ALL_RANKS = (TrainingDiverged, TooManyBadSamples)
"""Errors of a step that every rank raises in the same step, so that all of them can still do something together."""


@dataclass
class Trainer:
    """Runs steps from where the run stands to its end; everything else hangs on it as a callback."""

    cfg: RunConfig
    world: World
    model: VisionLanguageModel
    optimiser: Optimiser
    data: DataPipeline
    train_step: TrainStep
    callbacks: Sequence[Callback]
    stop: StopRequest
    bad_samples: BadSampleWatch
    watchdog: Watchdog
    saver: Saver
    step: int = 0
    """Last step done."""
    totals: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TOTALS, 0))
    """Sums over all steps so far."""

    def __post_init__(self) -> None:
        self.run_dir = Path(self.cfg.run.dir)
        self.metrics: Metrics = {}
        self.batch: StepBatch | None = None

    @property
    def is_main(self) -> bool:
        return self.world.is_main

    @property
    def last_step(self) -> int:
        """Where this process stops if nobody asks it to stop earlier."""
        return min(self.cfg.run.max_steps, self.cfg.run.stop_after or self.cfg.run.max_steps)

    def fit(self) -> str:
        """Train. Returns why it ended: "finished", "stop_after" or "interrupted"."""
        self._tell("on_run_start")
        try:
            with self.watchdog:
                reason = self._loop()
        except BaseException as error:
            if isinstance(error, _RAISED_BY_ALL_RANKS):
                self._finish_save()
            self._tell("on_exception", error)
            raise
        self._tell("on_run_end", reason)
        return reason

    def _loop(self) -> str:
        batches = iter(self.data)
        while self.step < self.last_step:
            self.watchdog.pulse(self.step + 1, "waiting for data")
            asked = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - asked
            stop_requested = self._run_step(batch, waited)
            self._tell_published(self.saver.poll())
            last = stop_requested or self.step == self.last_step
            if last or self._is_due():
                self._save(last)
            if stop_requested:
                return "interrupted"
        return "finished" if self.step == self.cfg.run.max_steps else "stop_after"

    def _run_step(self, batch: StepBatch, data_wait_s: float) -> bool:
        rate = learning_rate(batch.step, self.cfg.run.max_steps, self.cfg.optim.lr, self.cfg.optim.schedule)
        metrics, counts = self.train_step(batch, rate, self.stop.requested)
        self.step, self.batch = batch.step, batch
        self.bad_samples.update(batch, counts.bad_samples)
        for name in TOTALS:
            self.totals[name] += getattr(counts, name)
        self.metrics = self._record(batch, metrics, counts, data_wait_s)
        if metrics["trouble"] is not None and self.is_main:
            self._note_trouble(batch)
        self._tell("on_step_end", self.metrics)
        self.bad_samples.check(batch.step)
        return counts.stop_requested

    def _note_trouble(self, batch: StepBatch) -> None:
        record = {key: self.metrics[key] for key in ("step", "modality", "trouble", "updated")}
        outcome = "the update was made" if record["updated"] else "no update was made"
        log.warning("step %d (%s): %s; %s", batch.step, batch.modality, record["trouble"], outcome)
        note_step(self.run_dir, record | {"samples": batch.sample_names()})

    def _record(self, batch: StepBatch, metrics: Metrics, counts: BatchCounts, data_wait_s: float) -> Metrics:
        tiles = batch.tiles_per_rank
        mean_tiles = sum(tiles) / len(tiles) if tiles else 0.0
        return {
            "step": batch.step,
            "modality": batch.modality,
            **metrics,
            "tokens": counts.tokens,
            "supervised_tokens": counts.supervised_tokens,
            "tiles": counts.tiles,
            "tiles_per_image": counts.tiles_per_image,
            "tile_imbalance": max(tiles) / mean_tiles if mean_tiles else 1.0,
            "text_share": batch.text_share,
            "text_share_target": batch.text_share_target,
            "text_ratio": batch.text_ratio,
            "pack_fill": batch.pack_fill,
            "data_wait_s": data_wait_s,
            "tokens_total": self.totals["tokens"],
            "checkpoint_stall_s": self.saver.take_stall_s(),
            "checkpoint_failures": self.saver.failures,
            "bad_samples": self.bad_samples.tally.total,
            "bad_samples_by_source": self.bad_samples.tally.by_source(),
        }

    def _is_due(self) -> bool:
        every = self.cfg.checkpoint.every
        return every > 0 and self.step % every == 0

    def _save(self, last: bool) -> None:
        self.watchdog.pulse(self.step, "saving", patience=_SAVING_PATIENCE)
        tally = self.bad_samples.tally
        state = TrainState(
            self.step,
            self.data.state(),
            self.optimiser.steps_taken(),
            tally.total,
            samples_seen=tally.seen,
            totals=dict(self.totals),
            guard=self.train_step.guard.state(),
        )
        self._tell_published(self.saver.save(state, last=last))

    def _finish_save(self) -> None:
        """Let a save on its way become a checkpoint before an error ends the run."""
        try:
            self._tell_published(self.saver.finish())
        except CheckpointError as problem:
            log.warning("%s", problem)

    def _tell_published(self, folders: list[Path]) -> None:
        for folder in folders:
            self._tell("on_checkpoint", folder)

    def _tell(self, event: str, *args: object) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self, *args)
