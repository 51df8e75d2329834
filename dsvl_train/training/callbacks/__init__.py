"""Callbacks: what is not training itself (metrics file, progress, throughput, Weights & Biases), one small file each."""

from dsvl_train.config.schema import LoggingConfig
from dsvl_train.training.callbacks.base import Callback, Metrics, TrainerView
from dsvl_train.training.callbacks.health import Health
from dsvl_train.training.callbacks.metrics_file import MetricsFile
from dsvl_train.training.callbacks.progress import Progress
from dsvl_train.training.callbacks.throughput import Throughput
from dsvl_train.training.callbacks.wandb_logger import WandbLogger

__all__ = ["Callback", "Health", "Metrics", "MetricsFile", "Progress", "Throughput", "TrainerView", "WandbLogger", "default_callbacks"]


def default_callbacks(logging: LoggingConfig, *adding: Callback) -> list[Callback]:
    """The callbacks of an ordinary run, in the order that they need: what adds keys, `adding` too, comes before what writes them."""
    callbacks: list[Callback] = [Throughput(), Health(), *adding, MetricsFile()]
    if logging.wandb != "disabled":
        callbacks.append(WandbLogger())
    if logging.progress:
        callbacks.append(Progress())
    return callbacks
