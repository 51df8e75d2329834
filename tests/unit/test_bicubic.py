"""What `data.decode=exact` computes instead of Pillow is Pillow's bit for bit, in any thread, and whatever fails leaves it to Pillow."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import simplejpeg
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from dsvl_train.data import bicubic, jpeg, tiling
from dsvl_train.data.bicubic import PackedImage, Switch
from tests.unit.made_data import encoded, hard_picture

BICUBIC = Image.Resampling.BICUBIC
SIDES = st.one_of(st.integers(1, 9), st.integers(1, 150), st.integers(1, 1500))


def planes(image: Image.Image) -> np.ndarray:
    return np.asarray(image).transpose(2, 0, 1)


@settings(max_examples=400)
@given(st.tuples(SIDES, SIDES), st.tuples(SIDES, SIDES), st.integers(0, 9))
@example((1, 5000), (384, 384), 0)
@example((5000, 1), (1, 2), 1)
@example((1200, 900), (384, 288), 2)
@example((257, 511), (1152, 1151), 3)
def test_resizing_is_pillow_s(source_wh: tuple[int, int], size_wh: tuple[int, int], seed: int) -> None:
    image = hard_picture(*source_wh, seed)
    np.testing.assert_array_equal(PackedImage.from_pillow(image).resize(size_wh), planes(image.resize(size_wh, BICUBIC)))


@pytest.mark.parametrize("pillow_chooses", [False, True])
def test_both_orders_of_the_passes(pillow_chooses: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bicubic, "_pillow_chooses_order", lambda: pillow_chooses)
    image, size_wh = hard_picture(80, 300, 0), (70, 40)
    between_wh = (80, 40) if pillow_chooses else (70, 300)
    np.testing.assert_array_equal(
        PackedImage.from_pillow(image).resize(size_wh), planes(image.resize(between_wh, BICUBIC).resize(size_wh, BICUBIC))
    )


@settings(max_examples=300)
@given(st.integers(1, 20_000), st.integers(1, 4000))
def test_sums_fit_into_32_bits(old: int, new: int) -> None:
    first, weights = bicubic._weights(old, new)
    assert np.abs(weights.astype(np.int64)).sum(axis=1).max() <= 1.28 * 2**22
    assert first.min() >= 0 and first.max() < old


# ----------------------------------------------------------------------------------------------------------------- threads


def tiles(content: bytes) -> np.ndarray:
    pixels_nchw = np.empty((7, 3, 64, 64), dtype=np.uint8)
    tiling.fill_vl2_tiles(tiling.open_image(content, 10**7), (3, 2), 64, (127, 90, 12), pixels_nchw, "exact")
    return pixels_nchw


def test_threads_that_switch_at_once_get_pillow_s_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    contents = [encoded(hard_picture(60 + 7 * n, 300 - 5 * n, n), ("JPEG", "PNG")[n % 2]) for n in range(40)]
    monkeypatch.setattr(tiling, "SWITCH", Switch(after_s=float("inf")))
    wanted = [tiles(content) for content in contents]
    compared = []
    monkeypatch.setattr(bicubic, "agrees_with_pillow", lambda agrees=bicubic.agrees_with_pillow: compared.append(1) or agrees())
    switch = Switch(after_s=0.001)
    monkeypatch.setattr(tiling, "SWITCH", switch)
    with ThreadPoolExecutor(8) as pool:
        found = [pixels for _ in range(3) for pixels in pool.map(tiles, contents)]
    np.testing.assert_array_equal(np.stack(found), np.stack(wanted * 3))
    assert len(compared) == 1 and switch.kernels_serve()


def test_kernels_leave_python_s_lock_alone() -> None:
    source = PackedImage.from_pillow(hard_picture(1000, 1000, 0))
    source.resize((9, 9))
    work = threading.Thread(target=lambda: source.resize((6000, 6000)))
    work.start()
    turns = 0
    while work.is_alive():
        time.sleep(0.001)
        turns += 1
    assert turns > 20  # of about 100; with the lock held, one for each of the few calls of a kernel that fit between


# ---------------------------------------------------------------------------------------------------------- left to Pillow


def test_few_images_do_not_import_numba() -> None:
    code = (
        "import io, sys, numpy as np\n"
        "from PIL import Image\n"
        "from dsvl_train.data import processor, tiling\n"
        "stream = io.BytesIO(); Image.new('RGB', (90, 60)).save(stream, 'JPEG')\n"
        "pixels = np.empty((2, 3, 48, 48), np.uint8)\n"
        "tiling.fill_vl2_tiles(tiling.open_image(stream.getvalue(), 10**6), (1, 1), 48, (0, 0, 0), pixels)\n"
        "assert 'numba' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def without_numba(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(sys.modules, "numba", None)
    patch.setattr(bicubic, "_kernels", bicubic._kernels.__wrapped__)


def without_compiler(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("numba.config.DISABLE_JIT", 1)
    patch.setattr(bicubic, "_kernels", bicubic._kernels.__wrapped__)


def with_another_pillow(patch: pytest.MonkeyPatch) -> None:
    resize = Image.Image.resize
    patch.setattr(Image.Image, "resize", lambda image, size_wh, *_: resize(image, size_wh, Image.Resampling.BILINEAR))


@pytest.mark.parametrize("trouble", [without_numba, without_compiler, with_another_pillow])
def test_pillow_resizes_where_kernels_cannot(trouble: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    content = encoded(hard_picture(200, 150, 0), "JPEG")
    trouble(monkeypatch)
    monkeypatch.setattr(tiling, "SWITCH", Switch(after_s=float("inf")))
    wanted = tiles(content)
    switch = Switch(after_s=0.0)
    monkeypatch.setattr(tiling, "SWITCH", switch)
    np.testing.assert_array_equal(tiles(content), wanted)
    assert not switch.kernels_serve()
    assert [record.levelname for record in caplog.records] == ["WARNING"], "told once"
    assert "data.decode=exact" in caplog.text


def test_the_switch_turns_after_the_time_that_pillow_took() -> None:
    switch = Switch(after_s=0.05)
    image = hard_picture(600, 600, 0)
    started = time.thread_time()
    while not switch.kernels_serve():
        spent = time.thread_time() - started
        assert spent < 5
        with switch.pillow_resizes():
            image.resize((500, 500), BICUBIC)
    assert spent >= 0.02  # one resize before the last check


@pytest.mark.parametrize("option", ["fastdct", "fastupsample"])
def test_jpegs_that_decode_otherwise_are_left_to_pillow(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(jpeg.kinds_decoded_alike()) == 10, "as installed, all that are tried"
    decode_jpeg = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *args, **options: decode_jpeg(*args, **options, **{option: True}))
    alike = jpeg.kinds_decoded_alike.__wrapped__()
    halved = jpeg.Kind(False, ((2, 2), (1, 1), (1, 1)))
    assert halved not in alike and halved._replace(progressive=True) not in alike
    monkeypatch.setattr(jpeg, "kinds_decoded_alike", lambda: alike)
    image = tiling.open_image(encoded(hard_picture(83, 61, 1), "JPEG", quality=80, subsampling=2), 10**6)
    rgb = np.asarray(tiling.decode_rgb(image))
    packed = tiling.decode_packed(tiling.open_image(image.content, 10**6))  # type: ignore[arg-type]
    np.testing.assert_array_equal(packed.pixels_hw.view(np.uint8).reshape(61, 83, 4)[..., :3], rgb)
