"""Ids, labels, masks, tiles and pixels against the released VL2 processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dsvl_train.data.processor import Measured, Processor

DATA = Path(__file__).parent / "data" / "vl2"
SAMPLES: list[dict[str, Any]] = json.loads((DATA / "samples.json").read_text())


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_folder(DATA / "mla_softmax")


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(DATA / "processed.npz") as archive:
        return dict(archive)


@pytest.mark.parametrize("number", range(len(SAMPLES)))
def test_sample_equals_the_released_output(number: int, processor: Processor, golden: dict[str, np.ndarray]) -> None:
    sample = SAMPLES[number]
    encoded = processor.encode(sample["messages"], [DATA / name for name in sample["images"]])
    for name in ("input_ids", "labels", "image_mask", "tiles_wh", "pixels"):
        expected, actual = golden[f"{number}.{name}"], getattr(encoded, name).numpy()
        assert actual.dtype == expected.dtype, name
        np.testing.assert_array_equal(actual, expected, err_msg=name)
    assert encoded.image_count == len(sample["images"])


@pytest.mark.parametrize("number", range(len(SAMPLES)))
def test_measure_equals_the_released_sizes(number: int, processor: Processor, golden: dict[str, np.ndarray]) -> None:
    sample = SAMPLES[number]
    sizes = []
    for name in sample["images"]:
        with Image.open(DATA / name) as image:
            sizes.append(image.size)
    assert processor.measure(sample["messages"], sizes) == Measured(
        tokens=len(golden[f"{number}.input_ids"]),
        supervised_tokens=int((golden[f"{number}.labels"][1:] != -100).sum()),
        visual_tokens=int(golden[f"{number}.image_mask"].sum()),
        tiles=len(golden[f"{number}.pixels"]) if sizes else 0,
    )
