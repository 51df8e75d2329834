"""What each part of a model keeps of a micro-batch for its backward pass, in bytes.

Counted tensor by tensor as the parts are written (`models.layers`, `models.siglip`, …, megatron-core 0.16.1's unfused MLP and MoE): tests
hold the sums against what autograd really saves. Views count with what they are views of; what is small beside a hidden state (indices,
statistics of norms) is rounded up or left out.

Letters: t = tokens of the micro-batch, h = hidden size, b = bytes of an activation. Under sequence parallelism a rank holds t / tp tokens
between the sharded matrices, and all t tokens of heads / tp heads (or width / tp) inside them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from dsvl_train.config.geometry import vl2_tokens_side
from dsvl_train.config.schema import AdaptorConfig, LanguageConfig, ModelConfig, MoeConfig, SamConfig, SiglipConfig

STATISTICS = 8
"""Bytes per row of a LayerNorm's mean and deviation."""


@dataclass(frozen=True)
class Numerics:
    """How the device computes."""

    bytes: int
    """Of an activation and of a weight: 2 in bf16, 4 in fp32."""
    fused: bool
    """CUDA's norms and attention, flash-attn among them, which keep less than the CPU's."""


@dataclass(frozen=True)
class Kept:
    """Bytes that a part keeps where a gradient passes through it."""

    always: float = 0.0
    for_weights: float = 0.0
    """On top, if the part's own weights train."""

    def __add__(self, other: Kept) -> Kept:
        return Kept(self.always + other.always, self.for_weights + other.for_weights)

    def __mul__(self, factor: float) -> Kept:
        return Kept(self.always * factor, self.for_weights * factor)

    def when(self, flows: bool, trains: bool) -> float:
        """Bytes, given whether a gradient goes on to what comes before, and whether the part trains."""
        if trains:
            return self.always + self.for_weights
        return self.always if flows else 0.0


Recomputed = Literal["full"] | Collection[str]
"""What the backward pass runs again: whole layers, or modules (parallel.recompute_modules)."""


# ------------------------------------------------------------------------------------------------------------------ language


def language_layer(language: LanguageConfig, layer: int, tokens: int, tp: int, numerics: Numerics, recomputed: Recomputed = ()) -> Kept:
    """A decoder layer."""
    here, b = tokens / tp, numerics.bytes
    if recomputed == "full":
        return Kept(here * language.hidden_size * b)
    hidden = here * language.hidden_size * b
    is_moe = language.moe is not None and layer >= language.moe.dense_layers
    again = set(recomputed)
    norms = [_rms_norm(here, language.hidden_size, numerics), _rms_norm(here, language.hidden_size, numerics)]
    # routers, and modules that run again, keep their input in any case
    outputs = [
        Kept(hidden) if "mla_up_proj" in again else Kept(0.0, hidden),
        Kept(hidden) if is_moe or "mlp" in again else Kept(0.0, hidden),
    ]
    if "layernorm" in again:
        norms, outputs = [Kept(hidden), Kept(hidden)], []
    kept = sum([*norms, *outputs], start=_attention(language, tokens, tp, numerics, again))
    if not is_moe:
        return kept if "mlp" in again else kept + _swiglu(tokens, language.ffn_width / tp, b)
    assert language.moe is not None
    return kept if "moe" in again else kept + _experts(language.moe, language.hidden_size, tokens, tp, b, again)


def _rms_norm(rows: float, width: int, numerics: Numerics) -> Kept:
    """Its input, and one number per row. The CPU keeps the normalised input too, and both in fp32."""
    if numerics.fused:
        return Kept(rows * (width * numerics.bytes + 4))
    return Kept(rows * (width * 4 + 4), rows * width * 4)


