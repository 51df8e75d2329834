"""Pictures for pages: small, and within a budget, so that a page stays of a size that one can send."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from PIL import Image

LOSSLESS_PIXELS = 256 * 256
"""Larger pictures are JPEGs."""
SMALL_SIDE = 64
"""Held-out images up to this side, pixels, are shown enlarged."""
_QUALITY = 85
_PAGE_BYTES = 4_000_000
_TYPES = {"PNG": "image/png", "JPEG": "image/jpeg"}


def encode(picture: Image.Image) -> tuple[bytes, str]:
    """(file, "PNG" or "JPEG"): without loss where it is small."""
    lossless = picture.width * picture.height <= LOSSLESS_PIXELS
    buffer = io.BytesIO()
    if lossless:
        picture.save(buffer, "PNG")
    else:
        picture.save(buffer, "JPEG", quality=_QUALITY, subsampling=0)
    return buffer.getvalue(), "PNG" if lossless else "JPEG"


def read_small(path: Path, side: int) -> tuple[Image.Image, int]:
    """(the picture, scaled down to at most `side` pixels a side; the longer side that it had).

    Raises:
        OSError, ValueError, DecompressionBombError: it cannot be read.
    """
    with Image.open(path) as opened:
        longest = max(opened.size)
        opened.draft("RGB", (side, side))
        opened.load()
        picture = opened.convert("RGB") if opened.mode not in ("L", "RGB") else opened.copy()
    picture.thumbnail((side, side))
    return picture, longest


@dataclass
class Picture:
    """What stands in a page in a picture's place."""

    html: str
    side: int = 0
    """The longer side in its file, pixels; 0 where there is no picture."""


@dataclass
class Pictures:
    """The pictures of one page; those for which `budget` bytes leave no room are named in their place."""

    budget: int = _PAGE_BYTES
    spent: int = field(default=0, init=False)

    def embed(self, places: Sequence[Path], side: int, words: str, *, small: int = SMALL_SIDE) -> Picture:
        """The first of the files that is there as a data URI, scaled down; a note where it cannot be read.

        Args:
            places: where the file may lie.
            words: what it is, for those who do not see it.
            small: a picture up to this side is shown enlarged.
        """
        path = next((place for place in places if place.is_file()), places[0])
        try:
            picture, longest = read_small(path, side)
        except (OSError, ValueError, Image.DecompressionBombError):
            return Picture(f'<span class="missing">cannot read {escape(path.name)}</span>')
        content, kind = encode(picture)
        data = base64.b64encode(content).decode("ascii")
        if self.spent + len(data) > self.budget:
            return Picture(f'<span class="missing">{escape(path.name)}, left out to keep the page small</span>')
        self.spent += len(data)
        look = ' class="small"' if longest <= small else ""
        return Picture(f'<img{look} src="data:{_TYPES[kind]};base64,{data}" alt="{escape(words)}" loading="lazy">', longest)
