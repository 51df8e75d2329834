"""The DeepSpeed engine: ZeRO 1, 2 and 3, with or without CPU offload, over the same chunks, step and checkpoints as Megatron's.

Each chunk is a DeepSpeed engine of its own. A text step runs, reduces and steps the language engine alone, so vision's weights and moments
stay as they are, and under ZeRO-3 no rank gathers a vision parameter; each engine sees the same modules in the same order in every step,
which ZeRO-3's prefetching needs. One backward pass goes through both. What the two share is done here: the norm of all gradients, and
clipping by it.

Gradients are sums, not means: the loss is divided by the supervised tokens of the global batch beforehand (`training.step`), and
multiplied by the number of ranks here, by which DeepSpeed divides.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from dsvl_train.config.schema import EngineConfig, OptimConfig
from dsvl_train.data.batch import Modality
from dsvl_train.interop.native import Box, box
from dsvl_train.models.logical import LogicalTensor, logical_tensors
from dsvl_train.models.vlm import VisionLanguageModel
from dsvl_train.parallel.startup import World
from dsvl_train.training.adamw import zero_state
from dsvl_train.training.engine import MAIN, MOMENTS

_WEIGHT = "weight"
_REDUCE_AT_ONCE = 100_000_000
"""Elements of gradients that are reduced together at most; a buffer of as many fp32 numbers per chunk."""


class ZeroChunk:
    """A chunk under ZeRO, called in its place.

    A chunk that does not train has an engine under ZeRO-3 alone, which keeps its weights partitioned.
    """

    def __init__(self, module: MegatronModule, engine: Any | None, adam: torch.optim.AdamW | None, device: torch.device) -> None:
        self.module, self._engine, self.adam, self._device = module, engine, adam, device
        self._call: Any = module if adam is None else engine

    @property
    def trains(self) -> bool:
        """Some of its parameters train."""
        return self.adam is not None

    @property
    def zero(self) -> Any:
        """DeepSpeed's ZeRO optimiser around `adam`."""
        assert self._engine is not None and self.trains
        return self._engine.optimizer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def set_last_micro_batch(self, last: bool) -> None:
        """Say whether the coming backward pass completes the step's gradients."""
        if self._engine is not None and self.trains:
            self._engine.set_gradient_accumulation_boundary(last)

    @property
    def _partitioning(self) -> Any | None:
        """What gathers weights as modules run, and lets them go again; None where weights are whole."""
        optimiser = None if self._engine is None else self._engine.optimizer
        return getattr(optimiser, "parameter_offload", None if self.trains else optimiser)

    def stop_partitioning(self) -> None:
        """Let weights be as they are when modules run."""
        if (partitioning := self._partitioning) is not None:
            partitioning._remove_module_hooks()
            partitioning.forward_hooks, partitioning.backward_hooks = [], []

    def go_on_partitioning(self) -> None:
        """Gather weights as modules run again."""
        if (partitioning := self._partitioning) is not None:
            partitioning.setup_zero_stage3_hooks()

    def zero_grad_buffer(self) -> None:
        """Forget the gradients of the step before: ZeRO-3 keeps those of parameters that the coming step does not reach."""
        if self.trains and hasattr(self.zero, "grad_partitions_flat_buffer"):
            self.zero.grad_partitions_flat_buffer.zero_()

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Nothing is left to do: the last micro-batch's backward pass has reduced the gradients."""

    def squared_norm(self) -> Tensor:
        """Of the reduced gradients, over all ranks; not finite where they are not. Every rank calls."""
        zero = self.zero
        if hasattr(zero, "scaled_global_norm"):  # ZeRO 1 and 2
            return zero.scaled_global_norm().double().cpu() ** 2
        if hasattr(zero, "get_fp32_grad_partitions"):  # ZeRO 3
            partitions = (part for group in zero.get_fp32_grad_partitions().values() for part in group.values())
        else:  # ZeRO 1 in bf16
            partitions = iter(zero.fp32_groups_gradient_flat_partition)
        squares = torch.stack([torch.linalg.vector_norm(part, dtype=torch.float64).to(self._device) ** 2 for part in partitions]).sum()
        dist.all_reduce(squares)
        return squares.cpu()

    def update(self, gradient_scale: float) -> None:
        """Step with the reduced gradients times `gradient_scale`."""
        assert self.adam is not None and self._engine is not None
        scaling = self.adam.register_step_pre_hook(lambda adam, *_: _scale_gradients(adam, gradient_scale))
        self._engine.step()
        scaling.remove()

    def drop_gradients(self) -> None:
        """Step without AdamW's part in it, after which DeepSpeed starts gathering gradients anew."""
        assert self.adam is not None and self._engine is not None
        self.adam.step = lambda closure=None: None  # type: ignore[method-assign]
        self._engine.step()
        del self.adam.step


