"""AdamW over Megatron's optimisers, one set per modality.

A text step has no gradient for vision and adaptor. Megatron would still step them with zero gradients, which decays their moments and
their weights; here each chunk has optimisers of its own, and a text step runs the language chunk's alone (unless optim.update_idle).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, OptimizerConfig, ParamKey, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate
from torch import Tensor, nn

from dsvl_train.config.schema import OptimConfig
from dsvl_train.data.batch import Modality
from dsvl_train.interop.native import Box, box, model_boxes, share_boxes
from dsvl_train.models.logical import LogicalTensor, logical_tensors
from dsvl_train.models.vlm import VisionLanguageModel
from dsvl_train.training.adamw import Bf16MomentsAdamW, zero_state
from dsvl_train.training.engine import MAIN, MOMENTS


class ModalityOptimiser:
    """Steps the parameters that a step's modality reached.

    Args:
        chunks: name -> wrapped chunk, `vision` and the language chunks; every rank has the same ones, a chunk may hold nothing.
        multipliers: chunk -> parameter name in it -> factor on the learning rate, None = frozen (already without `requires_grad`).
        distributed: data-parallel ranks keep a share of the optimiser's state each (Megatron's distributed optimiser).
    """

    def __init__(
        self,
        optim: OptimConfig,
        chunks: Mapping[str, DistributedDataParallel],
        multipliers: Mapping[str, Mapping[str, float | None]],
        params_dtype: torch.dtype,
        *,
        distributed: bool = False,
    ) -> None:
        config = OptimizerConfig(
            optimizer="adam",
            lr=optim.lr,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.betas[0],
            adam_beta2=optim.betas[1],
            adam_eps=optim.eps,
            clip_grad=optim.clip_grad,
            bf16=params_dtype == torch.bfloat16,
            params_dtype=params_dtype,
            use_distributed_optimizer=distributed,
        )
        self.peak, self.clip_grad = optim.lr, optim.clip_grad
        self._update_idle = optim.update_idle
        self.distributed = distributed
        self._updates = {"vision": 0, "language": 0}
        self.by_chunk: dict[str, list[MegatronOptimizer]] = {
            name: get_megatron_optimizer(
                config, [chunk], _overrides(optim.lr, multipliers[name]), use_gloo_process_groups=False
            ).chained_optimizers
            for name, chunk in chunks.items()
        }
        every = [optimiser for optimisers in self.by_chunk.values() for optimiser in optimisers]
        self.moments_dtype = torch.bfloat16 if optim.moments_dtype == "bf16" else torch.float32
        if self.moments_dtype == torch.bfloat16:
            _keep_moments_in_bf16(every)
        text = [optimiser for name, mine in self.by_chunk.items() if optim.update_idle or name != "vision" for optimiser in mine]
        self._by_modality: dict[Modality, ChainedOptimizer] = {
            "multimodal": ChainedOptimizer(every),
            "text": ChainedOptimizer(text),
        }
        for group in self.param_groups():
            group["weight_decay"] = optim.weight_decay * group["wd_mult"]
            if "fused" in group:  # torch's AdamW: one pass over each tensor, where Megatron builds the plain loop
                group["fused"] = True

    def prepare(self, modality: Modality) -> float:
        """Take over the gradients. Returns their global norm; nothing is updated yet."""
        chained = self._by_modality[modality]
        chained.prepare_grads()
        return float(chained.get_grad_norm())

    def update(self, modality: Modality, norm: float) -> None:
        """Clip the prepared gradients, whose global norm is `norm`, and update."""
        chained = self._by_modality[modality]
        for optimiser in chained.chained_optimizers:
            if self.clip_grad > 0 and not optimiser.is_stub_optimizer:
                clip_grad_by_total_norm_fp32(optimiser.get_parameters(), max_norm=self.clip_grad, total_norm=norm)
        chained.step_with_ready_grads()
        for part in self._updates:
            self._updates[part] += part == "language" or modality == "multimodal" or self._update_idle

    def zero_grad(self, modality: Modality) -> None:
        """Drop the gradients of the parameters that this modality reaches."""
        self._by_modality[modality].zero_grad()

    def set_learning_rate(self, lr: float) -> dict[str, float]:
        """Set every group's rate to lr * multiplier. Returns multiplier (as text) -> rate, for the log."""
        rates: dict[str, float] = {}
        for group in self.param_groups():
            multiplier = group["max_lr"] / self.peak
            group["lr"] = lr * multiplier
            rates[f"x{multiplier:g}"] = group["lr"]
        return rates

    def param_groups(self) -> Iterator[dict[str, Any]]:
        """Every group of every chunk."""
        for optimisers in self.by_chunk.values():
            for optimiser in optimisers:
                if not optimiser.is_stub_optimizer:
                    yield from optimiser.optimizer.param_groups

    def state_of(self, parameter: nn.Parameter) -> ParameterState | None:
        """AdamW's state of a parameter; None where it is frozen or was never stepped."""
        if not parameter.requires_grad:
            return None
        for name, optimisers in self.by_chunk.items():
            for optimiser in optimisers:
                if self._updates[_part(name)] and not optimiser.is_stub_optimizer:
                    find = _sharded_state if self.distributed else _plain_state
                    found = find(optimiser, parameter)
                    if found is not None:
                        return found
        return None

    def steps_taken(self) -> dict[str, int]:
        """Updates of the `vision` and the `language` part so far; they differ by the text steps."""
        return dict(self._updates)

    def create_state(self, steps: Mapping[str, int]) -> None:
        """Make zero moments for every parameter of the parts that have taken a step, so that a checkpoint can be read into them."""
        self._updates = dict(steps)
        for name, optimisers in self.by_chunk.items():
            for optimiser in optimisers:
                if steps[_part(name)] and not optimiser.is_stub_optimizer:
                    _create_state(optimiser.optimizer, steps[_part(name)], self.moments_dtype)

    def whole_weights(self) -> AbstractContextManager[None]:
        """A context in which the model may be used outside of a step: always, its weights being where they are."""
        return nullcontext()

    def boxes(self, model: VisionLanguageModel) -> Iterator[tuple[str, Box]]:
        """Weights, buffers and the optimiser's state that this rank can write, by stored name.

        Of a state that data-parallel ranks share out it has its share, cut into boxes; nothing is put together. Replicas have the same
        boxes, the two of a tied embedding too, since Megatron gives it a bucket of its own.
        """
        yield from model_boxes(model).items()
        for parameter, state, tensors in self._states(model):
            for tensor in tensors:
                yield from state.boxes(parameter, tensor)

    @contextmanager
    def restoring(self, model: VisionLanguageModel, updates: Mapping[str, int]) -> Iterator[list[tuple[str, Box]]]:
        """A context that gives the boxes to read a checkpoint into, which are the state itself."""
        self.create_state(updates)
        of_states = [
            stored for parameter, state, tensors in self._states(model) for tensor in tensors for stored in state.boxes(parameter, tensor)
        ]
        yield [*model_boxes(model).items(), *of_states]

    def _states(self, model: VisionLanguageModel) -> Iterator[tuple[nn.Parameter, ParameterState, list[LogicalTensor]]]:
        """Each parameter that was stepped, with the logical tensors (several, where gate and up are one) that it stores."""
        stores: dict[int, tuple[nn.Parameter, list[LogicalTensor]]] = {}
        for tensor, local in logical_tensors(model):
            if isinstance(local, nn.Parameter):
                stores.setdefault(id(local), (local, []))[1].append(tensor)
        for parameter, tensors in stores.values():
            state = self.state_of(parameter)
            if state is not None:
                yield parameter, state, tensors


