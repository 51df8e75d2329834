"""Who encodes which tiles: balancing over data-parallel ranks (VL2 §4.2), sharing among tensor-parallel ranks.

Images differ in tiles, so data-parallel ranks would wait for the one with the most. Before a micro-batch is encoded its tiles move so that
each rank encodes as many as the next; the features move back. The backward pass is balanced by the same route, since the gradient of a
feature goes where the feature came from. Tensor-parallel ranks hold the same tiles; with `parallel.vision_tp=shard` each encodes a share
and the features are gathered, where `recompute` encodes all of them on every rank (VL §3.3).

Pixels need no gradient, so a micro-batch's can be sent (`TileRoute.send`) while the one before it is encoded.

`tile_plan` decides; `TileRoute` carries it out on one rank. Shapes: n = tiles, f = features of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from dsvl_train.parallel.tile_plan import Exchange


@dataclass
class TileRoute:
    """The way of one micro-batch's tiles on this rank, there (`distribute`) and back (`collect`)."""

    exchange: Exchange | None = None
    """Over data-parallel ranks; None = every rank encodes its own."""
    shard: bool = False
    """Tensor-parallel ranks encode a share each."""
    _under_way: _Travelling | None = None

    def send(self, pixels_nchw: Tensor) -> None:
        """Start the exchange of this rank's tiles; `distribute` waits for its end. All data-parallel ranks have to send their micro-batches
        in the same order, before or after the same other exchanges."""
        if self.exchange is not None and self._under_way is None:
            self._under_way = _Travelling.start(pixels_nchw, self._sends, self._receives)

    def distribute(self, pixels_nchw: Tensor) -> Tensor:
        """This rank's tiles -> the tiles that it encodes."""
        if self.exchange is not None:
            self.send(pixels_nchw)
            assert self._under_way is not None
            pixels_nchw, self._under_way = self._under_way.arrive(), None
        if self.shard:
            shares = tp_shares(pixels_nchw.shape[0])
            pixels_nchw = pixels_nchw.split(shares)[parallel_state.get_tensor_model_parallel_rank()]
        return pixels_nchw

    def collect(self, features_nf: Tensor, own_tiles: int) -> Tensor:
        """Features of the tiles that this rank encoded -> features of its own tiles, `own_tiles` of them."""
        if self.shard:
            encoded = own_tiles if self.exchange is None else sum(self._receives)
            features_nf = _GatherShares.apply(features_nf, tp_shares(encoded))
        if self.exchange is not None:
            features_nf = _Exchange.apply(features_nf, self._receives, self._sends)
        return features_nf

    @property
    def _sends(self) -> list[int]:
        assert self.exchange is not None
        return list(self.exchange[parallel_state.get_data_parallel_rank()])

    @property
    def _receives(self) -> list[int]:
        assert self.exchange is not None
        return [row[parallel_state.get_data_parallel_rank()] for row in self.exchange]


@dataclass(frozen=True)
class _Travelling:
    """Tiles that are being exchanged."""

    work: dist.Work
    leaving_nchw: Tensor
    """Kept until they have left."""
    arriving_nchw: Tensor

    @classmethod
    def start(cls, pixels_nchw: Tensor, sends: list[int], receives: list[int]) -> _Travelling:
        leaving = pixels_nchw.contiguous()
        arriving = leaving.new_empty(sum(receives), *leaving.shape[1:])
        group = parallel_state.get_data_parallel_group()
        work = dist.all_to_all_single(arriving, leaving, receives, sends, group=group, async_op=True)
        return cls(work, leaving, arriving)

    def arrive(self) -> Tensor:
        self.work.wait()
        return self.arriving_nchw


def tp_shares(tiles: int) -> list[int]:
    """Tiles that each tensor-parallel rank encodes."""
    size = parallel_state.get_tensor_model_parallel_world_size()
    return [tiles * (rank + 1) // size - tiles * rank // size for rank in range(size)]


def _all_to_all(rows: Tensor, sends: list[int], receives: list[int], group: dist.ProcessGroup) -> Tensor:
    out = rows.new_empty(sum(receives), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), receives, sends, group=group)
    return out


class _Exchange(torch.autograd.Function):
    """Rows to other data-parallel ranks; gradients take the same way back."""

    @staticmethod
    def forward(ctx: Any, rows_nf: Tensor, sends: list[int], receives: list[int]) -> Tensor:
        ctx.sends, ctx.receives = sends, receives
        return _all_to_all(rows_nf, sends, receives, parallel_state.get_data_parallel_group())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _all_to_all(gradients[0], ctx.receives, ctx.sends, parallel_state.get_data_parallel_group()), None, None


class _GatherShares(torch.autograd.Function):
    """All tensor-parallel ranks' rows, in order. What follows is the same on all of them, so each takes its share of the gradient back."""

    @staticmethod
    def forward(ctx: Any, rows_nf: Tensor, shares: list[int]) -> Tensor:
        ctx.shares = shares
        group = parallel_state.get_tensor_model_parallel_group()
        most = max(shares)
        padded = rows_nf.new_zeros(most, *rows_nf.shape[1:])
        padded[: rows_nf.shape[0]] = rows_nf
        gathered = rows_nf.new_empty(len(shares) * most, *rows_nf.shape[1:])
        if most:
            dist.all_gather_into_tensor(gathered, padded, group=group)
        gathered = gathered.unflatten(0, (len(shares), most))
        return torch.cat([rows[:share] for rows, share in zip(gathered, shares, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].split(ctx.shares)[parallel_state.get_tensor_model_parallel_rank()], None
