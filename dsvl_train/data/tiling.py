"""From image files to uint8 tiles, with Pillow alone, bit for bit as the released processors do it.

Normalisation is left to the vision tower: uint8 is a quarter of the bytes to move, and exact. Sizes are (width, height);
`pixels_nchw` is [tiles, 3, side, side].
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from dsvl_train.config.geometry import vl_resized_size

from .errors import SampleError

ImageSource = Image.Image | bytes | str | Path
"""An image, opened or not: Pillow's, the bytes of a file, or a path."""

_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
"""Formats read from data nobody has checked: no vector formats, which Pillow would hand to other programs."""


@cache
def _readable_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def open_image(source: ImageSource, max_image_pixels: int) -> Image.Image:
    """Open an image and check its size from the header, before anything is decoded.

    Raises:
        SampleError: `image_missing` - no such file. `unreadable` - the file cannot be read. `image_broken` - not an image. `image_bomb` -
            more than `max_image_pixels` pixels.
    """
    if isinstance(source, Image.Image):
        check_image_size(source.size, max_image_pixels)
        return source
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
    return image


def check_image_size(image_wh: tuple[int, int], max_image_pixels: int) -> None:
    """Raise SampleError for an image without pixels (`image_broken`) or with more than allowed (`image_bomb`)."""
    width, height = image_wh
    if width < 1 or height < 1:
        raise SampleError("image_broken", f"image of {width}x{height} pixels is empty")
    if width * height > max_image_pixels:
        raise SampleError(
            "image_bomb", f"image of {width}x{height} = {width * height} pixels; data.max_image_pixels allows {max_image_pixels}"
        )


def decode_rgb(image: Image.Image) -> Image.Image:
    """Decode an image to RGB as the released code does (alpha dropped, palettes expanded, EXIF orientation left alone).

    Raises:
        SampleError: `image_broken` - truncated or damaged, or its size is not what the header said.
    """
    header_wh = image.size
    try:
        image.load()
        rgb = image if image.mode == "RGB" else image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # as above; nothing of ours runs inside
        raise SampleError(
            "image_broken", f"image of {header_wh[0]}x{header_wh[1]} does not decode: {type(error).__name__}: {error}"
        ) from error
    if rgb.size != header_wh:
        raise SampleError("image_broken", f"image decodes to {rgb.size}, but its header says {header_wh}")
    return rgb


def fill_vl2_tiles(
    rgb: Image.Image, tiles_wh: tuple[int, int], side: int, colour: tuple[int, int, int], pixels_nchw: NDArray[np.uint8]
) -> None:
    """Write the thumbnail and the local tiles of an image, row by row, into `pixels_nchw` [1 + wide * high, 3, side, side].

    Both views are what `ImageOps.pad` gives: resized bicubically within their canvas, and centred on `colour` (released VL2
    `tokenize_with_images`).

    Raises:
        SampleError: `image_broken` - too thin for Pillow to resize.
    """
    wide, high = tiles_wh
    _write_view(rgb, 1, 1, colour, pixels_nchw[:1])
    if tiles_wh == (1, 1):
        pixels_nchw[1] = pixels_nchw[0]
    else:
        _write_view(rgb, wide, high, colour, pixels_nchw[1:])


def _write_view(rgb: Image.Image, wide: int, high: int, colour: tuple[int, int, int], pixels_nchw: NDArray[np.uint8]) -> None:
    """Resize to a canvas of wide x high tiles and cut them, row by row. Plane by plane, since whole rows of a tile are then contiguous: 5
    times faster than transposing interleaved RGB."""
    side = pixels_nchw.shape[-1]
    canvas_wh = (wide * side, high * side)
    try:
        resized = ImageOps.contain(rgb, canvas_wh)
    except (ValueError, OSError) as error:
        raise SampleError("image_broken", f"image of {rgb.size} cannot be resized to {canvas_wh}: {error}") from error
    # round(): half to even, as ImageOps.pad centres.
    left, top = round((canvas_wh[0] - resized.width) * 0.5), round((canvas_wh[1] - resized.height) * 0.5)
    grid = pixels_nchw.reshape(high, wide, 3, side, side)
    for channel, plane in enumerate(_centred_planes(resized, canvas_wh, left, top, colour)):
        grid[:, :, channel] = plane.reshape(high, side, wide, side).transpose(0, 2, 1, 3)


def fill_vl_square(rgb: Image.Image, side: int, min_side: int, colour: tuple[int, int, int], pixels_chw: NDArray[np.uint8]) -> None:
    """Write an image, resized bicubically and centred on a square of `colour`, into `pixels_chw` [3, side, side] (released VL).

    Raises:
        SampleError: `image_broken` - Pillow cannot resize it.
    """
    size_wh = vl_resized_size(rgb.size, side, min_side)
    try:
        resized = rgb if rgb.size == size_wh else rgb.resize(size_wh, Image.Resampling.BICUBIC)
    except (ValueError, OSError) as error:
        raise SampleError("image_broken", f"image of {rgb.size} cannot be resized to {size_wh}: {error}") from error
    left, top = (side - size_wh[0]) // 2, (side - size_wh[1]) // 2
    for channel, plane in enumerate(_centred_planes(resized, (side, side), left, top, colour)):
        pixels_chw[channel] = plane


def _centred_planes(
    resized: Image.Image, canvas_wh: tuple[int, int], left: int, top: int, colour: tuple[int, int, int]
) -> Iterator[NDArray[np.uint8]]:
    """Red, green and blue of a canvas [height, width] that holds the image at (left, top) and `colour` around it."""
    right, bottom = left + resized.width, top + resized.height
    for value, band in zip(colour, resized.split(), strict=True):
        plane = np.frombuffer(band.tobytes(), dtype=np.uint8).reshape(band.height, band.width)
        if resized.size == canvas_wh:
            yield plane
            continue
        canvas = np.empty((canvas_wh[1], canvas_wh[0]), dtype=np.uint8)
        canvas[:top], canvas[bottom:] = value, value
        canvas[top:bottom, :left], canvas[top:bottom, right:] = value, value
        canvas[top:bottom, left:right] = plane
        yield canvas
