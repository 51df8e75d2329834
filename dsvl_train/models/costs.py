"""What each layer of a model costs, in forward FLOPs; the pipeline's planner divides by it.

A multiply-add is two; norms, activations and lookups are not counted. No megatron-core here: `dsvl plan` works without it.
"""

from __future__ import annotations

from dsvl_train.config.schema import LanguageConfig, ModelConfig, ParallelConfig, RecomputeModule, RunConfig
from dsvl_train.models.adaptors import adaptor_flops
from dsvl_train.models.sam_vitdet import sam_block_flops, sam_flops
from dsvl_train.models.siglip import siglip_block_flops
from dsvl_train.parallel.division import Division, LayerCosts, plan_division


def choose_division(cfg: RunConfig) -> Division | None:
    """Which layers each pipeline rank holds, from the costs of the layers and the run's share of text steps; None without a pipeline."""
    parallel, data = cfg.parallel, cfg.data
    if parallel.pp == 1:
        return None
    text_steps = data.text_ratio if data.modality_grouping or data.text_ratio == 1 else 0.0
    return plan_division(run_costs(cfg), parallel.pp, parallel.vpp, parallel.vision_division, text_share=text_steps, group=parallel.group)


def run_costs(cfg: RunConfig) -> LayerCosts:
    """Costs of a run's usual micro-batch on one rank: tensor parallelism divides the language layers, and tiles if so set."""
    data = cfg.data
    tokens = data.micro_batch_size * data.seq_len
    tiles = usual_tiles(cfg.model, tokens)
    if not data.modality_grouping and data.text_ratio < 1:  # all steps are image steps, with the fewer tiles for it
        tiles *= 1 - data.text_ratio
    costs = layer_costs(cfg.model, tokens, tiles)
    tp, shared = cfg.parallel.tp, cfg.parallel.vision_tp == "shard"
    return costs.divided(vision=tp if shared else 1, language=tp)


def layer_costs(model: ModelConfig, tokens: int, tiles: float) -> LayerCosts:
    """Costs of a micro-batch of an image step with `tokens` tokens and `tiles` tiles.

    Patch embeddings are small beside a layer and left out.
    """
    siglip, sam = model.vision.siglip, model.vision.sam
    sam_layers = () if sam is None else tuple(tiles * sam_block_flops(sam, layer) for layer in range(sam.layers))
    patches = 0 if sam is None else 2 * sam.grid**2 * 3 * sam.patch_size**2 * sam.width
    necks = 0.0 if sam is None else tiles * (sam_flops(sam) - patches) - sum(sam_layers)
    return LayerCosts(
        siglip=(tiles * siglip_block_flops(siglip),) * siglip.layers,
        sam=sam_layers,
        vision_head=necks + tiles * adaptor_flops(model.adaptor, model.vision, model.language.hidden_size),
        language=tuple(language_layer_flops(model.language, layer, tokens) for layer in range(model.language.layers)),
        language_head=2.0 * tokens * model.language.hidden_size * model.language.vocab_size,
    )


def language_layer_flops(language: LanguageConfig, layer: int, tokens: int) -> float:
    """Forward FLOPs of a decoder layer over `tokens` tokens, attention taken as over one causal sequence of them."""
    hidden, heads = language.hidden_size, language.heads
    if language.mla is not None:
        mla = language.mla
        query_dim = mla.qk_nope_dim + mla.qk_rope_dim
        weights = hidden * heads * query_dim + hidden * (mla.kv_rank + mla.qk_rope_dim)
        weights += mla.kv_rank * heads * (mla.qk_nope_dim + mla.v_dim) + heads * mla.v_dim * hidden
        widths = query_dim + mla.v_dim
    else:
        head = hidden // heads
        weights = 2 * hidden * hidden + 2 * hidden * head * (language.kv_heads or heads)
        widths = 2 * head
    attention = tokens * (tokens / 2) * heads * widths * 2
    return 2.0 * tokens * weights + attention + feed_forward_flops(language, layer, tokens)


def feed_forward_flops(language: LanguageConfig, layer: int, tokens: int) -> float:
    """Forward FLOPs of a decoder layer's dense or MoE part over `tokens` tokens."""
    hidden, moe = language.hidden_size, language.moe
    if moe is None or layer < moe.dense_layers:
        return 2.0 * tokens * 3 * hidden * language.ffn_width
    return 2.0 * tokens * (3 * hidden * moe.expert_width * (moe.top_k + moe.shared_experts) + hidden * moe.routed_experts)


def usual_tiles(model: ModelConfig, tokens: int) -> float:
    """Tiles in a micro-batch of an image step when half of its tokens are visual, which is what packed image-text data comes to."""
    siglip = model.vision.siglip
    per_tile = siglip.tokens if model.adaptor.kind != "pixel_shuffle" else (-(-siglip.grid // model.adaptor.downsample_ratio)) ** 2
    return tokens / 2 / per_tile


def recompute_modules(language: LanguageConfig, parallel: ParallelConfig) -> list[RecomputeModule]:
    """What selective recomputation runs again: as configured, or whatever surrounds attention in this model's layers."""
    if parallel.recompute_modules is not None:
        return list(parallel.recompute_modules)
    modules: list[RecomputeModule] = ["layernorm", "mlp"]
    if language.moe is not None:
        modules.append("moe")
    if language.mla is not None:
        modules.append("mla_up_proj")
    return modules
