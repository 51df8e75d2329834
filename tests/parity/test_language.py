"""Our language models against transformers': Llama, and DeepSeekMoE with both attentions and both routers. Outputs and all gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from language_reference import build, copy_weights, gradients_under_their_names, packed, worst_gradient
from torch import Tensor, nn
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM
from vision_reference import difference, randomise

from dsvl_train.config.schema import LanguageConfig, MlaConfig, ModelConfig
from dsvl_train.data.batch import IGNORE_INDEX
from dsvl_train.interop.blocks import Table
from dsvl_train.interop.formats.language import add_language
from dsvl_train.interop.shapes import language_shapes
from dsvl_train.parallel import startup
from tests.tiny import VOCAB, tiny_model, tiny_run

LENGTHS = [13, 1, 29, 8]


@pytest.fixture(scope="module")
def world() -> Iterator[startup.World]:
    world = startup.start(tiny_run("vl").engine, tiny_run("vl").parallel, seed=0)
    yield world
    startup.stop()


def llama(language: LanguageConfig) -> nn.Module:
    config = LlamaConfig(
        vocab_size=language.vocab_size,
        hidden_size=language.hidden_size,
        intermediate_size=language.ffn_width,
        num_hidden_layers=language.layers,
        num_attention_heads=language.heads,
        num_key_value_heads=language.kv_heads or language.heads,
        rope_parameters={"rope_type": "default", "rope_theta": language.rope_theta},
        rms_norm_eps=language.norm_eps,
        tie_word_embeddings=language.tie_embeddings,
    )
    return LlamaForCausalLM(config)


def deepseek(language: LanguageConfig) -> nn.Module:
    moe, mla = language.moe, language.mla or MlaConfig(kv_rank=8, qk_nope_dim=8, qk_rope_dim=8, v_dim=8)
    assert moe is not None
    options: dict[str, Any] = {
        "vocab_size": language.vocab_size,
        "hidden_size": language.hidden_size,
        "intermediate_size": language.ffn_width,
        "moe_intermediate_size": moe.expert_width,
        "num_hidden_layers": language.layers,
        "num_attention_heads": language.heads,
        "num_key_value_heads": language.heads,
        "n_shared_experts": moe.shared_experts,
        "n_routed_experts": moe.routed_experts,
        "num_experts_per_tok": moe.top_k,
        "first_k_dense_replace": moe.dense_layers,
        "routed_scaling_factor": moe.routed_scaling,
        "norm_topk_prob": moe.normalise_top_k,
        "q_lora_rank": None,
        "kv_lora_rank": mla.kv_rank,
        "qk_nope_head_dim": mla.qk_nope_dim,
        "qk_rope_head_dim": mla.qk_rope_dim,
        "v_head_dim": mla.v_dim,
        "n_group": 1,
        "topk_group": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": language.rope_theta},
    }
    if moe.router == "sigmoid":
        return DeepseekV3ForCausalLM(DeepseekV3Config(**options))
    reference = DeepseekV2ForCausalLM(DeepseekV2Config(**options, topk_method="greedy"))
    return reference if language.mla is not None else with_plain_attention(reference, llama(language))


def with_plain_attention(reference: nn.Module, plain: nn.Module) -> nn.Module:
    """The released tiny model: Llama's attention, with its own rotary positions, in the decoder of DeepSeekMoE."""

    def own_positions(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        positions = plain.model.rotary_emb(kwargs["hidden_states"], kwargs["position_ids"])  # type: ignore[operator, union-attr]
        return args, kwargs | {"position_embeddings": positions}

    for layer, plain_layer in zip(reference.model.layers, plain.model.layers, strict=True):  # type: ignore[union-attr, arg-type]
        plain_layer.self_attn.register_forward_pre_hook(own_positions, with_kwargs=True)
        layer.self_attn = plain_layer.self_attn
    return reference


def pair(config: ModelConfig, world: startup.World, **stage: float) -> tuple[Any, nn.Module, Table]:
    """Ours and transformers' with the same random weights, and how their tensors belong together."""
    language = config.language
    reference = (llama if language.moe is None else deepseek)(language)
    randomise(reference, seed=1)
    for name, buffer in reference.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.2 * torch.randn(buffer.shape, generator=torch.Generator().manual_seed(2)))
    table = Table(language_shapes(language))
    add_language(table, language, "model.", "", experts="stacked" if language.moe else "single")
    model = build(config, world, **stage)
    copy_weights(reference, model, table)
    return model, reference, table


