"""Pillow's bicubic resizing, bit for bit and several times as fast: what `data.decode=exact` resizes with.

Pillow (`src/libImaging/Resample.c`) makes two passes with an 8-bit image between them. A pass computes every value as a sum of pixels times
weights of 22 fractional bits in 32-bit integers, rounds and clips. Integer sums do not depend on their order, so here the same sums are
made by whole rows, which compilers turn into vector instructions, where Pillow goes from pixel to pixel. The horizontal pass is the
vertical one of the transposed image.

What Pillow does is its own affair and may change, so `agrees_with_pillow` compares both before anything is resized here. Where they differ,
or numba does not work, Pillow resizes, with the same pixels. So it does in a process's first seconds of resizing: see `Switch`.

The kernels hold neither Python's lock nor any state. Compiled code is not kept on disk: numba's cache may hand a process what another kind
of CPU or an older version is just writing, and would save half a second. Letters of shapes: h, w height and width; p = 4 w, the bytes of a
row of pixels.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image

log = logging.getLogger(__name__)

_BITS = 22
"""Fractional bits of a weight: PRECISION_BITS of Resample.c."""

_STRIP = 256
"""Rows that the horizontal pass takes at a time."""

_GROUP = 4
"""Rows that one sweep over a row of sums adds; a bicubic enlargement has this many weights."""


LARGEST_SIDE = 2**16
"""Of images to be resized here: for greater ones, which no JPEG has, the arrays that weights are made with take much memory."""

_TRIED = (
    ((97, 61), (384, 250)),
    ((301, 203), (97, 61)),
    ((50, 400), (48, 70)),
    ((9, 7), (9, 31)),
    ((640, 5), (11, 5)),
)
"""(size, new size) of the images that are compared."""


@dataclass(frozen=True)
class PackedImage:
    """An RGB image as Pillow keeps it in memory, a pixel in 32 bits, so that transposing moves pixels and not bytes."""

    pixels_hw: NDArray[np.int32]
    """Bytes red, green, blue, and one of no meaning."""

    @classmethod
    def from_pillow(cls, rgb: Image.Image) -> PackedImage:
        """Copy an image of mode RGB."""
        return cls(np.frombuffer(rgb.tobytes("raw", "RGBX"), dtype=np.int32).reshape(rgb.height, rgb.width))

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)"""
        return self.pixels_hw.shape[1], self.pixels_hw.shape[0]

    def resize(self, size_wh: tuple[int, int]) -> NDArray[np.uint8]:
        """Red, green and blue [3, height, width], as `Image.resize(size_wh, BICUBIC)` gives them."""
        width, height = size_wh
        if vertical_first(self.size, size_wh):
            return _planes(_resample_columns(_resample_rows(self.pixels_hw, height), width))
        return _planes(_resample_rows(_resample_columns(self.pixels_hw, width), height))


def agrees_with_pillow() -> bool:
    """Whether `PackedImage.resize` works here, and gives the installed Pillow's pixels of images that try every path and many weights.

    Compiles the kernels in the process's first call.
    """
    rng = np.random.default_rng(0)
    try:
        for source_wh, size_wh in _TRIED:
            image = Image.fromarray(rng.integers(0, 2, (*source_wh[::-1], 3), dtype=np.uint8) * 255)
            wanted_hwc = np.asarray(image.resize(size_wh, Image.Resampling.BICUBIC))
            if not np.array_equal(PackedImage.from_pillow(image).resize(size_wh), wanted_hwc.transpose(2, 0, 1)):
                log.warning(
                    "data.decode=exact: Pillow resizes, since %s computes otherwise than known (%s to %s)",
                    PIL.__version__,
                    source_wh,
                    size_wh,
                )
                return False
    except Exception as error:  # numba is missing, older than numpy allows, switched off, or does not know this CPU
        log.warning("data.decode=exact: Pillow resizes, as numba does not work (%s: %s)", type(error).__name__, error)
        return False
    return True


