"""Mixing: how much of a step is text, and which source the next sample comes from. Pure functions.

Both are decided by error diffusion: each choice adds what was wanted to a running error and takes what is most owed, so the realised
shares track the wanted ones from the first step on, without luck. Source weights count **samples** within a modality (not tokens): a
weight of 2 draws twice as many samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dsvl_train.config.schema import DataConfig, SourceConfig
from dsvl_train.data.batch import Modality

Shape = Literal["linear", "cosine", "step"]


@dataclass(frozen=True)
class TextShareSchedule:
    """The modality warm-up (VL §3.2.2): the wanted share of text, from `start` to `target`."""

    start: float
    target: float
    warmup_steps: int = 0
    shape: Shape = "linear"

    def at(self, step: int) -> float:
        """The wanted share at a step, from 1. Step 1 has `start`, step warmup_steps + 1 and all later ones `target`."""
        if step > self.warmup_steps:
            return self.target
        done = (step - 1) / self.warmup_steps
        if self.shape == "step":
            done = 0.0
        elif self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.start + (self.target - self.start) * done


def text_share_schedule(cfg: DataConfig) -> TextShareSchedule:
    """The schedule that a configuration asks for; text alone when every source is text.

    Raises:
        ValueError: shares outside 0 to 1, or a share of text steps that the sources cannot give.
    """
    for name, value in (("text_ratio", cfg.text_ratio), ("text_ratio_start", cfg.text_ratio_start)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"data.{name}={value} is not a share: set it between 0 and 1")
    if cfg.text_warmup_steps < 0:
        raise ValueError(f"data.text_warmup_steps={cfg.text_warmup_steps} is negative: set it to 0 or more")
    drawn = {source.modality for source in cfg.sources.values() if source.weight > 0}
    if not drawn:
        raise ValueError("data.sources names no source with a weight above 0: nothing to train on")
    warms_up = cfg.text_warmup_steps > 0
    if drawn == {"text"}:
        if cfg.text_ratio < 1.0 or (warms_up and cfg.text_ratio_start < 1.0):
            raise ValueError(
                f"data.text_ratio={cfg.text_ratio} asks for multimodal steps, but every source in data.sources has modality text: "
                "add a multimodal source, or set data.text_ratio=1 and data.text_warmup_steps=0"
            )
        return TextShareSchedule(1.0, 1.0)
    if drawn == {"multimodal"}:
        if cfg.text_ratio > 0.0 or (warms_up and cfg.text_ratio_start > 0.0):
            raise ValueError(
                f"data.text_ratio={cfg.text_ratio} with data.text_warmup_steps={cfg.text_warmup_steps} asks for text steps, but no source "
                "in data.sources has modality text: add a text source, or set data.text_ratio=0 and data.text_warmup_steps=0"
            )
        return TextShareSchedule(0.0, 0.0)
    return TextShareSchedule(cfg.text_ratio_start, cfg.text_ratio, cfg.text_warmup_steps, cfg.text_warmup_shape)


def count_text(target_sum: float, text_done: float, parts: int) -> int:
    """How many parts of a step are text, by error diffusion.

    Args:
        target_sum: sum of the wanted shares of all steps up to and **including** this one.
        text_done: sum of the text shares of the steps before this one.
        parts: 1 where a step has one modality; the sequences of the global batch where it mixes them (data.modality_grouping=false).

    With this rule |text_done - target_sum| <= 1 / (2 * parts) after every step: counted in parts, the error is in [-1/2, 1/2) before, a
    number in [0, parts] is added, and as many whole parts are taken away as bring the result back.
    """
    return min(max(math.floor((target_sum - text_done) * parts + 0.5), 0), parts)


def normalised_weights(sources: Mapping[str, SourceConfig], modality: Modality) -> dict[str, float]:
    """Shares of a modality's sources, in their order; all 0 when none has a weight.

    Raises:
        ValueError: a weight that is negative or not a number.
    """
    for name, source in sources.items():
        if not (math.isfinite(source.weight) and source.weight >= 0):
            raise ValueError(f"data.sources.{name}.weight={source.weight}: set a number of 0 or more")
    weights = {name: source.weight for name, source in sources.items() if source.modality == modality}
    total = sum(weights.values())
    return {name: weight / total if total > 0 else 0.0 for name, weight in weights.items()}


def draw_sources(weights: Sequence[float], credits: Sequence[float], count: int) -> tuple[list[int], list[float]]:
    """The sources of the next `count` samples, and the credits after them.

    Every draw credits each source with its weight (they sum to 1) and takes one from the most credited, ties to the first. The credits
    sum to 0 and stay above -1: no source is ever a whole sample ahead of its share.
    """
    credit = list(credits)
    chosen = []
    for _ in range(count):
        credit = [have + weight for have, weight in zip(credit, weights, strict=True)]
        best = max(range(len(credit)), key=credit.__getitem__)
        credit[best] -= 1.0
        chosen.append(best)
    return chosen, credit
