"""From image files to uint8 tiles.

Two ways, `Decode`. "exact" is bit for bit the released processors' pixels before normalisation, which are Pillow's; `jpeg.py` and
`bicubic.py` make the same faster. "fast" resizes with torch's 8-bit kernel; no value is more than 2 of 255 off. Why 2: both make the
same two passes with the same weights and an 8-bit image between them, but keep 22 (Pillow) and about 15 bits (torch) of a weight, so
after one pass values differ by 1 at most. The second pass multiplies that by the absolute sum of bicubic weights, 1.27 at most, and
rounds. The order of the passes has to be Pillow's own, see `bicubic.vertical_first`.

Normalisation is left to the vision tower: uint8 is a quarter of the bytes to move, and exact. Sizes are (width, height);
`pixels_nchw` is [tiles, 3, side, side], `rgb_hwc` [height, width, 3].
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from dsvl_train.config.geometry import vl_resized_size

from . import jpeg
from .bicubic import LARGEST_SIDE, SWITCH, PackedImage, vertical_first
from .errors import SampleError

ImageSource = Image.Image | bytes | str | Path
"""An image, opened or not: Pillow's, the bytes of a file, or a path."""

Decode = Literal["exact", "fast"]
"""See the module's docstring."""

Pixels = NDArray[np.uint8]

_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
"""Formats read from data nobody has checked: no vector formats, which Pillow would hand to other programs."""


@cache
def _readable_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


# --------------------------------------------------------------------------------------------------------------- decoding


