"""A trained model for use: weights and processor, in a process started with `parallel.startup.start_alone`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dsvl_train.config.compose import load_run_config
from dsvl_train.config.schema import ParallelConfig, RunConfig
from dsvl_train.data.processor import Processor
from dsvl_train.interop import native
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


def load_model(path: str | Path, world: World) -> LoadedModel:
    """Load a checkpoint folder, or a run folder's latest checkpoint.

    Raises:
        ValueError: no checkpoint there, or it does not hold what its configuration says; names the tensor.
    """
    folder = native.resolve(path)
    cfg = load_run_config(folder / native.CONFIG_FILE)
    cfg.parallel = ParallelConfig()
    model = build_model(cfg.model, cfg.stage, cfg.parallel, world, seed=None)
    native.load_weights(folder, model)
    for chunk in model.chunks.values():
        chunk.eval()
    data = cfg.data
    processor = Processor.from_folder(
        folder / native.PROCESSOR_FOLDER,
        tile_selection=data.tile_selection,
        max_tiles=data.max_tiles,
        tiling_image_limit=data.tiling_image_limit,
        max_image_pixels=data.max_image_pixels,
    )
    return LoadedModel(cfg, world, model, processor)
