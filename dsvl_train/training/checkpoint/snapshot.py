"""This rank's part of a checkpoint, copied to host memory, so that training goes on while the copy is written.

What several ranks hold (data-parallel replicas, norms under tensor parallelism, tied embeddings) is copied and written by one of them;
`divide` chooses whom, so that all have about as much to write.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from dsvl_train.interop.native import Box
from dsvl_train.models.vlm import VisionLanguageModel
from dsvl_train.training.checkpoint.agreement import gather
from dsvl_train.training.engine import Optimiser

Key = bytes
"""Digest of a box's name and place: the same on every rank that holds it."""
_KEY_BYTES = 16


class HostCopy:
    """Buffers for the boxes that this rank writes, filled again by each snapshot."""

    def __init__(self, model: VisionLanguageModel, optimiser: Optimiser) -> None:
        self._model, self._optimiser = model, optimiser
        self._divided_for: tuple[bool, ...] | None = None
        self._mine: set[Key] = set()
        self._buffers: dict[Key, Tensor] = {}

    def take(self) -> list[tuple[str, Box]]:
        """Copy the state as it is now; every rank calls. The boxes are good until the next call."""
        updated = tuple(bool(count) for count in self._optimiser.steps_taken().values())
        if self._divided_for != updated:  # the first update of a part brings its moments; all ranks see it alike
            self._mine = self._divide()
            self._divided_for = updated
        boxes = [
            (name, self._copy(key, box))
            for name, box in self._optimiser.boxes(self._model)
            if (key := _key(name, box.offset)) in self._mine
        ]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return boxes

    def _divide(self) -> set[Key]:
        held = {_key(name, box.offset): box.local.nbytes for name, box in self._optimiser.boxes(self._model)}
        packed = b"".join(key + struct.pack("<q", size) for key, size in held.items())
        return divide([_unpack(of_rank) for of_rank in gather(packed)])[torch.distributed.get_rank()]

    def _copy(self, key: Key, box: Box) -> Box:
        if key not in self._buffers:
            pinned = box.local.device.type == "cuda"
            self._buffers[key] = torch.empty(box.local.shape, dtype=box.local.dtype, pin_memory=pinned)
        self._buffers[key].copy_(box.local, non_blocking=True)
        return Box(box.whole, box.offset, self._buffers[key])


def divide(sizes_r: Sequence[Mapping[Key, int]]) -> list[set[Key]]:
    """Each box to one of the ranks that hold it, the largest first and to the rank that has least so far.

    Args:
        sizes_r: per rank, box -> bytes.

    Returns:
        Per rank, what it writes; the same from every rank's call.
    """
    holders: dict[Key, list[int]] = {}
    sizes: dict[Key, int] = {}
    for rank, of_rank in enumerate(sizes_r):
        for key, size in of_rank.items():
            holders.setdefault(key, []).append(rank)
            sizes[key] = size
    load_r, writes_r = [0] * len(sizes_r), [set[Key]() for _ in sizes_r]
    for key in sorted(sizes, key=lambda key: (len(holders[key]) > 1, -sizes[key], key)):
        rank = min(holders[key], key=lambda rank: (load_r[rank], rank))
        load_r[rank] += sizes[key]
        writes_r[rank].add(key)
    return writes_r


def _key(name: str, offset: Iterable[int]) -> Key:
    return hashlib.blake2b(f"{name} {list(offset)}".encode(), digest_size=_KEY_BYTES).digest()


def _unpack(packed: bytes) -> dict[Key, int]:
    width = _KEY_BYTES + 8
    entries = [packed[start:end] for start, end in pairwise(range(0, len(packed) + 1, width))]
    return {entry[:_KEY_BYTES]: struct.unpack("<q", entry[_KEY_BYTES:])[0] for entry in entries}
