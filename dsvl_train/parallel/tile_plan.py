"""Which tiles move between data-parallel ranks so that each encodes as many as the next (VL2 §4.2).

Pure; `tile_exchange` carries it out.
"""

from __future__ import annotations

from collections.abc import Sequence

Exchange = tuple[tuple[int, ...], ...]
"""[from rank][to rank] -> tiles; the tiles of a rank go to the ranks in order, without changing places."""


def plan_exchanges(tiles_mr: Sequence[Sequence[int]]) -> list[Exchange]:
    """For each micro-batch, move as few tiles as it takes for every rank to encode floor or ceil of the mean.

    The odd tiles of a micro-batch go to the ranks that have encoded least so far, so that the step as a whole is even too.

    Args:
        tiles_mr: [micro-batch][rank] -> tiles of the samples there.
    """
    encoded = [0] * len(tiles_mr[0]) if tiles_mr else []
    exchanges = []
    for tiles_r in tiles_mr:
        targets = _targets(tiles_r, encoded)
        exchanges.append(_moves(tiles_r, targets))
        encoded = [before + target for before, target in zip(encoded, targets, strict=True)]
    return exchanges


def _targets(tiles_r: Sequence[int], encoded: Sequence[int]) -> list[int]:
    ranks = range(len(tiles_r))
    even, odd = divmod(sum(tiles_r), len(tiles_r))
    takes_one_more = sorted(ranks, key=lambda rank: (encoded[rank], -tiles_r[rank], rank))[:odd]
    return [even + (rank in takes_one_more) for rank in ranks]


def _moves(tiles_r: Sequence[int], targets: Sequence[int]) -> Exchange:
    moves = [[0] * len(tiles_r) for _ in tiles_r]
    for rank, (tiles, target) in enumerate(zip(tiles_r, targets, strict=True)):
        moves[rank][rank] = min(tiles, target)
    room = [target - min(tiles, target) for tiles, target in zip(tiles_r, targets, strict=True)]
    for giver, (tiles, target) in enumerate(zip(tiles_r, targets, strict=True)):
        surplus = max(tiles - target, 0)
        for taker in range(len(room)):
            moved = min(surplus, room[taker])
            moves[giver][taker] += moved
            room[taker] -= moved
            surplus -= moved
    return tuple(tuple(row) for row in moves)


def encoded_tiles(exchanges: Sequence[Exchange]) -> list[int]:
    """Tiles that each rank encodes over all micro-batches."""
    return [sum(row[rank] for exchange in exchanges for row in exchange) for rank in range(len(exchanges[0]))]
