"""Packing: which samples share a sequence. Pure functions: lengths in, lists of positions out.

A pack is a list of samples laid end to end, at most `capacity` tokens; a sample is never split. Packing looks over a window much wider
than a global batch, because best fit within one batch wastes what a wider choice would fill (arrival order fills about 78 %).

Packs that a window leaves badly filled stay open: the next window goes on filling them. A pack that stayed open through a whole window
without receiving anything is closed as it is, so that no sample waits for ever.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

GOOD_FILL = 0.98
"""A pack filled to this share of its capacity is closed."""

MAX_OPEN = 8
"""Packs that stay open from one window to the next at most: it bounds what a cursor stores."""


@dataclass(frozen=True)
class PackedWindow:
    """The packs of one window: lists of positions in the `lengths` that were packed."""

    closed: list[list[int]]
    """Complete packs, in an order that depends on the lengths (shuffle before use)."""
    open: list[list[int]]
    """Packs to be filled further by the next window."""


def pack_best_fit(lengths: Sequence[int], capacity: int, started: Sequence[Sequence[int]] = ()) -> list[list[int]]:
    """Best fit decreasing: longest sample first, each into the fullest pack that still takes it.

    `started` are packs (positions in `lengths`) to go on filling; they come first in the result, in their order. Ties go to the earlier
    sample and the earlier pack, so equal input gives equal output. O(n log n) comparisons.

    Raises:
        ValueError: a length below 1 or above the capacity, or a started pack that is already over it.
    """
    packs = [list(pack) for pack in started]
    placed = {position for pack in packs for position in pack}
    for position, length in enumerate(lengths):
        if not 1 <= length <= capacity:
            raise ValueError(f"sample {position} has {length} tokens; a pack takes 1 to {capacity} (data.seq_len)")
    room: list[tuple[int, int]] = []  # (free tokens, pack), sorted
    for number, pack in enumerate(packs):
        free = capacity - sum(lengths[position] for position in pack)
        if free < 0:
            raise ValueError(f"a started pack holds {capacity - free} tokens; its capacity is {capacity}")
        insort(room, (free, number))
    todo = sorted(
        (position for position in range(len(lengths)) if position not in placed), key=lambda position: (-lengths[position], position)
    )
    for position in todo:
        length = lengths[position]
        at = bisect_left(room, (length, -1))
        if at == len(room):
            packs.append([position])
            insort(room, (capacity - length, len(packs) - 1))
        else:
            free, number = room.pop(at)
            packs[number].append(position)
            insort(room, (free - length, number))
    return packs


def pack_window(
    lengths: Sequence[int],
    capacity: int,
    started: Sequence[Sequence[int]] = (),
    *,
    good_fill: float = GOOD_FILL,
    max_open: int = MAX_OPEN,
) -> PackedWindow:
    """Pack one window and decide which packs stay open for the next.

    Of the packs filled below `good_fill`, the emptiest `max_open` stay open, unless they were open before and received nothing now.
    """
    packs = pack_best_fit(lengths, capacity, started)
    sizes_before = [len(pack) for pack in started]
    fill = [sum(lengths[position] for position in pack) / capacity for pack in packs]
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
