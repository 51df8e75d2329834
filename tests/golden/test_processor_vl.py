"""Text, ids and padded images against the released VL processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dsvl_train.data.conversation import VlTemplate, parse_messages
from dsvl_train.data.processor import Processor
from dsvl_train.data.processor_folder import padding_colour
from dsvl_train.data.tiling import fill_vl_square, open_image

DATA = Path(__file__).parent / "data" / "vl"
SAMPLES: list[dict[str, Any]] = json.loads((DATA / "samples.json").read_text())
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
"""image_mean of the released 7B preprocessor_config.json."""


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_folder(DATA)


@pytest.mark.parametrize("number", range(len(SAMPLES)))
def test_text_and_ids_equal_the_released_output(number: int, processor: Processor) -> None:
    sample = SAMPLES[number]
    template = VlTemplate(processor.tokenizer)
    flat, _, _ = template.render(parse_messages(sample["messages"], processor.tokenizer.image_token, len(sample["images"])))
    assert flat == sample["sft_format"]
    with np.load(DATA / "processed.npz") as golden:
        expected = golden[f"{number}.input_ids"]
        counts = golden[f"{number}.num_image_tokens"].tolist() if f"{number}.num_image_tokens" in golden else []
    encoded = processor.encode(sample["messages"], [DATA / name for name in sample["images"]])
    np.testing.assert_array_equal(encoded.input_ids.numpy(), expected)
    np.testing.assert_array_equal(encoded.image_mask.numpy(), expected == processor.tokenizer.image_id)
    assert counts == [576] * len(sample["images"])
    assert encoded.pixels.shape == (len(sample["images"]), 3, 384, 384)
    assert encoded.tiles_wh.tolist() == [[0, 0]] * len(sample["images"])


@pytest.mark.parametrize("path", sorted((DATA / "images").glob("*.padded*.png")), ids=lambda path: path.stem)
def test_padded_image_equals_the_released_one(path: Path) -> None:
    name, padded = path.stem.split(".")
    side = int(padded.removeprefix("padded"))
    expected = np.asarray(Image.open(path)).transpose(2, 0, 1)
    actual = np.empty((3, side, side), dtype=np.uint8)
    colour = padding_colour(CLIP_MEAN if side == 1024 else (0.5, 0.5, 0.5))
    fill_vl_square(open_image(path.with_name(f"{name}.png"), 10**8), side, 14, colour, actual)
    np.testing.assert_array_equal(actual, expected)
