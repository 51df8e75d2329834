"""What each layer of a model costs, in forward FLOPs; the pipeline's planner divides by it.

A multiply-add is two; norms, activations and lookups are not counted. No megatron-core here: `dsvl plan` works without it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from dsvl_train.config.errors import ConfigError
from dsvl_train.config.schema import DataConfig, LanguageConfig, ModelConfig, ParallelConfig, RecomputeModule, RunConfig
from dsvl_train.models.adaptors import adaptor_flops
from dsvl_train.models.sam_vitdet import sam_block_flops, sam_flops
from dsvl_train.models.siglip import siglip_block_flops
from dsvl_train.parallel.division import Division, LayerCosts, plan_division


def choose_division(cfg: RunConfig) -> Division | None:
    """Which layers each pipeline rank holds, from the costs of the layers and the run's share of text steps; None without a pipeline."""
    parallel, data = cfg.parallel, cfg.data
    if parallel.pp == 1:
        return None
    costs, share = run_costs(cfg), share_of_text_steps(data)
    return plan_division(costs, parallel.pp, parallel.vpp, parallel.vision_division, text_share=share, group=parallel.group)


def share_of_text_steps(data: DataConfig) -> float:
    """Of a run's steps, after the modality warm-up: without grouping every step may have images."""
    return data.text_ratio if data.modality_grouping or data.text_ratio == 1 else 0.0


def run_costs(cfg: RunConfig) -> LayerCosts:
    """Costs of a run's usual micro-batch on one rank, by FLOPs or as measured.

    Tensor parallelism divides the language layers' work, and the encoder's where it shares tiles.

    Raises:
        ConfigError: parallel.layer_costs is no file of costs, or of another model or sequence length.
    """
    parallel, data = cfg.parallel, cfg.data
    tokens = data.micro_batch_size * data.seq_len
    tiles = usual_tiles(cfg.model, tokens)
    if not data.modality_grouping and data.text_ratio < 1:  # all steps are image steps, with the fewer tiles for it
        tiles *= 1 - data.text_ratio
    if parallel.layer_costs is None:
        costs = layer_costs(cfg.model, tokens, tiles)
    else:
        costs = read_measured(parallel.layer_costs, cfg.model, data.seq_len).of(data.micro_batch_size, tiles)
    return costs.divided(vision=parallel.tp if parallel.vision_tp == "shard" else 1, language=parallel.tp)


@dataclass(frozen=True)
class MeasuredCosts:
    """Forward seconds of each layer on one device."""

    seq_len: int
    """Tokens of the sequence that went through the language layers."""
    siglip: list[float]
    """Per layer, of one tile; so are the next two."""
    sam: list[float]
    vision_head: float
    language: list[float]
    """Per layer, of one sequence."""
    language_head: float

    def of(self, sequences: int, tiles: float) -> LayerCosts:
        """Costs of a micro-batch."""
        return LayerCosts(
            tuple(tiles * seconds for seconds in self.siglip),
            tuple(tiles * seconds for seconds in self.sam),
            tiles * self.vision_head,
            tuple(sequences * seconds for seconds in self.language),
            sequences * self.language_head,
        )

    def write(self, path: Path) -> None:
        """As a JSON object of the fields."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def read_measured(path: str, model: ModelConfig, seq_len: int) -> MeasuredCosts:
    """Costs that `MeasuredCosts.write` wrote, for this model.

    Raises:
        ConfigError: see `run_costs`.
    """
    key, fix = "parallel.layer_costs", f"dsvl plan --measure {path} with this run's settings, or parallel.layer_costs=null"
    try:
        measured = MeasuredCosts(**json.loads(Path(path).read_text(encoding="utf-8")))
        numbers = [*measured.siglip, *measured.sam, measured.vision_head, *measured.language, measured.language_head]
        if not all(isinstance(number, int | float) and number >= 0 for number in numbers):
            raise ValueError("every cost must be a number, at least 0")
    except (OSError, TypeError, ValueError) as error:
        raise ConfigError(key, f"must be a JSON file of seconds ({error})", value=path, fix=fix) from error
    sam = model.vision.sam
    wanted = [model.vision.siglip.layers, sam.layers if sam else 0, model.language.layers, seq_len]
    found = [len(measured.siglip), len(measured.sam), len(measured.language), measured.seq_len]
    if found != wanted:
        rule = f"layers of SigLIP, SAM and the language model and data.seq_len are {wanted} here, and {found} in the file"
        raise ConfigError(key, rule, value=path, fix=fix)
    return measured


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
