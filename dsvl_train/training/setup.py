"""Makes a model trainable: frozen as the stage says, wrapped for data parallelism, with its optimiser."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from dsvl_train.config.schema import ModelConfig, RunConfig
from dsvl_train.data.processor import Processor
from dsvl_train.models.vision import STORED_ONLY
from dsvl_train.models.vlm import VisionLanguageModel, whole_model_name
from dsvl_train.parallel.startup import World
from dsvl_train.training.engine import Chunk, Optimiser
from dsvl_train.training.optimiser import ModalityOptimiser
from dsvl_train.training.stages import apply_policy, format_summary, resolve_policy, summary


def building_place(cfg: RunConfig, world: World) -> World:
    """Where to build the model: in main memory under ZeRO-3, for which a device need not hold it whole."""
    on_host = cfg.engine.name == "deepspeed" and cfg.engine.zero_stage == 3
    return replace(world, device=torch.device("cpu")) if on_host else world


def build_trainable(cfg: RunConfig, world: World, model: VisionLanguageModel) -> tuple[Mapping[str, Chunk], Optimiser]:
    """Freeze as the stage says (and what is only stored), wrap the chunks for data parallelism, and make their optimiser.

    Raises:
        ValueError: the stage's policy does not fit the model, or a text step would train nothing.
    """
    parameters = dict(model.named_parameters())
    sizes = _sizes_over_pipeline({name: parameter.numel() for name, parameter in parameters.items()})
    multipliers = resolve_policy(sizes, cfg.stage.policy)
    multipliers |= {name: None for name in sizes if any(fnmatchcase(name, glob) for glob in STORED_ONLY)}
    apply_policy(parameters, multipliers)
    if cfg.data.text_ratio > 0 and not any(m is not None for name, m in multipliers.items() if name.startswith("language.")):
        raise ValueError(
            f"data.text_ratio={cfg.data.text_ratio:g} plans text steps, but stage.policy freezes the language model, so they would train "
            "nothing; set data.text_ratio=0 or unfreeze it"
        )
    model.vision.tower_trains = _trains_up_to_here(model)
    if world.is_main:
        print(format_summary(summary(sizes, multipliers)), file=sys.stderr, flush=True)
    by_chunk = {
        key: {name: multipliers[whole_model_name(chunk, name)] for name, _ in chunk.named_parameters()}
        for key, chunk in model.chunks.items()
    }
    if cfg.engine.name == "deepspeed":
        from dsvl_train.training.deepspeed_engine import build_zero  # an optional extra

        return build_zero(cfg.engine, cfg.optim, world, model, by_chunk)
    return _build_megatron(cfg, world, model, by_chunk)


def _build_megatron(
    cfg: RunConfig, world: World, model: VisionLanguageModel, multipliers: Mapping[str, Mapping[str, float | None]]
) -> tuple[Mapping[str, Chunk], Optimiser]:
    distributed = cfg.parallel.distributed_optimizer
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=False, use_distributed_optimizer=distributed)
    chunks = {name: DistributedDataParallel(chunk.config, ddp_config, chunk) for name, chunk in model.chunks.items()}
    for chunk in chunks.values():
        chunk.train()
    return chunks, ModalityOptimiser(cfg.optim, chunks, multipliers, world.params_dtype, distributed=distributed)


def _trains_up_to_here(model: VisionLanguageModel) -> bool:
    """Whether a parameter of the vision tower trains on this pipeline rank or an earlier one."""
    group = parallel_state.get_pipeline_model_parallel_group()
    trains = [False] * group.size()
    dist.all_gather_object(trains, any(p.requires_grad for p in model.vision.vision.parameters()), group=group)
    return any(trains[: group.rank() + 1])


def _sizes_over_pipeline(mine: dict[str, int]) -> dict[str, int]:
    """Elements of every parameter of the model's pipeline, by whole-model name: a stage's policy speaks of the whole model."""
    group = parallel_state.get_pipeline_model_parallel_group()
    everyone: list[dict[str, int]] = [{} for _ in range(group.size())]
    dist.all_gather_object(everyone, mine, group=group)
    return {name: size for rank in everyone for name, size in rank.items()}


def check_processor(model: ModelConfig, processor: Processor) -> None:
    """The processor must make what the model reads.

    Raises:
        ValueError: family, image size, visual tokens per image or vocabulary disagree.
    """
    wanted = model.vision.sam.image_size if model.vision.sam else model.vision.siglip.image_size
    if processor.family != model.family:
        raise ValueError(f"data.processor is of the {processor.family} family, model.family is {model.family}; choose one of the two")
    if processor.image_size != wanted:
        raise ValueError(f"data.processor makes images of {processor.image_size} px, the model's vision tower takes {wanted} px")
    if processor.tokenizer.vocab_size > model.language.vocab_size:
        raise ValueError(
            f"the tokenizer of data.processor has {processor.tokenizer.vocab_size} tokens, model.language.vocab_size is "
            f"{model.language.vocab_size}; set it to at least the former"
        )
