"""One reader for ranks that train on the same micro-batches.

Tensor- and pipeline-parallel peers hold the same share of every global batch. One of them reads and decodes; this module hands over what it
made: text and layout to all peers, tiles to those that need them (the first pipeline rank's). All peers plan for themselves, since planning
reads nothing, so that only the content travels. A reader that fails tells its peers, so that none waits for it.

`send` and `receive` are collective: every peer calls one of them for every step, in the same order, from the training thread.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsvl_train.data.batch import MicroBatch


class ReaderFailed(RuntimeError):
    """The rank that reads for this one failed; carries its message."""


@dataclass(frozen=True)
class Sharing:
    """A rank's place among its peers."""

    group: dist.ProcessGroup
    """The peers: all ranks that train on the same micro-batches."""
    reader: int
    """Global rank of the peer that reads; it needs pixels."""
    device: torch.device
    """Where the group's backend takes tensors: the CPU for gloo, this rank's GPU for NCCL."""
    pixel_group: dist.ProcessGroup | None
    """The peers that need pixels; None where this rank does not."""

    @property
    def reads(self) -> bool:
        """Whether this rank is the one that reads."""
        return dist.get_rank() == self.reader

    @property
    def needs_pixels(self) -> bool:
        """Whether this rank's micro-batches have pixels."""
        return self.pixel_group is not None


def send(micro_batches: Sequence[MicroBatch], notes: Sequence[dict[str, Any]], sharing: Sharing) -> None:
    """Hand a step over.

    Args:
        notes: JSON-able, for `receive` to return.
    """
    header = {"notes": list(notes), "shapes": [_shapes(micro_batch) for micro_batch in micro_batches]}
    _send_bytes(json.dumps(header).encode(), sharing)
    numbers = [part.reshape(-1).long() for micro_batch in micro_batches for part in _parts(micro_batch)]
    _broadcast(torch.cat([*numbers, torch.zeros(1, dtype=torch.long)]), sharing, sharing.group)
    for micro_batch in micro_batches:
        if micro_batch.tiles and micro_batch.pixels_nchw is not None and sharing.pixel_group is not None:
            _broadcast(micro_batch.pixels_nchw, sharing, sharing.pixel_group)


def send_failure(error: BaseException, sharing: Sharing) -> None:
    """Tell the peers that there will be no step."""
    _send_bytes(json.dumps({"error": f"{type(error).__name__}: {error}"}).encode(), sharing)


def receive(sharing: Sharing, *, pin_memory: bool = False) -> tuple[list[MicroBatch], list[dict[str, Any]]]:
    """What the reader made of a step, with the notes; without pixels where this rank does not need them.

    Raises:
        ReaderFailed: there is no step.
    """
    header = json.loads(_receive_bytes(sharing))
    if "error" in header:
        raise ReaderFailed(f"rank {sharing.reader}, which reads the data for this rank, failed: {header['error']}")
    shapes = header["shapes"]
    numbers = torch.empty(sum(_numbers(shape) for shape in shapes) + 1, dtype=torch.long)
    numbers = _broadcast(numbers, sharing, sharing.group)
    micro_batches, at = [], 0
    for shape in shapes:
        micro_batches.append(_from_numbers(numbers[at : at + _numbers(shape)], shape))
        at += _numbers(shape)
    if sharing.pixel_group is not None:
        for micro_batch, shape in zip(micro_batches, shapes, strict=True):
            if shape["pixels"] is not None:
                pixels_nchw = torch.empty(shape["pixels"], dtype=torch.uint8, pin_memory=pin_memory)
                micro_batch.pixels_nchw = _broadcast(pixels_nchw, sharing, sharing.pixel_group) if len(pixels_nchw) else pixels_nchw
    return micro_batches, header["notes"]


# ---------------------------------------------------------------------------------------------------------------- layout


def _parts(micro_batch: MicroBatch) -> list[Tensor]:
    """Everything but the pixels, in the order in which it travels."""
    parts = [micro_batch.tokens_t, micro_batch.labels_t, micro_batch.image_mask_t, micro_batch.padding_t]
    parts += [micro_batch.cu_seqlens, micro_batch.source_s]
    return [*parts, micro_batch.tiles_wh] if micro_batch.tiles_wh is not None else parts


def _shapes(micro_batch: MicroBatch) -> dict[str, Any]:
    return {
        "tokens": len(micro_batch.tokens_t),
        "samples": len(micro_batch.source_s),
        "images": None if micro_batch.tiles_wh is None else len(micro_batch.tiles_wh),
        "pixels": None if micro_batch.pixels_nchw is None else list(micro_batch.pixels_nchw.shape),
    }


def _numbers(shape: dict[str, Any]) -> int:
    return 4 * shape["tokens"] + 2 * shape["samples"] + 1 + 2 * (shape["images"] or 0)


def _from_numbers(numbers: Tensor, shape: dict[str, Any]) -> MicroBatch:
    tokens, samples = shape["tokens"], shape["samples"]
    tokens_t, labels_t, image_mask_t, padding_t, cu_seqlens, source_s, tiles = numbers.split(
        [tokens, tokens, tokens, tokens, samples + 1, samples, 2 * (shape["images"] or 0)]
    )
    return MicroBatch(
        tokens_t=tokens_t,
        labels_t=labels_t,
        cu_seqlens=cu_seqlens.int(),
        image_mask_t=image_mask_t.bool(),
        padding_t=padding_t.bool(),
        source_s=source_s,
        pixels_nchw=None,
        tiles_wh=None if shape["images"] is None else tiles.reshape(-1, 2),
    )


# ----------------------------------------------------------------------------------------------------------- collectives


def _broadcast(tensor: Tensor, sharing: Sharing, group: dist.ProcessGroup) -> Tensor:
    """Send, or receive into, a tensor of the CPU; returns it. NCCL goes through a copy on the device, one tensor at a time."""
    staged = tensor.to(sharing.device)
    dist.broadcast(staged, sharing.reader, group)
    if staged is not tensor and not sharing.reads:
        tensor.copy_(staged)
    return tensor


def _send_bytes(content: bytes, sharing: Sharing) -> None:
    _broadcast(torch.tensor([len(content)]), sharing, sharing.group)
    _broadcast(torch.frombuffer(bytearray(content), dtype=torch.uint8), sharing, sharing.group)


def _receive_bytes(sharing: Sharing) -> bytes:
    length = int(_broadcast(torch.zeros(1, dtype=torch.long), sharing, sharing.group))
    return _broadcast(torch.empty(length, dtype=torch.uint8), sharing, sharing.group).numpy().tobytes()
