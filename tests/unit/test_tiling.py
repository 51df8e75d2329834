"""Decoding and tiling: exact mode is Pillow bit for bit, fast mode at most 2 of 255 off, and both accept and refuse the same files."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from dsvl_train.data import tiling
from dsvl_train.data.bicubic import Switch, vertical_first
from dsvl_train.data.errors import SampleError
from dsvl_train.data.processor import Processor
from dsvl_train.data.tiling import (
    OpenedImage,
    contained_size,
    decode_array,
    decode_packed,
    decode_rgb,
    fill_vl2_tiles,
    fill_vl_square,
    open_image,
)
from tests.unit.made_data import VL2_FOLDER, bomb, encoded, hard_picture

COLOUR = (127, 90, 12)
AT_FIRST, LATER = Switch(after_s=float("inf")), Switch(after_s=0.0)
"""Exact mode before and after a process has taken over resizing from Pillow."""


def padded_tiles(image: Image.Image, tiles_wh: tuple[int, int], side: int) -> np.ndarray:
    """Thumbnail and tiles by `ImageOps.pad` and `crop`, as the released processor says."""
    views = [ImageOps.pad(image, (side, side), color=COLOUR)]
    local = ImageOps.pad(image, (tiles_wh[0] * side, tiles_wh[1] * side), color=COLOUR)
    for row in range(tiles_wh[1]):
        for column in range(tiles_wh[0]):
            views.append(local.crop((column * side, row * side, (column + 1) * side, (row + 1) * side)))
    return np.stack([np.asarray(view).transpose(2, 0, 1) for view in views])


KINDS_AND_MODES = (("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGBA"), ("PNG", "LA"), ("PNG", "P"), ("PNG", "1"))


@settings(max_examples=150)
@given(
    width=st.integers(1, 260),
    height=st.integers(1, 260),
    wide=st.integers(1, 3),
    high=st.integers(1, 3),
    seed=st.integers(0, 9),
    kind_and_mode=st.sampled_from(KINDS_AND_MODES),
)
def test_exact_tiles_equal_pillow_and_fast_ones_nearly(
    width: int, height: int, wide: int, high: int, seed: int, kind_and_mode: tuple[str, str]
) -> None:
    kind, mode = kind_and_mode
    content = encoded(hard_picture(width, height, seed).convert(mode), kind)
    wanted = padded_tiles(Image.open(io.BytesIO(content)).convert("RGB"), (wide, high), 48)
    found = np.full(wanted.shape, 1, dtype=np.uint8)
    for switch in (AT_FIRST, LATER):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiling, "SWITCH", switch)
            fill_vl2_tiles(open_image(content, 10**6), (wide, high), 48, COLOUR, found, "exact")
        np.testing.assert_array_equal(found, wanted)
    fill_vl2_tiles(open_image(content, 10**6), (wide, high), 48, COLOUR, found, "fast")
    assert np.abs(found.astype(int) - wanted).max() <= 2


@settings(max_examples=30)
@given(width=st.integers(1, 300), height=st.integers(1, 300), kind=st.sampled_from(["JPEG", "PNG"]), seed=st.integers(0, 9))
def test_the_fast_vl_square_is_nearly_the_exact_one(width: int, height: int, kind: str, seed: int) -> None:
    content = encoded(hard_picture(width, height, seed), kind)
    exact, fast = np.empty((3, 96, 96), dtype=np.uint8), np.empty((3, 96, 96), dtype=np.uint8)
    fill_vl_square(open_image(content, 10**6), 96, 14, COLOUR, exact, "exact")
    fill_vl_square(open_image(content, 10**6), 96, 14, COLOUR, fast, "fast")
    assert np.abs(fast.astype(int) - exact).max() <= 2


@settings(max_examples=150)
@given(st.tuples(*[st.integers(1, 90)] * 4), st.integers(0, 9))
def test_the_order_of_passes_is_pillow_s(sizes: tuple[int, int, int, int], seed: int) -> None:
    width, height, new_width, new_height = sizes
    image = hard_picture(width, height, seed)
    between = (width, new_height) if vertical_first((width, height), (new_width, new_height)) else (new_width, height)
    two_steps = image.resize(between, Image.Resampling.BICUBIC).resize((new_width, new_height), Image.Resampling.BICUBIC)
    assert image.resize((new_width, new_height), Image.Resampling.BICUBIC).tobytes() == two_steps.tobytes()


@settings(max_examples=200)
@given(st.tuples(*[st.integers(1, 5000)] * 2), st.tuples(*[st.integers(1, 9)] * 2))
def test_the_contained_size_is_pillow_s(size_wh: tuple[int, int], tiles_wh: tuple[int, int]) -> None:
    class Sized:
        width, height = size_wh
        mode = "L"

        def resize(self, size: tuple[int, int], resample: Any) -> Any:
            return Image.new("L", size)

    canvas_wh = (tiles_wh[0] * 48, tiles_wh[1] * 48)
    assert contained_size(size_wh, canvas_wh) == ImageOps.contain(Sized(), canvas_wh).size  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------------- decoding


def outcome(decode: Any, content: bytes) -> Any:
    """Pixels, or the kind of refusal."""
    try:
        return np.array(decode(open_image(content, 10**6))).tobytes()
    except SampleError as error:
        return error.kind


def unpacked(opened: OpenedImage) -> np.ndarray:
    packed_hw = decode_packed(opened).pixels_hw
    return packed_hw.view(np.uint8).reshape(*packed_hw.shape, 4)[..., :3]


def kinds_of_jpeg() -> dict[str, bytes]:
    image = hard_picture(83, 61, 1)
    return {
        "4:2:0": encoded(image, quality=80, subsampling=2),
        "4:2:2": encoded(image, quality=80, subsampling=1),
        "4:4:4": encoded(image, quality=97, subsampling=0),
        "progressive": encoded(image, progressive=True),
        "rgb": encoded(image, keep_rgb=True),
        "grey": encoded(image.convert("L")),
        "cmyk": encoded(image.convert("CMYK")),
        "turned by EXIF": encoded(image, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"),
        "restarts": encoded(image, restart_marker_rows=1),
        "called jpg and a png": encoded(image, "PNG"),
        "transparent": encoded(image.convert("RGBA"), "PNG"),
        "palette": encoded(image.convert("P"), "PNG"),
    }


@pytest.mark.parametrize("kind", list(kinds_of_jpeg()))
def test_all_decoders_give_the_same_pixels(kind: str) -> None:
    content = kinds_of_jpeg()[kind]
    assert outcome(decode_array, content) == outcome(unpacked, content) == outcome(decode_rgb, content)
    assert len(outcome(decode_array, content)) == 83 * 61 * 3


def test_ordinary_jpegs_do_not_need_pillow_s_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    content = kinds_of_jpeg()["4:2:0"]
    monkeypatch.setattr(tiling, "decode_rgb", None)
    assert decode_array(open_image(content, 10**6)).shape == unpacked(open_image(content, 10**6)).shape == (61, 83, 3)


@settings(max_examples=300)
@given(
    kind=st.sampled_from(["4:2:0", "4:4:4", "progressive", "grey", "restarts"]),
    at=st.integers(0, 10**6),
    value=st.integers(0, 255),
    cut=st.one_of(st.none(), st.integers(0, 10**6)),
)
def test_damaged_jpegs_decode_or_fail_alike(kind: str, at: int, value: int, cut: int | None) -> None:
    content = bytearray(kinds_of_jpeg()[kind])
    content[at % len(content)] = value
    damaged = bytes(content if cut is None else content[: cut % len(content)])
    assert outcome(decode_array, damaged) == outcome(unpacked, damaged) == outcome(decode_rgb, damaged)


@pytest.mark.parametrize("decode", ["exact", "fast"])
def test_a_bomb_is_refused_before_anything_is_decoded(decode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("decoded")

    monkeypatch.setattr(simplejpeg, "decode_jpeg", never)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", never)
    processor = Processor.from_folder(VL2_FOLDER, max_image_pixels=100 * 100, decode=decode)
    messages = [{"role": "user", "content": "<image>\n?"}, {"role": "assistant", "content": "!"}]
    for content in (bomb(), encoded(Image.new("RGB", (101, 100)))):
        with pytest.raises(SampleError) as caught:
            processor.encode(messages, [content])
        assert caught.value.kind == "image_bomb"


def test_the_way_to_decode_changes_no_index_and_is_checked() -> None:
    exact, fast = (Processor.from_folder(VL2_FOLDER, decode=decode) for decode in ("exact", "fast"))  # type: ignore[arg-type]
    assert exact.fingerprint() == fast.fingerprint()
    with pytest.raises(ValueError, match=r"data\.decode"):
        Processor.from_folder(VL2_FOLDER, decode="best")  # type: ignore[arg-type]
