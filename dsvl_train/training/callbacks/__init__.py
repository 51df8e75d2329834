"""Callbacks: what is not training itself (metrics file, progress, throughput, Weights & Biases), one small file each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsvl_train.config.schema import LoggingConfig
from dsvl_train.training.callbacks.base import Callback, Metrics, TrainerView
from dsvl_train.training.callbacks.health import Health
from dsvl_train.training.callbacks.metrics_file import MetricsFile
from dsvl_train.training.callbacks.progress import Progress
from dsvl_train.training.callbacks.samples import Samples
from dsvl_train.training.callbacks.throughput import Throughput
from dsvl_train.training.callbacks.wandb_logger import WandbLogger

if TYPE_CHECKING:
    from dsvl_train.training.callbacks.evaluation import Evaluation  # imports megatron-core

__all__ = [
    "Callback",
    "Health",
    "Metrics",
    "MetricsFile",
    "Progress",
    "Samples",
    "Throughput",
    "TrainerView",
    "WandbLogger",
    "default_callbacks",
]


def default_callbacks(logging: LoggingConfig, samples: Samples | None = None, evaluation: Evaluation | None = None) -> list[Callback]:
    """The callbacks of an ordinary run, in the order that they need: what adds keys or things to look at comes before what writes them."""
    adding = [callback for callback in (samples, evaluation) if callback is not None]
    callbacks: list[Callback] = [Throughput(), Health(), *adding, MetricsFile()]
    if logging.wandb != "disabled":
        callbacks.append(WandbLogger(samples, evaluation))
    if logging.progress:
        callbacks.append(Progress())
    return callbacks
