"""A trained model for use: weights and processor, in a process started with `parallel.startup.start_alone`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dsvl_train.config.compose import load_run_config
from dsvl_train.config.schema import ParallelConfig, RunConfig
from dsvl_train.data.processor import Processor
from dsvl_train.evaluation.samples import load_processor
from dsvl_train.interop import native
from dsvl_train.interop.loading import load_source
from dsvl_train.interop.neutral import neutral_run
from dsvl_train.interop.released import looks_foreign, open_released
from dsvl_train.models.build import build_model
from dsvl_train.models.vlm import VisionLanguageModel
from dsvl_train.parallel.startup import World


@dataclass
class LoadedModel:
    """A model in evaluation mode with what it takes to talk to it."""

    cfg: RunConfig
    world: World
    model: VisionLanguageModel
    processor: Processor


def load_model(path: str | Path, world: World, *, max_tiles: int | None = None) -> LoadedModel:
    """Load a checkpoint folder, a run folder's latest checkpoint, or a model folder in a released format.

    Args:
        max_tiles: VL2: local tiles of an image at most, in place of what the model was trained with.

    Raises:
        ValueError: no model there, or it does not hold what its configuration says; names the tensor.
    """
    if looks_foreign(path):
        config, source = open_released(path)
        cfg = neutral_run(config, path)
        model = build_model(cfg.model, cfg.stage, cfg.parallel, world, seed=None)
        load_source(source, model)
    else:
        folder = native.resolve(path)
        cfg = load_run_config(folder / native.CONFIG_FILE)
        cfg.parallel = ParallelConfig()
        model = build_model(cfg.model, cfg.stage, cfg.parallel, world, seed=None)
        native.load_weights(folder, model)
    for chunk in model.chunks.values():
        chunk.eval()
    return LoadedModel(cfg, world, model, load_processor(path, max_tiles=max_tiles))
