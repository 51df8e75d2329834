"""What a rank's parameters are of the whole model: the one description that initial weights, checkpoints and conversion share.

A logical tensor has a name and a shape that do not depend on the layout: layers and experts are counted over the whole model, and the
fused gate-and-up weight of a SwiGLU is two tensors. A rank holds a box of it, given by an offset.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from torch import Tensor

from dsvl_train.models.vlm import VisionLanguageModel, whole_model_name

_LOCAL_EXPERT = re.compile(r"\.experts\.local_experts\.(\d+)\.")


@dataclass(frozen=True)
class LogicalTensor:
    """The part of one logical tensor that this rank holds."""

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    offset: tuple[int, ...]
    """Where this rank's box starts."""
    parameter_name: str
    """The local parameter or buffer that stores the box."""
    rows: tuple[int, int] | None = None
    """The box is these rows of the local tensor; None = all of it."""

    def of(self, local: Tensor) -> Tensor:
        """The box inside `local`, a view: the parameter itself, its gradient or one of its optimiser moments."""
        return local if self.rows is None else local[self.rows[0] : self.rows[1]]

    def boxes_in(self, local_shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
        """What this tensor has of the elements `start` to `stop` of the flattened local tensor, as boxes.

        Yields:
            Offset in the whole tensor, size, and the flattened local tensor's element that the box begins with; a box is contiguous in it.
        """
        row = math.prod(local_shape[1:])
        first, last = (0, local_shape[0]) if self.rows is None else self.rows
        start, stop = max(start - first * row, 0), min(stop, last * row) - first * row
        for offset, size in boxes_of_range((last - first, *local_shape[1:]), start, stop):
            yield tuple(base + place for base, place in zip(self.offset, offset, strict=True)), size, first * row + start
            start += math.prod(size)

    def box_of(self, whole: Tensor, local_shape: torch.Size) -> Tensor:
        """This rank's share of the whole tensor, `local_shape` being the box's."""
        for dim, (start, length) in enumerate(zip(self.offset, local_shape, strict=True)):
            whole = whole.narrow(dim, start, length)
        return whole


def boxes_of_range(shape: Sequence[int], start: int, stop: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The elements `start` to `stop` of a flattened tensor as boxes (offset, size), in their order: whole rows as one, and what is left of
    the rows at both ends."""
    if start >= stop:
        return []
    if len(shape) == 1:
        return [((start,), (stop - start,))]
    row = math.prod(shape[1:])
    first_whole, end_of_whole = -(-start // row), stop // row
    if first_whole > end_of_whole:  # within a row
        ends, whole = [(end_of_whole, start, stop)], []
    else:
        ends = [(first_whole - 1, start, first_whole * row), (end_of_whole, end_of_whole * row, stop)]
        rows = end_of_whole - first_whole
        whole = [((first_whole, *(0 for _ in shape[1:])), (rows, *shape[1:]))] if rows else []
    of_ends = [
        [((place, *offset), (1, *size)) for offset, size in boxes_of_range(shape[1:], begin - place * row, end - place * row)]
        for place, begin, end in ends
    ]
    return [*of_ends[0], *whole, *(box for of_end in of_ends[1:] for box in of_end)]


def logical_tensors(model: VisionLanguageModel) -> Iterator[tuple[LogicalTensor, Tensor]]:
    """Every parameter and persistent buffer of this rank as logical tensors, each with the local tensor that stores it."""
    for chunk in model.chunks.values():
        persistent = chunk.state_dict(keep_vars=True)
        for name, local in persistent.items():
            if torch.is_tensor(local):
                for part in _parts(name, whole_model_name(chunk, name), local, model):
                    yield part, local


def _parts(name: str, whole_name: str, local: Tensor, model: VisionLanguageModel) -> Iterator[LogicalTensor]:
    local_shape = getattr(local, "ds_shape", local.shape)  # under DeepSpeed's ZeRO-3 a parameter's data comes and goes
    is_expert = _LOCAL_EXPERT.search(name) is not None
    sharded = getattr(local, "tensor_model_parallel", False) and not is_expert  # experts stay whole: expert tensor parallelism is 1
    tp_size = parallel_state.get_tensor_model_parallel_world_size() if sharded else 1
    tp_rank = parallel_state.get_tensor_model_parallel_rank() if sharded else 0
    dim = local.partition_dim if sharded else 0  # type: ignore[attr-defined]
    global_name = _global_name(whole_name, model)
    if not name.endswith("linear_fc1.weight"):
        yield _part(global_name, name, local_shape, dim, tp_rank, tp_size, None)
        return
    half = local_shape[0] // 2  # Megatron stacks gate over up, each rank its share of both
    shape = torch.Size([half, *local_shape[1:]])
    for index, leaf in enumerate(("gate", "up")):
        part_name = global_name.replace("linear_fc1.weight", f"{leaf}.weight")
        yield _part(part_name, name, shape, 0, tp_rank, tp_size, (index * half, (index + 1) * half))


def _part(
    name: str, parameter_name: str, shape: torch.Size, dim: int, tp_rank: int, tp_size: int, rows: tuple[int, int] | None
) -> LogicalTensor:
    whole, offset = list(shape), [0] * len(shape)
    if tp_size > 1:
        whole[dim] *= tp_size
        offset[dim] = shape[dim] * tp_rank
    return LogicalTensor(name, tuple(whole), tuple(offset), parameter_name, rows)


def _global_name(name: str, model: VisionLanguageModel) -> str:
    """Experts counted over all expert-parallel ranks; the output layer's copy of a tied embedding is the embedding."""
    if name == "language.output_layer.weight" and model.tied_embeddings:
        return "language.embedding.word_embeddings.weight"

    def whole_model_index(match: re.Match[str]) -> str:
        experts_here = model.config.num_moe_experts // model.config.expert_model_parallel_size
        return f".experts.{int(match[1]) + parallel_state.get_expert_model_parallel_rank() * experts_here}."

    return _LOCAL_EXPERT.sub(whole_model_index, name)
