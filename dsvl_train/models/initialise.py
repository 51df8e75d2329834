"""Random initial weights, a function of the seed and the tensor's name alone.

A run from scratch therefore starts alike on every layout: a rank that holds a shard draws the whole tensor and takes its share.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from dsvl_train.config.schema import ModelConfig
from dsvl_train.models.logical import logical_tensors
from dsvl_train.models.vlm import VisionLanguageModel


def initialise(model: VisionLanguageModel, config: ModelConfig, seed: int) -> None:
    """Set every parameter in place.

    Language: normal(0, init_std), norms one. Vision and adaptor: Xavier-normal weights (big_vision's SigLIP), biases zero, norms one,
    position embeddings normal(0, 1/sqrt(width)), relative positions and `hd_alpha_downsamples` zero, newline and separator embeddings
    normal(0, 1/sqrt(h)) as released.
    """
    with torch.no_grad():
        for tensor, local in logical_tensors(model):
            box = tensor.of(local)
            box.copy_(tensor.box_of(_draw(tensor.name, tensor.shape, config, seed), box.shape))


def _draw(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> Tensor:
    """The whole tensor `name`, in fp32 on the CPU (so that it is the same on every device)."""
    std = _standard_deviation(name, shape, config)
    if std is None:
        return torch.ones(shape)
    if std == 0.0:
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator) * std


def _standard_deviation(name: str, shape: tuple[int, ...], config: ModelConfig) -> float | None:
    """None = all ones, 0 = all zeros."""
    leaf = name.rsplit(".", 1)[-1]
    if leaf in ("rel_pos_h", "rel_pos_w", "hd_alpha_downsamples", "bias", "expert_bias"):
        return 0.0
    if leaf in ("pos_embed", "latent", "image_newline", "view_seperator"):
        return 1 / math.sqrt(shape[-1])
    if len(shape) == 1:
        return None
    if name.startswith("language."):
        return config.language.init_std
    fan_in, fan_out = math.prod(shape[1:]), shape[0] * math.prod(shape[2:])
    return math.sqrt(2 / (fan_in + fan_out))
