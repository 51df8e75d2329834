"""Shared by the vision parity tests: transformers' parameters under our names, random weights, the largest relative difference."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

Tensors = dict[str, Tensor]

_SIGLIP = (
    ("embeddings.patch_embedding.", "patch_embed.proj."),
    ("embeddings.position_embedding.weight", "pos_embed"),
    ("encoder.layers.", "blocks."),
    ("self_attn.out_proj.", "attn.proj."),
    ("layer_norm", "norm"),
    ("post_layernorm.", "norm."),
)
_SAM = (
    ("high_res_vision_model.vision_encoder.", ""),
    ("patch_embed.projection.", "patch_embed.proj."),
    ("layers.", "blocks."),
    ("neck.conv1.", "neck.0."),
    ("neck.layer_norm1.", "neck.1."),
    ("neck.conv2.", "neck.2."),
    ("neck.layer_norm2.", "neck.3."),
    ("high_res_vision_proj.conv1.", "downsamples.0."),
    ("high_res_vision_proj.conv2.", "downsamples.1."),
    ("high_res_vision_alpha", "hd_alpha_downsamples"),
    ("layer_norm", "norm"),
)


def siglip_from_hf(hf: Tensors) -> Tensors:
    """Weights (or gradients) of `SiglipVisionModel` under the released names: q, k, v in one matrix."""
    ours: Tensors = {}
    for name, tensor in hf.items():
        if ".self_attn.k_proj." in name or ".self_attn.v_proj." in name:
            continue
        if ".self_attn.q_proj." in name:
            tensor = torch.cat([hf[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")])
            name = name.replace("self_attn.q_proj", "attn.qkv")
        for old, new in _SIGLIP:
            name = name.replace(old, new)
        ours[name] = tensor[None] if name == "pos_embed" else tensor
    return ours


def sam_from_hf(hf: Tensors) -> Tensors:
    """Weights (or gradients) of `DeepseekVLHybridModel`'s high-resolution branch under the released names."""
    ours: Tensors = {}
    for name, tensor in hf.items():
        if not name.startswith("high_res_vision_"):
            continue
        name = re.sub(r"^high_res_vision_neck\.(conv|layer_norm)", r"neck_hd.neck.\1", name)
        for old, new in _SAM:
            name = name.replace(old, new)
        ours[name.replace("neck_hd.neck.", "neck_hd.")] = tensor
    return ours


def randomise(module: nn.Module, seed: int) -> None:
    """Random values for every parameter: norms about one, the rest large enough that each of them shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = 0.25 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + noise if "norm" in name and name.endswith("weight") else noise)


def weights(module: nn.Module) -> Tensors:
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def gradients(module: nn.Module) -> Tensors:
    """Gradients of all parameters; every one must have one."""
    missing = [name for name, parameter in module.named_parameters() if parameter.grad is None]
    assert not missing, missing
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


def difference(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def worst_difference(actual: Tensors, expected: Tensors) -> float:
    assert actual.keys() == expected.keys(), actual.keys() ^ expected.keys()
    return max(difference(actual[name], expected[name]) for name in expected)


def random_pixels(tiles: int, size: int, seed: int) -> Tensor:
    return torch.randint(0, 256, (tiles, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
