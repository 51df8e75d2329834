"""Packing: packs hold each sample once, never overflow, and are full where lengths allow it."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsvl_train.data.packing import GOOD_FILL, pack_best_fit, pack_tightly, pack_window, spread_poor

LENGTHS = st.lists(st.integers(1, 100), max_size=200)
BOTH_WAYS = pytest.mark.parametrize("packing", [pack_best_fit, pack_tightly])


@BOTH_WAYS
@given(lengths=LENGTHS, capacity=st.integers(100, 300))
def test_every_sample_is_in_exactly_one_pack_and_none_overflows(packing: Any, lengths: list[int], capacity: int) -> None:
    packs = packing(lengths, capacity)
    assert sorted(position for pack in packs for position in pack) == list(range(len(lengths)))
    assert all(0 < sum(lengths[position] for position in pack) <= capacity for pack in packs)
    assert packs == packing(lengths, capacity)


SIZES = st.lists(st.tuples(st.integers(1, 100), st.integers(0, 9)), max_size=200)
"""Tokens and tiles."""


@given(sizes=SIZES, capacity=st.integers(100, 300), max_tiles=st.integers(9, 30), data=st.data())
def test_no_pack_of_any_window_has_more_tiles_than_allowed(
    sizes: list[tuple[int, int]], capacity: int, max_tiles: int, data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, len(sizes)))
    lengths, tiles = [length for length, _ in sizes], [tile for _, tile in sizes]
    before = pack_window(lengths[:first], capacity, tiles=tiles[:first], max_tiles=max_tiles)
    left = [position for pack in before.open for position in pack] + list(range(first, len(sizes)))
    places = iter(range(len(left)))
    started = [[next(places) for _ in pack] for pack in before.open]
    after = pack_window([lengths[at] for at in left], capacity, started, tiles=[tiles[at] for at in left], max_tiles=max_tiles)
    packs = before.closed + [[left[place] for place in pack] for pack in (*after.closed, *after.open)]
    assert sorted(position for pack in packs for position in pack) == list(range(len(sizes)))
    for pack in packs:
        assert sum(lengths[position] for position in pack) <= capacity
        assert sum(tiles[position] for position in pack) <= max_tiles


def test_a_limit_on_tiles_that_nothing_reaches_changes_nothing() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 500).tolist()
    tiles = [length % 5 for length in lengths]
    assert pack_window(lengths, 300, tiles=tiles, max_tiles=10_000) == pack_window(lengths, 300)


def test_a_pack_full_of_tiles_is_closed_and_a_sample_of_too_many_refused() -> None:
    window = pack_window([10, 10, 10], 100, tiles=[4, 4, 1], max_tiles=5)
    assert (window.closed, window.open) == ([[0, 2]], [[1]])
    with pytest.raises(ValueError, match=r"sample 1 has 6 tiles; a pack takes 5 \(data\.max_tiles_per_sequence\)"):
        pack_best_fit([10, 10], 100, tiles=[4, 6], max_tiles=5)


@given(lengths=LENGTHS)
def test_best_fit_wastes_less_than_half_in_all_packs_but_one(lengths: list[int]) -> None:
    packs = pack_best_fit(lengths, 100)
    assert sum(sum(lengths[position] for position in pack) <= 50 for pack in packs) <= 1


@BOTH_WAYS
@given(lengths=LENGTHS, data=st.data())
def test_started_packs_are_kept_and_only_grow(packing: Any, lengths: list[int], data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(lengths)))
    started = packing(lengths[:first], 100)
    packs = packing(lengths, 100, started)
    assert all(pack[: len(start)] == start for pack, start in zip(packs, started, strict=False))
    assert sorted(position for pack in packs for position in pack) == list(range(len(lengths)))
    assert all(sum(lengths[position] for position in pack) <= 100 for pack in packs)


@given(lengths=LENGTHS, max_open=st.integers(0, 4))
def test_a_window_closes_or_keeps_each_pack(lengths: list[int], max_open: int) -> None:
    window = pack_window(lengths, 120, max_open=max_open)
    assert sorted(position for pack in (*window.closed, *window.open) for position in pack) == list(range(len(lengths)))
    assert len(window.open) <= max_open
    assert all(sum(lengths[position] for position in pack) < 0.98 * 120 for pack in window.open)


def test_a_pack_that_a_window_cannot_fill_is_closed() -> None:
    window = pack_window([60, 70, 80], 100, started=[[0]])
    assert [0] in window.closed
    assert [0] not in window.open


def test_fill_over_windows_of_a_long_tailed_mixture() -> None:
    rng = np.random.default_rng(0)
    lengths = np.minimum(np.exp(rng.normal(5.5, 1.2, 20_000)).astype(int) + 5, 4096)
    started_lengths: list[list[int]] = []
    tokens = packs = 0
    for start in range(0, len(lengths), 1024):
        carried = [length for pack in started_lengths for length in pack]
        places = iter(range(len(carried)))
        window_lengths = carried + lengths[start : start + 1024].tolist()
        window = pack_window(window_lengths, 4096, [[next(places) for _ in pack] for pack in started_lengths])
        tokens += sum(window_lengths[position] for pack in window.closed for position in pack)
        packs += len(window.closed)
        started_lengths = [[window_lengths[position] for position in pack] for pack in window.open]
    assert tokens / (packs * 4096) >= 0.98


@pytest.mark.parametrize("length", [0, 101])
@BOTH_WAYS
def test_a_length_that_fits_no_pack_is_refused(packing: Any, length: int) -> None:
    with pytest.raises(ValueError, match=r"sample 1 has .*data\.seq_len"):
        packing([5, length], 100)


@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=8))
def test_the_last_two_samples_of_a_tight_pack_are_the_best_two(lengths: list[int]) -> None:
    """Held against every pair: with a started pack of 40 in 100, what goes in first is the single or the pair that fills most."""
    pack = pack_tightly([40, *lengths], 100, [[0]])[0]
    filled = sum(([40, *lengths][position]) for position in pack[1:])
    pairs = [a + b for number, a in enumerate(lengths) for b in lengths[number + 1 :] if a + b <= 60]
    assert filled >= max([length for length in lengths if length <= 60] + pairs, default=0)


@given(fill=st.lists(st.floats(0.5, 1.0), min_size=1, max_size=60), data=st.data())
def test_poor_packs_come_at_even_distances(fill: list[float], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(fill))))
    spread = spread_poor(order, fill)
    assert sorted(spread) == sorted(order)
    good = [pack for pack in order if fill[pack] >= GOOD_FILL]
    assert [pack for pack in spread if fill[pack] >= GOOD_FILL] == good
    places = [place for place, pack in enumerate(spread) if fill[pack] < GOOD_FILL]
    distances = [b - a for a, b in itertools.pairwise(places)]
    assert not distances or max(distances) - min(distances) <= 1
