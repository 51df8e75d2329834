"""Generation from a trained model: greedy by default, or sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsvl_train.data.processor import Encoded
from dsvl_train.evaluation.forward import embed_images, forward_packed
from dsvl_train.evaluation.loading import LoadedModel


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0
    """0 = greedy."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this much probability."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature={self.temperature} must be at least 0, and top_p={self.top_p} in (0, 1]")


def generate(loaded: LoadedModel, prompts: Sequence[Encoded], max_new_tokens: int, sampling: Sampling | None = None) -> list[list[int]]:
    """Continue each prompt until the model's end token or `max_new_tokens`. Returns the new ids, the end token left out.

    Args:
        prompts: encoded with `inference=True`; their images are encoded once.
    """
    sampling = sampling or Sampling()
    generator = torch.Generator().manual_seed(sampling.seed)
    stop_ids = set(loaded.processor.stop_ids)
    visual = embed_images(loaded, prompts)
    ids = [prompt.input_ids for prompt in prompts]
    masks = [prompt.image_mask for prompt in prompts]
    answers: list[list[int]] = [[] for _ in prompts]
    going = list(range(len(prompts)))
    for _ in range(max_new_tokens):
        if not going:
            break
        logits = forward_packed(loaded, [ids[i] for i in going], [masks[i] for i in going], [visual[i] for i in going])
        still_going = []
        for i, logits_tv in zip(going, logits, strict=True):
            token = _choose(logits_tv[-1], sampling, generator)
            if token in stop_ids:
                continue
            answers[i].append(token)
            ids[i] = torch.cat([ids[i], torch.tensor([token])])
            masks[i] = torch.cat([masks[i], torch.tensor([False])])
            still_going.append(i)
        going = still_going
    return answers


def _choose(logits_v: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    if sampling.temperature == 0:
        return int(logits_v.argmax())
    probabilities, tokens = (logits_v.float().cpu() / sampling.temperature).softmax(-1).sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = torch.where(before < sampling.top_p, probabilities, 0.0)
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])
