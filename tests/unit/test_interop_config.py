"""config.json of others: what an absent key means, and which values are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsvl_train.config.compose import CONF_DIR, from_plain_model
from dsvl_train.config.schema import ModelConfig
from dsvl_train.interop.checks import differences, require_same_model
from dsvl_train.interop.formats import deepseek_vl2, multi_modality, transformers_vl
from dsvl_train.interop.formats import language as lm
from dsvl_train.interop.formats.json_file import JsonConfig

POOL = ["vision.attn_pool.latent", "vision_model.vision_tower.attn_pool.latent", "vision_model.high_layer_norm.weight"]
VL2_VISION = {"layers": 27, "mlp_ratio": 3.7362, "model_name": "siglip_so400m_patch14_384", "patch_size": 14, "width": 1152}
VL2_COMMON: dict[str, Any] = {"model_type": "deepseek_vl_v2", "tile_tag": "2D", "global_view_pos": "head", "vision_config": VL2_VISION}
PIXELS = {"select_feature": "same", "select_layer": -1}
HALF = [0.5, 0.5, 0.5]

RELEASED: dict[str, dict[str, Any]] = {
    "deepseek_vl_1b": {
        "model_type": "multi_modality",
        "aligner_config": {
            "cls": "MlpProjector",
            "params": {"depth": 2, "input_dim": 1024, "n_embed": 2048, "projector_type": "mlp_gelu"},
        },
        "language_config": {
            "model_type": "llama",
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "vocab_size": 102400,
            "max_position_embeddings": 16384,
        },
        "vision_config": {
            "cls": "CLIPVisionTower",
            "params": {"image_size": 384, "model_name": "siglip_large_patch16_384", "pixel_mean": HALF, "pixel_std": HALF, **PIXELS},
        },
    },
    "deepseek_vl_7b": {
        "model_type": "multi_modality",
        "aligner_config": {
            "cls": "MlpProjector",
            "params": {"depth": 2, "input_dim": 1024, "n_embed": 4096, "projector_type": "low_high_hybrid_split_mlp_gelu"},
        },
        "language_config": {"model_type": "llama", "num_hidden_layers": 30, "vocab_size": 102400, "max_position_embeddings": 16384},
        "vision_config": {
            "cls": "HybridVisionTower",
            "params": {
                "concat_type": "tuple",
                "freeze_high": True,
                "freeze_low": True,
                "high_res_cfg": {
                    "image_size": 1024,
                    "model_name": "sam_b_downsample",
                    "pixel_mean": [0.48145466, 0.4578275, 0.40821073],
                    "pixel_std": [0.26862954, 0.26130258, 0.27577711],
                    **PIXELS,
                },
                "low_res_cfg": {
                    "image_size": 384,
                    "model_name": "siglip_large_patch16_384",
                    "pixel_mean": HALF,
                    "pixel_std": HALF,
                    **PIXELS,
                },
            },
        },
    },
    "deepseek_vl2_tiny": VL2_COMMON
    | {
        "projector_config": {"model_type": "mlp_projector", "n_embed": 1280},
        "language_config": {
            "hidden_size": 1280,
            "intermediate_size": 6848,
            "moe_intermediate_size": 896,
            "num_hidden_layers": 12,
            "num_attention_heads": 10,
            "num_key_value_heads": 10,
            "use_mla": False,
            "kv_lora_rank": None,
            "q_lora_rank": None,
            "qk_nope_head_dim": 0,
            "qk_rope_head_dim": 0,
            "v_head_dim": 0,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "greedy",
            "vocab_size": 129280,
            "max_position_embeddings": 4096,
            "lm_head": True,
        },
    },
    "deepseek_vl2_small": VL2_COMMON
    | {
        "projector_config": {"model_type": "mlp_projector"},
        "language_config": {
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "q_lora_rank": None,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "greedy",
            "max_position_embeddings": 4096,
        },
    },
    "deepseek_vl2": VL2_COMMON
    | {
        "projector_config": {"model_type": "mlp_projector", "n_embed": 2560},
        "language_config": {
            "hidden_size": 2560,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "q_lora_rank": None,
            "n_routed_experts": 72,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.0,
            "vocab_size": 129280,
            "max_position_embeddings": 4096,
            "lm_head": False,
        },
    },
}
"""The published files, without what they leave out."""


def as_config(values: dict[str, Any]) -> JsonConfig:
    return JsonConfig(Path("somewhere/config.json"), json.loads(json.dumps(values)))


def configured(name: str) -> ModelConfig:
    return from_plain_model(yaml.safe_load((CONF_DIR / "model" / f"{name}.yaml").read_text()))


def read(values: dict[str, Any]) -> ModelConfig:
    reader = deepseek_vl2.read if values["model_type"] == "deepseek_vl_v2" else multi_modality.read
    return reader(as_config(values), POOL)


@pytest.mark.parametrize("name", RELEASED)
def test_a_published_config_is_the_configured_model(name: str) -> None:
    """What the files leave out is what the released classes put there: 30 layers, 102400 tokens, latent attention, ..."""
    wanted, got = configured(name), read(RELEASED[name])
    assert differences(wanted, got) == []
    assert got.language.max_positions == wanted.language.max_positions


@pytest.mark.parametrize("name", RELEASED)
def test_what_is_written_reads_as_the_same_model(name: str) -> None:
    model = configured(name)
    if model.family == "vl2":
        written = deepseek_vl2.write(model, bos_id=0, eos_id=1, dtype="bfloat16", aux_loss_alpha=0.001, candidates=None)
        assert len(written["candidate_resolutions"]) == 23
        assert written["vision_config"]["model_name"] == "siglip_so400m_patch14_384"
    else:
        written = multi_modality.write(model, dtype="float16")
        assert "custom" not in json.dumps(written)
    assert differences(model, read(written)) == []


@pytest.mark.parametrize("name", ["deepseek_vl_1b", "deepseek_vl_7b"])
def test_a_vl_in_transformers_reads_as_the_same_model(name: str) -> None:
    model = configured(name)
    written = transformers_vl.write(model, bos_id=100000, eos_id=100001, image_token_id=100015, dtype="float16")
    assert written["tie_word_embeddings"] is False
    assert written["vision_config"]["hidden_act"] == "gelu"
    got = transformers_vl.read(as_config(written), ["model.vision_model.head.probe", "lm_head.weight"])
    got.vision.stored_layer_norms = model.vision.stored_layer_norms  # transformers has no place for them
    assert differences(model, got) == []


def test_transformers_ties_embeddings_unless_a_head_is_stored() -> None:
    values = {"model_type": "deepseek_vl", "text_config": {"model_type": "llama"}, "vision_config": {}}
    assert transformers_vl.read(as_config(values), []).language.tie_embeddings
    assert not transformers_vl.read(as_config(values), ["lm_head.weight"]).language.tie_embeddings


def test_the_misspelt_default_of_topk_method_is_greedy() -> None:
    values = json.loads(json.dumps(RELEASED["deepseek_vl2_small"]))
    del values["language_config"]["topk_method"]
    moe = read(values).language.moe
    assert moe is not None and not moe.expert_bias


def test_an_absent_q_lora_rank_is_1536_and_refused() -> None:
    values = json.loads(json.dumps(RELEASED["deepseek_vl2_small"]))
    del values["language_config"]["q_lora_rank"]
    with pytest.raises(ValueError, match=r"somewhere/config\.json: language_config\.q_lora_rank = 1536 \(its default; the key is absent\)"):
        read(values)


@pytest.mark.parametrize(
    ("name", "path", "value", "words"),
    [
        ("deepseek_vl_1b", "aligner_config.params.projector_type", "linear", 'projector_type = "linear"'),
        ("deepseek_vl_1b", "aligner_config.params.n_embed", 1024, "n_embed = 1024: only 2048"),
        ("deepseek_vl_1b", "vision_config.cls", "Other", 'vision_config.cls = "Other"'),
        ("deepseek_vl_1b", "vision_config.params.select_layer", -2, "select_layer = -2"),
        ("deepseek_vl_1b", "vision_config.params.select_feature", "patch", 'select_feature = "patch"'),
        ("deepseek_vl_1b", "language_config.rope_scaling", {"rope_type": "linear"}, "scaled rotary"),
        ("deepseek_vl_1b", "language_config.rope_theta", 10000.5, "only a whole number"),
        ("deepseek_vl_1b", "language_config.attention_bias", True, "attention_bias = true"),
        ("deepseek_vl_1b", "language_config.head_dim", 64, "head_dim = 64"),
        ("deepseek_vl_1b", "language_config.num_key_value_heads", 3, "must divide num_attention_heads 16"),
        ("deepseek_vl_7b", "vision_config.params.concat_type", "add", 'concat_type = "add"'),
        ("deepseek_vl_7b", "vision_config.params.high_res_cfg.model_name", "sam_h", 'high_res_cfg.model_name = "sam_h": unknown encoder'),
        ("deepseek_vl2", "language_config.norm_topk_prob", False, "norm_topk_prob = false"),
        ("deepseek_vl2", "language_config.scoring_func", "softmax", 'topk_method = "noaux_tc": only supported with scoring_func sigmoid'),
        ("deepseek_vl2", "language_config.rms_norm_eps", 1e-5, "rms_norm_eps = 1e-05"),
        ("deepseek_vl2", "projector_config.token_pooling", True, "token_pooling = true"),
        ("deepseek_vl2", "vision_config.layers", 0, "vision_config.layers = 0: expected a whole number, at least 1"),
    ],
)
def test_values_that_are_not_implemented_are_refused(name: str, path: str, value: Any, words: str) -> None:
    values = json.loads(json.dumps(RELEASED[name]))
    *sections, key = path.split(".")
    section = values
    for part in sections:
        section = section[part]
    section[key] = value
    with pytest.raises(ValueError) as caught:
        read(values)
    assert words in str(caught.value)
    assert "somewhere/config.json" in str(caught.value)


def test_a_v3_config_of_transformers() -> None:
    values = {
        "model_type": "deepseek_v3",
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "q_lora_rank": None,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"},
    }
    language = lm.read_deepseek_moe(as_config(values), lm.V3)
    assert language.rope_theta == 5000.0
    assert language.moe is not None
    moe = language.moe
    assert (moe.router, moe.expert_bias, moe.normalise_top_k, moe.routed_scaling, moe.shared_experts) == ("sigmoid", True, True, 2.5, 1)


def test_another_model_is_told_by_the_settings_that_differ() -> None:
    run, stored = configured("deepseek_vl2_small"), configured("deepseek_vl2_small")
    stored.name, stored.language.max_positions, stored.language.kv_heads = "other", 16, 16
    require_same_model(run, stored, "there")
    stored.language.hidden_size, stored.vision.siglip.layers = 1024, 3
    words = r"siglip\.layers is 3 there and 27 here; model\.language\.hidden_size is 1024 there and 2048 here"
    with pytest.raises(ValueError, match=words):
        require_same_model(run, stored, "there")
