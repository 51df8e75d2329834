"""Exchange between pipeline ranks over gloo.

Two things differ from NCCL. A gloo send completes only when the other side receives, so a schedule that waits for its sends deadlocks:
they stay pending until the end of the step. And messages between two ranks are told apart by a tag alone: with two pipeline ranks the
next and the previous rank are the same one, so forward and backward traffic have different tags.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsvl_train.parallel.pipeline import PipelineCommunicator

_FORWARD, _BACKWARD = 1, 2
_DIMENSIONS = 3


class GlooCommunicator(PipelineCommunicator):
    """Sends a tensor as its shape, then its content; an empty one as its shape alone."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._under_way: list[tuple[dist.Work | None, Tensor]] = []

    def _communicate(  # type: ignore[override]
        self,
        *,
        tensor_send_next: Tensor | None,
        tensor_send_prev: Tensor | None,
        recv_prev: bool,
        recv_next: bool,
        tensor_shape: Any,
        wait_on_reqs: bool = True,
    ) -> tuple[Tensor | None, Tensor | None, None]:
        if tensor_send_prev is not None and getattr(tensor_send_prev, "is_no_gradient", False):
            tensor_send_prev = tensor_send_prev.new_empty(0, 0, 0)
        self._under_way = [(work, tensor) for work, tensor in self._under_way if work is not None and not work.is_completed()]
        self._send(tensor_send_next, self.next_rank, _FORWARD)
        self._send(tensor_send_prev, self.prev_rank, _BACKWARD)
        from_prev = self._receive(self.prev_rank, _FORWARD) if recv_prev else None
        from_next = self._receive(self.next_rank, _BACKWARD) if recv_next else None
        return from_prev, from_next, None

    def finish(self) -> None:
        for work, _ in self._under_way:
            if work is not None:
                work.wait()
        self._under_way.clear()

    def _send(self, tensor: Tensor | None, rank: int | None, tag: int) -> None:
        if tensor is None:
            return
        if tensor.ndim != _DIMENSIONS:
            raise AssertionError(f"pipeline ranks exchange tensors of {_DIMENSIONS} dimensions, not {list(tensor.shape)}")
        parts = [torch.tensor(tensor.shape), tensor.detach().contiguous()]
        for part in parts if tensor.numel() else parts[:1]:
            self._under_way.append((dist.isend(part, dst=rank, group=self.pp_group, tag=tag), part))

    def _receive(self, rank: int | None, tag: int) -> Tensor:
        shape = torch.empty(_DIMENSIONS, dtype=torch.int64)
        dist.recv(shape, src=rank, group=self.pp_group, tag=tag)
        tensor = torch.empty(shape.tolist(), dtype=self.config.pipeline_dtype, requires_grad=True)
        if tensor.numel():
            dist.recv(tensor.detach(), src=rank, group=self.pp_group, tag=tag)
        return tensor
