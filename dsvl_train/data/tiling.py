"""From image files to uint8 tiles, with Pillow alone, bit for bit as the released processors do it.

Normalisation is left to the vision tower: uint8 is a quarter of the bytes to move, and exact. Array names: `pixels_nchw` is [tiles, 3, side,
side]; sizes are (width, height).
"""

from __future__ import annotations

import io
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
        SampleError: `image_missing` - no such file. `image_broken` - not an image. `image_bomb` - more than `max_image_pixels` pixels.
    """
    if isinstance(source, Image.Image):
        image = source
    else:
        opened = io.BytesIO(source) if isinstance(source, bytes) else source
        try:
            image = Image.open(opened, formats=_readable_formats())
        except FileNotFoundError as error:
            raise SampleError("image_missing", f"image file {source} does not exist") from error
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
        raise SampleError("image_broken", f"image of {header_wh[0]}x{header_wh[1]} does not decode: {type(error).__name__}: {error}") from error
    if rgb.size != header_wh:
        raise SampleError("image_broken", f"image decodes to {rgb.size}, but its header says {header_wh}")
    return rgb


def fill_vl2_tiles(
    rgb: Image.Image, tiles_wh: tuple[int, int], side: int, colour: tuple[int, int, int], pixels_nchw: NDArray[np.uint8]
) -> None:
    """Write the thumbnail and the local tiles of an image, row by row, into `pixels_nchw` [1 + wide * high, 3, side, side].

    Both views are resized bicubically within their canvas and centred on `colour` (released VL2 `tokenize_with_images`).

    Raises:
        SampleError: `image_broken` - too thin for Pillow to resize.
    """
    wide, high = tiles_wh
    thumbnail = _pad(rgb, (side, side), colour)
    _write_tiles(thumbnail, 1, 1, pixels_nchw[:1])
    if tiles_wh == (1, 1):
        pixels_nchw[1] = pixels_nchw[0]
    else:
        _write_tiles(_pad(rgb, (wide * side, high * side), colour), wide, high, pixels_nchw[1:])


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
    if size_wh != (side, side):
        pixels_chw[:] = np.asarray(colour, dtype=np.uint8)[:, None, None]
    for plane, band in zip(pixels_chw, resized.split(), strict=True):
        plane[top : top + size_wh[1], left : left + size_wh[0]] = _plane(band)


def _pad(rgb: Image.Image, size_wh: tuple[int, int], colour: tuple[int, int, int]) -> Image.Image:
    try:
        return ImageOps.pad(rgb, size_wh, color=colour)
    except (ValueError, OSError) as error:
        raise SampleError("image_broken", f"image of {rgb.size} cannot be resized to {size_wh}: {error}") from error


def _write_tiles(view: Image.Image, wide: int, high: int, pixels_nchw: NDArray[np.uint8]) -> None:
    """Cut a view of wide x high tiles, row by row. Plane by plane, since whole rows of a tile are then contiguous: 5 times faster than
    transposing interleaved RGB."""
    side = pixels_nchw.shape[-1]
    grid = pixels_nchw.reshape(high, wide, 3, side, side)
    for channel, band in enumerate(view.split()):
        grid[:, :, channel] = _plane(band).reshape(high, side, wide, side).transpose(0, 2, 1, 3)


def _plane(band: Image.Image) -> NDArray[np.uint8]:
    """One channel as [height, width]."""
    return np.frombuffer(band.tobytes(), dtype=np.uint8).reshape(band.height, band.width)
