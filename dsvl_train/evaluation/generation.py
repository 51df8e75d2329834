"""Generation from a trained model: greedy by default, or sampled; several prompts at once, of any lengths."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsvl_train.data.processor import Encoded
from dsvl_train.evaluation.cache import CachedLanguageModel
from dsvl_train.evaluation.forward import embed_images
from dsvl_train.evaluation.loading import LoadedModel
from dsvl_train.evaluation.recompute import RecomputedLanguageModel


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0
    """0 = greedy."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this much probability (of what `top_k` left)."""
    top_k: int = 0
    """Sample from this many most probable tokens; 0 = all."""
    seed: int = 0
    """Each prompt draws from its own stream of this seed, so an answer does not depend on when the others end."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(
                f"temperature={self.temperature} must be finite and at least 0, top_p={self.top_p} in (0, 1], "
                f"and top_k={self.top_k} at least 0"
            )


def generate(
    loaded: LoadedModel,
    prompts: Sequence[Encoded],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    *,
    on_token: Callable[[int, int], None] | None = None,
    use_cache: bool = True,
    first: int = 0,
    agree: Callable[[list[int]], list[int]] | None = None,
) -> list[list[int]]:
    """Continue each prompt until the model's end token or `max_new_tokens`. Returns the new ids, the end token left out.

    Args:
        prompts: encoded with `inference=True`; their images are encoded once.
        on_token: called with (index in `prompts`, id) as soon as a token is chosen, end tokens excepted.
        use_cache: False computes everything anew for each token: slow, and the same.
        first: what the first prompt's number is among all that are asked in turns, so that each draws from a stream of its own.
        agree: given this rank's choices of a step, returns those of all ranks that generate together.

    Raises:
        ValueError: `max_new_tokens` below 1.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if not prompts:
        return []
    sampling = sampling or Sampling()
    generators = [_generator(sampling.seed, first + number) for number in range(len(prompts))]
    model = CachedLanguageModel(loaded.model.language) if use_cache else RecomputedLanguageModel(loaded)
    with model.computing():
        return _continue(loaded, model, prompts, max_new_tokens, sampling, generators, on_token, agree)


def _continue(
    loaded: LoadedModel,
    model: CachedLanguageModel | RecomputedLanguageModel,
    prompts: Sequence[Encoded],
    max_new_tokens: int,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    on_token: Callable[[int, int], None] | None,
    agree: Callable[[list[int]], list[int]] | None,
) -> list[list[int]]:
    stop_ids = set(loaded.processor.stop_ids)
    answers: list[list[int]] = [[] for _ in prompts]
    going = list(range(len(prompts)))
    logits_sv = model.prefill([p.input_ids for p in prompts], [p.image_mask for p in prompts], embed_images(loaded, prompts))
    while True:
        chosen = [_choose(logits_v, sampling, generators[number]) for number, logits_v in zip(going, logits_sv, strict=True)]
        chosen = chosen if agree is None else agree(chosen)
        staying = [row for row, token in enumerate(chosen) if token not in stop_ids]
        for row in staying:
            answers[going[row]].append(chosen[row])
            if on_token is not None:
                on_token(going[row], chosen[row])
        # going prompts are equally far: all began together
        if not staying or len(answers[going[staying[0]]]) == max_new_tokens:
            return answers
        if len(staying) < len(going):
            model.keep(staying)
            going = [going[row] for row in staying]
        logits_sv = model.append([chosen[row] for row in staying])


def _generator(seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(((seed << 20) + number) % 2**63)


def _choose(logits_v: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    if sampling.temperature == 0:
        return int(logits_v.argmax())
    logits_v, tokens = logits_v.double().cpu().sort(descending=True, stable=True)
    if sampling.top_k:
        logits_v = logits_v[: sampling.top_k]
    probabilities = ((logits_v - logits_v[0]) / sampling.temperature).softmax(-1)  # of differences: no temperature is too low
    before = probabilities.cumsum(-1) - probabilities
    probabilities = torch.where(before < sampling.top_p, probabilities, 0.0)
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])