class Switch:
    """Turns a process from Pillow's resizing to the kernels once Pillow has worked for as long as it takes to compile them.

    So a process that resizes little, as most tests and commands do, neither compiles nor imports numba, and none spends more than twice the
    least time possible. Pixels do not depend on the moment.
    """

    def __init__(self, after_s: float) -> None:
        self._left_s = after_s
        self._kernels_serve: bool | None = None
        self._loading = threading.Lock()

    def kernels_serve(self) -> bool:
        """Whether to resize by `PackedImage`. The thread that finds it is time loads the kernels; others go on with Pillow meanwhile."""
        if self._kernels_serve is None and self._left_s <= 0:
            self.load(wait=False)
        return self._kernels_serve is True

    def load(self, wait: bool = True) -> None:
        """Compile the kernels now, unless that was done."""
        if self._loading.acquire(blocking=wait):
            try:
                if self._kernels_serve is None:
                    self._kernels_serve = agrees_with_pillow()
            finally:
                self._loading.release()

    @contextmanager
    def pillow_resizes(self) -> Iterator[None]:
        """Count the time that Pillow takes."""
        started = time.thread_time()
        yield
        self._left_s -= time.thread_time() - started


SWITCH = Switch(after_s=2.0)
"""The process's. Compiling takes 1.5 s of a core."""


# -------------------------------------------------------------------------------------------------------- order of passes


def vertical_first(source_wh: tuple[int, int], size_wh: tuple[int, int]) -> bool:
    """Whether the installed Pillow makes the vertical pass of a resize first.

    The order shows: bicubic weights overshoot beside edges, and what is clipped between the passes differs. Pillow made the horizontal pass
    first always; version 13 makes the vertical one first where the height shrinks by more than twice the pixels that the width does.
    """
    (width, height), (new_width, new_height) = source_wh, size_wh
    return _pillow_chooses_order() and height - new_height > max(2 * (width - new_width), 0)


@cache
def _pillow_chooses_order() -> bool:
    """Asks Pillow: in an image that version 13 begins vertically, is the result the horizontal-first one?"""
    noise = np.random.default_rng(0).integers(0, 2, (32, 8, 3), dtype=np.uint8) * 255
    image = Image.fromarray(noise)
    horizontal_first = image.resize((7, 32), Image.Resampling.BICUBIC).resize((7, 8), Image.Resampling.BICUBIC)
    return image.resize((7, 8), Image.Resampling.BICUBIC).tobytes() != horizontal_first.tobytes()


# --------------------------------------------------------------------------------------------------------------- a pass


