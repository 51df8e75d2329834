"""Teacher-forced loss of a sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from dsvl_train.data.batch import IGNORE_INDEX
from dsvl_train.data.processor import Encoded
from dsvl_train.evaluation.forward import embed_images, forward_packed
from dsvl_train.evaluation.loading import LoadedModel


@dataclass(frozen=True)
class Score:
    """What a model makes of one sample."""

    tokens: int
    """Supervised tokens: labels that are not masked, the first position excluded, since nothing predicts it."""
    loss_sum: float
    """Their next-token losses in nats, added in float64."""


def score_sample(loaded: LoadedModel, sample: Encoded) -> Score:
    """Score one sample by itself, so that its score depends on nothing else."""
    targets_t = F.pad(sample.labels[1:], (0, 1), value=IGNORE_INDEX)
    (losses_t,) = forward_packed(loaded, [sample.input_ids], [sample.image_mask], embed_images(loaded, [sample]), [targets_t])
    supervised_t = targets_t != IGNORE_INDEX
    return Score(int(supervised_t.sum()), float(losses_t.cpu().double()[supervised_t].sum()))


def logits(loaded: LoadedModel, sample: Encoded) -> Tensor:
    """Logits [t, vocabulary] of one sample."""
    (logits_tv,) = forward_packed(loaded, [sample.input_ids], [sample.image_mask], embed_images(loaded, [sample]))
    return logits_tv[:, : loaded.cfg.model.language.vocab_size]
