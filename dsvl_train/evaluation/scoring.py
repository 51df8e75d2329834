"""Teacher-forced losses: of one sample, and of many in packed forward passes, through a pipeline where there is one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsvl_train.data.batch import IGNORE_INDEX
from dsvl_train.data.processor import Encoded
from dsvl_train.evaluation.forward import embed_images, forward_packed
from dsvl_train.evaluation.loading import LoadedModel
from dsvl_train.models.vlm import VisionChunk
from dsvl_train.parallel.pipeline import run_pipeline


@dataclass(frozen=True)
class Score:
    """What a model makes of one sample."""

    tokens: int
    """Supervised tokens: labels that are not masked, the first position excluded, since nothing predicts it."""
    loss_sum: float
    """Their next-token losses in nats, added in float64."""

    @property
    def perplexity(self) -> float:
        """Per token."""
        return perplexity(self.loss_sum, self.tokens)


def perplexity(loss_sum: float, tokens: float) -> float:
    """exp of the mean loss; infinite beyond what a float holds."""
    try:
        return math.exp(loss_sum / tokens)
    except OverflowError:
        return math.inf


def score_sample(loaded: LoadedModel, sample: Encoded) -> Score:
    """Score one sample by itself, so that its score depends on nothing else."""
    ((score,),) = score_pack(loaded, [Question(0, [sample])])
    return score


def logits(loaded: LoadedModel, sample: Encoded) -> Tensor:
    """Logits [t, vocabulary] of one sample."""
    (logits_tv,) = forward_packed(loaded, [sample.input_ids], [sample.image_mask], embed_images(loaded, [sample]))
    return logits_tv[:, : loaded.cfg.model.language.vocab_size]


# ----------------------------------------------------------------------------------------------------------------------- packs


@dataclass(frozen=True)
class Question:
    """Samples that share their images: a question with each of its answers, or a sample by itself."""

    item: int
    """Its number in the task."""
    samples: Sequence[Encoded]
    first: int = 0
    """The first sample's number among those of the item."""

    @property
    def tokens(self) -> int:
        return sum(len(sample.input_ids) for sample in self.samples)


Pack = list[Question]
"""What one forward pass scores."""


def packs(questions: Iterable[Question], tokens_at_once: int) -> Iterator[Pack]:
    """Questions in packs of at most `tokens_at_once` tokens. A question of more is divided, its images being encoded for each part; a
    sample of more is a pack by itself."""
    pack: Pack = []
    for question in questions:
        for part in _parts(question, tokens_at_once):
            if pack and sum(one.tokens for one in pack) + part.tokens > tokens_at_once:
                yield pack
                pack = []
            pack.append(part)
    if pack:
        yield pack


def score_pack(loaded: LoadedModel, pack: Pack) -> list[list[Score]]:
    """Score the samples of each question in one forward pass; images shared within a question are encoded once."""
    samples = [sample for question in pack for sample in question.samples]
    per_question = embed_images(loaded, [question.samples[0] for question in pack])
    visual = [embeddings for question, embeddings in zip(pack, per_question, strict=True) for _ in question.samples]
    targets = [_targets(sample) for sample in samples]
    losses = forward_packed(loaded, [s.input_ids for s in samples], [s.image_mask for s in samples], visual, targets)
    return _by_question(pack, [_score(*pair) for pair in zip(losses, targets, strict=True)])


@torch.no_grad()
def score_through_pipeline(loaded: LoadedModel, batches: Sequence[Pack], *, images: bool) -> list[list[list[Score]]]:
    """`score_pack` of several packs, each a micro-batch of the model's pipeline.

    Args:
        batches: at least as many as pipeline ranks, and on every rank as many.
        images: run the encoder's chunks too; a pack may still have no image.

    Returns scores on the last pipeline rank, and none on the others.
    """
    model, scores = loaded.model, []
    spread = model.division.spread

    def forward_step(waiting: Iterator[Pack], chunk: Any) -> tuple[Tensor, Any]:
        pack = next(waiting)
        if isinstance(chunk, VisionChunk):
            return _encode(loaded, pack)[:, None], None
        samples = [sample for question in pack for sample in question.samples]
        has_images = any(sample.image_count for sample in samples)
        encodes_here = model.vision.finishes and not spread and chunk.pre_process and has_images
        targets_t = torch.cat([_targets(sample) for sample in samples])
        ids_t = torch.cat([sample.input_ids for sample in samples]).to(loaded.world.device)
        lengths = torch.tensor([0, *(len(sample.input_ids) for sample in samples)], device=loaded.world.device)
        out = chunk(
            ids_t,
            lengths.cumsum(0).to(torch.int32),
            torch.zeros_like(ids_t, dtype=torch.bool),
            image_mask_t=torch.cat([sample.image_mask for sample in samples]).to(loaded.world.device),
            visual_vh=_encode(loaded, pack) if encodes_here else None,
            labels_t=targets_t.to(loaded.world.device),
        )
        return out, partial(keep, pack, samples)

    def keep(pack: Pack, samples: Sequence[Encoded], losses_t: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        per_sample = losses_t.split([len(sample.input_ids) for sample in samples])
        pairs = zip(per_sample, samples, strict=True)
        scores.append(_by_question(pack, [_score(losses_t, _targets(sample)) for losses_t, sample in pairs]))
        return losses_t.sum(), torch.ones((), dtype=torch.int, device=losses_t.device), {}

    chunks = [chunk for name, chunk in model.chunks.items() if name != "vision" or (spread and images)]
    run_pipeline(forward_step, chunks, batches, group=loaded.cfg.parallel.group, forward_only=True)
    return scores


def _encode(loaded: LoadedModel, pack: Pack) -> Tensor:
    """This rank's part of the encoder over the images of a pack; where it ends, the embeddings of every sample, shared ones repeated."""
    vision, device = loaded.model.vision, loaded.world.device
    with_images = [question for question in pack if question.samples[0].image_count]
    side = vision.vision.image_size
    pixels = [question.samples[0].pixels for question in with_images] or [torch.empty(0, 3, side, side, dtype=torch.uint8)]
    tiles_wh = [question.samples[0].tiles_wh for question in with_images] or [torch.empty(0, 2, dtype=torch.int64)]
    out = vision(torch.cat(pixels).to(device), torch.cat(tiles_wh))
    if not vision.finishes:
        return out
    per_question = out.split([int(question.samples[0].image_mask.sum()) for question in with_images])
    repeated = [visual_vh for visual_vh, question in zip(per_question, with_images, strict=True) for _ in question.samples]
    return torch.cat(repeated) if repeated else out


def _parts(question: Question, tokens_at_once: int) -> Iterator[Question]:
    first, tokens = 0, 0
    for number, sample in enumerate(question.samples):
        if number > first and tokens + len(sample.input_ids) > tokens_at_once:
            yield Question(question.item, question.samples[first:number], question.first + first)
            first, tokens = number, 0
        tokens += len(sample.input_ids)
    yield Question(question.item, question.samples[first:], question.first + first)


def _targets(sample: Encoded) -> Tensor:
    return F.pad(sample.labels[1:], (0, 1), value=IGNORE_INDEX)


def _score(losses_t: Tensor, targets_t: Tensor) -> Score:
    supervised_t = targets_t != IGNORE_INDEX
    return Score(int(supervised_t.sum()), float(losses_t.detach().cpu().double()[supervised_t].sum()))


def _by_question(pack: Pack, scores: Sequence[Score]) -> list[list[Score]]:
    remaining = iter(scores)
    return [[next(remaining) for _ in question.samples] for question in pack]