def _attention(language: LanguageConfig, tokens: int, tp: int, numerics: Numerics, again: Collection[str]) -> Kept:
    """From the projections to the output projection's input."""
    b, heads, mla, here = numerics.bytes, language.heads / tp, language.mla, tokens / tp
    core = Kept() if "core_attn" in again else Kept(tokens * heads * 4)  # the softmax's denominators
    if mla is None:
        head = language.hidden_size // language.heads
        groups = (language.kv_heads or language.heads) / tp
        fused_projection = (heads + 2 * groups) * head  # kept whole, since the values are a part of it
        grouped = groups != heads and not numerics.fused  # torch repeats keys and values
        kept = Kept(tokens * b * ((heads + groups) * head + (2 * heads * head if grouped else fused_projection) + 4 * head))
        output = heads * head
        copies = Kept() if numerics.fused else Kept(0.0, tokens * output * b)
    else:
        query, latent = mla.qk_nope_dim + mla.qk_rope_dim, mla.kv_rank + mla.qk_rope_dim
        kept = _rms_norm(here, mla.kv_rank, numerics)
        if numerics.fused or b == 4:
            kept += Kept(here * (latent - mla.kv_rank) * b)  # the latent and the rotary key are one tensor
        kept += Kept(tokens * heads * query * b)  # values, widened to the queries after they were projected
        if "mla_up_proj" in again:
            kept += Kept(here * mla.kv_rank * b + tokens * mla.qk_rope_dim * 4)
        else:
            kept += Kept(tokens * b * (2 * heads * query + 4 * mla.qk_rope_dim), here * mla.kv_rank * b)
        output = heads * query
        copies = Kept(0.0, tokens * heads * mla.v_dim * b)
    if "core_attn" not in again:
        core += Kept(tokens * output * b)
    return kept + core + copies


def _swiglu(tokens: float, width: float, b: int) -> Kept:
    """Gate and up in one tensor, silu(gate), a copy of up, and their product, which the second matrix takes."""
    return Kept(tokens * width * b * 4, tokens * width * b)


def _experts(moe: MoeConfig, hidden: int, tokens: int, tp: int, b: int, again: Collection[str]) -> Kept:
    """Routed experts at an even load, and the shared ones. A routed expert's product is kept before and after its weighting."""
    here = tokens / tp
    routed = here * moe.top_k
    router = Kept(here * (17 * moe.routed_experts + 28 * moe.top_k + 20))
    experts = Kept(routed * moe.expert_width * b * 5, routed * (moe.expert_width + hidden) * b)
    shared = Kept()
    if moe.shared_experts and "shared_experts" not in again:
        shared = _swiglu(tokens, moe.shared_experts * moe.expert_width / tp, b)
    return router + experts + shared


def embedding(tokens: int) -> Kept:
    """Token numbers."""
    return Kept(0.0, tokens * 8.0)


def head(language: LanguageConfig, tokens: int, tp: int, numerics: Numerics) -> Kept:
    """Final norm, output layer and loss: the softmax over this rank's share of the vocabulary, in fp32."""
    here = tokens / tp
    norm = _rms_norm(here, language.hidden_size, numerics) + Kept(0.0, here * language.hidden_size * numerics.bytes)
    return norm + Kept(tokens * (language.padded_vocab_size / tp * 4 + 9))


# -------------------------------------------------------------------------------------------------------------------- vision


def siglip_block(siglip: SiglipConfig, tiles: float, numerics: Numerics, recomputed: bool = False) -> Kept:
    """A block over `tiles` tiles."""
    rows, width, b = tiles * siglip.tokens, siglip.width, numerics.bytes
    if recomputed:
        return Kept(rows * width * b)
    attention = Kept(rows * (4 * width * b + 4 * siglip.heads))
    norms = Kept(rows * (2 * width * b + 2 * STATISTICS), rows * 2 * width * b)
    return norms + attention + Kept(rows * siglip.mlp_width * b, rows * siglip.mlp_width * b)


