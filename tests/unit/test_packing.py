"""Packing: packs hold each sample once, never overflow, and are full where lengths allow it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsvl_train.data.packing import pack_best_fit, pack_window

LENGTHS = st.lists(st.integers(1, 100), max_size=200)


@given(lengths=LENGTHS, capacity=st.integers(100, 300))
def test_every_sample_is_in_exactly_one_pack_and_none_overflows(lengths: list[int], capacity: int) -> None:
    packs = pack_best_fit(lengths, capacity)
    assert sorted(position for pack in packs for position in pack) == list(range(len(lengths)))
    assert all(0 < sum(lengths[position] for position in pack) <= capacity for pack in packs)
    assert packs == pack_best_fit(lengths, capacity)


@given(lengths=LENGTHS)
def test_best_fit_wastes_less_than_half_in_all_packs_but_one(lengths: list[int]) -> None:
    packs = pack_best_fit(lengths, 100)
    assert sum(sum(lengths[position] for position in pack) <= 50 for pack in packs) <= 1


@given(lengths=LENGTHS, data=st.data())
def test_started_packs_are_kept_and_only_grow(lengths: list[int], data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(lengths)))
    started = pack_best_fit(lengths[:first], 100)
    packs = pack_best_fit(lengths, 100, started)
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
def test_a_length_that_fits_no_pack_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=r"sample 1 has .*data\.seq_len"):
        pack_best_fit([5, length], 100)
