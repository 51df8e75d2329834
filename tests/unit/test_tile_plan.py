"""Balancing tiles over data-parallel ranks: nothing lost, even in every micro-batch and over the step, no tile moved without need."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from dsvl_train.parallel.tile_plan import encoded_tiles, plan_exchanges


@given(
    st.integers(1, 8).flatmap(lambda ranks: st.lists(st.lists(st.integers(0, 30), min_size=ranks, max_size=ranks), min_size=1, max_size=6))
)
@settings(max_examples=200, deadline=None)
def test_every_rank_encodes_as_many_tiles_as_the_next(tiles_mr: list[list[int]]) -> None:
    exchanges = plan_exchanges(tiles_mr)
    for tiles_r, exchange in zip(tiles_mr, exchanges, strict=True):
        encoded = [sum(column) for column in zip(*exchange, strict=True)]
        assert [sum(row) for row in exchange] == tiles_r
        assert max(encoded) - min(encoded) <= 1
        kept = sum(exchange[rank][rank] for rank in range(len(tiles_r)))
        assert kept == sum(min(tiles, target) for tiles, target in zip(tiles_r, encoded, strict=True))
    totals = encoded_tiles(exchanges)
    assert max(totals) - min(totals) <= 1
    assert sum(totals) == sum(map(sum, tiles_mr))


def test_ranks_that_are_even_keep_their_tiles() -> None:
    assert plan_exchanges([[3, 3, 3]]) == [((3, 0, 0), (0, 3, 0), (0, 0, 3))]
    assert plan_exchanges([[6, 0, 3]]) == [((3, 3, 0), (0, 0, 0), (0, 0, 3))]
    assert plan_exchanges([[0, 0]]) == [((0, 0), (0, 0))]