@dataclass(frozen=True)
class OpenedImage:
    """An image whose header has been read and found acceptable; nothing is decoded yet."""

    image: Image.Image
    content: bytes | None = None
    """The file's bytes; None when Pillow's image was given."""

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)"""
        return self.image.size


def open_image(source: ImageSource, max_image_pixels: int) -> OpenedImage:
    """Open an image and check its size from the header, before anything is decoded.

    Raises:
        SampleError: `image_missing` - no such file. `unreadable` - the file cannot be read. `image_broken` - not an image. `image_bomb` -
            more than `max_image_pixels` pixels.
    """
    if isinstance(source, Image.Image):
        check_image_size(source.size, max_image_pixels)
        return OpenedImage(source)
    try:
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
    except FileNotFoundError as error:
        raise SampleError("image_missing", f"image file {error.filename} does not exist") from error
    except OSError as error:
        raise SampleError("unreadable", f"image file cannot be read: {error}") from error
    try:
        image = Image.open(io.BytesIO(content), formats=_readable_formats())
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise SampleError("image_bomb", f"image refused by Pillow: {error}") from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise whatever a damaged header leads them to
        raise SampleError("image_broken", f"image cannot be opened: {type(error).__name__}: {error}") from error
    check_image_size(image.size, max_image_pixels)
    return OpenedImage(image, content)


def check_image_size(image_wh: tuple[int, int], max_image_pixels: int) -> None:
    """Raise SampleError for an image without pixels (`image_broken`) or with more than allowed (`image_bomb`)."""
    width, height = image_wh
    if width < 1 or height < 1:
        raise SampleError("image_broken", f"image of {width}x{height} pixels is empty")
    if width * height > max_image_pixels:
        raise SampleError(
            "image_bomb", f"image of {width}x{height} = {width * height} pixels; data.max_image_pixels allows {max_image_pixels}"
        )


def decode_rgb(opened: OpenedImage) -> Image.Image:
    """Decode an image to RGB as the released code does (alpha dropped, palettes expanded, EXIF orientation left alone).

    Raises:
        SampleError: `image_broken` - truncated or damaged, or its size is not what the header said.
    """
    image, header_wh = opened.image, opened.size
    try:
        image.load()
        rgb = image if image.mode == "RGB" else image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # as above; nothing of ours runs inside
        raise SampleError(
            "image_broken", f"image of {header_wh[0]}x{header_wh[1]} does not decode: {type(error).__name__}: {error}"
        ) from error
    _check_decoded(rgb.size, header_wh)
    return rgb


def decode_array(opened: OpenedImage) -> Pixels:
    """The same pixels as `decode_rgb` as an array [height, width, 3]; JPEGs skip Pillow.

    A stream that libjpeg-turbo has the least objection to (cut, corrupt) goes to Pillow, which decides whether it can be used, so both ways
    accept the same files. So does CMYK, which simplejpeg would convert in its own way.

    Raises:
        SampleError: as `decode_rgb`.
    """
    if opened.content is not None and jpeg.kind_of(opened.image) is not None:
        rgb_hwc = jpeg.decode(opened.content, "RGB")
        if rgb_hwc is not None:
            _check_decoded((rgb_hwc.shape[1], rgb_hwc.shape[0]), opened.size)
            return rgb_hwc
    return np.array(decode_rgb(opened))


def decode_packed(opened: OpenedImage) -> PackedImage:
    """The same pixels as `decode_rgb`; JPEGs skip Pillow if they are of a kind for which both decoders were found to agree bit for bit.

    Raises:
        SampleError: as `decode_rgb`.
    """
    if opened.content is not None and (kind := jpeg.kind_of(opened.image)) is not None and kind in jpeg.kinds_decoded_alike():
        rgbx_hwc = jpeg.decode(opened.content, "RGBX")
        if rgbx_hwc is not None:
            _check_decoded((rgbx_hwc.shape[1], rgbx_hwc.shape[0]), opened.size)
            return PackedImage(rgbx_hwc.view(np.int32)[..., 0])
    return PackedImage.from_pillow(decode_rgb(opened))


def _check_decoded(found_wh: tuple[int, int], header_wh: tuple[int, int]) -> None:
    if found_wh != header_wh:
        raise SampleError("image_broken", f"image decodes to {found_wh}, but its header says {header_wh}")


# ----------------------------------------------------------------------------------------------------------------- tiling


def fill_vl2_tiles(
    opened: OpenedImage, tiles_wh: tuple[int, int], side: int, colour: tuple[int, int, int], pixels_nchw: Pixels, decode: Decode = "exact"
) -> None:
    """Write the thumbnail and the local tiles of an image, row by row, into `pixels_nchw` [1 + wide * high, 3, side, side].

    Both views are what `ImageOps.pad` gives: resized bicubically within their canvas, and centred on `colour` (released VL2
    `tokenize_with_images`). One local tile is the thumbnail once more, and not computed again.

    Raises:
        SampleError: `image_broken` - it does not decode, or is too thin to resize.
    """
    source = _decoded(opened, decode)
    _write_view(source, (1, 1), side, colour, pixels_nchw[:1])
    if tiles_wh == (1, 1):
        pixels_nchw[1] = pixels_nchw[0]
    else:
        _write_view(source, tiles_wh, side, colour, pixels_nchw[1:])


def fill_vl_square(
    opened: OpenedImage, side: int, min_side: int, colour: tuple[int, int, int], pixels_chw: Pixels, decode: Decode = "exact"
) -> None:
    """Write an image, resized bicubically and centred on a square of `colour`, into `pixels_chw` [3, side, side] (released VL).

    Raises:
        SampleError: `image_broken` - it does not decode or cannot be resized.
    """
    size_wh = vl_resized_size(opened.size, side, min_side)
    planes = _resize(_decoded(opened, decode), size_wh)
    left, top = (side - size_wh[0]) // 2, (side - size_wh[1]) // 2
    _paste(planes, left, top, colour, pixels_chw)


Source = Image.Image | PackedImage | Pixels
"""A decoded image, as what resizes it takes it: Pillow's or packed for "exact", an array [height, width, 3] for "fast"."""


def _decoded(opened: OpenedImage, decode: Decode) -> Source:
    if decode == "fast":
        return decode_array(opened)
    if SWITCH.kernels_serve() and max(opened.size) <= LARGEST_SIDE:
        return decode_packed(opened)
    return decode_rgb(opened)


