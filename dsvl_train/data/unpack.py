"""A micro-batch taken apart into its samples again, as the model is given them: for people to look at.

Shapes as in `batch.py`: t = tokens, s = samples, i = images, n = tiles.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from PIL import Image
from torch import Tensor

from dsvl_train.data.batch import IGNORE_INDEX, MicroBatch
from dsvl_train.data.processor import Processor

_BORDER = 3
"""Pixels between tiles that lie side by side, and around them."""
_BETWEEN = 12
"""Pixels between the global view and the local tiles."""
_BORDER_COLOUR = (216, 27, 96)
_GROUND_COLOUR = (128, 128, 128)
"""Beside the tiles; to be looked at on light and on dark pages."""


@dataclass(frozen=True)
class Span:
    """Neighbouring tokens of one kind."""

    text: str
    tokens: int
    supervised: bool
    """Whether they are targets of the loss."""
    special: bool = False
    """One special token."""
    image: int | None = None
    """The image, by its number in the sample, whose visual tokens they are."""


@dataclass(frozen=True)
class UnpackedImage:
    """One image of a sample."""

    tiles_wh: tuple[int, int]
    """Local tiles (wide, high); (0, 0): one tile and no grid."""
    tokens: int
    pixels_nchw: Tensor | None
    """uint8 [n, 3, side, side], the global view first; None on a rank without pixels."""


@dataclass(frozen=True)
class UnpackedSample:
    """One sample of a micro-batch."""

    source: int
    """Index of its source in the order of data.sources."""
    spans: list[Span]
    images: list[UnpackedImage]

    @property
    def tokens(self) -> int:
        return sum(span.tokens for span in self.spans)

    @property
    def supervised_tokens(self) -> int:
        return sum(span.tokens for span in self.spans if span.supervised)

    @property
    def tiles(self) -> int:
        return sum(1 + image.tiles_wh[0] * image.tiles_wh[1] for image in self.images)


def choose_samples(micro_batches: Sequence[MicroBatch], count: int) -> list[tuple[int, int]]:
    """(micro-batch, sample in it) of at most `count` samples, in their order but one of each source before a second of any.

    Bad samples' places are left out.
    """
    seen: Counter[int] = Counter()
    found = []
    for number, micro in enumerate(micro_batches):
        is_bad = micro.padding_t[micro.cu_seqlens[:-1].long()].tolist()
        for sample, (source, bad) in enumerate(zip(micro.source_s.tolist(), is_bad, strict=True)):
            if not bad:
                found.append((seen[source], number, sample))
                seen[source] += 1
    return [(number, sample) for _, number, sample in sorted(found)[:count]]


def unpack_sample(micro: MicroBatch, sample: int, processor: Processor) -> UnpackedSample:
    """One sample of a micro-batch by its number there; `processor` is the one that made it."""
    start, end = micro.cu_seqlens[sample : sample + 2].tolist()
    is_image_t = micro.image_mask_t[start:end].numpy()
    images = _images(micro, int(micro.image_mask_t[:start].sum()), int(is_image_t.sum()), processor)
    ids_t = micro.tokens_t[start:end].numpy()
    supervised_t = np.zeros(end - start, dtype=bool)
    # labels_t holds each position's target, the token after it: the mask of the tokens themselves is one later.
    supervised_t[1:] = micro.labels_t[start : end - 1].numpy() != IGNORE_INDEX
    image_t = np.full(end - start, -1)
    image_t[is_image_t] = np.repeat(np.arange(len(images)), [image.tokens for image in images])
    return UnpackedSample(int(micro.source_s[sample]), list(_spans(ids_t, supervised_t, image_t, processor)), images)


def _images(micro: MicroBatch, visual_before: int, visual: int, processor: Processor) -> list[UnpackedImage]:
    """The images whose visual tokens are the `visual` ones after the first `visual_before` of the micro-batch."""
    found, tokens_at, tile_at = [], 0, 0
    for wide, high in [] if micro.tiles_wh is None else micro.tiles_wh.tolist():
        tokens, tiles = processor.visual_tokens((wide, high)), 1 + wide * high
        if visual_before <= tokens_at < visual_before + visual:
            pixels_nchw = None if micro.pixels_nchw is None else micro.pixels_nchw[tile_at : tile_at + tiles]
            found.append(UnpackedImage((wide, high), tokens, pixels_nchw))
        tokens_at, tile_at = tokens_at + tokens, tile_at + tiles
    return found


def _spans(ids_t: np.ndarray, supervised_t: np.ndarray, image_t: np.ndarray, processor: Processor) -> Iterator[Span]:
    tokenizer = processor.tokenizer
    rows = list(zip(ids_t.tolist(), supervised_t.tolist(), image_t.tolist(), strict=True))

    def kind(place: int) -> tuple[int, int, bool]:
        token, supervised, image = rows[place]
        alone = token in tokenizer.special_ids and image < 0
        return (place if alone else -1, image, supervised)

    for (alone, image, supervised), places in groupby(range(len(rows)), kind):
        ids = [rows[place][0] for place in places]
        if image >= 0:
            yield Span(tokenizer.image_token, len(ids), supervised, image=image)
        else:
            yield Span(tokenizer.decode(ids), len(ids), supervised, special=alone >= 0)


def draw_tiles(image: UnpackedImage, side: int) -> Image.Image | None:
    """The tiles of an image with borders around them, the global view at the left and the local ones in their grid; None without pixels.

    Args:
        side: pixels that the longer side is to have at most, borders not counted; tiles are scaled down to it, never up.
    """
    if image.pixels_nchw is None:
        return None
    wide, high = image.tiles_wh
    columns = 1 + wide
    tile = min(image.pixels_nchw.shape[-1], max(1, side // max(columns, high)))
    pitch = tile + _BORDER
    across = pitch + _BORDER + (_BETWEEN + wide * pitch if wide else 0)
    canvas = Image.new("RGB", (across, _BORDER + max(high, 1) * pitch), _GROUND_COLOUR)
    for number, pixels_hwc in enumerate(image.pixels_nchw.permute(0, 2, 3, 1).numpy()):
        row, column = divmod(number - 1, wide) if number else (0, 0)
        left = column * pitch + (pitch + _BETWEEN if number else 0)
        canvas.paste(_BORDER_COLOUR, (left, row * pitch, left + pitch + _BORDER, (row + 1) * pitch + _BORDER))
        picture = Image.fromarray(np.ascontiguousarray(pixels_hwc))
        if picture.width > tile:
            picture = picture.resize((tile, tile), Image.Resampling.BOX)
        canvas.paste(picture, (left + _BORDER, row * pitch + _BORDER))
    return canvas