def sam_block(sam: SamConfig, layer: int, tiles: float, numerics: Numerics, recomputed: bool = False) -> Kept:
    """A block over `tiles` tiles. Its attention keeps the matrix of relative positions, on a CPU that of the probabilities."""
    rows, width, b = tiles * sam.grid**2, sam.width, numerics.bytes
    if recomputed:
        return Kept(rows * width * b)
    side = sam.grid if layer in sam.global_layers else sam.window
    positions = tiles * (1 if side == sam.grid else (-(-sam.grid // sam.window)) ** 2) * side**2
    mlp_width = int(width * sam.mlp_ratio)
    norms = Kept(rows * (2 * width * b + 2 * STATISTICS), rows * width * b + positions * width * b)
    if numerics.fused:
        matrices = positions * side**2 * sam.heads * b
        attention = Kept(matrices + positions * 4 * (width * b + sam.heads), positions * 2 * width * b)
    else:
        matrices = positions * side**2 * sam.heads * 4
        attention = Kept(matrices + positions * 3 * width * 4, positions * 3 * width * b)
    return norms + attention + Kept(rows * mlp_width * b, rows * mlp_width * b)


def encoder_embed(encoder: SiglipConfig | SamConfig, tiles: float, numerics: Numerics) -> Kept:
    """The normalised pixels."""
    return Kept(0.0, tiles * 3 * encoder.image_size**2 * numerics.bytes)


def siglip_finish(siglip: SiglipConfig, tiles: float, numerics: Numerics) -> Kept:
    """The last norm."""
    return Kept(tiles * siglip.tokens * (siglip.width * numerics.bytes + STATISTICS))


def sam_finish(sam: SamConfig, tiles: float, numerics: Numerics) -> Kept:
    """Both branches' necks, interpolation and convolutions."""
    half = (sam.interpolate_to + 1) // 2
    branch = 3 * sam.grid**2 * sam.neck_width + sam.interpolate_to**2 * sam.neck_width + half**2 * sam.downsample_widths[0]
    weighted = sam.output_grid**2 * sam.downsample_widths[1]
    return Kept(tiles * numerics.bytes * (sam.grid**2 * sam.width + 2 * branch), tiles * numerics.bytes * weighted)


def adaptor(adaptor: AdaptorConfig, model: ModelConfig, tiles: float, numerics: Numerics) -> Kept:
    """Its linear layers' inputs, and the GELUs' between them."""
    siglip, sam, b = model.vision.siglip, model.vision.sam, numerics.bytes
    rows, width = tiles * siglip.tokens, siglip.width + (sam.downsample_widths[-1] if sam else 0)
    if adaptor.kind == "pixel_shuffle":
        rows = tiles * vl2_tokens_side(siglip.image_size, siglip.patch_size, adaptor.downsample_ratio) ** 2
        width *= adaptor.downsample_ratio**2
    between = rows * (adaptor.depth - 1) * model.language.hidden_size * b
    return Kept(between, rows * width * b + between)


def vision_state(model: ModelConfig, tiles: float, numerics: Numerics) -> float:
    """Bytes of what travels between the parts of an encoder that a pipeline cuts (`VisionTower.pack`), at its largest."""
    siglip, sam = model.vision.siglip, model.vision.sam
    columns = siglip.tokens * siglip.width + (0 if sam is None else 2 * sam.grid**2 * sam.width)
    return tiles * columns * numerics.bytes


# ----------------------------------------------------------------------------------------------- while a part runs, at its most


def language_layer_working(language: LanguageConfig, layer: int, tokens: int, tp: int, numerics: Numerics) -> float:
    """Bytes beyond what is kept while a layer's backward pass runs: gradients on their way through its widest place."""
    here, b, hidden = tokens / tp, numerics.bytes, language.hidden_size
    gathered = tokens * hidden if tp > 1 else 0.0
    head = hidden // language.heads if language.mla is None else language.mla.qk_nope_dim + language.mla.qk_rope_dim
    attention = 4 * tokens * language.heads / tp * head
    moe = language.moe
    widest = 2 * tokens * language.ffn_width / tp
    if moe is not None and layer >= moe.dense_layers:
        widest = (3 * moe.top_k - 1) * here * hidden
    return b * (gathered + max(attention, widest) + 2 * here * hidden)


def head_working(language: LanguageConfig, tokens: int, tp: int, numerics: Numerics) -> float:
    """Beside the softmax the logits or, in bf16, their gradient; the weight's gradient comes when the softmax has gone."""
    vocabulary, b = language.padded_vocab_size / tp, numerics.bytes
    logits = tokens * vocabulary * b
    weight = vocabulary * language.hidden_size * b
    if b == 4:  # the softmax is made of the logits in place, unless the vocabulary is padded
        logits = logits if language.padded_vocab_size > language.vocab_size else 0.0
        widest = max(logits, weight)
    else:
        widest = logits + max(weight - tokens * vocabulary * 4, 0.0)
    return widest + tokens * language.hidden_size * b


def vision_working(model: ModelConfig, tiles: float, numerics: Numerics) -> float:
    """Bytes beyond what is kept while an encoder's block runs, forward or backward."""
    siglip, sam, b = model.vision.siglip, model.vision.sam, numerics.bytes
    working = tiles * siglip.tokens * b * 2 * (siglip.mlp_width + siglip.width)
    if sam is not None:
        rows = tiles * sam.grid**2
        matrix = rows * sam.grid**2 * sam.heads * b  # of a global layer
        mlp = rows * b * 2 * (int(sam.width * sam.mlp_ratio) + sam.width)
        working = max(working, mlp, matrix if numerics.fused else 2 * matrix)
    return working
