"""Token and tile geometry: pure functions from sizes to counts, shared by the data pipeline, the models and the planner.

Sizes are (width, height) in pixels and grids are (tiles wide, tiles high) throughout, as the released code writes them. Nothing here
needs torch, pixels or a tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Literal

TileRule = Literal["released", "paper"]

VL_MIN_SIDE = 14
"""Shortest side of a resized image in the released VL preprocessor_config.json, pixels."""


def candidate_resolutions(image_size: int, max_tiles: int = 9) -> list[tuple[int, int]]:
    """All (width, height) canvases of at most `max_tiles` square tiles, in the order in which ties are decided.

    For `max_tiles` = 9 these are the 23 pairs of the released config, in its order; the rule behind that order, used for every other
    `max_tiles` (VL2, footnote 2, goes to 18): fewer tiles first, then the more elongated canvas, then tall before wide. So the list for a
    smaller `max_tiles` is always the beginning of the list for a larger one.

    Args:
        image_size: side of a tile, pixels.
        max_tiles: tiles of a canvas at most (VL2 §2: m * n <= 9).

    Raises:
        ValueError: `image_size` or `max_tiles` is below 1.
    """
    if image_size < 1 or max_tiles < 1:
        raise ValueError(
            f"image_size={image_size} and max_tiles={max_tiles} must be at least 1; set data.max_tiles to 1 for one local tile"
        )
    grids = [(wide, high) for wide in range(1, max_tiles + 1) for high in range(1, max_tiles // wide + 1)]
    grids.sort(key=lambda grid: (grid[0] * grid[1], min(grid), grid[0]))
    return [(wide * image_size, high * image_size) for wide, high in grids]


@lru_cache(maxsize=64)
def _candidates(image_size: int) -> tuple[tuple[int, int], ...]:
    return tuple(candidate_resolutions(image_size))


def select_tiles(
    image_wh: tuple[int, int],
    image_size: int,
    candidates: Sequence[tuple[int, int]] | None = None,
    rule: TileRule = "released",
) -> tuple[int, int]:
    """The grid of local tiles for an image.

    Args:
        image_wh: the image's (width, height), pixels.
        image_size: side of a tile, pixels.
        candidates: (width, height) canvases in order of preference; default `candidate_resolutions(image_size)`.
        rule: "released" = the released `select_best_resolution`: most effective resolution, then least wasted area, then first.
            "paper" = VL2 §2: least padding area after the long side is resized to the canvas, then first. The paper names no tie rule,
            and areas are absolute, so the smallest canvas of the image's own aspect ratio wins.

    Returns:
        (tiles wide, tiles high).

    Raises:
        ValueError: a side of the image is below 1, there are no candidates, or the rule is unknown.
    """
    width, height = image_wh
    if width < 1 or height < 1:
        raise ValueError(f"image of {width}x{height} pixels: both sides must be at least 1")
    canvases = _candidates(image_size) if candidates is None else candidates
    if not canvases:
        raise ValueError("no candidate resolutions to select tiles from; give at least one (width, height)")
    if rule == "released":
        best_wh = _most_effective(width, height, canvases)
    elif rule == "paper":
        best_wh = min(canvases, key=lambda canvas: padding_area(image_wh, canvas))
    else:
        raise ValueError(f"unknown tile rule {rule!r}; data.tile_selection is 'released' or 'paper'")
    return best_wh[0] // image_size, best_wh[1] // image_size


def _most_effective(width: int, height: int, canvases: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The released rule. Its float arithmetic and truncations are kept: they decide near-ties."""
    area = width * height
    best_wh = canvases[0]
    most_effective, least_wasted = -1, 0
    for canvas_wh in canvases:
        scale = min(canvas_wh[0] / width, canvas_wh[1] / height)
        effective = min(int(width * scale) * int(height * scale), area)
        wasted = canvas_wh[0] * canvas_wh[1] - effective
        if effective > most_effective or (effective == most_effective and wasted < least_wasted):
            most_effective, least_wasted, best_wh = effective, wasted, canvas_wh
    return best_wh


def padding_area(image_wh: tuple[int, int], canvas_wh: tuple[int, int]) -> Fraction:
    """Pixels of the canvas that the resized image leaves empty (VL2 §2, footnote 1), exact so that ties are ties."""
    width, height = image_wh
    canvas_width, canvas_height = canvas_wh
    if canvas_width * height <= canvas_height * width:
        return canvas_width * (canvas_height - Fraction(height * canvas_width, width))
    return canvas_height * (canvas_width - Fraction(width * canvas_height, height))


def vl2_tokens_side(image_size: int, patch_size: int, downsample_ratio: int = 2) -> int:
    """Visual tokens along one side of a tile after the pixel shuffle: ceil((image_size // patch_size) / ratio), 14 as released."""
    return -((image_size // patch_size) // -downsample_ratio)


def vl2_visual_tokens(tiles_wh: tuple[int, int], tokens_side: int) -> int:
    """Visual tokens of one image: thumbnail with newlines, separator, local tiles with newlines (VL2 §2; released order "head").

    s * (s + 1) + 1 + s * high * (s * wide + 1): 421 for 1 x 1 tiles and 2017 for 3 x 3 at s = 14.
    """
    wide, high = tiles_wh
    return tokens_side * (tokens_side + 1) + 1 + tokens_side * high * (tokens_side * wide + 1)


def vl_resized_size(image_wh: tuple[int, int], image_size: int, min_side: int = VL_MIN_SIDE) -> tuple[int, int]:
    """Size of an image before VL pads it to a square: long side to `image_size`, the short one truncated, at least `min_side`.

    Raises:
        ValueError: a side of the image is below 1.
    """
    width, height = image_wh
    if width < 1 or height < 1:
        raise ValueError(f"image of {width}x{height} pixels: both sides must be at least 1")
    longest = max(width, height)
    return max(int(width / longest * image_size), min_side), max(int(height / longest * image_size), min_side)