def _write_view(source: Source, tiles_wh: tuple[int, int], side: int, colour: tuple[int, int, int], pixels_nchw: Pixels) -> None:
    """Resize to a canvas of wide x high tiles and cut them, row by row."""
    wide, high = tiles_wh
    canvas_wh = (wide * side, high * side)
    size_wh = contained_size(_size(source), canvas_wh)
    planes = _resize(source, size_wh)
    # round(): half to even, as ImageOps.pad centres.
    left, top = round((canvas_wh[0] - size_wh[0]) * 0.5), round((canvas_wh[1] - size_wh[1]) * 0.5)
    for row in range(high):
        for column in range(wide):
            _paste(planes, left - column * side, top - row * side, colour, pixels_nchw[row * wide + column])


def contained_size(image_wh: tuple[int, int], canvas_wh: tuple[int, int]) -> tuple[int, int]:
    """The size to which `ImageOps.contain` resizes: the largest of the image's proportions within a canvas."""
    width, height = image_wh
    image_ratio, canvas_ratio = width / height, canvas_wh[0] / canvas_wh[1]
    if image_ratio > canvas_ratio:
        return canvas_wh[0], round(height / width * canvas_wh[0])
    if image_ratio < canvas_ratio:
        return round(width / height * canvas_wh[1]), canvas_wh[1]
    return canvas_wh


def _size(source: Source) -> tuple[int, int]:
    return (source.shape[1], source.shape[0]) if isinstance(source, np.ndarray) else source.size


def _resize(source: Source, size_wh: tuple[int, int]) -> list[Pixels]:
    """Red, green and blue, each [height, width], resized bicubically with anti-aliasing. By planes, since a tile's rows are then
    contiguous: 5 times faster than transposing interleaved RGB."""
    source_wh = _size(source)
    if min(size_wh) < 1:  # an image so thin that nothing is left of it
        return [np.empty(size_wh[::-1], dtype=np.uint8)] * 3
    if isinstance(source, PackedImage):
        return list(source.resize(size_wh))
    if isinstance(source, np.ndarray):
        rgb_nchw = torch.from_numpy(source).permute(2, 0, 1)[None]
        if vertical_first(source_wh, size_wh):
            rgb_nchw = _resize_torch(rgb_nchw, (source_wh[0], size_wh[1]))
        return list(_resize_torch(rgb_nchw, size_wh)[0].numpy())
    try:
        with SWITCH.pillow_resizes():
            resized = source if source_wh == size_wh else source.resize(size_wh, Image.Resampling.BICUBIC)
    except (ValueError, OSError) as error:
        raise SampleError("image_broken", f"image of {source_wh} cannot be resized to {size_wh}: {error}") from error
    return [np.frombuffer(resized.tobytes("raw", band), dtype=np.uint8).reshape(size_wh[::-1]) for band in "RGB"]


def _resize_torch(rgb_nchw: Tensor, size_wh: tuple[int, int]) -> Tensor:
    """Horizontal pass, then vertical, each where it changes something."""
    return functional.interpolate(rgb_nchw, size=size_wh[::-1], mode="bicubic", antialias=True, align_corners=False)


def _paste(planes: Iterable[Pixels], left: int, top: int, colour: tuple[int, int, int], tile_chw: Pixels) -> None:
    """Write the part of an image that falls on a tile whose (0, 0) is (-left, -top) of it; `colour` where it does not reach."""
    _, high, wide = tile_chw.shape
    for plane, value, tile in zip(planes, colour, tile_chw, strict=True):
        above, below = max(top, 0), min(top + plane.shape[0], high)
        before, after = max(left, 0), min(left + plane.shape[1], wide)
        if above >= below or before >= after:
            tile[:] = value
            continue
        tile[:above], tile[below:] = value, value
        tile[above:below, :before], tile[above:below, after:] = value, value
        tile[above:below, before:after] = plane[above - top : below - top, before - left : after - left]
