"""Weights & Biases: a second home for the metrics, never a condition of the run."""

from __future__ import annotations

import logging
import math
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsvl_train.training.callbacks.base import Callback, Metrics, TrainerView
from dsvl_train.training.callbacks.samples import Samples
from dsvl_train.training.callbacks.wandb_media import generations_table, sample_media

if TYPE_CHECKING:
    from dsvl_train.training.callbacks.evaluation import Evaluation  # imports megatron-core

_log = logging.getLogger(__name__)


class WandbLogger(Callback):
    """Logs every step from rank 0. Runs of one model are a group, the training stage is the job type; `logging.wandb` chooses offline,
    online or disabled. Whatever fails in wandb gives one warning and ends the logging, not the run.

    Args:
        samples: whose samples are logged beside the numbers, in the steps that have some.
        evaluation: whose answers are.
    """

    def __init__(self, samples: Samples | None = None, evaluation: Evaluation | None = None) -> None:
        self._samples, self._evaluation = samples, evaluation
        self._run: Any = None

    def on_run_start(self, trainer: TrainerView) -> None:
        if trainer.is_main and trainer.cfg.logging.wandb != "disabled":
            self._guard(lambda: self._start(trainer))

    def on_step_end(self, trainer: TrainerView, metrics: Metrics) -> None:
        if self._run is not None:
            self._guard(lambda: self._run.log(flatten(metrics) | self._media(trainer), step=trainer.step))

    def on_run_end(self, trainer: TrainerView, reason: str) -> None:
        self._finish(exit_code=0)

    def on_exception(self, trainer: TrainerView, error: BaseException) -> None:
        self._finish(exit_code=1)

    def _media(self, trainer: TrainerView) -> dict[str, Any]:
        media: dict[str, Any] = {}
        if self._samples is not None and self._samples.drawn:
            media |= sample_media(self._samples.drawn, trainer.run_dir)
        if self._evaluation is not None and self._evaluation.generations:
            media["generations"] = generations_table(self._evaluation.generations)
        return media

    def _start(self, trainer: TrainerView) -> None:
        import wandb

        cfg, folder = trainer.cfg, trainer.run_dir / "log"
        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=cfg.logging.wandb_project,
            mode=cfg.logging.wandb,
            dir=str(folder),
            id=_run_id(folder / "wandb_id"),
            resume="allow",
            name=cfg.run.name,
            group=cfg.model.name,
            job_type=cfg.stage.name,
            tags=[cfg.model.family, cfg.stage.name, cfg.engine.name],
            config=asdict(cfg),
            settings=wandb.Settings(silent=True, console="off"),
        )

    def _finish(self, exit_code: int) -> None:
        if self._run is not None:
            run = self._run
            self._guard(lambda: run.finish(exit_code=exit_code))
            self._run = None

    def _guard(self, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:
            self._run = None
            _log.warning("Weights & Biases is off for the rest of this run (%s: %s); metrics.jsonl goes on", type(error).__name__, error)


def flatten(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Numbers under slash-separated names, as wandb charts them: `lr/vision`, `expert_max_violation/0`. Words and tables (the expert
    load of every layer) are left out; the loss also goes under its modality, `loss/text`, so that each has a chart of its own."""
    flat: dict[str, float] = {}
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}/{name}": number for name, item in value.items() if (number := _number(item)) is not None})
        elif isinstance(value, (list, tuple)):
            flat.update({f"{key}/{index}": number for index, item in enumerate(value) if (number := _number(item)) is not None})
        elif (number := _number(value)) is not None:
            flat[key] = number
    if "loss" in flat and "modality" in metrics:
        flat[f"loss/{metrics['modality']}"] = flat["loss"]
    return flat


def _number(value: Any) -> float | None:
    if hasattr(value, "item") and getattr(value, "size", 1) != 0:
        try:
            value = value.item()
        except (ValueError, RuntimeError):
            return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if math.isfinite(value) else None


def _run_id(path: Path) -> str:
    """The id under which a resumed run goes on as the same wandb run."""
    if path.exists() and (known := path.read_text(encoding="utf-8").strip()):
        return known
    fresh = uuid.uuid4().hex[:12]
    path.write_text(fresh + "\n", encoding="utf-8")
    return fresh
