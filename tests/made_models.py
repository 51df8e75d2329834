"""Tiny random model folders as others write them, for tests of import and export.

Names and shapes come from elsewhere than the code under test: transformers' own classes for language models and for its DeepSeek-VL, our
vision modules (whose parameters carry the released names) behind the released prefixes.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dsvl_train.config.schema import SamConfig, SiglipConfig

GOLDEN = Path(__file__).resolve().parent / "golden" / "data"
VOCAB, HIDDEN = 600, 48

SIGLIP = SiglipConfig(image_size=32, patch_size=8, width=32, layers=2, heads=2, gelu="erf", attention_pool=True)
SAM = SamConfig(
    image_size=64,
    patch_size=8,
    width=32,
    layers=2,
    heads=2,
    window=3,
    global_layers=[1],
    neck_width=16,
    interpolate_to=16,
    downsample_widths=[32, 64],
)
LLAMA: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
}


def random_state(module: torch.nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """A state of the module's names and shapes: normal(0, 0.1), norms around 1."""
    generator = torch.Generator().manual_seed(sum(map(ord, prefix)) + len(module.state_dict()))
    return {
        prefix + name: torch.randn(tensor.shape, generator=generator) * 0.1 + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        for name, tensor in module.state_dict().items()
    }


def llama_state(prefix: str = "", **changes: Any) -> dict[str, Tensor]:
    """transformers' names of a Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return random_state(LlamaForCausalLM(LlamaConfig(**(LLAMA | changes))), prefix)


def write_model(folder: Path, config: dict[str, Any], state: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Path:
    """config.json and one model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.to(dtype).contiguous() for name, tensor in state.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def multi_modality(hybrid: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and tensors of a DeepSeek-VL as released: 1.3B-like, or 7B-like with both stored layer norms."""
    from dsvl_train.models.sam_vitdet import SamEncoder
    from dsvl_train.models.siglip import SiglipEncoder

    prefix = "vision_model.vision_tower_low.vision_tower." if hybrid else "vision_model.vision_tower."
    state = llama_state("language_model.") | random_state(SiglipEncoder(SIGLIP), prefix)
    siglip: dict[str, Any] = {
        "model_name": "custom",
        "image_size": 32,
        "patch_size": 8,
        "width": 32,
        "layers": 2,
        "heads": 2,
        "pixel_mean": [0.5] * 3,
        "pixel_std": [0.5] * 3,
        "select_feature": "same",
        "select_layer": -1,
        "mlp_ratio": 4.0,
    }
    params = siglip
    if hybrid:
        state |= random_state(SamEncoder(SAM), "vision_model.vision_tower_high.vision_tower.")
        for norm, width in (("high_layer_norm", 64), ("low_layer_norm", 32)):
            state |= random_state(torch.nn.LayerNorm(width), f"vision_model.{norm}.")
        layers = {"high_up_proj": (64, HIDDEN // 2), "low_up_proj": (32, HIDDEN // 2), "layers.1": (HIDDEN, HIDDEN)}
        high = {
            "model_name": "custom",
            "image_size": 64,
            "patch_size": 8,
            "width": 32,
            "layers": 2,
            "heads": 2,
            "mlp_ratio": 4.0,
            "window_size": 3,
            "global_attn_indexes": [1],
            "neck_width": 16,
            "interpolate_to": 16,
            "downsample_channels": [32, 64],
            "pixel_mean": SAM.pixel_mean,
            "pixel_std": SAM.pixel_std,
            "select_feature": "same",
            "select_layer": -1,
        }
        params = {"concat_type": "tuple", "freeze_high": True, "freeze_low": True, "high_res_cfg": high, "low_res_cfg": siglip}
    else:
        layers = {"layers.0": (32, HIDDEN), "layers.2": (HIDDEN, HIDDEN)}
    for name, (width_in, width_out) in layers.items():
        state |= random_state(torch.nn.Linear(width_in, width_out), f"aligner.{name}.")
    config = {
        "model_type": "multi_modality",
        "architectures": ["MultiModalityCausalLM"],
        "torch_dtype": "float16",
        "aligner_config": {
            "cls": "MlpProjector",
            "model_type": "aligner",
            "params": {
                "depth": 2,
                "input_dim": 32,
                "n_embed": HIDDEN,
                "projector_type": "low_high_hybrid_split_mlp_gelu" if hybrid else "mlp_gelu",
            },
        },
        "language_config": {"model_type": "llama", **LLAMA},
        "vision_config": {"cls": "HybridVisionTower" if hybrid else "CLIPVisionTower", "model_type": "vision", "params": params},
    }
    return config, state


def write_multi_modality(folder: Path, hybrid: bool, dtype: torch.dtype = torch.float32) -> Path:
    """A whole released DeepSeek-VL folder, processor included."""
    write_model(folder, *multi_modality(hybrid), dtype)
    write_vl_processor(folder, hybrid)
    return folder


def write_vl_processor(folder: Path, hybrid: bool) -> None:
    """Tokenizer and processor files of the golden VL folder, at the tiny models' sizes."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "processor_config.json", "preprocessor_config.json"):
        shutil.copyfile(GOLDEN / "vl" / name, folder / name)
    tokens = json.loads((folder / "processor_config.json").read_text()) | {"num_image_tokens": 16}
    (folder / "processor_config.json").write_text(json.dumps(tokens))
    images = json.loads((folder / "preprocessor_config.json").read_text())
    images |= {"image_size": 64, "image_mean": SAM.pixel_mean, "image_std": SAM.pixel_std} if hybrid else {"image_size": 32}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))


def transformers_model(hybrid: bool, use_head: bool = False) -> Any:
    """A random DeepSeek-VL of transformers, tiny; its `save_pretrained` writes a folder."""
    import transformers

    text = {"model_type": "llama", "rope_theta": 5000.0, **LLAMA}
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "hidden_act": "gelu",
        "vision_use_head": use_head,
    }
    options: dict[str, Any] = {"text_config": text, "vision_config": vision, "tie_word_embeddings": False, "image_token_id": 563}
    if hybrid:
        options["high_res_vision_config"] = {
            "model_type": "sam_vision_model",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 8,
            "output_channels": 16,
            "window_size": 3,
            "global_attn_indexes": [1],
            "mlp_dim": 128,
        }
    kind = "DeepseekVLHybrid" if hybrid else "DeepseekVL"
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(getattr(transformers, f"{kind}Config")(**options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.1 + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return model


def same_tensors(first: Path, second: Path) -> list[str]:
    """What differs between the weights of two folders: names, types, shapes, bits."""
    from dsvl_train.interop.blocks import read_whole
    from dsvl_train.interop.sources import open_weights

    a, b = open_weights(first), open_weights(second)
    wrong = [f"{name} is in one of the two only" for name in a.infos().keys() ^ b.infos().keys()]
    for name in a.infos().keys() & b.infos().keys():
        if a.infos()[name] != b.infos()[name]:
            wrong.append(f"{name}: {a.infos()[name]} and {b.infos()[name]}")
        elif not torch.equal(bits(read_whole(a, name)), bits(read_whole(b, name))):
            wrong.append(f"{name}: other bits")
    return wrong


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
