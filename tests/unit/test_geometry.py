"""Tile selection and token counts, from sizes alone."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsvl_train.config.geometry import (
    candidate_resolutions,
    padding_area,
    select_tiles,
    vl2_tokens_side,
    vl2_visual_tokens,
    vl_resized_size,
)

SIDES = st.integers(1, 5000)


def test_geometry_imports_without_torch() -> None:
    code = "import sys, dsvl_train.config.geometry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("max_tiles", range(1, 19))
def test_candidates_are_all_grids_and_extend_the_shorter_list(max_tiles: int) -> None:
    grids = [(width // 384, height // 384) for width, height in candidate_resolutions(384, max_tiles)]
    assert grids[0] == (1, 1)
    assert set(grids) == {(m, n) for m in range(1, 19) for n in range(1, 19) if m * n <= max_tiles}
    assert len(set(grids)) == len(grids)
    longer = candidate_resolutions(384, max_tiles + 1)
    assert [(384 * m, 384 * n) for m, n in grids] == longer[: len(grids)]


def test_number_of_candidates() -> None:
    assert len(candidate_resolutions(384)) == 23
    assert len(candidate_resolutions(384, 18)) == 58


@given(SIDES, SIDES, st.integers(1, 18))
def test_released_rule_has_most_effective_resolution_then_least_waste(width: int, height: int, max_tiles: int) -> None:
    candidates = candidate_resolutions(384, max_tiles)
    wide, high = select_tiles((width, height), 384, candidates)

    def rank(canvas: tuple[int, int]) -> tuple[int, int]:
        scale = min(canvas[0] / width, canvas[1] / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        return -effective, canvas[0] * canvas[1] - effective

    assert (wide * 384, high * 384) == min(candidates, key=rank)
    assert wide * high <= max_tiles


@given(SIDES, SIDES)
def test_paper_rule_has_least_padding(width: int, height: int) -> None:
    candidates = candidate_resolutions(384)
    wide, high = select_tiles((width, height), 384, rule="paper")
    least = padding_area((width, height), (wide * 384, high * 384))
    assert least == min(padding_area((width, height), canvas) for canvas in candidates)
    # By hand: the long side of the canvas is filled, the rest of the other side is padding.
    scale = min(wide * 384 / width, high * 384 / height)
    assert float(least) == pytest.approx(wide * high * 384 * 384 - width * scale * height * scale, abs=1e-3)


def test_rules_differ_where_the_paper_would_shrink() -> None:
    assert select_tiles((1152, 1152), 384) == (3, 3)
    assert select_tiles((1152, 1152), 384, rule="paper") == (1, 1)


def test_released_examples_of_visual_tokens() -> None:
    side = vl2_tokens_side(384, 14)
    assert side == 14
    assert [vl2_visual_tokens(grid, side) for grid in ((1, 1), (2, 1), (3, 3), (1, 9), (9, 1))] == [421, 617, 2017, 2101, 1989]
    assert vl2_tokens_side(42, 14) == 2  # 3 patches, padded to 4


@given(SIDES, SIDES, st.sampled_from([384, 1024]))
def test_vl_resize_fills_the_long_side(width: int, height: int, side: int) -> None:
    resized = vl_resized_size((width, height), side)
    assert max(resized) == side
    assert min(resized) >= 14
    assert min(resized) == max(int(min(width, height) / max(width, height) * side), 14)


def test_wrong_arguments_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"max_tiles=0.*data\.max_tiles"):
        candidate_resolutions(384, 0)
    with pytest.raises(ValueError, match="0x5"):
        select_tiles((0, 5), 384)
    with pytest.raises(ValueError, match="'best'"):
        select_tiles((5, 5), 384, rule="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no candidate"):
        select_tiles((5, 5), 384, [])
