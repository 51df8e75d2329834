"""Start and stop the processes of a run: device, process groups, Megatron's parallel state, seeds."""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

from dsvl_train.config.schema import EngineConfig, ParallelConfig


@dataclass(frozen=True)
class World:
    """Where this process stands in the run."""

    rank: int
    size: int
    device: torch.device
    params_dtype: torch.dtype
    """bf16 (with fp32 main weights in the optimiser) on CUDA, fp32 on the CPU, unless engine.precision says otherwise."""
    dp_rank: int
    dp_size: int

    @property
    def is_main(self) -> bool:
        """Rank 0: the one that writes files and speaks."""
        return self.rank == 0


def choose_device(engine: EngineConfig) -> torch.device:
    """The device of this rank.

    Raises:
        ValueError: engine.device asks for CUDA where there is none.
    """
    wants = engine.device
    if wants == "cuda" and not torch.cuda.is_available():
        raise ValueError("engine.device=cuda, but torch sees no CUDA device; use engine.device=cpu (or auto)")
    if wants == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def start(engine: EngineConfig, parallel: ParallelConfig, seed: int) -> World:
    """Join the run: one process when started plainly, one rank under torchrun.

    On CUDA this is megatron-core over NCCL as it is; on a CPU the same code over gloo, through `cpu_backend`.
    """
    device = choose_device(engine)
    _quieten_libraries()
    if device.type == "cpu":
        from dsvl_train.parallel import cpu_backend

        cpu_backend.install()
    else:
        torch.cuda.set_device(device)
    _join_process_group(device, timeout=timedelta(seconds=engine.timeout_s))

    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        context_parallel_size=parallel.cp,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=1,
        distributed_timeout_minutes=max(1, engine.timeout_s // 60),
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    bf16 = engine.precision == "bf16" or (engine.precision == "auto" and device.type == "cuda")
    return World(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        device=device,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
    )


def start_alone(device: Literal["auto", "cpu", "cuda"] = "auto") -> World:
    """One process with the whole model, for use after training, whatever layout it was trained on.

    Raises:
        ValueError: `device` is "cuda" where there is none.
    """
    return start(EngineConfig(device=device), ParallelConfig(), seed=0)


def stop() -> None:
    """Leave the run, all ranks together: a job manager may end those that are still at work when the first has left."""
    if not dist.is_initialized():
        return
    dist.barrier()
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def _join_process_group(device: torch.device, timeout: timedelta) -> None:
    backend = "gloo" if device.type == "cpu" else "nccl"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def _quieten_libraries() -> None:
    """Megatron warns at import about every optional package that is absent; nothing here needs them."""
    warnings.filterwarnings("ignore", module=r"megatron\..*")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=r".*(Transformer Engine|Apex|apex|transformer_engine).*")
