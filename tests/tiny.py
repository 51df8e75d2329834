"""Tiny models of both families and made-up batches, for tests of the training code."""

from __future__ import annotations

import torch

from dsvl_train.config.schema import (
    AdaptorConfig,
    CheckpointConfig,
    DataConfig,
    EngineConfig,
    InitConfig,
    LanguageConfig,
    LaunchConfig,
    LoggingConfig,
    MlaConfig,
    ModelConfig,
    MoeConfig,
    OptimConfig,
    ParallelConfig,
    ParamRule,
    RunConfig,
    RunSettings,
    SamConfig,
    ScheduleConfig,
    SiglipConfig,
    StageConfig,
    VisionConfig,
)
from dsvl_train.data.batch import IGNORE_INDEX, MicroBatch, Modality, StepBatch

VOCAB = 200
SOURCES = ["first", "second"]


def tiny_model(family: str, *, sigmoid: bool = True, mla: bool = True) -> ModelConfig:
    siglip = SiglipConfig(image_size=32, patch_size=8, width=32, layers=4, heads=2, gelu="tanh" if family == "vl2" else "erf")
    if family == "vl2":
        moe = MoeConfig(
            routed_experts=4,
            shared_experts=1,
            top_k=2,
            expert_width=32,
            router="sigmoid" if sigmoid else "softmax",
            normalise_top_k=sigmoid,
            routed_scaling=2.0 if sigmoid else 1.0,
            expert_bias=sigmoid,
        )
        language = LanguageConfig(
            vocab_size=VOCAB,
            hidden_size=48,
            ffn_width=64,
            layers=6,
            heads=4,
            init_std=0.1,
            moe=moe,
            mla=MlaConfig(kv_rank=16, qk_nope_dim=8, qk_rope_dim=8, v_dim=12) if mla else None,
        )
        return ModelConfig("tiny_vl2", "vl2", VisionConfig(siglip), AdaptorConfig("pixel_shuffle"), language)
    sam = SamConfig(
        image_size=64,
        patch_size=8,
        width=32,
        layers=4,
        heads=2,
        window=3,
        global_layers=[1, 3],
        neck_width=16,
        interpolate_to=16,
        downsample_widths=[24, 32],
    )
    language = LanguageConfig(vocab_size=VOCAB, hidden_size=48, ffn_width=64, layers=6, heads=4, init_std=0.1)
    return ModelConfig("tiny_vl", "vl", VisionConfig(siglip, sam), AdaptorConfig("hybrid"), language)


def tiny_run(family: str, run_dir: str = "unused", **parallel: object) -> RunConfig:
    """A run in which everything trains, vision at a tenth of the learning rate."""
    policy = [ParamRule("vision.*", 0.1), ParamRule("adaptor.*", 1.0), ParamRule("language.*", 1.0)]
    return RunConfig(
        run=RunSettings(name="tiny", dir=run_dir, max_steps=8),
        model=tiny_model(family),
        stage=StageConfig("pretrain", policy, aux_loss_weight=0.01, expert_bias_rate=0.01),
        data=DataConfig(processor="unused", sources={}, seq_len=64, packing=True, batch_size=4),
        parallel=ParallelConfig(**parallel),  # type: ignore[arg-type]
        engine=EngineConfig(device="cpu"),
        optim=OptimConfig(lr=1e-3, schedule=ScheduleConfig("constant"), weight_decay=0.1),
        checkpoint=CheckpointConfig(),
        logging=LoggingConfig(),
        launch=LaunchConfig(),
        init=InitConfig(),
    )


def tiny_batch(model: ModelConfig, step: int, modality: Modality, dp_rank: int = 0, dp_size: int = 1) -> StepBatch:
    """One rank's share of a global batch of four micro-batches, each two samples; a function of the step alone."""
    generator = torch.Generator().manual_seed(1000 + step)
    micro_batches = [_micro_batch(model, modality, index, generator) for index in range(4)]
    share = micro_batches[dp_rank::dp_size]
    return StepBatch(
        step, modality, share, text_share=0.5, text_share_target=0.5, text_ratio=0.5, pack_fill=1.0, tiles_per_rank=[3] * dp_size
    )


def image_batch(model: ModelConfig, tiles: list[int], seed: int) -> StepBatch:
    """A VL2 image step of one sample per micro-batch, each with one image of so many tiles (the thumbnail among them)."""
    generator = torch.Generator().manual_seed(seed)
    micro_batches = []
    side, image = model.vision.siglip.grid // 2, model.vision.siglip.image_size
    for count in tiles:
        wide = count - 1  # 0: the tile alone, as the blank one of a sample without image
        visual = side * (side + 1) + 1 + side * (side * wide + 1) if wide else 0
        total = visual + 8
        image_mask_t = torch.zeros(total, dtype=torch.bool)
        image_mask_t[2 : 2 + visual] = True
        micro_batches.append(
            MicroBatch(
                tokens_t=torch.randint(0, VOCAB, (total,), generator=generator),
                labels_t=torch.randint(0, VOCAB, (total,), generator=generator).masked_fill(image_mask_t, IGNORE_INDEX),
                cu_seqlens=torch.tensor([0, total], dtype=torch.int32),
                image_mask_t=image_mask_t,
                padding_t=torch.zeros(total, dtype=torch.bool),
                source_s=torch.tensor([0]),
                pixels_nchw=torch.randint(0, 256, (count, 3, image, image), generator=generator, dtype=torch.uint8),
                tiles_wh=torch.tensor([[wide, 1]]),
            )
        )
    return StepBatch(1, "multimodal", micro_batches, text_share=0.0, text_share_target=0.0, text_ratio=0.0, pack_fill=1.0)


def _micro_batch(model: ModelConfig, modality: Modality, index: int, generator: torch.Generator) -> MicroBatch:
    with_image = modality == "multimodal" and index != 2  # one micro-batch of an image step has no image
    visual = _visual_tokens(model) if with_image else 0
    lengths = [visual + 9 + index, 14 - 2 * index]
    total = sum(lengths)
    tokens_t = torch.randint(0, VOCAB, (total,), generator=generator)
    labels_t = torch.randint(0, VOCAB, (total,), generator=generator)
    image_mask_t = torch.zeros(total, dtype=torch.bool)
    image_mask_t[2 : 2 + visual] = True
    labels_t[image_mask_t] = IGNORE_INDEX
    labels_t[[lengths[0] - 1, total - 1]] = IGNORE_INDEX
    side = model.vision.sam.image_size if model.vision.sam else model.vision.siglip.image_size
    tiles = 3 if model.family == "vl2" else 1
    return MicroBatch(
        tokens_t=tokens_t,
        labels_t=labels_t,
        cu_seqlens=torch.tensor([0, lengths[0], total], dtype=torch.int32),
        image_mask_t=image_mask_t,
        padding_t=torch.zeros(total, dtype=torch.bool),
        source_s=torch.tensor([index % 2, 1]),
        pixels_nchw=torch.randint(0, 256, (tiles, 3, side, side), generator=generator, dtype=torch.uint8) if with_image else None,
        tiles_wh=torch.tensor([[2, 1]] if model.family == "vl2" else [[0, 0]]) if with_image else None,
    )


def _visual_tokens(model: ModelConfig) -> int:
    if model.family == "vl":
        return model.vision.siglip.tokens
    side = model.vision.siglip.grid // 2
    return side * (side + 1) + 1 + side * (2 * side + 1)
