"""What a callback is: a watcher of the run that changes nothing in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from dsvl_train.config.schema import RunConfig
from dsvl_train.data.batch import StepBatch

Metrics = dict[str, Any]
"""One step's record; the keys are those of `metrics.jsonl`."""


class TrainerView(Protocol):
    """What callbacks may ask of the trainer."""

    @property
    def cfg(self) -> RunConfig: ...

    @property
    def step(self) -> int:
        """Last step done; 0 before the first. At the start of a resumed run, the step it goes on from."""
        ...

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes files and talks to people."""
        ...

    @property
    def run_dir(self) -> Path: ...

    @property
    def metrics(self) -> Metrics:
        """The last step's record."""
        ...

    @property
    def batch(self) -> StepBatch | None:
        """What this rank was given for the last step; None before the first. It is gone with the next step, so keep no part of it."""
        ...


class Callback:
    """Every method does nothing unless overridden. They run on every rank, in the order of the list; a callback that writes or prints asks
    `trainer.is_main` itself. `on_step_end` may add keys to `metrics` for the callbacks after it."""

    def on_run_start(self, trainer: TrainerView) -> None:
        """Before the first step, after a checkpoint was loaded."""

    def on_step_end(self, trainer: TrainerView, metrics: Metrics) -> None:
        """After each step."""

    def on_checkpoint(self, trainer: TrainerView, path: Path) -> None:
        """After a checkpoint was published at `path`."""

    def on_run_end(self, trainer: TrainerView, reason: str) -> None:
        """After the last step; `reason` is a word for people, such as "finished", "stop_after" or "interrupted"."""

    def on_exception(self, trainer: TrainerView, error: BaseException) -> None:
        """Before an error leaves the training loop. `on_run_end` does not follow."""
