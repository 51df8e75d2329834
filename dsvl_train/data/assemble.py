"""From samples to a micro-batch: lay them end to end, shift the labels within each, put masked padding where a sample is bad.

NumPy, not torch, does the copying: it runs in reader threads, where torch's own threads would multiply.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from dsvl_train.data.batch import IGNORE_INDEX, MicroBatch, Modality
from dsvl_train.data.sources import SampleArrays


def shift_labels(labels_t: NDArray[np.int64]) -> NDArray[np.int64]:
    """The target of each position of one sample: the next position's label; the last position has none."""
    shifted = np.full_like(labels_t, IGNORE_INDEX)
    shifted[:-1] = labels_t[1:]
    return shifted


def placeholder(tokens: int, pad_id: int) -> SampleArrays:
    """What stands in a bad sample's place: exactly its planned length, nothing supervised, no image."""
    return SampleArrays(
        tokens_t=np.full(tokens, pad_id, dtype=np.int64),
        labels_t=np.full(tokens, IGNORE_INDEX, dtype=np.int64),
        image_mask_t=np.zeros(tokens, dtype=bool),
        tiles_wh=None,
        pixels_nchw=None,
    )


def lay_out(
    samples: Sequence[SampleArrays],
    bad: Sequence[bool],
    sources: Sequence[int],
    modality: Modality,
    image_size: int,
    *,
    pin_memory: bool = False,
) -> MicroBatch:
    """Samples end to end.

    Args:
        bad: for each sample, whether it is a placeholder.
        sources: for each sample, its source's place in data.sources.
        image_size: side of a tile, pixels: a multimodal micro-batch without images has pixels of shape [0, 3, side, side].
        pin_memory: put the pixels into pages that a GPU copies from while the host goes on.
    """
    lengths = [len(sample.tokens_t) for sample in samples]
    pixels = [sample.pixels_nchw for sample in samples if sample.pixels_nchw is not None]
    tiles = [sample.tiles_wh for sample in samples if sample.tiles_wh is not None]
    multimodal = modality == "multimodal"
    return MicroBatch(
        tokens_t=torch.from_numpy(np.concatenate([sample.tokens_t for sample in samples])),
        labels_t=torch.from_numpy(np.concatenate([shift_labels(sample.labels_t) for sample in samples])),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)),
        image_mask_t=torch.from_numpy(np.concatenate([sample.image_mask_t for sample in samples])),
        padding_t=torch.from_numpy(np.repeat(np.asarray(bad, dtype=bool), lengths)),
        source_s=torch.from_numpy(np.asarray(sources, dtype=np.int64)),
        pixels_nchw=_join_pixels(pixels, image_size, pin_memory) if multimodal else None,
        tiles_wh=torch.from_numpy(np.concatenate([np.empty((0, 2), np.int64), *tiles])) if multimodal else None,
    )


def _join_pixels(pixels: Sequence[NDArray[np.uint8]], image_size: int, pin_memory: bool) -> torch.Tensor:
    """All samples' tiles in one tensor: one copy, straight into pinned pages where those are wanted."""
    tiles = sum(len(of_sample) for of_sample in pixels)
    joined_nchw = torch.empty((tiles, 3, image_size, image_size), dtype=torch.uint8, pin_memory=pin_memory)
    if pixels:
        np.concatenate(pixels, out=joined_nchw.numpy())
    return joined_nchw