class ZeroOptimiser:
    """Steps the parameters that a step's modality reached."""

    def __init__(self, optim: OptimConfig, chunks: Mapping[str, ZeroChunk], device: torch.device) -> None:
        self.clip_grad, self.chunks, self._device = optim.clip_grad, chunks, device
        self._prepared: list[ZeroChunk] = []
        self._updates = {"vision": 0, "language": 0}
        self._part_of = {id(parameter): name for name, chunk in chunks.items() for parameter in chunk.module.parameters()}

    def zero_grad(self, modality: Modality) -> None:
        """Drop the gradients of a step that was not to be updated; each update has dropped those that it used."""
        for chunk in self._prepared:
            chunk.drop_gradients()
        self._prepared = []

    def set_learning_rate(self, lr: float) -> dict[str, float]:
        """Set every group's rate to lr * multiplier. Returns multiplier (as text) -> rate, for the log."""
        rates: dict[str, float] = {}
        for chunk in self.chunks.values():
            for group in chunk.adam.param_groups if chunk.adam else ():
                group["lr"] = lr * group["lr_multiplier"]
                rates[f"x{group['lr_multiplier']:g}"] = group["lr"]
        return rates

    def prepare(self, modality: Modality) -> float:
        """Take over the gradients. Returns their global norm; nothing is updated yet."""
        self._prepared = [chunk for name, chunk in self.chunks.items() if chunk.trains and (name != "vision" or modality == "multimodal")]
        return math.sqrt(sum(float(chunk.squared_norm()) for chunk in self._prepared))

    def update(self, modality: Modality, norm: float) -> None:
        """Clip the prepared gradients, whose global norm is `norm`, and update."""
        scale = min(1.0, self.clip_grad / (norm + 1e-6)) if self.clip_grad > 0 else 1.0
        for chunk in self._prepared:
            chunk.update(scale)
        self._prepared = []
        self._updates["language"] += 1
        self._updates["vision"] += modality == "multimodal"

    def steps_taken(self) -> dict[str, int]:
        """Updates of the `vision` and the `language` part so far; they differ by the text steps."""
        return dict(self._updates)

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """A context in which the model may be used outside of a step, and not by all ranks in step; every rank enters it.

        Under ZeRO-3 every rank holds all weights meanwhile.
        """
        from deepspeed import zero

        for chunk in self.chunks.values():
            chunk.stop_partitioning()
        parameters = [parameter for chunk in self.chunks.values() for parameter in chunk.module.parameters()]
        try:
            with zero.GatheredParameters(parameters):
                yield
        finally:
            for chunk in self.chunks.values():
                chunk.go_on_partitioning()

    # ----------------------------------------------------------------------------------------------------------- checkpoints

    def boxes(self, model: VisionLanguageModel) -> Iterator[tuple[str, Box]]:
        """Weights, buffers and the optimiser's state by stored name, each on one rank; every rank goes through all of it.

        Tensors are put together one after the other.
        """
        for owner, local, tensors in _owned(model):
            for key in self._keys(local):
                whole = _whole(local, key)
                if owner == dist.get_rank():
                    for tensor in tensors:
                        yield _stored_name(key, tensor), box(tensor, whole.detach())

    @contextmanager
    def restoring(self, model: VisionLanguageModel, updates: Mapping[str, int]) -> Iterator[list[tuple[str, Box]]]:
        """A context that gives the boxes to read a checkpoint into; what they then hold becomes the state. Every rank enters it.

        Each tensor is read by one rank; after that they are handed around one by one.
        """
        self._updates = dict(updates)
        mine, owned = dist.get_rank(), list(_owned(model))
        read = {
            (id(local), key): torch.empty(_shape(local), dtype=_dtype(local, key))
            for owner, local, _ in owned
            if owner == mine
            for key in self._keys(local)
        }
        yield [
            (_stored_name(key, tensor), box(tensor, read[id(local), key]))
            for owner, local, tensors in owned
            if owner == mine
            for key in self._keys(local)
            for tensor in tensors
        ]

        def hand_around(*keys: str) -> None:
            for owner, local, _ in owned:
                for key in self._keys(local):
                    if key in keys:
                        whole = torch.empty(_shape(local), dtype=_dtype(local, key), device=self._device)
                        if owner == mine:
                            whole.copy_(read.pop((id(local), key)))
                        dist.broadcast(whole, owner)
                        _assign(local, key, whole)

        hand_around(_WEIGHT)
        for name, chunk in self.chunks.items():
            if chunk.adam is not None:
                chunk.zero.refresh_fp32_params()
                for state in chunk.adam.state.values():
                    state["step"].fill_(updates[name])
        hand_around(*MOMENTS, MAIN)

    def _keys(self, local: Tensor) -> tuple[str, ...]:
        """What is stored of a parameter or buffer."""
        if not local.requires_grad:
            return (_WEIGHT,)
        state = MOMENTS if local.dtype == torch.float32 else (*MOMENTS, MAIN)
        return (_WEIGHT, *(state if self._updates[self._part_of[id(local)]] else ()))


