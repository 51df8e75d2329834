"""Reading and writing `processor_config.json` and `preprocessor_config.json` in the released layout.

Reading is strict: a key that is missing or a value that this code does not implement is an error that names the file and the key.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tokenizers

from dsvl_train.config.geometry import VL_MIN_SIDE, candidate_resolutions

from .tokenizer import PAD_TOKEN, VL2_IMAGE_TOKEN, VL_IMAGE_TOKEN, save_tokenizer_folder

Family = Literal["vl", "vl2"]

_CLASSES: dict[str, Family] = {"VLChatProcessor": "vl", "DeepseekVLV2Processor": "vl2"}
_PROCESSOR, _PREPROCESSOR = "processor_config.json", "preprocessor_config.json"
_HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class VlSettings:
    """What a VL folder says."""

    image_token: str
    tokens_per_image: int
    mask_prompt: bool
    image_size: int
    min_size: int
    image_mean: tuple[float, ...]


@dataclass(frozen=True)
class Vl2Settings:
    """What a VL2 folder says."""

    image_token: str
    pad_token: str
    mask_prompt: bool
    candidates: tuple[tuple[int, int], ...]
    patch_size: int
    downsample_ratio: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]

    @property
    def image_size(self) -> int:
        """Side of a tile, pixels: the released processor takes it from the first candidate."""
        return self.candidates[0][0]


class _JsonFile:
    """A JSON object whose keys are required one by one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: a processor folder holds {_PROCESSOR} (VL: and {_PREPROCESSOR}) and a tokenizer")
        try:
            self._values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not JSON: {error}") from error
        if not isinstance(self._values, dict):
            raise ValueError(f"{path}: expected a JSON object, found {type(self._values).__name__}")

    def get(self, key: str, kind: type) -> Any:
        if key not in self._values:
            raise ValueError(f"{self.path}: key {key!r} is missing")
        value = self._values[key]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ValueError(f"{self.path}: {key} = {value!r}; expected {kind.__name__}")
        return value

    def positive(self, key: str) -> int:
        value: int = self.get(key, int)
        if value < 1:
            raise ValueError(f"{self.path}: {key} = {value}; must be at least 1")
        return value

    def floats(self, key: str) -> tuple[float, ...]:
        values = self.get(key, list)
        if len(values) != 3 or not all(isinstance(value, int | float) and 0 <= value <= 1 for value in values):
            raise ValueError(f"{self.path}: {key} = {values!r}; expected three numbers from 0 to 1, one per channel")
        return tuple(float(value) for value in values)

    def require(self, key: str, kind: type, expected: Any) -> None:
        value = self.get(key, kind)
        if value != expected:
            raise ValueError(
                f"{self.path}: {key} = {value!r} is not supported; this code implements {expected!r}, as the released models have"
            )


def read_family(folder: str | Path) -> Family:
    """The family that `processor_class` of a folder's processor_config.json names.

    Raises:
        FileNotFoundError, ValueError: naming the file and the key.
    """
    file = _JsonFile(Path(folder) / _PROCESSOR)
    name = file.get("processor_class", str)
    if name not in _CLASSES:
        raise ValueError(f"{file.path}: processor_class = {name!r}; known are {list(_CLASSES)}")
    return _CLASSES[name]


def read_vl_settings(folder: str | Path) -> VlSettings:
    """Read a VL folder's two files.

    Raises:
        FileNotFoundError, ValueError: naming the file and the key.
    """
    file = _JsonFile(Path(folder) / _PROCESSOR)
    file.require("sft_format", str, "deepseek")
    file.require("ignore_id", int, -100)
    file.require("add_special_token", bool, False)
    images = _JsonFile(Path(folder) / _PREPROCESSOR)
    images.require("do_normalize", bool, False)
    return VlSettings(
        image_token=file.get("image_tag", str),
        tokens_per_image=file.positive("num_image_tokens"),
        mask_prompt=file.get("mask_prompt", bool),
        image_size=images.positive("image_size"),
        min_size=images.positive("min_size"),
        image_mean=images.floats("image_mean"),
    )