def _weights(old: int, new: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """The first row that counts for each of `new` rows, [new], and the weights of the rows from there on, [new, a multiple of _GROUP].

    In the order of operations of `precompute_coeffs` and `normalize_coeffs_8bpc`, so that doubles round alike. Absolute weights add up to
    1.27 at most, so sums of weights times bytes stay below 2^31.
    """
    scale = old / new
    stretch = max(scale, 1.0)
    support = 2.0 * stretch
    centre = (np.arange(new) + 0.5) * scale
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    end = np.minimum((centre + support + 0.5).astype(np.int64), old)
    taps = -(-int((end - first).max()) // _GROUP) * _GROUP
    row = first[:, None] + np.arange(taps)
    x = np.abs((row - centre[:, None] + 0.5) * (1.0 / stretch))
    near, far = ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    weights[row >= end[:, None]] = 0.0
    weights /= np.cumsum(weights, axis=1)[:, -1:]  # a sum from left to right, as in C; np.sum adds in another order
    weights *= 1 << _BITS
    return first, (weights + np.where(weights < 0, -0.5, 0.5)).astype(np.int32)


def _resample_rows(pixels_hw: NDArray[np.int32], new_height: int) -> NDArray[np.int32]:
    """The vertical pass."""
    height, width = pixels_hw.shape
    if height == new_height:
        return pixels_hw
    resampled_hw = np.empty((new_height, width), dtype=np.int32)
    _kernels().weigh_rows(pixels_hw.view(np.uint8), *_weights(height, new_height), resampled_hw.view(np.uint8))
    return resampled_hw


def _resample_columns(pixels_hw: NDArray[np.int32], new_width: int) -> NDArray[np.int32]:
    """The horizontal pass: a vertical one between two transpositions, by strips of rows, which stay in the cache."""
    height, width = pixels_hw.shape
    if width == new_width:
        return pixels_hw
    weights = _weights(width, new_width)
    resampled_hw = np.empty((height, new_width), dtype=np.int32)
    for top in range(0, height, _STRIP):
        strip_hw = pixels_hw[top : top + _STRIP]
        strip_wh, resampled_wh = np.empty((width, len(strip_hw)), dtype=np.int32), np.empty((new_width, len(strip_hw)), dtype=np.int32)
        _kernels().transpose(strip_hw, strip_wh)
        _kernels().weigh_rows(strip_wh.view(np.uint8), *weights, resampled_wh.view(np.uint8))
        _kernels().transpose(resampled_wh, resampled_hw[top : top + _STRIP])
    return resampled_hw


def _planes(pixels_hw: NDArray[np.int32]) -> NDArray[np.uint8]:
    planes_chw = np.empty((3, *pixels_hw.shape), dtype=np.uint8)
    _kernels().split_planes(pixels_hw.view(np.uint8), planes_chw)
    return planes_chw


# ------------------------------------------------------------------------------------------------------- compiled by numba


def _weigh_rows(rows_hp: Any, first: Any, weights: Any, resampled_hp: Any) -> None:
    """A vertical pass. Weights beyond the last row are zeros, and meet the last row instead."""
    last = len(rows_hp) - 1
    sums = np.empty(rows_hp.shape[1], np.int32)
    for new_row in range(len(resampled_hp)):
        sums[:] = 1 << (_BITS - 1)
        for tap in range(0, weights.shape[1], _GROUP):
            row = first[new_row] + tap
            row_0, row_1 = rows_hp[min(row, last)], rows_hp[min(row + 1, last)]
            row_2, row_3 = rows_hp[min(row + 2, last)], rows_hp[min(row + 3, last)]
            weight_0, weight_1, weight_2, weight_3 = weights[new_row, tap : tap + _GROUP]
            for p in range(len(sums)):
                sums[p] += row_0[p] * weight_0 + row_1[p] * weight_1 + row_2[p] * weight_2 + row_3[p] * weight_3
        for p in range(len(sums)):
            resampled_hp[new_row, p] = min(max(sums[p] >> _BITS, 0), 255)


def _transpose(pixels_hw: Any, pixels_wh: Any) -> None:
    """By blocks of 8 x 8 pixels: larger ones fall out of the cache at widths of 1,024, where a column's pixels share a few lines of it."""
    height, width = pixels_hw.shape
    for top in range(0, height, 8):
        for left in range(0, width, 8):
            if top + 8 <= height and left + 8 <= width:
                for x in range(8):  # these bounds are known when it is compiled: twice as fast
                    for y in range(8):
                        pixels_wh[left + x, top + y] = pixels_hw[top + y, left + x]
            else:
                for x in range(left, min(left + 8, width)):
                    for y in range(top, min(top + 8, height)):
                        pixels_wh[x, y] = pixels_hw[y, x]


def _split_planes(rows_hp: Any, planes_chw: Any) -> None:
    for colour in range(3):
        for row in range(planes_chw.shape[1]):
            for column in range(planes_chw.shape[2]):
                planes_chw[colour, row, column] = rows_hp[row, 4 * column + colour]


class _Kernels(NamedTuple):
    weigh_rows: Callable[..., None]
    transpose: Callable[..., None]
    split_planes: Callable[..., None]


@cache
def _kernels() -> _Kernels:
    """Compiled for one signature each, here and not when they are first called. Raises ImportError without numba."""
    from numba import config, njit, types

    if config.DISABLE_JIT:
        raise ImportError("NUMBA_DISABLE_JIT is set")

    def array(dtype: Any, ndim: int, *, written: bool = False) -> Any:
        return types.Array(dtype, ndim, "C", readonly=not written)

    bytes_, pixels = types.uint8, types.int32

    def compiled(function: Callable[..., None], *arrays: Any) -> Callable[..., None]:
        kernel: Callable[..., None] = njit(types.void(*arrays), nogil=True)(function)
        return kernel

    return _Kernels(
        compiled(_weigh_rows, array(bytes_, 2), array(types.int64, 1), array(types.int32, 2), array(bytes_, 2, written=True)),
        compiled(_transpose, array(pixels, 2), array(pixels, 2, written=True)),
        compiled(_split_planes, array(bytes_, 2), array(bytes_, 3, written=True)),
    )