def build_zero(
    engine: EngineConfig,
    optim: OptimConfig,
    world: World,
    model: VisionLanguageModel,
    multipliers: Mapping[str, Mapping[str, float | None]],
) -> tuple[dict[str, ZeroChunk], ZeroOptimiser]:
    """Hand the chunks to DeepSpeed.

    Args:
        multipliers: chunk -> parameter name in it -> factor on the learning rate, None = frozen (already without `requires_grad`).
    """
    deepspeed = _import_deepspeed(world)
    with redirect_stdout(StringIO()):  # where it says how much memory is left, asked or not
        chunks = {
            name: _build_chunk(deepspeed, _settings(engine, world, chunk), optim, world, chunk, multipliers[name])
            for name, chunk in model.chunks.items()
        }

    @contextmanager
    def but_the_last() -> Iterator[None]:
        """Megatron's schedules run all micro-batches but the last inside this."""
        for chunk in chunks.values():
            chunk.set_last_micro_batch(False)
        yield
        for chunk in chunks.values():
            chunk.set_last_micro_batch(True)

    for chunk in model.chunks.values():
        chunk.config.no_sync_func = but_the_last
        chunk.config.grad_scale_func = lambda loss: loss * world.dp_size
    return chunks, ZeroOptimiser(optim, chunks, world.device)


def _import_deepspeed(world: World) -> Any:
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it even where there is one process
    import deepspeed

    # A collective for inference that it would compile at start-up on a CPU
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _settings(engine: EngineConfig, world: World, chunk: MegatronModule) -> dict[str, Any]:
    """DeepSpeed's configuration of a chunk. It clips and accumulates nothing by itself: `ZeroOptimiser` and Megatron's schedule do."""
    cpu = {"device": "cpu", "pin_memory": world.device.type == "cuda"}
    bf16 = world.params_dtype == torch.bfloat16
    trained = sum(parameter.numel() for parameter in chunk.parameters() if parameter.requires_grad)
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": engine.zero_stage,
            "reduce_bucket_size": min(max(trained, 1), _REDUCE_AT_ONCE),
            "stage3_param_persistence_threshold": engine.zero_keep_whole,
            **({"offload_optimizer": cpu} if engine.offload in ("optimizer", "all") else {}),
            **({"offload_param": cpu} if engine.offload == "all" else {}),
        },
    }


def _build_chunk(
    deepspeed: Any,
    settings: dict[str, Any],
    optim: OptimConfig,
    world: World,
    chunk: MegatronModule,
    multipliers: Mapping[str, float | None],
) -> ZeroChunk:
    chunk.train()
    groups = _param_groups(optim, chunk, multipliers)
    partitioned = settings["zero_optimization"]["stage"] == 3
    if partitioned:  # one weight after the other, on the way to the device
        deepspeed.zero.Init(module=chunk, config_dict_or_path=settings, dtype=world.params_dtype)
        for buffer in chunk.buffers():
            buffer.data = buffer.data.to(world.device)
    if groups:
        adam = torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.betas[0], optim.betas[1]), eps=optim.eps, fused=True)
        engine, *_ = deepspeed.initialize(model=chunk, optimizer=adam, config=settings, dist_init_required=False)
        _create_state(adam, engine.optimizer)
        return ZeroChunk(chunk, engine, adam, world.device)
    if partitioned:
        engine, *_ = deepspeed.initialize(model=chunk, config=settings, dist_init_required=False)
        return ZeroChunk(chunk, engine, None, world.device)
    return ZeroChunk(chunk, None, None, world.device)


