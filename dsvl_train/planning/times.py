"""How long the steps of a run take and how much of it its pipeline idles, in the unit of the layers' costs; communication is free."""

from __future__ import annotations

from dataclasses import dataclass

from dsvl_train.config.schema import DataConfig, RunConfig
from dsvl_train.models.costs import feed_forward_flops, language_layer_flops, recompute_modules, run_costs, share_of_text_steps
from dsvl_train.parallel.division import Division, LayerCosts
from dsvl_train.parallel.pipeline_simulation import simulate

BACKWARD = 2.0
"""Cost of a backward pass over that of its forward pass, what is computed again apart."""


@dataclass(frozen=True)
class StepTimes:
    """Of the modalities that the run has."""

    makespan: dict[str, float]
    """Modality -> time of a step."""
    bubble: dict[str, float]
    """Modality -> share of the ranks' time that idles."""
    average: float
    """Time of a step, modalities weighted as at the end of the modality warm-up."""


def modalities(data: DataConfig) -> list[str]:
    """Of the steps that the run has."""
    if not data.modality_grouping:
        return ["text"] if share_of_text_steps(data) == 1 else ["multimodal"]
    shares = [data.text_ratio, *([data.text_ratio_start] if data.text_warmup_steps else [])]
    return ["text"] * any(share > 0 for share in shares) + ["multimodal"] * any(share < 1 for share in shares)


def step_times(cfg: RunConfig, division: Division, micro_batches: int) -> StepTimes:
    """Simulate a step of each modality.

    Raises:
        ConfigError: see `run_costs`.
    """
    costs = run_costs(cfg)
    makespan, bubble = {}, {}
    for modality in modalities(cfg.data):
        table = division.chunk_costs(costs, modality == "multimodal")
        timeline = simulate(table, micro_batches, BACKWARD + _run_again(cfg, costs), cfg.parallel.group)
        makespan[modality], bubble[modality] = timeline.makespan, timeline.bubble
    text = share_of_text_steps(cfg.data)
    return StepTimes(makespan, bubble, text * makespan.get("text", 0.0) + (1 - text) * makespan.get("multimodal", 0.0))


def _run_again(cfg: RunConfig, costs: LayerCosts) -> float:
    """Share of the forward pass that the backward pass repeats, as if every chunk repeated as much."""
    language, parallel = cfg.model.language, cfg.parallel
    modules = set(recompute_modules(language, parallel)) if parallel.recompute == "selective" else set()
    again = sum(costs.siglip) + sum(costs.sam) if parallel.vision_recompute else 0.0
    for layer, cost in enumerate(costs.language):
        feed_forward = "mlp" if language.moe is None or layer < language.moe.dense_layers else "moe"
        if parallel.recompute == "full":
            again += cost
        elif feed_forward in modules:
            again += cost * feed_forward_flops(language, layer, cfg.data.seq_len) / language_layer_flops(language, layer, cfg.data.seq_len)
    return again / (costs.vision + sum(costs.language) + costs.language_head)
