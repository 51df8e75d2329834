"""The language models, as Megatron specs: LLaMA-style dense (VL) and DeepSeekMoE with MHA or MLA (VL2 §2, Table 1)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from dsvl_train.config.schema import LanguageConfig, ParallelConfig, StageConfig
from dsvl_train.models.costs import recompute_modules
from dsvl_train.models.layers import PackedAttention, ReplicatedLinear, RMSNorm
from dsvl_train.models.moe import SampleMoELayer, SampleRouter
from dsvl_train.parallel.division import Division


def transformer_config(
    language: LanguageConfig,
    stage: StageConfig,
    parallel: ParallelConfig,
    params_dtype: torch.dtype,
    on_cpu: bool,
    division: Division | None = None,
) -> TransformerConfig:
    """Megatron's configuration of the language model, its layers divided over the pipeline by `division` (None = no pipeline).

    The loss is summed, not averaged, by Megatron (`calculate_per_token_loss`): `training.step` divides by the supervised tokens of the
    global batch itself, before the backward pass.
    """
    options: dict[str, Any] = {
        "num_layers": language.layers,
        "hidden_size": language.hidden_size,
        "ffn_hidden_size": language.ffn_width,
        "num_attention_heads": language.heads,
        "num_query_groups": language.kv_heads or language.heads,
        "kv_channels": language.hidden_size // language.heads,
        "normalization": "RMSNorm",
        "layernorm_epsilon": language.norm_eps,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "perform_initialization": False,  # models.initialise does it, by parameter name
        "use_cpu_initialization": on_cpu,
        "params_dtype": params_dtype,
        "pipeline_dtype": params_dtype,
        "bf16": params_dtype == torch.bfloat16,
        "tensor_model_parallel_size": parallel.tp,
        "pipeline_model_parallel_size": parallel.pp,
        "virtual_pipeline_model_parallel_size": parallel.vpp if parallel.vpp > 1 else None,
        "pipeline_model_parallel_layout": None if division is None else _pipeline_layout(division),
        "context_parallel_size": parallel.cp,
        "expert_model_parallel_size": parallel.ep,
        "expert_tensor_parallel_size": 1,
        "sequence_parallel": parallel.tp > 1,
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",  # the one that takes variable lengths; Megatron asks for it of dense models too
        "calculate_per_token_loss": True,
        "gradient_accumulation_fusion": False,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
    }
    options.update(_recompute_options(language, parallel))
    if language.moe is not None:
        options.update(_moe_options(language, stage))
    if language.mla is None:
        return TransformerConfig(**options)
    mla = language.mla
    return MLATransformerConfig(
        **options,
        multi_latent_attention=True,
        q_lora_rank=None,
        kv_lora_rank=mla.kv_rank,
        qk_head_dim=mla.qk_nope_dim,
        qk_pos_emb_head_dim=mla.qk_rope_dim,
        v_head_dim=mla.v_dim,
        rope_type="rope",
        rotary_base=language.rope_theta,
        rotary_scaling_factor=1.0,
    )


def _pipeline_layout(division: Division) -> list[list[str]]:
    """The language layers of each chunk and rank, as Megatron wants to hear it."""
    layout = [["decoder"] * len(layers) for chunk in division.language for layers in chunk]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return layout


class _CheckpointWithoutOutput(CheckpointWithoutOutput):
    """Megatron's recomputation of norms and up-projections; 0.16.1 reads its `fp8=False` as true, and then needs Transformer Engine."""

    def __init__(self, fp8: bool = False) -> None:
        super().__init__(fp8)
        self.fp8 = fp8


def _recompute_options(language: LanguageConfig, parallel: ParallelConfig) -> dict[str, Any]:
    if parallel.recompute == "none":
        return {}
    if parallel.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    tensor_parallel.CheckpointWithoutOutput = _CheckpointWithoutOutput
    return {"recompute_granularity": "selective", "recompute_modules": recompute_modules(language, parallel)}


def _moe_options(language: LanguageConfig, stage: StageConfig) -> dict[str, Any]:
    moe = language.moe
    assert moe is not None
    return {
        "num_moe_experts": moe.routed_experts,
        "moe_router_topk": moe.top_k,
        "moe_ffn_hidden_size": moe.expert_width,
        "moe_shared_expert_intermediate_size": moe.shared_experts * moe.expert_width or None,
        "moe_layer_freq": [int(layer >= moe.dense_layers) for layer in range(language.layers)],
        "moe_router_dtype": "fp32",  # the released gate casts input and weight
        "moe_router_score_function": moe.router,
        # softmax over all experts, then top-k, not renormalised; Megatron normalises sigmoid weights itself, as released
        "moe_router_pre_softmax": moe.router == "softmax" and not moe.normalise_top_k,
        "moe_router_topk_scaling_factor": moe.routed_scaling if moe.routed_scaling != 1.0 else None,
        "moe_router_enable_expert_bias": moe.expert_bias,
        "moe_router_bias_update_rate": stage.expert_bias_rate,
        "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_aux_loss_coeff": stage.aux_loss_weight,
        "moe_grouped_gemm": False,
    }


