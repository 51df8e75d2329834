"""Shared by the language parity tests: weights of transformers' models into ours, and our gradients under their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dsvl_train.config.schema import ModelConfig
from dsvl_train.interop.blocks import MappedSource, Table, TensorInfo
from dsvl_train.parallel import startup
from tests.tiny import tiny_run

Tensors = dict[str, Tensor]


class InMemory:
    """Tensors as `interop` reads them from files."""

    where = "memory"

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors

    def infos(self) -> Mapping[str, TensorInfo]:
        return {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in self._tensors.items()}

    def read(self, name: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        return self._tensors[name][tuple(slice(at, at + length) for at, length in zip(start, size, strict=True))]


def build(config: ModelConfig, world: startup.World, **stage: float) -> Any:
    """Our model; its stage's settings (balancing) are zero unless given."""
    from dsvl_train.models.build import build_model

    run = tiny_run(config.family)
    run.stage.aux_loss_weight = run.stage.expert_bias_rate = 0.0
    for key, value in stage.items():
        setattr(run.stage, key, value)
    return build_model(config, run.stage, run.parallel, world, seed=0)


def copy_weights(reference: nn.Module, model: Any, table: Table) -> None:
    """Every tensor of the reference must have its place in ours."""
    from dsvl_train.interop.loading import load_source

    state = {name: tensor.detach() for name, tensor in reference.state_dict().items()}
    shared = {"lm_head.weight"} if "lm_head.weight" not in table.foreign else set()  # tied
    assert state.keys() - shared == table.foreign.keys(), (state.keys() - shared) ^ table.foreign.keys()
    load_source(MappedSource(InMemory(state), table.to_ours(), table.ours), model)


def gradients_under_their_names(model: Any, table: Table) -> Tensors:
    """Gradients of all parameters that the table knows, as the reference cuts them; vocabulary padding has none."""
    from dsvl_train.models.logical import logical_tensors

    ours: Tensors = {}
    for tensor, local in logical_tensors(model):
        if tensor.name not in table.ours:
            continue
        if isinstance(local, nn.Parameter):
            assert local.grad is not None, f"{tensor.name} has no gradient"
            ours[tensor.name] = tensor.of(local.grad)
        else:
            ours[tensor.name] = torch.zeros_like(tensor.of(local))
    mapped = MappedSource(InMemory(ours), table.to_foreign(), table.foreign)
    return {name: mapped.read(name, (0,) * len(info.shape), info.shape) for name, info in mapped.infos().items()}


def packed(samples: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """(ids, targets) of each sample, laid end to end, as the language chunk takes them."""
    lengths = [len(ids) for ids, _ in samples]
    tokens_t = torch.cat([ids for ids, _ in samples])
    return {
        "tokens_t": tokens_t,
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        "padding_t": torch.zeros_like(tokens_t, dtype=torch.bool),
    }


def worst_gradient(model: Any, table: Table, reference: nn.Module) -> tuple[float, str]:
    """The largest difference over the largest expected value, and where. Every parameter of the reference is compared.

    The bias of keys moves all scores of a query alike, so its gradient is zero but for rounding; it is held against the query's.
    """
    actual = gradients_under_their_names(model, table)
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    worst = (0.0, "")
    for name, gradient in expected.items():
        assert gradient is not None, f"{name} has no gradient in the reference"
        scale = expected[name.replace("k_proj.bias", "q_proj.bias")]
        assert scale is not None
        difference = (actual[name] - gradient).abs().max() / scale.abs().max()
        worst = max(worst, (difference.item(), name))
    return worst
