"""Tensor names of two formats, related by the regions that their tensors share.

A foreign format stores the same numbers as we do, cut differently: q, k and v apart instead of one fused weight per head group, experts
stacked instead of one by one, no padding rows in the vocabulary. Every such difference is a list of *blocks*, rectangular regions that a
foreign tensor and one of ours have in common. One list of blocks drives both directions, can be read region by region (so that a rank
reads its boxes and a conversion holds one tensor), and copies bits without touching them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a stored tensor before reading it."""

    shape: Shape
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorSource(Protocol):
    """Stored tensors that can be read region by region."""

    where: str
    """The folder, for messages."""

    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor by name."""
        ...

    def read(self, name: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        """The region of `size` that begins at `start`."""
        ...


@dataclass(frozen=True)
class Block:
    """A region that a foreign tensor and one of ours share.

    `size` counts the dimensions that both have, aligned at the last one. A side with more dimensions (a stack of experts, a leading 1)
    has an index in `start` for each of those in front.
    """

    foreign: str
    foreign_start: Shape
    ours: str
    ours_start: Shape
    size: Shape


@dataclass(frozen=True)
class Placement:
    """A block seen from one side: `size` numbers at `start` of the wanted tensor are those at `source_start` of the source's tensor."""

    source: str
    source_start: Shape
    start: Shape
    size: Shape


@dataclass
class Table:
    """The relation of one foreign format, for one configuration, to our logical tensors."""

    ours: dict[str, Shape]
    """Shapes of our logical tensors."""
    foreign: dict[str, Shape] = field(default_factory=dict)
    """Shapes that the foreign tensors must have."""
    blocks: list[Block] = field(default_factory=list)

    def same(self, foreign: str, ours: str, foreign_shape: Shape | None = None) -> None:
        """One tensor under two names; `foreign_shape` may lack or add dimensions of 1 in front."""
        shape = self.ours[ours]
        other = shape if foreign_shape is None else foreign_shape
        common = min(len(shape), len(other))
        assert math.prod(shape) == math.prod(other) and shape[len(shape) - common :] == other[len(other) - common :], (shape, other)
        self.foreign[foreign] = other
        self.blocks.append(Block(foreign, (0,) * len(other), ours, (0,) * len(shape), shape[len(shape) - common :]))

    def rows(self, foreign: str, foreign_shape: Shape, pieces: Iterable[tuple[str, Shape, Shape, Shape]]) -> None:
        """A foreign tensor made of regions of ours: pieces are (ours, where in ours, where in the foreign tensor, size)."""
        self.foreign[foreign] = foreign_shape
        self.blocks += [Block(foreign, there, ours, here, size) for ours, here, there, size in pieces]

    def to_ours(self) -> dict[str, list[Placement]]:
        """Our tensor -> where its numbers come from."""
        placements: dict[str, list[Placement]] = {}
        for block in self.blocks:
            placements.setdefault(block.ours, []).append(Placement(block.foreign, block.foreign_start, block.ours_start, block.size))
        return placements

    def to_foreign(self) -> dict[str, list[Placement]]:
        """Foreign tensor -> where its numbers come from."""
        placements: dict[str, list[Placement]] = {}
        for block in self.blocks:
            placements.setdefault(block.foreign, []).append(Placement(block.ours, block.ours_start, block.foreign_start, block.size))
        return placements


class MappedSource:
    """A source seen through a table: the other side's tensors, read region by region.

    Numbers that no block covers (rows that pad the vocabulary) read as zero.
    """

    def __init__(self, source: TensorSource, placements: Mapping[str, list[Placement]], shapes: Mapping[str, Shape]) -> None:
        self.where = source.where
        self.source = source
        self._placements = placements
        stored = source.infos()
        self._infos = {name: TensorInfo(shapes[name], _dtype(name, placements[name], stored)) for name in shapes if name in placements}

    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor that the source covers."""
        return self._infos

    def read(self, name: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        """A region of the mapped tensor."""
        parts = [part for placement in self._placements[name] if (part := _overlap(placement, start, size)) is not None]
        if len(parts) == 1 and math.prod(parts[0].size) == math.prod(size):
            return self._read_part(parts[0]).reshape(tuple(size))
        out = torch.zeros(tuple(size), dtype=self._infos[name].dtype)
        for part in parts:
            region = out[tuple(slice(at, at + length) for at, length in zip(part.start, _padded(part.size, len(part.start)), strict=True))]
            region.copy_(self._read_part(part).reshape(region.shape))
        return out

    def _read_part(self, part: Placement) -> Tensor:
        return self.source.read(part.source, part.source_start, _padded(part.size, len(part.source_start)))


def read_whole(source: TensorSource, name: str) -> Tensor:
    """One tensor, all of it."""
    shape = source.infos()[name].shape
    return source.read(name, (0,) * len(shape), shape)


def _overlap(placement: Placement, start: Sequence[int], size: Sequence[int]) -> Placement | None:
    """The part of a placement inside a region of the wanted tensor, its `start` counted from the region's."""
    placed = _padded(placement.size, len(placement.start))
    first = [max(at, low) for at, low in zip(placement.start, start, strict=True)]
    last = [min(at + length, low + wanted) for at, length, low, wanted in zip(placement.start, placed, start, size, strict=True)]
    if any(low >= high for low, high in zip(first, last, strict=True)):
        return None
    lengths = tuple(high - low for low, high in zip(first, last, strict=True))
    common = len(placement.size)
    skipped = [low - at for low, at in zip(first, placement.start, strict=True)]
    source_start = list(placement.source_start)
    for dim in range(1, common + 1):
        source_start[-dim] += skipped[-dim]
    begin = tuple(low - at for low, at in zip(first, start, strict=True))
    return Placement(placement.source, tuple(source_start), begin, lengths[len(lengths) - common :])


def _padded(size: Shape, rank: int) -> Shape:
    """`size` with ones in front."""
    return (1,) * (rank - len(size)) + size


def _dtype(name: str, placements: list[Placement], stored: Mapping[str, TensorInfo]) -> torch.dtype:
    dtypes = {stored[placement.source].dtype for placement in placements}
    if len(dtypes) > 1:
        parts = sorted({placement.source for placement in placements})
        raise ValueError(f"the parts of {name} ({', '.join(parts)}) are stored in different types: {', '.join(sorted(map(str, dtypes)))}")
    return dtypes.pop()
