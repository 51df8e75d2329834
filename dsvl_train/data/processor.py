"""From a conversation and its images to ids, labels and tiles, equal to the released processors' output.

Shapes: t = tokens, i = images, n = tiles. `encode` makes everything, `measure` the same numbers from image sizes alone, so that the index
and the planner never decode an image. Both go through `_layout`, which is why they agree.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dsvl_train.config.geometry import TileRule, candidate_resolutions, select_tiles, vl2_tokens_side, vl2_visual_tokens

from .batch import IGNORE_INDEX
from .conversation import TEMPLATES, Message, TokenisedText, Vl2Template, VlTemplate, parse_messages, tokenise_continuation
from .errors import SampleError
from .processor_folder import (
    Vl2Settings,
    VlSettings,
    padding_colour,
    read_family,
    read_vl2_settings,
    read_vl_settings,
    write_processor_folder,
)
from .tiling import Decode, ImageSource, OpenedImage, Pixels, check_image_size, fill_vl2_tiles, fill_vl_square, open_image
from .tokenizer import VL2_ADDED_TOKENS, Tokenizer

__all__ = ["Encoded", "Measured", "Processor", "SampleError", "Vl2Processor", "VlProcessor", "write_processor_folder"]

Messages = Sequence[Mapping[str, str]]

DEFAULT_MAX_IMAGE_PIXELS = 178_956_970
"""Pillow's own limit, and the default of data.max_image_pixels."""

_EMPTY_TILE_GREY = 128
"""The released VL2 code gives a text-only sample one tile of zeros after normalisation: mid grey before it."""

_VERSION = 1
"""Raise it when ids, labels or pixels change for the same input: indexes made before then no longer match."""


@dataclass(frozen=True)
class Measured:
    """Sizes of a sample."""

    tokens: int
    """Length of the sequence, visual tokens included."""
    supervised_tokens: int
    """Terms of its next-token loss: labels that are not masked, the first position excluded since nothing predicts it."""
    visual_tokens: int
    tiles: int
    """Tiles to encode; 0 without images."""
    turns: tuple[tuple[int, int], ...] = field(default=(), compare=False)
    """(text tokens, supervised tokens) of each message, visual tokens not counted; what stands before the first message belongs to it."""


@dataclass
class Encoded:
    """A sample as tensors."""

    input_ids: Tensor
    """int64 [t]. Image positions hold the image token's id."""
    labels: Tensor
    """int64 [t], NOT shifted; IGNORE_INDEX = masked."""
    image_mask: Tensor
    """bool [t]: positions of visual tokens."""
    tiles_wh: Tensor
    """int64 [i, 2]: local tiles (wide, high) per image; (0, 0) for VL. A VL2 sample without images has one row (0, 0), as released."""
    pixels: Tensor
    """uint8 [n, 3, side, side]. A VL2 sample without images has one mid-grey tile, as released: see `image_count`."""
    image_count: int
    """Images of the sample. Where it is 0, `pixels` and `tiles_wh` mean nothing and must not be encoded."""

    def measured(self) -> Measured:
        """What `Processor.measure` says of the same sample."""
        return Measured(
            tokens=len(self.input_ids),
            supervised_tokens=int((self.labels[1:] != IGNORE_INDEX).sum()),
            visual_tokens=int(self.image_mask.sum()),
            tiles=len(self.pixels) if self.image_count else 0,
        )


@dataclass
class _Layout:
    """A sample's text, and the place of its images, before any pixel."""

    text: TokenisedText
    tiles_wh: list[tuple[int, int]]
    visual_tokens: list[int]
    tiles: int


