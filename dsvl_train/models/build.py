"""A model on this rank's device."""

from __future__ import annotations

from dsvl_train.config.schema import ModelConfig, ParallelConfig, StageConfig
from dsvl_train.models.initialise import initialise
from dsvl_train.models.language import transformer_config
from dsvl_train.models.vlm import VisionLanguageModel
from dsvl_train.parallel.startup import World


def build_model(model: ModelConfig, stage: StageConfig, parallel: ParallelConfig, world: World, seed: int | None) -> VisionLanguageModel:
    """Build the chunks of this rank, with random weights drawn from `seed`; None leaves them undefined, to be loaded."""
    config = transformer_config(model.language, stage, parallel, world.params_dtype, on_cpu=world.device.type == "cpu")
    built = VisionLanguageModel(model, config)
    if seed is not None:
        initialise(built, model, seed)
    for chunk in built.chunks.values():
        chunk.to(world.device)
    return built
