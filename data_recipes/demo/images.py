"""The demo's pictures: handwritten digits, rendered words and pages, bar charts. All are 8-bit grey, dark on white.

Sizes are multiples of the demo's 48-pixel tiles, so dynamic tiling cuts them without scaling: a word is 2 x 1 tiles, a page
2 x 2 to 3 x 3, a chart 2 x 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFont

TILE = 48
"""Side of the demo's tiles, pixels."""
WORD_FONT_SIZES = (20, 18)
"""Pixels; the first is the one that held-out words are drawn with."""
LINE_HEIGHT = 23
_MARGIN = 3
_SCAN = 8


@lru_cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's built-in font (Aileron); needs no file.

    Raises:
        ValueError: this Pillow was built without FreeType.
    """
    loaded = ImageFont.load_default(size=size)
    if not isinstance(loaded, ImageFont.FreeTypeFont):
        raise ValueError(f"Pillow {Image.__version__} has no FreeType and cannot scale its built-in font: install a Pillow wheel from PyPI")
    return loaded


@dataclass(frozen=True)
class Jitter:
    """How a digit is drawn; the default is the plain, centred drawing of the evaluation."""

    angle: float = 0.0
    """Degrees."""
    scale: float = 1.0
    """Side of the drawn scan over 40 pixels."""
    stretch: float = 1.0
    """Width over height."""
    shift: tuple[float, float] = (0.0, 0.0)
    """Pixels."""
    ink: float = 1.0
    """1 = the scan's darkest value becomes black."""


def random_jitter(rng: Random) -> Jitter:
    """Modest variation, so that 1,497 scans are not learnt by heart."""
    return Jitter(
        angle=rng.uniform(-10, 10),
        scale=rng.uniform(0.9, 1.1),
        stretch=rng.uniform(0.9, 1.1),
        shift=(rng.uniform(-2, 2), rng.uniform(-2, 2)),
        ink=rng.uniform(0.75, 1.0),
    )


def digit_image(scan: np.ndarray, jitter: Jitter | None = None) -> Image.Image:
    """A scan (8 x 8, ink 0 to 16) as a 48 x 48 image, by one bicubic resampling."""
    jitter = jitter or Jitter()
    padded = np.full((_SCAN + 4, _SCAN + 4), 255, np.uint8)
    padded[2:-2, 2:-2] = np.round(255 - scan * (255 / 16) * jitter.ink).astype(np.uint8)
    pixels_per_cell = 40 * jitter.scale / _SCAN
    cos, sin = math.cos(math.radians(jitter.angle)), math.sin(math.radians(jitter.angle))
    a, b = cos / (pixels_per_cell * jitter.stretch), sin / (pixels_per_cell * jitter.stretch)
    d, e = -sin / pixels_per_cell, cos / pixels_per_cell
    centre, (dx, dy) = _SCAN / 2 + 2, jitter.shift
    x0, y0 = TILE / 2 + dx, TILE / 2 + dy
    matrix = (a, b, centre - a * x0 - b * y0, d, e, centre - d * x0 - e * y0)
    return Image.fromarray(padded).transform((TILE, TILE), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=255)


def side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """Images of one height in a row."""
    joined = Image.new("L", (sum(i.width for i in images), images[0].height), 255)
    x = 0
    for image in images:
        joined.paste(image, (x, 0))
        x += image.width
    return joined


def word_image(word: str, rng: Random | None = None) -> Image.Image:
    """A word on 96 x 48 pixels; with `rng` shifted a little and in one of the sizes."""
    size = rng.choice(WORD_FONT_SIZES) if rng else WORD_FONT_SIZES[0]
    image = Image.new("L", (2 * TILE, TILE), 255)
    room = max(0, int(2 * TILE - _MARGIN - font(size).getlength(word)) - _MARGIN)
    dx, dy = (rng.randint(0, min(4, room)), rng.randint(-3, 3)) if rng else (0, 0)
    ImageDraw.Draw(image).text((_MARGIN + dx, TILE // 2 + dy), word, font=font(size), fill=rng.randint(0, 60) if rng else 0, anchor="lm")
    return image


def wrap_words(words: Sequence[str], width: int, lines: int) -> list[str]:
    """The first words that fill up to `lines` lines of a page of `width` pixels."""
    wrapped: list[str] = []
    current = ""
    for word in words:
        longer = f"{current} {word}".strip()
        if font(WORD_FONT_SIZES[0]).getlength(longer) <= width - 2 * _MARGIN:
            current = longer
            continue
        if current:
            wrapped.append(current)
        current = word
        if len(wrapped) == lines:
            return wrapped
    return [*wrapped, current][:lines] if current else wrapped


def page_image(lines: Sequence[str], width: int, height: int, rng: Random | None = None) -> Image.Image:
    """Lines of text on a page; with `rng` shifted a little."""
    image = Image.new("L", (width, height), 255)
    draw = ImageDraw.Draw(image)
    dx, dy = (rng.randint(0, 2), rng.randint(-2, 2)) if rng else (0, 0)
    for number, line in enumerate(lines):
        draw.text((_MARGIN + dx, LINE_HEIGHT // 2 + number * LINE_HEIGHT + dy), line, font=font(WORD_FONT_SIZES[0]), fill=0, anchor="lm")
    return image


def chart_image(title: str, heights: Sequence[float], values: Sequence[str], rng: Random | None = None) -> Image.Image:
    """A bar chart on 96 x 96 pixels: title, bars labelled A, B, C ... with their values above.

    Args:
        heights: per bar, 0 to 1 of the plot's height.
        values: the numbers drawn above the bars.
    """
    side, top, bottom = 2 * TILE, 30, 2 * TILE - 15
    image = Image.new("L", (side, side), 255)
    draw = ImageDraw.Draw(image)
    title_font = next((font(size) for size in (12, 11, 10) if font(size).getlength(title) <= side - 4), font(9))
    draw.text((side // 2, 8), title, font=title_font, fill=0, anchor="mm")
    draw.line((2, bottom, side - 3, bottom), fill=0)
    slot = (side - 6) / len(heights)
    bar = int(slot * (rng.uniform(0.55, 0.75) if rng else 0.65))
    shade = rng.randint(60, 150) if rng else 110
    for number, (height, value) in enumerate(zip(heights, values, strict=True)):
        centre = 3 + slot * (number + 0.5)
        roof = bottom - max(2, round(height * (bottom - top)))
        draw.rectangle((centre - bar / 2, roof, centre + bar / 2, bottom - 1), fill=shade)
        draw.text((centre, roof - 6), value, font=font(10), fill=0, anchor="mm")
        draw.text((centre, side - 7), chr(ord("A") + number), font=font(12), fill=0, anchor="mm")
    return image
