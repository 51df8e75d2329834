"""What each layer of a model costs, in forward FLOPs; the pipeline's planner divides by it.

A multiply-add is two; norms, activations and lookups are not counted.
"""

from __future__ import annotations

from dsvl_train.config.schema import LanguageConfig, ModelConfig
from dsvl_train.models.adaptors import adaptor_flops
from dsvl_train.models.sam_vitdet import sam_block_flops, sam_flops
from dsvl_train.models.siglip import siglip_block_flops
from dsvl_train.parallel.division import LayerCosts


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
    moe = language.moe
    if moe is None or layer < moe.dense_layers:
        weights += 3 * hidden * language.ffn_width
    else:
        weights += 3 * hidden * moe.expert_width * (moe.top_k + moe.shared_experts) + hidden * moe.routed_experts
    attention = tokens * (tokens / 2) * heads * widths * 2
    return 2.0 * tokens * weights + attention


def usual_tiles(model: ModelConfig, tokens: int) -> float:
    """Tiles in a micro-batch of an image step when half of its tokens are visual, which is what packed image-text data comes to."""
    siglip = model.vision.siglip
    per_tile = siglip.tokens if model.adaptor.kind != "pixel_shuffle" else (-(-siglip.grid // model.adaptor.downsample_ratio)) ** 2
    return tokens / 2 / per_tile
