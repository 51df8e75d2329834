"""Packing: which samples share a sequence. Pure functions: lengths in, lists of positions out.

A pack is a list of samples laid end to end, at most `capacity` tokens and, where that is asked for, `max_tiles` tiles; a sample is never
split. Packing looks over a window much wider
than a global batch, because best fit within one batch wastes what a wider choice would fill (arrival order fills about 78 %).

Packs that a window leaves badly filled stay open: the next window goes on filling them. A pack that stayed open through a whole window
without receiving anything is closed as it is, so that no sample waits for ever.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dsvl_train.data.order import Ints

GOOD_FILL = 0.98
"""A pack filled to this share of its capacity is closed."""

MAX_OPEN = 16
"""Packs that stay open from one window to the next at most: it bounds what a cursor stores."""


@dataclass(frozen=True)
class PackedWindow:
    """The packs of one window: lists of positions in the `lengths` that were packed."""

    closed: list[list[int]]
    """Complete packs, in an order that depends on the lengths (shuffle before use)."""
    open: list[list[int]]
    """Packs to be filled further by the next window."""


def pack_best_fit(
    lengths: Sequence[int],
    capacity: int,
    started: Sequence[Sequence[int]] = (),
    *,
    tiles: Sequence[int] = (),
    max_tiles: int | None = None,
) -> list[list[int]]:
    """Best fit decreasing: largest sample first, each into the fullest pack that still takes it.

    `started` are packs (positions in `lengths`) to go on filling; they come first in the result, in their order. Ties go to the earlier
    sample and the earlier pack, so equal input gives equal output. O(n log n) comparisons, unless `max_tiles` closes many packs early.

    Args:
        tiles, max_tiles: of each sample, and of a pack at most. A sample is then as large as the larger of its shares of the two limits;
            None = tiles don't count.

    Raises:
        ValueError: a length below 1 or above the capacity, tiles above `max_tiles`, or a started pack that is already over a limit.
    """
    tile, most = ([0] * len(lengths), 1) if max_tiles is None else (tiles, max_tiles)
    packs = [list(pack) for pack in started]
    placed = {position for pack in packs for position in pack}
    for position, (length, of_sample) in enumerate(zip(lengths, tile, strict=True)):
        if not 1 <= length <= capacity:
            raise ValueError(f"sample {position} has {length} tokens; a pack takes 1 to {capacity} (data.seq_len)")
        if of_sample > most:
            raise ValueError(f"sample {position} has {of_sample} tiles; a pack takes {most} (data.max_tiles_per_sequence)")
    room: list[tuple[int, int]] = []  # (free tokens, pack), sorted
    free_tiles: list[int] = []
    for number, pack in enumerate(packs):
        free = capacity - sum(lengths[position] for position in pack)
        free_tiles.append(most - sum(tile[position] for position in pack))
        if free < 0:
            raise ValueError(f"a started pack holds {capacity - free} tokens; its capacity is {capacity}")
        if free_tiles[number] < 0:
            raise ValueError(f"a started pack holds {most - free_tiles[number]} tiles; it takes {most}")
        insort(room, (free, number))
    size = [max(length * most, of_sample * capacity) for length, of_sample in zip(lengths, tile, strict=True)]
    for position in sorted((position for position in range(len(lengths)) if position not in placed), key=lambda at: (-size[at], at)):
        length, of_sample = lengths[position], tile[position]
        at = bisect_left(room, (length, -1))
        while at < len(room) and free_tiles[room[at][1]] < of_sample:
            at += 1
        if at == len(room):
            packs.append([position])
            free_tiles.append(most - of_sample)
            insort(room, (capacity - length, len(packs) - 1))
        else:
            free, number = room.pop(at)
            packs[number].append(position)
            free_tiles[number] -= of_sample
            insort(room, (free - length, number))
    return packs


CLOSE_ENOUGH = 0.002
"""Share of the capacity that may stay empty without looking further."""


def pack_tightly(lengths: Sequence[int], capacity: int, started: Sequence[Sequence[int]] = ()) -> list[list[int]]:
    """One pack after another: the longest sample left, then what fills the rest best.

    The rest is filled by the one or two samples that leave least of it empty (found exactly); where that leaves more than a little, by the
    longest that fits, and again. Where most samples are a fraction of a pack, this leaves a tenth as much empty as best fit decreasing;
    where many are longer than half of it, best fit decreasing wastes less, since this uses up the short ones early.

    `started` are packs (positions in `lengths`) to go on filling; they come first in the result, in their order. Ties go to the later
    sample, so equal input gives equal output.

    Raises:
        ValueError: a length below 1 or above the capacity, or a started pack that is already over it.
    """
    for position, length in enumerate(lengths):
        if not 1 <= length <= capacity:
            raise ValueError(f"sample {position} has {length} tokens; a pack takes 1 to {capacity} (data.seq_len)")
    all_lengths = np.asarray(lengths, dtype=np.int64)
    placed = np.zeros(len(all_lengths), dtype=bool)
    placed[[position for pack in started for position in pack]] = True
    order = np.argsort(all_lengths, kind="stable")
    left = _Left(all_lengths[order[~placed[order]]], order[~placed[order]])
    packs = []
    for pack in started:
        room = capacity - sum(lengths[position] for position in pack)
        if room < 0:
            raise ValueError(f"a started pack holds {capacity - room} tokens; its capacity is {capacity}")
        packs.append([*pack, *left.fill(room, round(CLOSE_ENOUGH * capacity))])
    while len(left):
        length, position = left.take(len(left) - 1)
        packs.append([position, *left.fill(capacity - length, round(CLOSE_ENOUGH * capacity))])
    return packs


class _Left:
    """Samples that are not packed yet, by rising length."""

    def __init__(self, lengths: Ints, positions: Ints) -> None:
        self.lengths, self.positions = lengths, positions

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, at: int) -> tuple[int, int]:
        """Remove a sample. Returns its length and position."""
        taken = int(self.lengths[at]), int(self.positions[at])
        self.lengths, self.positions = np.delete(self.lengths, at), np.delete(self.positions, at)
        return taken

    def fill(self, room: int, close_enough: int) -> list[int]:
        """Take samples that fill `room`. Returns their positions."""
        filled: list[int] = []
        while len(self) and self.lengths[0] <= room:
            longest = int(np.searchsorted(self.lengths, room, side="right")) - 1
            single = int(self.lengths[longest])
            first, second, pair = self._best_pair(room)
            best = max(single, pair)
            if room - best > close_enough and room >= single + 2 * int(self.lengths[0]):
                length, position = self.take(longest)
                filled.append(position)
                room -= length
                continue
            if single >= pair:
                filled.append(self.take(longest)[1])
            else:
                filled += [self.take(max(first, second))[1], self.take(min(first, second))[1]]
            break
        return filled

    def _best_pair(self, room: int) -> tuple[int, int, int]:
        """The two samples whose sum is largest within `room`, and the sum; 0 when no two fit."""
        partners = np.searchsorted(self.lengths, room - self.lengths, side="right") - 1
        itself = np.arange(len(self))
        partners = np.where(partners >= itself, np.maximum(partners - (partners == itself), -1), partners)
        sums = np.where((partners >= 0) & (partners != itself), self.lengths + self.lengths[partners], 0)
        sums[sums > room] = 0
        first = int(sums.argmax())
        return first, int(partners[first]), int(sums[first])


def pack_window(
    lengths: Sequence[int],
    capacity: int,
    started: Sequence[Sequence[int]] = (),
    *,
    tiles: Sequence[int] = (),
    max_tiles: int | None = None,
    good_fill: float = GOOD_FILL,
    max_open: int = MAX_OPEN,
) -> PackedWindow:
    """Pack one window, by the better of two ways, and decide which packs stay open for the next.

    Where these would put more than `max_tiles` tiles into a pack, a third way packs that counts them.
    Of the packs filled below `good_fill`, the emptiest `max_open` stay open, unless they were open before and received nothing now; a pack
    that is full of tiles is full.
    """
    packs = min(pack_tightly(lengths, capacity, started), pack_best_fit(lengths, capacity, started), key=len)
    if max_tiles is not None and any(sum(tiles[position] for position in pack) > max_tiles for pack in packs):
        packs = pack_best_fit(lengths, capacity, started, tiles=tiles, max_tiles=max_tiles)
    sizes_before = [len(pack) for pack in started]
    fill = [sum(lengths[position] for position in pack) / capacity for pack in packs]
    if max_tiles is not None:
        fill = [max(share, sum(tiles[position] for position in pack) / max_tiles) for share, pack in zip(fill, packs, strict=True)]
    may_stay = [
        number
        for number, pack in enumerate(packs)
        if fill[number] < good_fill and (number >= len(sizes_before) or len(pack) > sizes_before[number])
    ]
    stay = set(sorted(may_stay, key=lambda number: (fill[number], number))[:max_open])
    return PackedWindow(
        closed=[pack for number, pack in enumerate(packs) if number not in stay],
        open=[pack for number, pack in enumerate(packs) if number in stay],
    )


def spread_poor(order: Sequence[int], fill: Sequence[float], *, good_fill: float = GOOD_FILL) -> list[int]:
    """Rearrange packs so that the badly filled ones come at even distances, and no global batch has more than its share of them.

    `order` is a shuffle of the packs; within the good and within the poor ones it stays.
    """
    poor = [pack for pack in order if fill[pack] < good_fill]
    good = iter([pack for pack in order if fill[pack] >= good_fill])
    if not poor:
        return list(order)
    apart = len(order) / len(poor)
    first = order[0] / len(order)  # as random as the shuffle
    places = {int((number + first) * apart): pack for number, pack in enumerate(poor)}
    return [places[place] if place in places else next(good) for place in range(len(order))]
