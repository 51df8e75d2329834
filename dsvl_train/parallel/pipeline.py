"""Runs a step's pipeline through Megatron's schedules.

A step has one modality, so one of two pipelines over the same ranks: the language chunks alone, or with the encoder in front of them.
Which one it is shows in the list of chunks that is handed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import schedules
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config
from torch import Tensor

from dsvl_train.parallel.pipeline_simulation import group_size


class PipelineCommunicator(P2PCommunicator):
    """Megatron's exchange between neighbouring ranks, with two additions.

    A gradient that a rank has marked with `no_gradient` is not sent; the neighbour, which has nothing to train before it, gets an empty
    tensor. And `finish` waits for what a backend has left under way (gloo's sends are rendezvous; see `gloo_pipeline`).
    """

    def _communicate(self, *, tensor_send_prev: Tensor | None, **kwargs: Any) -> Any:
        if tensor_send_prev is not None and getattr(tensor_send_prev, "is_no_gradient", False):
            tensor_send_prev = tensor_send_prev.new_empty(0, 0, 0)
        return super()._communicate(tensor_send_prev=tensor_send_prev, **kwargs)

    def finish(self) -> None:
        """Wait for sends that are still under way."""


def no_gradient(received: Tensor) -> None:
    """Say that nothing before `received`, a tensor from the previous pipeline rank, trains: its gradient is not sent back."""
    marker = received.new_zeros(1).expand(received.shape)
    marker.is_no_gradient = True  # type: ignore[attr-defined]
    received.grad = marker


def run_pipeline(
    forward_step: Callable[..., Any],
    chunks: Sequence[Any],
    micro_batches: Iterable[Any],
    *,
    group: int | None = None,
    forward_only: bool = False,
) -> list[Any]:
    """Forward (and backward) passes of all micro-batches through this rank's chunks.

    Args:
        forward_step: what Megatron's schedules call per chunk and micro-batch.
        chunks: in the order of computation, as their engine wrapped them. More than one needs a pipeline of several ranks.
        group: micro-batches through one chunk before the next; see `pipeline_simulation.group_size`.

    Returns what the loss function gave per micro-batch, on the last rank.
    """
    batches = list(micro_batches)
    common = {
        "forward_step_func": forward_step,
        "num_microbatches": len(batches),
        "seq_length": 1,  # lengths vary: shapes travel with the tensors
        "micro_batch_size": 1,
        "forward_only": forward_only,
    }
    pp = parallel_state.get_pipeline_model_parallel_world_size()
    if pp == 1:
        return schedules.forward_backward_no_pipelining(data_iterator=iter(batches), model=list(chunks), **common)
    config = get_model_config(chunks[0])
    communicator = _communicator(parallel_state.get_pipeline_model_parallel_group(), config)
    common |= {"p2p_communicator": communicator, "pg_collection": _process_groups()}
    if len(chunks) == 1:
        result = schedules.forward_backward_pipelining_without_interleaving(data_iterator=iter(batches), model=list(chunks), **common)
    else:
        config.microbatch_group_size_per_vp_stage = group_size(pp, len(batches), group)
        iterators = [iter(batches) for _ in chunks]
        result = schedules.forward_backward_pipelining_with_interleaving(data_iterator=iterators, model=list(chunks), **common)
    communicator.finish()
    return result


def _communicator(group: dist.ProcessGroup, config: Any) -> PipelineCommunicator:
    if dist.get_backend(group) != "gloo":
        return PipelineCommunicator(group, config)
    from dsvl_train.parallel.gloo_pipeline import GlooCommunicator  # a run on CUDA never imports it

    return GlooCommunicator(group, config)


def _process_groups() -> ProcessGroupCollection:
    """The groups that Megatron's schedules take with a communicator of one's own."""
    groups = ProcessGroupCollection()
    groups.tp = parallel_state.get_tensor_model_parallel_group()
    groups.cp = parallel_state.get_context_parallel_group()
    groups.pp = parallel_state.get_pipeline_model_parallel_group()
    groups.embd = parallel_state.get_embedding_group(check_initialized=False)
    groups.pos_embd = parallel_state.get_position_embedding_group(check_initialized=False)
    groups.dp_cp = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return groups