def samples() -> list[tuple[Tensor, Tensor]]:
    """(ids, targets) of several lengths; some targets are not supervised."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for length in LENGTHS:
        ids, targets = torch.randint(0, VOCAB, (2, length), generator=generator)
        targets[torch.rand(length, generator=generator) < 0.3] = IGNORE_INDEX
        made.append((ids, targets))
    return made


def dense(**changes: Any) -> ModelConfig:
    config = tiny_model("vl")
    return replace(config, language=replace(config.language, **changes))


CONFIGS = {
    "llama": dense(),
    "llama-gqa": dense(kv_heads=2, rope_theta=5000.0, norm_eps=1e-5),
    "llama-tied": dense(tie_embeddings=True),
    "moe-mha-softmax": tiny_model("vl2", sigmoid=False, mla=False),
    "moe-mla-softmax": tiny_model("vl2", sigmoid=False),
    "moe-mla-sigmoid-bias": tiny_model("vl2"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_losses_and_every_gradient_are_those_of_transformers(name: str, world: startup.World) -> None:
    """A pack of ours against samples one by one. Worst seen: 1.5e-6 (logits), 4.3e-6 (gradients)."""
    model, reference, table = pair(CONFIGS[name], world)
    pack, supervised = samples(), sum(int((targets != IGNORE_INDEX).sum()) for _, targets in samples())
    with torch.no_grad():
        logits = model.language(**packed(pack))[:, :VOCAB]
    targets_t = torch.cat([targets for _, targets in pack])
    loss_t = model.language(**packed(pack), labels_t=targets_t)
    loss = torch.where(targets_t != IGNORE_INDEX, loss_t, 0.0).sum() / supervised
    loss.backward()

    expected = [reference(input_ids=ids[None]).logits[0] for ids, _ in pack]
    losses = [
        F.cross_entropy(x, targets, ignore_index=IGNORE_INDEX, reduction="sum") for x, (_, targets) in zip(expected, pack, strict=True)
    ]
    expected_loss = torch.stack(losses).sum() / supervised
    expected_loss.backward()

    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    assert difference(logits, torch.cat(expected)) < 1e-5
    worst, where = worst_gradient(model, table, reference)
    assert worst < 2e-5, where


def gate_logits(reference: nn.Module) -> list[Tensor]:
    """Router logits of every gate, filled by the next forward pass."""
    seen: list[Tensor] = []
    for module in reference.modules():
        if type(module).__name__.endswith("TopkRouter"):
            module.register_forward_hook(lambda _, __, output: seen.append(output[0]))
    return seen


def released_seq_aux(logits_te: Tensor, top_k: int, sigmoid: bool) -> Tensor:
    """The released gate's loss of one sequence, without its weight: with c_e the tokens whose k highest scores include e,

        sum_e [c_e / (t * k / e)] * mean_t scores_te

    The released gate has it for softmax. For sigmoid it is DeepSeek-V3's (eq. 17-20): scores are divided by their sum over experts, and c
    counts by scores alone, without the selection bias.
    """
    tokens, experts = logits_te.shape
    scores_te = logits_te.sigmoid() if sigmoid else logits_te.softmax(-1)
    chosen_tk = scores_te.topk(top_k).indices
    if sigmoid:
        scores_te = scores_te / scores_te.sum(-1, keepdim=True)
    counts_e = torch.zeros(experts).scatter_add_(0, chosen_tk.flatten(), torch.ones(chosen_tk.numel()))
    return (counts_e / (tokens * top_k / experts) * scores_te.mean(0)).sum()


@pytest.mark.parametrize("lengths", [[12, 12], LENGTHS], ids=["equal", "ragged"])
@pytest.mark.parametrize("name", ["moe-mla-softmax", "moe-mla-sigmoid-bias"])
def test_the_balancing_loss_is_the_released_one(name: str, lengths: list[int], world: startup.World) -> None:
    """Where sequences are equally long, the released mean over them; else each counts by its tokens. Padding counts nowhere.

    Gradients of the balancing loss alone, of every parameter that it reaches. Worst seen: 2.8e-6.
    """
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    weight = 0.01
    model, reference, table = pair(CONFIGS[name], world, aux_loss_weight=weight)
    generator = torch.Generator().manual_seed(4)
    pack = [(torch.randint(0, VOCAB, (length,), generator=generator), torch.zeros(length)) for length in lengths]
    padding = torch.randint(0, VOCAB, (5,), generator=generator)
    inputs = packed([*pack, (padding, torch.zeros(5))])
    inputs["padding_t"][-5:] = True
    for router in model.routers().values():
        router.reset_statistics()
        router.tokens_of_global_batch = sum(lengths)
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0))
    (model.language(**inputs) * 0.0)[:, :VOCAB].sum().backward()

    seen = gate_logits(reference)
    moe = CONFIGS[name].language.moe
    assert moe is not None
    total = torch.zeros(())
    for ids, _ in pack:
        seen.clear()
        reference(input_ids=ids[None])
        share = len(ids) / sum(lengths)
        total = total + share * torch.stack([released_seq_aux(gate, moe.top_k, moe.router == "sigmoid") for gate in seen]).sum()
    if len(set(lengths)) == 1:
        assert share == 1 / len(lengths)  # the released mean over the batch
    (weight * total).backward()

    measured = torch.stack([router.aux_loss for router in model.routers().values()]).sum()
    torch.testing.assert_close(measured.float(), total.detach(), rtol=1e-5, atol=0)
    compared = compare_where_reached(model, table, reference)
    assert {f"model.layers.{layer}.mlp.gate.weight" for layer in (1, 2)} <= compared.keys()
    assert max(compared.values()) < 2e-5, compared


def compare_where_reached(model: Any, table: Table, reference: nn.Module) -> dict[str, float]:
    """Relative difference by parameter; what the loss does not reach, such as the last layer's experts, must be zero in ours too."""
    actual = gradients_under_their_names(model, table)
    differences = {}
    for name, parameter in reference.named_parameters():
        if parameter.grad is None or not parameter.grad.any():
            assert not actual[name].any(), name
        else:
            differences[name] = difference(actual[name], parameter.grad)
    return differences