def _param_groups(optim: OptimConfig, chunk: MegatronModule, multipliers: Mapping[str, float | None]) -> list[dict[str, Any]]:
    """A group per learning rate and weight decay; vectors do not decay."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in chunk.named_parameters():
        multiplier = multipliers[name]
        if multiplier is not None:
            decay = 0.0 if parameter.dim() == 1 or name.endswith(".bias") else optim.weight_decay
            groups.setdefault((multiplier, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": optim.lr * multiplier, "lr_multiplier": multiplier, "weight_decay": decay}
        for (multiplier, decay), parameters in groups.items()
    ]


def _scale_gradients(adam: torch.optim.Optimizer, scale: float) -> None:
    for group in adam.param_groups:
        for partition in group["params"]:
            if partition.grad is not None:
                partition.grad.mul_(scale)


# --------------------------------------------------------------------------------------------------------- whole tensors


def _owned(model: VisionLanguageModel) -> Iterator[tuple[int, Tensor, list[LogicalTensor]]]:
    """Every parameter and buffer, its logical tensors, and the rank that keeps it in a checkpoint: an even share of the elements each."""
    by_local = [(local, [tensor for tensor, _ in pairs]) for local, pairs in _by_local(model)]
    total = sum(math.prod(_shape(local)) for local, _ in by_local)
    before = 0
    for local, tensors in by_local:
        yield before * dist.get_world_size() // max(total, 1), local, tensors
        before += math.prod(_shape(local))


def _by_local(model: VisionLanguageModel) -> Iterator[tuple[Tensor, list[tuple[LogicalTensor, Tensor]]]]:
    for _, pairs in itertools.groupby(logical_tensors(model), key=lambda pair: id(pair[1])):
        together = list(pairs)
        yield together[0][1], together


def _shape(local: Tensor) -> torch.Size:
    return getattr(local, "ds_shape", local.shape)


def _stored_name(key: str, tensor: LogicalTensor) -> str:
    return f"model.{tensor.name}" if key == _WEIGHT else f"optim.{key}.{tensor.name}"


def _dtype(local: Tensor, key: str) -> torch.dtype:
    return local.dtype if key == _WEIGHT else torch.float32


@torch.no_grad()
def _whole(local: Tensor, key: str) -> Tensor:
    """A weight, or a tensor of the optimiser's state, in the parameter's shape; every rank calls."""
    from deepspeed import zero
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if key == MAIN:
        return safe_get_full_fp32_param(local)
    if key in MOMENTS:
        return safe_get_full_optimizer_state(local, key)
    if not _is_partitioned(local):
        return local
    with zero.GatheredParameters([local]):
        return local.detach().clone()


@torch.no_grad()
def _assign(local: Tensor, key: str, whole: Tensor) -> None:
    """Undo `_whole`; every rank calls with the same tensor."""
    from deepspeed import utils, zero

    if key == _WEIGHT and _is_partitioned(local):
        with zero.GatheredParameters([local], modifier_rank=0):
            local.copy_(whole)
    elif key == _WEIGHT:
        local.copy_(whole)
    elif _is_partitioned(local):  # not DeepSpeed's safe_set_full_…, which fail where ranks do not divide the elements
        share = _share(whole, local.ds_tensor.numel())  # type: ignore[attr-defined]
        utils.safe_set_local_fp32_param(local, share) if key == MAIN else utils.safe_set_local_optimizer_state(local, share, key)
    elif key == MAIN:
        utils.safe_set_full_fp32_param(local, whole)
    else:
        utils.safe_set_full_optimizer_state(local, whole, key)


def _is_partitioned(local: Tensor) -> bool:
    """Under ZeRO-3, where a parameter's data comes and goes."""
    return hasattr(local, "ds_id")


def _share(whole: Tensor, elements: int) -> Tensor:
    """This rank's partition, ZeRO-3's way: equal stretches of the flattened tensor, the last padded with zeros."""
    flat = F.pad(whole.flatten(), (0, elements * dist.get_world_size() - whole.numel()))
    return flat.narrow(0, elements * dist.get_rank(), elements)


def _create_state(adam: torch.optim.AdamW, zero: Any) -> None:
    """AdamW's state before its first step, which would make it group by group, while DeepSpeed links parameters to it after the first."""
    partitions = getattr(zero, "fp32_partitioned_groups_flat", None)  # ZeRO-3 hands them to AdamW one at a time
    if partitions is None:
        partitions = [partition for group in adam.param_groups for partition in group["params"]]
    for partition in partitions:
        adam.state[partition] = zero_state(partition, adam.defaults, torch.float32)
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._lazy_init_hp_params_optimizer_state()
