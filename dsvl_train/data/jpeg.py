"""JPEGs decoded straight into an array, past Pillow: simplejpeg brings a libjpeg-turbo of its own.

Both ask the library for the same (accurate integer DCT, smooth upsampling), and every version of libjpeg-turbo computes these alike, so the
pixels are the same. For who needs to be sure of it, `kinds_decoded_alike` compares them as installed.
"""

from __future__ import annotations

import io
import logging
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

log = logging.getLogger(__name__)


class Kind(NamedTuple):
    """What decides which of its ways the library takes through an image."""

    progressive: bool
    sampling: tuple[tuple[int, int], ...]
    """(horizontal, vertical) sampling factors of each component."""


def kind_of(image: Image.Image) -> Kind | None:
    """The kind of a JPEG that Pillow has opened; None for what must not be decoded here: other formats, and CMYK."""
    if image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
        return None
    components: list[tuple[int, int, int, int]] = getattr(image, "layer", [])
    return Kind("progressive" in image.info, tuple((horizontal, vertical) for _, horizontal, vertical, _ in components))


def decode(content: bytes, order: Literal["RGB", "RGBX"]) -> NDArray[np.uint8] | None:
    """Pixels [height, width, bytes of a pixel], grey ones three times; None if the library has the least objection (cut, corrupt)."""
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(content, order, strict=True)
    except ValueError:
        return None
    return pixels


@cache
def kinds_decoded_alike() -> frozenset[Kind]:
    """The kinds of which Pillow, as installed, decodes made images to the same pixels as `decode`."""
    alike: dict[Kind, bool] = {}
    for content in _tried():
        with Image.open(io.BytesIO(content), formats=["JPEG"]) as image:
            kind, here, pillow_s = kind_of(image), decode(content, "RGB"), np.asarray(image.convert("RGB"))
        if kind is not None:
            alike[kind] = alike.get(kind, True) and here is not None and np.array_equal(here, pillow_s)
    unlike = [kind for kind in alike if not alike[kind]]
    if unlike:
        log.warning("data.decode=exact: Pillow decodes JPEGs of these kinds, since simplejpeg decodes them otherwise: %s", unlike)
    return frozenset(kind for kind in alike if kind not in unlike)


def _tried() -> list[bytes]:
    """Noise beside a smooth ramp in every sampling, no side a multiple of a block. Progressive ones also as they are after some of their
    scans, where the library smooths what it does not know yet."""
    height, width = 61, 83
    rng = np.random.default_rng(0)
    picture_hwc = (rng.integers(0, 2, (height, width, 3)) * 255).astype(np.uint8)
    picture_hwc[:, width // 2 :] = np.linspace(0, 255, height).astype(np.uint8)[:, None, None] // np.array([1, 2, 3], dtype=np.uint8)
    picture = Image.fromarray(picture_hwc)
    contents = [simplejpeg.encode_jpeg(picture_hwc, 90, "RGB", sampling) for sampling in ("444", "422", "420", "440", "411")]
    contents.append(simplejpeg.encode_jpeg(np.asarray(picture.convert("L"))[..., None], 90, "GRAY", "Gray"))
    for image, subsampling in ((picture, 0), (picture, 1), (picture, 2), (picture.convert("L"), -1)):
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=90, progressive=True, subsampling=subsampling)
        scans = stream.getvalue().split(b"\xff\xda")
        contents += [b"\xff\xda".join(scans[:end]) + b"\xff\xd9" for end in range(2, len(scans))] + [stream.getvalue()]
    return contents