def _attention_spec(language: LanguageConfig) -> ModuleSpec:
    causal = {"attn_mask_type": AttnMaskType.causal}
    if language.mla is None:
        submodules = SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=PackedAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=IdentityOp,
            k_layernorm=IdentityOp,
        )
        return ModuleSpec(module=SelfAttention, params=causal, submodules=submodules)
    mla_submodules = MLASelfAttentionSubmodules(
        linear_q_proj=ColumnParallelLinear,
        linear_q_down_proj=ColumnParallelLinear,
        linear_q_up_proj=ColumnParallelLinear,
        linear_kv_down_proj=ColumnParallelLinear,
        linear_kv_up_proj=ColumnParallelLinear,
        core_attention=PackedAttention,
        linear_proj=RowParallelLinear,
        q_layernorm=IdentityOp,
        kv_layernorm=RMSNorm,
    )
    return ModuleSpec(module=MLASelfAttention, params=causal, submodules=mla_submodules)


def _feed_forward_spec(language: LanguageConfig, layer: int) -> ModuleSpec:
    if language.moe is None or layer < language.moe.dense_layers:
        return ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear))
    spec = get_moe_module_spec_for_backend(LocalSpecProvider(), num_experts=language.moe.routed_experts, moe_grouped_gemm=False)
    spec.module = SampleMoELayer
    spec.submodules.router = SampleRouter
    return spec


def decoder_spec(language: LanguageConfig, of_chunk: range) -> TransformerBlockSubmodules:
    """The decoder layers of a chunk: the model's first `moe.dense_layers` keep a dense FFN."""
    layers = [
        ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=RMSNorm,
                self_attention=_attention_spec(language),
                self_attn_bda=get_bias_dropout_add,
                pre_mlp_layernorm=RMSNorm,
                mlp=_feed_forward_spec(language, layer),
                mlp_bda=get_bias_dropout_add,
            ),
        )
        for layer in of_chunk
    ]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def build_language_model(
    language: LanguageConfig, config: TransformerConfig, of_chunk: range | None = None, vp_stage: int | None = None
) -> GPTModel:
    """A Megatron GPT of the configured kind, or the chunk of it with the layers `of_chunk`.

    Its embedding does not scatter over sequence-parallel ranks: visual embeddings go in first.
    """
    of_chunk = range(language.layers) if of_chunk is None else of_chunk
    model = GPTModel(
        config=config,
        transformer_layer_spec=decoder_spec(language, of_chunk),
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        vp_stage=vp_stage,
        vocab_size=language.padded_vocab_size,
        max_sequence_length=language.max_positions,
        position_embedding_type="rope",
        rotary_base=language.rope_theta,
        share_embeddings_and_output_weights=language.tie_embeddings,
        scatter_embedding_sequence_parallel=False,
    )
    _replicate_latent_projections(model, config)
    _mark_shards(model, config)
    return model


def _replicate_latent_projections(model: GPTModel, config: TransformerConfig) -> None:
    """MLA's down-projection of keys and values, whole on every tensor-parallel rank (Transformer Engine's spec does the same).

    megatron-core 0.16.1's column-parallel one gathers its output; the rotary part of it then serves each rank's own heads, and the gather
    drops the other ranks' share of its gradient.
    """
    for module in model.modules():
        if isinstance(module, MLASelfAttention):
            out_features = config.kv_lora_rank + config.qk_pos_emb_head_dim
            module.linear_kv_down_proj = ReplicatedLinear(config, config.hidden_size, out_features)


def _mark_shards(model: GPTModel, config: TransformerConfig) -> None:
    """Tell Megatron's gradient reduction and norm which weights are shards; it does so itself only where it also initialises them.

    With expert tensor parallelism 1, experts are replicated over the tensor-parallel ranks, which see different tokens: their gradients
    are summed over the expert-data-parallel group. megatron-core 0.16.1 forgets that when TP > 1 and EP = 1.
    """
    split_dim = {ColumnParallelLinear: 0, VocabParallelEmbedding: 0, RowParallelLinear: 1}
    experts_apart = config.tensor_model_parallel_size > 1 or config.expert_model_parallel_size > 1
    for module in model.modules():
        if type(module) not in split_dim or module.weight is None:
            continue
        set_tensor_model_parallel_attributes(module.weight, is_parallel=True, dim=split_dim[type(module)], stride=1)
        if getattr(module, "is_expert", False):
            module.weight.allreduce = not experts_apart