@dataclass
class ParameterState:
    """The optimiser's tensors of a parameter, or this rank's share of them: a range of the flattened parameter."""

    tensors: dict[str, Tensor]
    """`exp_avg`, `exp_avg_sq`, and `main`, the fp32 weight, where the model computes in another precision. Empty = no share here."""
    share: tuple[int, int] | None = None
    """None = all of it."""

    def boxes(self, parameter: nn.Parameter, tensor: LogicalTensor) -> Iterator[tuple[str, Box]]:
        """What is here of one of the logical tensors that the parameter stores, by stored name; views."""
        for name, values in self.tensors.items():
            parts = [box(tensor, values)] if self.share is None else share_boxes(tensor, parameter.shape, self.share[0], values.view(-1))
            for part in parts:
                yield f"optim.{name}.{tensor.name}", part


def _plain_state(optimiser: MegatronOptimizer, parameter: nn.Parameter) -> ParameterState | None:
    main = getattr(parameter, "main_param", parameter)
    if main not in optimiser.optimizer.state:
        return None
    tensors = {moment: optimiser.optimizer.state[main][moment] for moment in MOMENTS}
    return ParameterState(tensors if main is parameter else tensors | {MAIN: main})


def _sharded_state(optimiser: Any, parameter: nn.Parameter) -> ParameterState | None:
    """From Megatron's distributed optimiser, which flattens all parameters into buffers and gives each rank a stretch of them."""
    in_buffers = any(parameter in bucket.params for buffer in optimiser.buffers for bucket in buffer.buckets)
    if not in_buffers:
        return None
    if parameter not in optimiser.model_param_gbuf_map:
        return ParameterState({}, share=(0, 0))
    group, place = optimiser.model_param_group_index_map[parameter]
    main = optimiser.optimizer.param_groups[group]["params"][place]
    tensors = {moment: optimiser.optimizer.state[main][moment] for moment in MOMENTS}
    held = optimiser._get_model_param_range_map(parameter)["param"]
    return ParameterState(tensors if parameter.dtype == torch.float32 else tensors | {MAIN: main}, share=(held.start, held.end))