def read_vl2_settings(folder: str | Path) -> Vl2Settings:
    """Read a VL2 folder's file.

    Raises:
        FileNotFoundError, ValueError: naming the file and the key.
    """
    file = _JsonFile(Path(folder) / _PROCESSOR)
    file.require("sft_format", str, "deepseek")
    file.require("ignore_id", int, -100)
    file.require("normalize", bool, True)
    return Vl2Settings(
        image_token=file.get("image_token", str),
        pad_token=file.get("pad_token", str),
        mask_prompt=file.get("mask_prompt", bool),
        candidates=_read_candidates(file),
        patch_size=file.positive("patch_size"),
        downsample_ratio=file.positive("downsample_ratio"),
        image_mean=file.floats("image_mean"),
        image_std=file.floats("image_std"),
    )


def _read_candidates(file: _JsonFile) -> tuple[tuple[int, int], ...]:
    pairs = file.get("candidate_resolutions", list)
    if not pairs or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(n, int) and n > 0 for n in pair) for pair in pairs
    ):
        raise ValueError(f"{file.path}: candidate_resolutions = {pairs!r}; expected a list of [width, height] in pixels")
    side = pairs[0][0]
    if pairs[0] != [side, side] or any(width % side or height % side for width, height in pairs):
        raise ValueError(
            f"{file.path}: candidate_resolutions must begin with one tile and hold multiples of its side {side}, found {pairs}"
        )
    return tuple((width, height) for width, height in pairs)


def write_processor_folder(
    family: Family,
    folder: str | Path,
    tokenizer: tokenizers.Tokenizer,
    *,
    image_size: int,
    patch_size: int | None = None,
    downsample_ratio: int = 2,
    tokens_per_image: int | None = None,
    max_tiles: int = 9,
    mask_prompt: bool = True,
    image_mean: Sequence[float] = _HALF,
    image_std: Sequence[float] = _HALF,
) -> None:
    """Write a processor folder in the released layout, tokenizer included.

    Args:
        family: "vl" writes both JSON files, "vl2" only processor_config.json.
        folder: made if it does not exist.
        tokenizer: e.g. from `train_byte_level_bpe`; see `save_tokenizer_folder` for the tokens it must have.
        image_size: side of the input square (VL) or of a tile (VL2), pixels.
        patch_size, downsample_ratio, max_tiles: VL2 geometry; `patch_size` is required there.
        tokens_per_image: VL: visual tokens of an image (576 as released); required there.
        mask_prompt: what the file says; `Processor.from_folder` decides for training (the released VL2 files say false).
        image_mean, image_std: the vision tower's normalisation; int(255 * mean) is the padding colour.

    Raises:
        ValueError: a setting that the family needs is missing.
    """
    folder = Path(folder)
    save_tokenizer_folder(tokenizer, folder)
    shared = {"add_special_token": False, "ignore_id": -100, "mask_prompt": mask_prompt, "sft_format": "deepseek"}
    statistics = {"image_mean": list(image_mean), "image_std": list(image_std)}
    if family == "vl":
        if tokens_per_image is None:
            raise ValueError("tokens_per_image=None: a VL folder needs the number of visual tokens of an image (576 as released)")
        own: dict[str, Any] = {"image_tag": VL_IMAGE_TOKEN, "num_image_tokens": tokens_per_image, "processor_class": "VLChatProcessor"}
        preprocessor = {
            "background_color": list(padding_colour(image_mean)),
            "do_normalize": False,
            **statistics,
            "image_processor_type": "VLMImageProcessor",
            "image_size": image_size,
            "min_size": VL_MIN_SIDE,
            "rescale_factor": 1 / 255,
        }
        _write_json(folder / _PREPROCESSOR, preprocessor)
    elif family == "vl2":
        if patch_size is None:
            raise ValueError("patch_size=None: a VL2 folder needs the vision encoder's patch size (14 as released)")
        own = {
            "candidate_resolutions": [list(pair) for pair in candidate_resolutions(image_size, max_tiles)],
            "downsample_ratio": downsample_ratio,
            **statistics,
            "image_token": VL2_IMAGE_TOKEN,
            "normalize": True,
            "pad_token": PAD_TOKEN,
            "patch_size": patch_size,
            "processor_class": "DeepseekVLV2Processor",
        }
    else:
        raise ValueError(f"unknown family {family!r}; 'vl' or 'vl2'")
    _write_json(folder / _PROCESSOR, {**shared, **own})


def padding_colour(image_mean: Sequence[float]) -> tuple[int, int, int]:
    """The released background: the mean colour, truncated; (127, 127, 127) for 0.5."""
    red, green, blue = (int(value * 255) for value in image_mean)
    return red, green, blue


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(dict(sorted(value.items())), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
