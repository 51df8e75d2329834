"""Evaluation's forward pass: samples laid end to end, as in training, without gradient.

Shapes: t = tokens of all samples, s = samples, v = visual tokens, h = language width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsvl_train.data.processor import Encoded
from dsvl_train.evaluation.loading import LoadedModel


@torch.no_grad()
def embed_images(loaded: LoadedModel, samples: Sequence[Encoded]) -> list[Tensor | None]:
    """Visual embeddings [v, h] per sample, None for a sample without images; all tiles go through the encoder together."""
    with_images = [sample for sample in samples if sample.image_count]
    if not with_images:
        return [None] * len(samples)
    device = loaded.world.device
    pixels_nchw = torch.cat([sample.pixels for sample in with_images]).to(device)
    tiles_wh = torch.cat([sample.tiles_wh for sample in with_images])
    visual_vh = loaded.model.vision(pixels_nchw, tiles_wh)
    per_sample = iter(visual_vh.split([int(sample.image_mask.sum()) for sample in with_images]))
    return [next(per_sample) if sample.image_count else None for sample in samples]


@torch.no_grad()
def forward_packed(
    loaded: LoadedModel,
    ids: Sequence[Tensor],
    image_masks: Sequence[Tensor],
    visual: Sequence[Tensor | None],
    labels: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Per sample: logits [t, vocabulary], or with shifted `labels` the next-token losses [t]."""
    device = loaded.world.device
    lengths = [len(sample) for sample in ids]
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    present = [part for part in visual if part is not None]
    tokens_t = torch.cat(list(ids)).to(device)
    out_t = loaded.model.language(
        tokens_t,
        cu_seqlens,
        torch.zeros_like(tokens_t, dtype=torch.bool),
        image_mask_t=torch.cat(list(image_masks)).to(device) if present else None,
        visual_vh=torch.cat(present) if present else None,
        labels_t=None if labels is None else torch.cat(list(labels)).to(device),
    )
    return list(out_t.split(lengths))
