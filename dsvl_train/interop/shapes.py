"""Shapes of a model's logical tensors, from its configuration alone: no weights, no processes, no megatron-core.

A test holds them against `models.logical` on built models.
"""

from __future__ import annotations

import torch

from dsvl_train.config.schema import LanguageConfig, ModelConfig
from dsvl_train.interop.blocks import Shape
from dsvl_train.models.adaptors import build_adaptor
from dsvl_train.models.vision import VisionTower


def logical_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Logical tensor -> shape of the whole, in the order of computation."""
    with torch.device("meta"):
        vision = VisionTower(model.vision)
        adaptor = build_adaptor(model.adaptor, model.vision, model.language.hidden_size)
    shapes = {f"vision.{name}": tuple(tensor.shape) for name, tensor in vision.state_dict().items()}
    shapes |= {f"adaptor.{name}": tuple(tensor.shape) for name, tensor in adaptor.state_dict().items()}
    return shapes | language_shapes(model.language)


def language_shapes(language: LanguageConfig) -> dict[str, Shape]:
    """The language model's logical tensors."""
    h = language.hidden_size
    vocabulary = (language.padded_vocab_size, h)
    shapes: dict[str, Shape] = {"language.embedding.word_embeddings.weight": vocabulary}
    for layer in range(language.layers):
        parts: dict[str, Shape] = {"input_layernorm.weight": (h,)}
        parts |= _attention(language)
        parts["pre_mlp_layernorm.weight"] = (h,)
        parts |= _feed_forward(language, layer)
        shapes |= {f"language.decoder.layers.{layer}.{name}": shape for name, shape in parts.items()}
    shapes["language.decoder.final_layernorm.weight"] = (h,)
    if not language.tie_embeddings:
        shapes["language.output_layer.weight"] = vocabulary
    return shapes


def _attention(language: LanguageConfig) -> dict[str, Shape]:
    h, heads, mla = language.hidden_size, language.heads, language.mla
    if mla is None:
        groups, width = language.kv_heads or heads, h // heads
        shapes: dict[str, Shape] = {"linear_qkv.weight": ((heads + 2 * groups) * width, h), "linear_proj.weight": (h, heads * width)}
    else:
        shapes = {
            "linear_q_proj.weight": (heads * (mla.qk_nope_dim + mla.qk_rope_dim), h),
            "linear_kv_down_proj.weight": (mla.kv_rank + mla.qk_rope_dim, h),
            "kv_layernorm.weight": (mla.kv_rank,),
            "linear_kv_up_proj.weight": (heads * (mla.qk_nope_dim + mla.v_dim), mla.kv_rank),
            "linear_proj.weight": (h, heads * mla.v_dim),
        }
    return {f"self_attention.{name}": shape for name, shape in shapes.items()}


def _feed_forward(language: LanguageConfig, layer: int) -> dict[str, Shape]:
    h, moe = language.hidden_size, language.moe
    if moe is None or layer < moe.dense_layers:
        return _swiglu("mlp", h, language.ffn_width)
    shapes: dict[str, Shape] = {"mlp.router.weight": (moe.routed_experts, h)}
    if moe.expert_bias:
        shapes["mlp.router.expert_bias"] = (moe.routed_experts,)
    for expert in range(moe.routed_experts):
        shapes |= _swiglu(f"mlp.experts.{expert}", h, moe.expert_width)
    if moe.shared_experts:
        shapes |= _swiglu("mlp.shared_experts", h, moe.shared_experts * moe.expert_width)
    return shapes


def _swiglu(prefix: str, hidden: int, width: int) -> dict[str, Shape]:
    into, out = (width, hidden), (hidden, width)
    return {f"{prefix}.gate.weight": into, f"{prefix}.up.weight": into, f"{prefix}.linear_fc2.weight": out}
