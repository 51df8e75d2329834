"""A model on this rank's device."""

from __future__ import annotations

from dsvl_train.config.schema import ModelConfig, ParallelConfig, StageConfig
from dsvl_train.models.initialise import initialise
from dsvl_train.models.language import transformer_config
from dsvl_train.models.vlm import VisionLanguageModel
from dsvl_train.parallel.division import Division
from dsvl_train.parallel.startup import World


def build_model(
    model: ModelConfig, stage: StageConfig, parallel: ParallelConfig, world: World, seed: int | None, division: Division | None = None
) -> VisionLanguageModel:
    """Build the chunks of this rank, with random weights drawn from `seed`; None leaves them undefined, to be loaded.

    `division` says which layers this pipeline rank holds; it is needed where parallel.pp is more than 1.
    """
    on_cpu = world.device.type == "cpu"
    config = transformer_config(model.language, stage, parallel, world.params_dtype, on_cpu, division if parallel.pp > 1 else None)
    shard_tiles = parallel.tp > 1 and parallel.vision_tp == "shard"
    built = VisionLanguageModel(model, config, division, shard_tiles=shard_tiles)
    built.vision.vision.recompute = parallel.vision_recompute
    if seed is not None:
        initialise(built, model, seed)
    for chunk in built.chunks.values():
        chunk.to(world.device)
    return built
