"""Makes a model trainable: frozen as the stage says, wrapped for data parallelism, with its optimiser."""

from __future__ import annotations

import sys
from fnmatch import fnmatchcase

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from dsvl_train.config.schema import ModelConfig, RunConfig
from dsvl_train.data.processor import Processor
from dsvl_train.models.vision import STORED_ONLY
from dsvl_train.models.vlm import VisionLanguageModel
from dsvl_train.parallel.startup import World
from dsvl_train.training.optimiser import ModalityOptimiser
from dsvl_train.training.stages import apply_policy, format_summary, resolve_policy, summary


def build_trainable(
    cfg: RunConfig, world: World, model: VisionLanguageModel
) -> tuple[dict[str, DistributedDataParallel], ModalityOptimiser]:
    """Freeze as the stage says (and what is only stored), wrap the chunks for data parallelism, and make their optimiser.

    Raises:
        ValueError: the stage's policy does not fit the model, or a text step would train nothing.
    """
    parameters = dict(model.named_parameters())
    multipliers = resolve_policy(parameters, cfg.stage.policy)
    multipliers |= {name: None for name in parameters if any(fnmatchcase(name, glob) for glob in STORED_ONLY)}
    apply_policy(parameters, multipliers)
    if cfg.data.text_ratio > 0 and not any(p.requires_grad for p in model.language.parameters()):
        raise ValueError(
            f"data.text_ratio={cfg.data.text_ratio:g} plans text steps, but stage.policy freezes the language model, so they would train "
            "nothing; set data.text_ratio=0 or unfreeze it"
        )
    if world.is_main:
        sizes = {name: parameter.numel() for name, parameter in parameters.items()}
        print(format_summary(summary(sizes, multipliers)), file=sys.stderr, flush=True)
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=False)
    chunks = {name: DistributedDataParallel(model.config, ddp_config, chunk) for name, chunk in model.chunks.items()}
    for chunk in chunks.values():
        chunk.train()
    return chunks, ModalityOptimiser(cfg.optim, chunks, multipliers, world.params_dtype)


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
