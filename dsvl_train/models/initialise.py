"""Random initial weights, a function of the seed and the parameter's name alone.

A run from scratch therefore starts alike on every layout: a rank that holds a shard draws the whole tensor and takes its share.
"""

from __future__ import annotations

import hashlib
import math
import re

import torch
from megatron.core import parallel_state
from torch import Tensor

from dsvl_train.config.schema import ModelConfig
from dsvl_train.models.vlm import VisionLanguageModel

_LOCAL_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")


def initialise(model: VisionLanguageModel, config: ModelConfig, seed: int) -> None:
    """Set every parameter in place.

    Language: normal(0, init_std), norms one. Vision and adaptor: Xavier-normal weights (big_vision's SigLIP), biases zero, norms one,
    position embeddings normal(0, 1/sqrt(width)), relative positions and `hd_alpha_downsamples` zero, newline and separator embeddings
    normal(0, 1/sqrt(h)) as released.
    """
    experts = 0 if config.language.moe is None else config.language.moe.routed_experts // model.config.expert_model_parallel_size
    ep_rank, tp_rank = parallel_state.get_expert_model_parallel_rank(), parallel_state.get_tensor_model_parallel_rank()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            global_name = _LOCAL_EXPERT.sub(lambda match: f".experts.{int(match[1]) + ep_rank * experts}.", name)
            sharded = getattr(parameter, "tensor_model_parallel", False) and not _LOCAL_EXPERT.search(name)  # experts stay whole
            shards = parallel_state.get_tensor_model_parallel_world_size() if sharded else 1
            shape = list(parameter.shape)
            if sharded:
                shape[parameter.partition_dim] *= shards
            full = _draw(global_name, shape, config, seed)
            parameter.copy_(_share(full, name, parameter.partition_dim, tp_rank, shards) if sharded else full)


def _draw(name: str, shape: list[int], config: ModelConfig, seed: int) -> Tensor:
    """The whole tensor `name`, in fp32 on the CPU (so that it is the same on every device)."""
    std = _standard_deviation(name, shape, config)
    if std is None:
        return torch.ones(shape)
    if std == 0.0:
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator) * std


def _standard_deviation(name: str, shape: list[int], config: ModelConfig) -> float | None:
    """None = all ones, 0 = all zeros."""
    leaf = name.rsplit(".", 1)[-1]
    if leaf in ("image_newline", "view_seperator"):
        return 1 / math.sqrt(shape[-1])
    if leaf in ("rel_pos_h", "rel_pos_w", "hd_alpha_downsamples") or leaf == "bias":
        return 0.0
    if leaf in ("pos_embed", "latent"):
        return 1 / math.sqrt(shape[-1])
    if len(shape) == 1:
        return None
    if name.startswith("language."):
        return config.language.init_std
    fan_in, fan_out = math.prod(shape[1:]), shape[0] * math.prod(shape[2:])
    return math.sqrt(2 / (fan_in + fan_out))


def _share(full: Tensor, name: str, dim: int, rank: int, shards: int) -> Tensor:
    if name.endswith("linear_fc1.weight"):  # gate over up: each rank holds its share of both
        return torch.cat([half.chunk(shards, dim)[rank] for half in full.chunk(2, dim)], dim)
    return full.chunk(shards, dim)[rank]