def _part(chunk: str) -> str:
    return chunk.partition(".")[0]


def _overrides(peak: float, multipliers: Mapping[str, float | None]) -> dict[ParamKey, dict[str, float]]:
    """Megatron's per-parameter overrides: no weight decay on vectors, and a learning rate per multiplier."""
    overrides: dict[ParamKey, dict[str, float]] = {
        ParamKey(with_name_predicate=ParamWithNamePredicate("vector", lambda p, name: p.dim() == 1 or name.endswith(".bias"))): {
            "wd_mult": 0.0
        }
    }
    for multiplier in sorted({m for m in multipliers.values() if m is not None}):
        names = {name for name, m in multipliers.items() if m == multiplier}
        predicate = ParamWithNamePredicate(f"lr_x{multiplier:g}", lambda p, name, names=names: name.removeprefix("module.") in names)
        overrides[ParamKey(with_name_predicate=predicate)] = {"max_lr": peak * multiplier, "min_lr": 0.0}
    return overrides


def _keep_moments_in_bf16(optimisers: list[MegatronOptimizer]) -> None:
    """Put our AdamW in the place of the one that Megatron chose, before it has any state.

    Megatron's own lower precision states are Transformer Engine's alone, and come with a second way to hold gradients and main weights.
    """
    for optimiser in optimisers:
        if not optimiser.is_stub_optimizer:
            optimiser.optimizer = Bf16MomentsAdamW.in_place_of(optimiser.optimizer)


def _create_state(adam: torch.optim.Optimizer, steps: int, moments_dtype: torch.dtype) -> None:
    from megatron.core.optimizer import USING_PYTORCH_OPTIMIZER

    ours = USING_PYTORCH_OPTIMIZER or isinstance(adam, Bf16MomentsAdamW)
    for group in adam.param_groups:
        if not ours:
            group["step"] = steps
        for parameter in group["params"]:
            state = zero_state(parameter, group, moments_dtype, steps)
            if not ours:
                del state["step"]
            adam.state[parameter].update(state)