class Processor(ABC):
    """What `VlProcessor` and `Vl2Processor` share; `Processor.from_folder` chooses between them.

    Attributes:
        family: "vl" or "vl2".
        tokenizer: text to ids.
        image_size: side of the input square (VL) or of a tile (VL2), pixels.
        stop_ids: ids that end generation.
    """

    family: Literal["vl", "vl2"]

    def __init__(self, tokenizer: Tokenizer, image_size: int, *, mask_prompt: bool, max_image_pixels: int, decode: Decode) -> None:
        if decode not in ("exact", "fast"):
            raise ValueError(f"unknown way to decode {decode!r}; data.decode is 'exact' or 'fast'")
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.mask_prompt = mask_prompt
        self.max_image_pixels = max_image_pixels
        self.decode: Decode = decode
        self.stop_ids = [tokenizer.eos_id]
        self._template: VlTemplate | Vl2Template = TEMPLATES[self.family](tokenizer, mask_prompt=mask_prompt)

    @staticmethod
    def from_folder(
        path: str | Path,
        *,
        mask_prompt: bool | None = True,
        tile_selection: TileRule = "released",
        max_tiles: int | None = 9,
        tiling_image_limit: int = 2,
        max_image_pixels: int = DEFAULT_MAX_IMAGE_PIXELS,
        decode: Decode = "exact",
    ) -> Processor:
        """The processor of a folder in the released layout.

        Args:
            path: folder with tokenizer.json, tokenizer_config.json, processor_config.json and, for VL, preprocessor_config.json.
            mask_prompt: supervise answers only; None = what the folder says (the released VL2 folders say no).
            tile_selection: VL2: "released" or "paper", see `config.geometry.select_tiles`.
            max_tiles: VL2: local tiles of one image at most. The folder's own candidates are used where they go exactly this far, else all
                of `candidate_resolutions(image_size, max_tiles)`; None = the folder's own in any case.
            tiling_image_limit: VL2: samples with more images than this are not tiled.
            max_image_pixels: images with more are refused, from their header.
            decode: "exact": the released processor's pixels, bit for bit; "fast": no value more than 2 of 255 off, see `tiling.py`.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file lacks a key or token, or says something that is not implemented; names the file and the key.
        """
        if read_family(path) == "vl":
            return VlProcessor(path, read_vl_settings(path), mask_prompt=mask_prompt, max_image_pixels=max_image_pixels, decode=decode)
        return Vl2Processor(
            path,
            read_vl2_settings(path),
            mask_prompt=mask_prompt,
            tile_selection=tile_selection,
            max_tiles=max_tiles,
            tiling_image_limit=tiling_image_limit,
            max_image_pixels=max_image_pixels,
            decode=decode,
        )

    def encode(self, messages: Messages, images: Sequence[ImageSource], *, inference: bool = False) -> Encoded:
        """Make a sample's tensors.

        Args:
            messages: {"role", "content"} in order, with one image tag in the contents per image; see `conversation.py`.
            images: in the order of their tags, opened or not.
            inference: leave out the final eos, so that the last answer (possibly empty) or the document can be continued. For a VL
                conversation this changes nothing, as released: end it with an empty answer.

        Raises:
            SampleError: a ValueError with `kind`; see `errors.py`.
        """
        opened = [open_image(image, self.max_image_pixels) for image in images]
        layout = self._layout(messages, [image.size for image in opened], inference=inference)
        return self._encoded(layout, self._pixels(opened, layout), len(opened))

    def encode_answers(self, messages: Messages, images: Sequence[ImageSource], answers: Sequence[str]) -> list[Encoded]:
        """One question with each of several answers, to be scored. The images are decoded once, and the samples share their pixels.

        Supervised are the answer's own tokens alone, whatever `mask_prompt` says: no earlier answer, and no end token, which is no part
        of what an answer says. A token that holds any character of the answer is one of its own.

        Args:
            messages: a conversation up to the user's last turn, or one document, which the answers go on with as they are.

        Raises:
            SampleError: as `encode`.
        """
        opened = [open_image(image, self.max_image_pixels) for image in images]
        sizes_wh = [image.size for image in opened]
        layouts = [self._answer_layout(messages, sizes_wh, answer) for answer in answers]
        pixels = self._pixels(opened, layouts[0])
        return [self._encoded(layout, pixels, len(opened)) for layout in layouts]

    def _answer_layout(self, messages: Messages, sizes_wh: Sequence[tuple[int, int]], answer: str) -> _Layout:
        tokenizer = self.tokenizer
        parsed = parse_messages(messages, tokenizer.image_token, len(sizes_wh))
        if parsed[0].role == "document":
            text = tokenise_continuation(parsed[0].content, answer, tokenizer, len(sizes_wh))
        else:
            template = TEMPLATES[self.family](tokenizer, mask_prompt=True)
            text = template.tokenise([*parsed, Message("assistant", answer)], len(sizes_wh), inference=True)
            last = text.turn_at[-1]
            text.supervised = [
                supervised and position >= last and token != tokenizer.eos_id
                for position, (token, supervised) in enumerate(zip(text.ids, text.supervised, strict=True))
            ]
        return _Layout(text, *self._image_layout(sizes_wh))

    def _encoded(self, layout: _Layout, pixels: tuple[Pixels, list[tuple[int, int]]], image_count: int) -> Encoded:
        text = layout.text
        repeats = np.ones(len(text.ids), dtype=np.int64)
        repeats[text.image_at] = layout.visual_tokens
        is_image = np.zeros(len(text.ids), dtype=bool)
        is_image[text.image_at] = True
        ids = np.asarray(text.ids, dtype=np.int64)
        labels = np.where(np.asarray(text.supervised, dtype=bool) & ~is_image, ids, IGNORE_INDEX)
        pixels_nchw, tiles_wh = pixels
        return Encoded(
            input_ids=torch.from_numpy(np.repeat(ids, repeats)),
            labels=torch.from_numpy(np.repeat(labels, repeats)),
            image_mask=torch.from_numpy(np.repeat(is_image, repeats)),
            tiles_wh=torch.tensor(tiles_wh, dtype=torch.int64).reshape(-1, 2),
            pixels=torch.from_numpy(pixels_nchw),
            image_count=image_count,
        )

    def measure(self, messages: Messages, image_sizes: Sequence[tuple[int, int]], *, inference: bool = False) -> Measured:
        """The sizes of what `encode` would make, from the images' (width, height) alone.

        Raises:
            SampleError: as `encode`, except for what only decoding shows.
        """
        sizes_wh = [(int(width), int(height)) for width, height in image_sizes]
        for size_wh in sizes_wh:
            check_image_size(size_wh, self.max_image_pixels)
        layout = self._layout(messages, sizes_wh, inference=inference)
        text = layout.text
        is_text = np.ones(len(text.ids), dtype=bool)
        is_text[text.image_at] = False
        counted = np.asarray(text.supervised, dtype=bool) & is_text
        counted[:1] = False  # nothing predicts the first token
        ends = [*text.turn_at[1:], len(text.ids)]
        turns = tuple((int(is_text[at:end].sum()), int(counted[at:end].sum())) for at, end in zip(text.turn_at, ends, strict=True))
        return Measured(
            tokens=len(text.ids) - len(text.image_at) + sum(layout.visual_tokens),
            supervised_tokens=int(counted.sum()),
            visual_tokens=sum(layout.visual_tokens),
            tiles=layout.tiles,
            turns=turns,
        )

    def prompt_messages(self, text: str, n_images: int = 0) -> list[dict[str, str]]:
        """A conversation that asks `text` about `n_images` images, to be answered; tags are put first unless `text` has them already.

        Raises:
            SampleError: `image_count` - `text` has some tags, but not `n_images`.
        """
        tag = self.tokenizer.image_token
        tags = text.count(tag)
        if tags not in (0, n_images):
            raise SampleError("image_count", f"the prompt has {tags} {tag} tags for {n_images} images; give one each, or none")
        question = text if tags else f"{tag}\n" * n_images + text
        return [{"role": "user", "content": question}, {"role": "assistant", "content": ""}]

    def fingerprint(self) -> str:
        """Hash of all that decides ids, labels and pixels: tokenizer, template, geometry, mask. An index keeps it."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        facts = {
            "version": _VERSION,
            "family": self.family,
            "template": self._template.name,
            "tokenizer": self.tokenizer.fingerprint(),
            "mask_prompt": self.mask_prompt,
            "max_image_pixels": self.max_image_pixels,
            **self._geometry(),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _layout(self, messages: Messages, sizes_wh: Sequence[tuple[int, int]], *, inference: bool) -> _Layout:
        parsed = parse_messages(messages, self.tokenizer.image_token, len(sizes_wh))
        text = self._template.tokenise(parsed, len(sizes_wh), inference=inference)
        return _Layout(text, *self._image_layout(sizes_wh))

    @abstractmethod
    def visual_tokens(self, tiles_wh: tuple[int, int]) -> int:
        """Tokens of an image of so many local tiles, as in `Encoded.tiles_wh`."""

    @abstractmethod
    def _image_layout(self, sizes_wh: Sequence[tuple[int, int]]) -> tuple[list[tuple[int, int]], list[int], int]:
        """Local tiles (wide, high) and visual tokens of each image, and tiles of all."""

    @abstractmethod
    def _pixels(self, images: Sequence[OpenedImage], layout: _Layout) -> tuple[Pixels, list[tuple[int, int]]]:
        """Decoded tiles [n, 3, side, side] of all images, and the rows of `Encoded.tiles_wh`."""

    @abstractmethod
    def _geometry(self) -> dict[str, Any]:
        """Settings for the fingerprint."""


class VlProcessor(Processor):
    """DeepSeek-VL: each image is one square of `image_size` and takes `tokens_per_image` tokens (576 as released), whatever its size."""

    family: Literal["vl", "vl2"] = "vl"

    def __init__(
        self,
        path: str | Path,
        settings: VlSettings,
        *,
        mask_prompt: bool | None = True,
        max_image_pixels: int = DEFAULT_MAX_IMAGE_PIXELS,
        decode: Decode = "exact",
    ) -> None:
        self.settings = settings
        self.tokens_per_image = settings.tokens_per_image
        self._colour = padding_colour(settings.image_mean)
        super().__init__(
            Tokenizer.from_folder(path, image_token=settings.image_token, added_tokens=(settings.image_token,)),
            settings.image_size,
            mask_prompt=settings.mask_prompt if mask_prompt is None else mask_prompt,
            max_image_pixels=max_image_pixels,
            decode=decode,
        )

    def visual_tokens(self, tiles_wh: tuple[int, int]) -> int:
        return self.tokens_per_image

    def _image_layout(self, sizes_wh: Sequence[tuple[int, int]]) -> tuple[list[tuple[int, int]], list[int], int]:
        count = len(sizes_wh)
        return [(0, 0)] * count, [self.tokens_per_image] * count, count

    def _pixels(self, images: Sequence[OpenedImage], layout: _Layout) -> tuple[Pixels, list[tuple[int, int]]]:
        pixels_nchw = np.empty((len(images), 3, self.image_size, self.image_size), dtype=np.uint8)
        for image, pixels_chw in zip(images, pixels_nchw, strict=True):
            fill_vl_square(image, self.image_size, self.settings.min_size, self._colour, pixels_chw, self.decode)
        return pixels_nchw, layout.tiles_wh

    def _geometry(self) -> dict[str, Any]:
        return asdict(self.settings) | {"mask_prompt": self.mask_prompt}


class Vl2Processor(Processor):
    """DeepSeek-VL2: each image is a thumbnail and up to `max_tiles` local tiles (VL2 §2).

    Attributes:
        candidates: (width, height) canvases that tiles are selected from, in order of preference.
        tokens_side: visual tokens along one side of a tile (14 as released).
    """

    family: Literal["vl", "vl2"] = "vl2"

    def __init__(
        self,
        path: str | Path,
        settings: Vl2Settings,
        *,
        mask_prompt: bool | None = True,
        tile_selection: TileRule = "released",
        max_tiles: int | None = 9,
        tiling_image_limit: int = 2,
        max_image_pixels: int = DEFAULT_MAX_IMAGE_PIXELS,
        decode: Decode = "exact",
    ) -> None:
        if tile_selection not in ("released", "paper"):
            raise ValueError(f"unknown tile rule {tile_selection!r}; data.tile_selection is 'released' or 'paper'")
        self.settings = settings
        self.tile_selection: TileRule = tile_selection
        self.tiling_image_limit = tiling_image_limit
        self.candidates = _candidates_up_to(settings, max_tiles)
        self.tokens_side = vl2_tokens_side(settings.image_size, settings.patch_size, settings.downsample_ratio)
        self._colour = padding_colour(settings.image_mean)
        super().__init__(
            Tokenizer.from_folder(
                path,
                image_token=settings.image_token,
                added_tokens=(settings.image_token, *VL2_ADDED_TOKENS[1:]),
                pad_token=settings.pad_token,
            ),
            settings.image_size,
            mask_prompt=settings.mask_prompt if mask_prompt is None else mask_prompt,
            max_image_pixels=max_image_pixels,
            decode=decode,
        )

    def visual_tokens(self, tiles_wh: tuple[int, int]) -> int:
        return vl2_visual_tokens(tiles_wh, self.tokens_side)

    def _image_layout(self, sizes_wh: Sequence[tuple[int, int]]) -> tuple[list[tuple[int, int]], list[int], int]:
        if len(sizes_wh) > self.tiling_image_limit:
            tiles_wh = [(1, 1)] * len(sizes_wh)
        else:
            tiles_wh = [select_tiles(size_wh, self.image_size, self.candidates, self.tile_selection) for size_wh in sizes_wh]
        visual_tokens = [self.visual_tokens(grid_wh) for grid_wh in tiles_wh]
        return tiles_wh, visual_tokens, sum(1 + wide * high for wide, high in tiles_wh)

    def _pixels(self, images: Sequence[OpenedImage], layout: _Layout) -> tuple[Pixels, list[tuple[int, int]]]:
        side = self.image_size
        if not images:
            return np.full((1, 3, side, side), _EMPTY_TILE_GREY, dtype=np.uint8), [(0, 0)]
        pixels_nchw = np.empty((layout.tiles, 3, side, side), dtype=np.uint8)
        start = 0
        for image, (wide, high) in zip(images, layout.tiles_wh, strict=True):
            end = start + 1 + wide * high
            fill_vl2_tiles(image, (wide, high), side, self._colour, pixels_nchw[start:end], self.decode)
            start = end
        return pixels_nchw, layout.tiles_wh

    def _geometry(self) -> dict[str, Any]:
        chosen = {"tile_selection": self.tile_selection, "tiling_image_limit": self.tiling_image_limit, "candidates": self.candidates}
        return asdict(self.settings) | chosen | {"mask_prompt": self.mask_prompt}


def _candidates_up_to(settings: Vl2Settings, max_tiles: int | None) -> tuple[tuple[int, int], ...]:
    side = settings.image_size
    if max_tiles is None or max(width * height for width, height in settings.candidates) == max_tiles * side * side:
        return settings.candidates
    return tuple(candidate_resolutions(side, max_tiles))
