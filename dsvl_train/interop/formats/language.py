"""Language models of others: Llama (DeepSeek-LLM) and the DeepSeekMoE of `deepseek_v2` and `deepseek_v3`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from dsvl_train.config.schema import LanguageConfig, MlaConfig, MoeConfig
from dsvl_train.interop.blocks import Table
from dsvl_train.interop.formats.json_file import JsonConfig

# ------------------------------------------------------------------------------------------------------------------ config.json


def read_llama(config: JsonConfig, tie_default: bool = False) -> LanguageConfig:
    """A `llama` configuration; absent keys have LlamaConfig's defaults."""
    config.require("model_type", "llama", "llama")
    heads = config.integer("num_attention_heads", 32)
    hidden = config.integer("hidden_size", 4096)
    groups = config.values.get("num_key_value_heads")
    language = LanguageConfig(
        vocab_size=config.integer("vocab_size", 32000),
        hidden_size=hidden,
        ffn_width=config.integer("intermediate_size", 11008),
        layers=config.integer("num_hidden_layers", 32),
        heads=heads,
        kv_heads=heads if groups is None else config.integer("num_key_value_heads"),
        max_positions=config.integer("max_position_embeddings", 2048),
        rope_theta=_rope_theta(config),
        norm_eps=config.number("rms_norm_eps", 1e-6),
        tie_embeddings=config.boolean("tie_word_embeddings", tie_default),
    )
    _check_heads(config, language)
    config.require("hidden_act", "silu", "silu")
    config.require("attention_bias", False, False)
    config.require("mlp_bias", False, False)
    config.require("head_dim", hidden // heads, hidden // heads, None)
    return language


@dataclass(frozen=True)
class MoeDefaults:
    """What a configuration class puts where a key is absent."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    n_routed_experts: int | None
    n_shared_experts: int | None
    num_experts_per_tok: int | None
    first_k_dense_replace: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    topk_method: str
    scoring_func: str
    max_position_embeddings: int
    n_group: int | None
    topk_group: int | None


RELEASED = MoeDefaults(
    vocab_size=102400,
    hidden_size=4096,
    intermediate_size=11008,
    moe_intermediate_size=1407,
    num_hidden_layers=30,
    num_attention_heads=32,
    q_lora_rank=1536,
    kv_lora_rank=512,
    n_routed_experts=None,
    n_shared_experts=None,
    num_experts_per_tok=None,
    first_k_dense_replace=0,
    norm_topk_prob=False,
    routed_scaling_factor=1.0,
    topk_method="gready",  # misspelt in the released class; see `read_deepseek_moe`
    scoring_func="softmax",
    max_position_embeddings=2048,
    n_group=None,
    topk_group=None,
)
"""DeepseekV2Config as released with DeepSeek-VL2 (and with DeepSeek-V2)."""

V2 = replace(RELEASED, num_hidden_layers=32, n_routed_experts=64, n_shared_experts=2, topk_method="greedy")
"""DeepseekV2Config of transformers."""

V3 = MoeDefaults(
    vocab_size=129280,
    hidden_size=7168,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    num_hidden_layers=61,
    num_attention_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    n_routed_experts=256,
    n_shared_experts=1,
    num_experts_per_tok=8,
    first_k_dense_replace=3,
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    topk_method="noaux_tc",
    scoring_func="sigmoid",
    max_position_embeddings=4096,
    n_group=8,
    topk_group=4,
)
"""DeepseekV3Config of transformers, whose gate is always sigmoid with a selection bias."""


def read_deepseek_moe(config: JsonConfig, defaults: MoeDefaults = RELEASED) -> LanguageConfig:
    """A DeepSeekMoE configuration, with MHA (`use_mla` false) or latent attention.

    Raises:
        ValueError: something that the model here does not do: query compression, group-limited routing, scaled rotary positions, …
    """
    layers = config.integer("num_hidden_layers", defaults.num_hidden_layers)
    heads = config.integer("num_attention_heads", defaults.num_attention_heads)
    mla = _read_mla(config, defaults) if config.boolean("use_mla", True) else None
    groups = config.values.get("num_key_value_heads")
    language = LanguageConfig(
        vocab_size=config.integer("vocab_size", defaults.vocab_size),
        hidden_size=config.integer("hidden_size", defaults.hidden_size),
        ffn_width=config.integer("intermediate_size", defaults.intermediate_size),
        layers=layers,
        heads=heads,
        kv_heads=None if mla is not None or groups is None else config.integer("num_key_value_heads"),
        max_positions=config.integer("max_position_embeddings", defaults.max_position_embeddings),
        rope_theta=_rope_theta(config),
        norm_eps=config.number("rms_norm_eps", 1e-6),
        tie_embeddings=config.boolean("tie_word_embeddings", False),
        moe=_read_moe(config, defaults, layers),
        mla=mla,
    )
    if language.kv_heads == heads:
        language.kv_heads = None
    if mla is None:
        _check_heads(config, language)
    config.require("hidden_act", "silu", "silu")
    config.require("attention_bias", False, False)
    return language


def _read_mla(config: JsonConfig, defaults: MoeDefaults) -> MlaConfig:
    config.require("q_lora_rank", defaults.q_lora_rank, None)
    config.require("rms_norm_eps", 1e-6, 1e-6)  # the latent's norm has this one in the released class, whatever the configuration says
    config.require("rope_interleave", True, True)
    return MlaConfig(
        kv_rank=config.integer("kv_lora_rank", defaults.kv_lora_rank),
        qk_nope_dim=config.integer("qk_nope_head_dim", 128),
        qk_rope_dim=config.integer("qk_rope_head_dim", 64),
        v_dim=config.integer("v_head_dim", 128),
    )


def _read_moe(config: JsonConfig, defaults: MoeDefaults, layers: int) -> MoeConfig | None:
    experts = config.values.get("n_routed_experts", defaults.n_routed_experts)
    dense = config.integer("first_k_dense_replace", defaults.first_k_dense_replace, least=0)
    if experts is None or dense >= layers:
        return None
    config.require("moe_layer_freq", 1, 1)
    scoring = config.require("scoring_func", defaults.scoring_func, "softmax", "sigmoid")
    # the released class defaults to "gready", which no branch of its gate knows; whoever wrote it meant "greedy"
    method = config.require("topk_method", defaults.topk_method, "greedy", "gready", "group_limited_greedy", "noaux_tc")
    _check_groups(config, defaults)
    normalise = config.boolean("norm_topk_prob", defaults.norm_topk_prob)
    top_k = config.integer("num_experts_per_tok", defaults.num_experts_per_tok)
    if top_k > config.integer("n_routed_experts", defaults.n_routed_experts):
        raise config.error("num_experts_per_tok", f"more than the n_routed_experts = {experts} there are", defaults.num_experts_per_tok)
    if scoring == "sigmoid" and not normalise and top_k > 1:
        raise config.error("norm_topk_prob", "only true is supported with scoring_func sigmoid", defaults.norm_topk_prob)
    if scoring == "softmax" and method == "noaux_tc":
        raise config.error("topk_method", "only supported with scoring_func sigmoid", defaults.topk_method)
    shared = config.values.get("n_shared_experts", defaults.n_shared_experts)
    return MoeConfig(
        routed_experts=config.integer("n_routed_experts", defaults.n_routed_experts),
        shared_experts=0 if shared is None else config.integer("n_shared_experts", defaults.n_shared_experts, least=0),
        top_k=top_k,
        expert_width=config.integer("moe_intermediate_size", defaults.moe_intermediate_size),
        dense_layers=dense,
        router=scoring,
        normalise_top_k=normalise,
        routed_scaling=config.number("routed_scaling_factor", defaults.routed_scaling_factor),
        expert_bias=method == "noaux_tc",
    )


def _check_groups(config: JsonConfig, defaults: MoeDefaults) -> None:
    """Routing limited to groups of experts is not implemented; one group, or all groups chosen, is no limit."""
    groups = config.values.get("n_group", defaults.n_group)
    chosen = config.values.get("topk_group", defaults.topk_group)
    if groups not in (None, 1) and groups != chosen:
        rule = f"routing to topk_group = {chosen} of them is not supported, only one group (or all of them)"
        raise config.error("n_group", rule, defaults.n_group)


def _check_heads(config: JsonConfig, language: LanguageConfig) -> None:
    if language.hidden_size % language.heads:
        raise config.error("num_attention_heads", f"must divide hidden_size {language.hidden_size}", language.heads)
    if language.heads % (language.kv_heads or language.heads):
        raise config.error("num_key_value_heads", f"must divide num_attention_heads {language.heads}", language.kv_heads)


def _rope_theta(config: JsonConfig) -> float:
    """The base of the rotary positions: `rope_theta`, or transformers 5's `rope_parameters`.

    Raises:
        ValueError: positions are scaled (linear, yarn, …).
    """
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.section(key)
        kind = rope.values.get("rope_type", rope.values.get("type", "default"))
        if kind != "default":
            raise config.error(key, "scaled rotary positions are not supported")
        if rope.values.get("partial_rotary_factor", 1.0) != 1.0:
            raise config.error(key, "partly rotary positions are not supported")
    holder = config if "rope_theta" in config else config.section("rope_parameters")
    theta = holder.number("rope_theta", 10000.0)
    if theta != int(theta):
        raise config.error("rope_theta", "only a whole number is supported")
    return theta


def write_llama(language: LanguageConfig) -> dict[str, Any]:
    """A `llama` configuration, every value spelled out.

    Raises:
        ValueError: the language model is no Llama.
    """
    if language.moe is not None or language.mla is not None:
        raise ValueError("a mixture-of-experts or latent-attention language model cannot be written as llama; use --format deepseek_vl_v2")
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": language.vocab_size,
        "hidden_size": language.hidden_size,
        "intermediate_size": language.ffn_width,
        "num_hidden_layers": language.layers,
        "num_attention_heads": language.heads,
        "num_key_value_heads": language.kv_heads or language.heads,
        "max_position_embeddings": language.max_positions,
        "rope_theta": language.rope_theta,
        "rms_norm_eps": language.norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": language.tie_embeddings,
    }


def write_deepseek_moe(language: LanguageConfig, bos_id: int, eos_id: int, aux_loss_alpha: float) -> dict[str, Any]:
    """A language_config of DeepSeek-VL2, every value that matters spelled out."""
    values: dict[str, Any] = {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "vocab_size": language.vocab_size,
        "hidden_size": language.hidden_size,
        "intermediate_size": language.ffn_width,
        "num_hidden_layers": language.layers,
        "num_attention_heads": language.heads,
        "num_key_value_heads": language.kv_heads or language.heads,
        "max_position_embeddings": language.max_positions,
        "rope_theta": language.rope_theta,
        "rms_norm_eps": language.norm_eps,
        "hidden_act": "silu",
        "tie_word_embeddings": language.tie_embeddings,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "q_lora_rank": None,
        "use_mla": language.mla is not None,
    }
    mla, moe = language.mla, language.moe
    values |= {
        "kv_lora_rank": mla.kv_rank if mla else None,
        "qk_nope_head_dim": mla.qk_nope_dim if mla else 0,
        "qk_rope_head_dim": mla.qk_rope_dim if mla else 0,
        "v_head_dim": mla.v_dim if mla else 0,
    }
    if moe is not None:
        values |= {
            "n_routed_experts": moe.routed_experts,
            "n_shared_experts": moe.shared_experts or None,
            "num_experts_per_tok": moe.top_k,
            "moe_intermediate_size": moe.expert_width,
            "first_k_dense_replace": moe.dense_layers,
            "moe_layer_freq": 1,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "noaux_tc" if moe.expert_bias else "greedy",
            "scoring_func": moe.router,
            "norm_topk_prob": moe.normalise_top_k,
            "routed_scaling_factor": moe.routed_scaling,
            "aux_loss_alpha": aux_loss_alpha,
            "seq_aux": True,
        }
    return values


# ---------------------------------------------------------------------------------------------------------------- tensor names

Experts = Literal["single", "stacked"]
"""single: a tensor per expert and matrix. stacked: transformers 5's `experts.gate_up_proj` and `experts.down_proj`."""


def add_language(table: Table, language: LanguageConfig, body: str, head: str, experts: Experts = "single") -> None:
    """Relate a Llama-like decoder; `body` and `head` are what stands before `embed_tokens` and `lm_head`, dots included."""
    vocabulary = (language.vocab_size, language.hidden_size)
    _add_vocabulary(table, f"{body}embed_tokens.weight", "language.embedding.word_embeddings.weight", vocabulary)
    for layer in range(language.layers):
        theirs, ours = f"{body}layers.{layer}.", f"language.decoder.layers.{layer}."
        table.same(f"{theirs}input_layernorm.weight", f"{ours}input_layernorm.weight")
        _add_attention(table, language, f"{theirs}self_attn.", f"{ours}self_attention.")
        table.same(f"{theirs}post_attention_layernorm.weight", f"{ours}pre_mlp_layernorm.weight")
        _add_feed_forward(table, language, layer, f"{theirs}mlp.", f"{ours}mlp.", experts)
    table.same(f"{body}norm.weight", "language.decoder.final_layernorm.weight")
    if not language.tie_embeddings:
        _add_vocabulary(table, f"{head}lm_head.weight", "language.output_layer.weight", vocabulary)


def stacks_experts(names: Iterable[str]) -> Experts:
    """How a checkpoint stores its experts."""
    return "stacked" if any(name.endswith("mlp.experts.gate_up_proj") for name in names) else "single"


def _add_vocabulary(table: Table, theirs: str, ours: str, shape: tuple[int, int]) -> None:
    table.rows(theirs, shape, [(ours, (0, 0), (0, 0), shape)])


def _add_attention(table: Table, language: LanguageConfig, theirs: str, ours: str) -> None:
    if language.mla is not None:
        table.same(f"{theirs}q_proj.weight", f"{ours}linear_q_proj.weight")
        table.same(f"{theirs}kv_a_proj_with_mqa.weight", f"{ours}linear_kv_down_proj.weight")
        table.same(f"{theirs}kv_a_layernorm.weight", f"{ours}kv_layernorm.weight")
        table.same(f"{theirs}kv_b_proj.weight", f"{ours}linear_kv_up_proj.weight")
    else:
        _add_fused_qkv(table, language, theirs, f"{ours}linear_qkv.weight")
    table.same(f"{theirs}o_proj.weight", f"{ours}linear_proj.weight")


def _add_fused_qkv(table: Table, language: LanguageConfig, theirs: str, ours: str) -> None:
    """Megatron's fused weight: per key/value group the rows of its query heads, of its key, of its value."""
    h, width = language.hidden_size, language.hidden_size // language.heads
    groups = language.kv_heads or language.heads
    queries = language.heads // groups
    for name, rows, first in (("q", queries, 0), ("k", 1, queries), ("v", 1, queries + 1)):
        size = (rows * width, h)
        pieces = [(ours, ((group * (queries + 2) + first) * width, 0), (group * rows * width, 0), size) for group in range(groups)]
        table.rows(f"{theirs}{name}_proj.weight", (groups * rows * width, h), pieces)


def _add_feed_forward(table: Table, language: LanguageConfig, layer: int, theirs: str, ours: str, experts: Experts) -> None:
    moe = language.moe
    if moe is None or layer < moe.dense_layers:
        _add_swiglu(table, theirs, ours)
        return
    table.same(f"{theirs}gate.weight", f"{ours}router.weight")
    if moe.expert_bias:
        table.same(f"{theirs}gate.e_score_correction_bias", f"{ours}router.expert_bias")
    if experts == "single":
        for expert in range(moe.routed_experts):
            _add_swiglu(table, f"{theirs}experts.{expert}.", f"{ours}experts.{expert}.")
    else:
        _add_stacked_experts(table, moe, language.hidden_size, f"{theirs}experts.", f"{ours}experts.")
    if moe.shared_experts:
        _add_swiglu(table, f"{theirs}shared_experts.", f"{ours}shared_experts.")


def _add_swiglu(table: Table, theirs: str, ours: str) -> None:
    table.same(f"{theirs}gate_proj.weight", f"{ours}gate.weight")
    table.same(f"{theirs}up_proj.weight", f"{ours}up.weight")
    table.same(f"{theirs}down_proj.weight", f"{ours}linear_fc2.weight")


def _add_stacked_experts(table: Table, moe: MoeConfig, hidden: int, theirs: str, ours: str) -> None:
    count, width = moe.routed_experts, moe.expert_width
    gate_up = [
        (f"{ours}{expert}.{leaf}.weight", (0, 0), (expert, row, 0), (width, hidden))
        for expert in range(count)
        for leaf, row in (("gate", 0), ("up", width))
    ]
    table.rows(f"{theirs}gate_up_proj", (count, 2 * width, hidden), gate_up)
    down = [(f"{ours}{expert}.linear_fc2.weight", (0, 0), (expert, 0, 0), (hidden, width)) for expert in range(count)]
    table.rows(f"{theirs}down_proj", (count, hidden, width), down)
