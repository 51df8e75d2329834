"""Made-up sources, shards and corpora for the tests of the data pipeline."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from PIL import Image

from dsvl_train.config.geometry import select_tiles, vl2_tokens_side, vl2_visual_tokens
from dsvl_train.config.schema import DataConfig, SourceConfig
from dsvl_train.data.order import Ints
from dsvl_train.data.processor import Processor
from dsvl_train.data.shards import ShardWriter
from dsvl_train.data.text_corpus import write_text_corpus

VL2_FOLDER = Path(__file__).parents[1] / "golden" / "data" / "vl2" / "mla_softmax"
VL_FOLDER = Path(__file__).parents[1] / "golden" / "data" / "vl"
WORDS = ["tile", "thumbnail", "adaptor", "expert", "token", "pack", "window", "shard", "step", "rank", "loss", "mask", "image", "plan"]


class MadeSource:
    """A source of lengths alone: enough for the planner."""

    def __init__(self, name: str, modality: Any, lengths: Sequence[int], tiles: Sequence[int] | None = None, shards: int = 1) -> None:
        self.name, self.modality = name, modality
        self.length = np.asarray(lengths, dtype=np.int64)
        self.tile = np.asarray(tiles if tiles is not None else [0] * len(lengths), dtype=np.int64)
        self.shard_sizes: Ints = np.diff(np.linspace(0, len(lengths), shards + 1).astype(np.int64))

    def lengths(self, samples: Any) -> Any:
        return self.length[samples]

    def tiles(self, samples: Any) -> Any:
        return self.tile[samples]

    def identity(self) -> str:
        return f"made-{crc32(self.length.tobytes())}"


def long_tailed(samples: int, seed: int, seq_len: int = 4096, *, even: bool = False) -> tuple[list[int], list[int]]:
    """Tokens and tiles of samples by VL2's released geometry: 1 to 8 images of 100 to 4,000 pixels a side, 5 to 4,000 tokens of text.

    Images per sample follow Zipf's law with exponent 2.5, 8 and more counting as 8 (75 % of the samples have one); sides are log-normal
    around 493 pixels (sigma 0.7), texts log-normal around 55 tokens (sigma 1.5), cut to these ranges. `even` draws from the whole of each
    range alike: images per sample uniform, sides and texts log-uniform. Images of a sample with more than two are not tiled. A sample over
    `seq_len` is left out, as the data pipeline does: at 4,096 tokens 0.7 % of the long-tailed and 13 % of the even ones.
    """
    rng = np.random.default_rng(seed)
    side = vl2_tokens_side(384, 14)
    tokens: list[int] = []
    tiles: list[int] = []
    while len(tokens) < samples:
        images = int(rng.integers(1, 9)) if even else min(int(rng.zipf(2.5)), 8)
        text = int(np.exp(rng.uniform(*np.log((5, 4000))))) if even else int(np.clip(np.exp(rng.normal(4.0, 1.5)), 5, 4000))
        logs = rng.uniform(*np.log((100, 4000)), (images, 2)) if even else rng.normal(6.2, 0.7, (images, 2))
        sizes = np.clip(np.exp(logs), 100, 4000).astype(int)
        grids = [select_tiles((int(w), int(h)), 384) if images <= 2 else (1, 1) for w, h in sizes]
        total = text + sum(vl2_visual_tokens(grid, side) for grid in grids)
        if total <= seq_len:
            tokens.append(total)
            tiles.append(sum(1 + wide * high for wide, high in grids))
    return tokens, tiles


def config(sources: dict[str, SourceConfig], **settings: Any) -> DataConfig:
    """A data configuration with small defaults."""
    defaults: dict[str, Any] = {"processor": str(VL2_FOLDER), "seq_len": 256, "packing": True, "batch_size": 4, "workers": 0, "window": 32}
    return DataConfig(sources=sources, **{**defaults, **settings})


def shards_source(path: Any, modality: Any = "multimodal", weight: float = 1.0) -> SourceConfig:
    return SourceConfig(kind="shards", path=str(path), modality=modality, weight=weight)


def text_source(path: Any, weight: float = 1.0) -> SourceConfig:
    return SourceConfig(kind="text", path=str(path), modality="text", weight=weight)


def picture(width: int, height: int, seed: int = 0, kind: str = "PNG", flat: bool = False) -> bytes:
    """An encoded image: noise over a gradient, or one colour."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 200, width * height).reshape(height, width, 1)
    pixels = (ramp + rng.integers(0, 55, (height, width, 3))).astype(np.uint8)
    pixels = np.full_like(pixels, 99) if flat else pixels
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def hard_picture(width: int, height: int, seed: int) -> Image.Image:
    """Black and white noise beside smooth ground: where bicubic weights overshoot most."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 2, (height, width, 3)) * 255
    smooth = np.linspace(0, 255, width * height).reshape(height, width, 1)
    return Image.fromarray(np.where(rng.random((height, width, 1)) < 0.7, noise, smooth).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def bomb() -> bytes:
    """A small PNG that declares 60,000 x 60,000 pixels."""
    raw = bytearray(picture(8, 8))
    raw[16:24] = (60_000).to_bytes(4, "big") * 2
    raw[29:33] = crc32(bytes(raw[12:29])).to_bytes(4, "big")
    return bytes(raw)


def sentence(rng: np.random.Generator, words: int) -> str:
    return " ".join(rng.choice(WORDS, words))


def write_mixture(folder: Path, samples: int, *, shards: int = 2, seed: int = 0) -> list[str]:
    """Conversations with 0 to 2 images, captions and plain documents; returns the keys."""
    rng = np.random.default_rng(seed)
    keys = []
    with ShardWriter(folder, max_samples=-(-samples // shards)) as writer:
        for number in range(samples):
            images = [("png", picture(*rng.integers(20, 150, 2), seed=number)) for _ in range(number % 3)]
            if number % 5 == 4:
                messages = [{"role": "document", "content": "<image>\n" * len(images) + sentence(rng, 8)}]
            else:
                messages = [
                    {"role": "user", "content": "<image>\n" * len(images) + sentence(rng, int(rng.integers(1, 10)))},
                    {"role": "assistant", "content": sentence(rng, int(rng.integers(1, 20)))},
                ]
            keys.append(writer.write(messages, images))
    return keys


def write_corpus(prefix: Path, processor: Processor, documents: int = 30, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    write_text_corpus(prefix, [sentence(rng, int(rng.integers(1, 200))) for _ in range(documents)], processor.tokenizer)
