"""Continuation without a cache: everything anew for each token, through the forward pass of scoring. The reference for `cache`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from dsvl_train.evaluation.forward import forward_packed
from dsvl_train.evaluation.loading import LoadedModel


class RecomputedLanguageModel:
    """`cache.CachedLanguageModel`'s interface, remembering nothing but tokens."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.ids: list[Tensor] = []
        self.image_masks: list[Tensor] = []
        self.visual: list[Tensor | None] = []

    def computing(self) -> AbstractContextManager[None]:
        """Around all calls."""
        return nullcontext()

    def prefill(self, ids: Sequence[Tensor], image_masks: Sequence[Tensor], visual: Sequence[Tensor | None]) -> Tensor:
        """Take whole prompts. Returns logits [s, vocabulary]."""
        self.ids, self.image_masks, self.visual = list(ids), list(image_masks), list(visual)
        return self._last_logits()

    def append(self, tokens_s: Sequence[int]) -> Tensor:
        """Take one more token of each sample. Returns logits [s, vocabulary]."""
        self.ids = [torch.cat([ids, ids.new_tensor([token])]) for ids, token in zip(self.ids, tokens_s, strict=True)]
        self.image_masks = [torch.cat([mask, mask.new_tensor([False])]) for mask in self.image_masks]
        return self._last_logits()

    def keep(self, samples: Sequence[int]) -> None:
        """Forget all samples but these."""
        self.ids = [self.ids[i] for i in samples]
        self.image_masks = [self.image_masks[i] for i in samples]
        self.visual = [self.visual[i] for i in samples]

    def _last_logits(self) -> Tensor:
        return torch.stack([logits_tv[-1] for logits_tv in forward_packed(self.loaded, self.ids, self.image_masks, self.visual)])
