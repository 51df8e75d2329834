"""The nearest layout that fits: as few settings changed as possible, and of those the fastest."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dsvl_train.config.errors import ConfigError
from dsvl_train.config.schema import RunConfig
from dsvl_train.config.validate import validate
from dsvl_train.planning.memory import LayoutPlan, plan_layout
from dsvl_train.planning.parameters import Part, PartSize

MOST_CHANGES = 4
MOST_TENSOR_PARALLEL = 8
"""Tensor parallelism beyond one machine's GPUs is slow."""


NEARLY_AS_FAST = 1.15
"""Predicted times leave communication out, so differences below this say little."""


@dataclass(frozen=True)
class Change:
    """One setting, as one would type it."""

    key: str
    value: object

    def __str__(self) -> str:
        shown = str(self.value).lower() if isinstance(self.value, bool) else str(self.value)
        return f"{self.key}={shown}"


@dataclass(frozen=True)
class Found:
    """A layout that fits."""

    changes: tuple[Change, ...]
    plan: LayoutPlan


def nearest_that_fits(
    cfg: RunConfig, world_size: int, limit: float, sizes: dict[Part, PartSize], tiles: float | None = None
) -> Found | None:
    """The layout of the same number of processes with the fewest changes whose fullest rank needs at most `limit` bytes.

    Of several with as many changes, one that leaves the run's numbers as they are (all but optim.moments_dtype do); of the fastest of
    these, one with the least tensor and pipeline parallelism.

    Args:
        sizes: `part_sizes` of the model and stage.
        tiles: see `plan_layout`.
    """
    for number in range(1, MOST_CHANGES + 1):
        fitting = [found for found in _candidates(cfg, world_size, number, sizes, tiles) if found.plan.peak <= limit]
        if fitting:
            return _best(fitting)
    return None


def _best(fitting: list[Found]) -> Found:
    same_numbers = [found for found in fitting if not any(change.key == "optim.moments_dtype" for change in found.changes)]
    fitting = same_numbers or fitting
    fastest = min(found.plan.times.average for found in fitting)
    fast = [found for found in fitting if found.plan.times.average <= fastest * NEARLY_AS_FAST]
    return min(fast, key=lambda found: (found.plan.cfg.parallel.tp, found.plan.cfg.parallel.pp, found.plan.times.average, found.plan.peak))


def _candidates(cfg: RunConfig, world_size: int, number: int, sizes: dict[Part, PartSize], tiles: float | None) -> Iterator[Found]:
    for settings in itertools.combinations(_options(cfg, world_size, sizes), number):
        for changes in itertools.product(*settings):
            changed = copy.deepcopy(cfg)
            for change in changes:
                section, _, name = change.key.partition(".")
                setattr(getattr(changed, section), name, change.value)
            try:
                validate(changed, world_size, cfg.engine.device)
            except ConfigError:
                continue
            scaled = None if tiles is None else tiles * changed.data.micro_batch_size / cfg.data.micro_batch_size
            yield Found(changes, plan_layout(changed, world_size, scaled, sizes))


def _options(cfg: RunConfig, world_size: int, sizes: dict[Part, PartSize]) -> Sequence[Sequence[Change]]:
    """Setting -> the values that it may change to."""
    parallel, data, language = cfg.parallel, cfg.data, cfg.model.language
    divisors = [number for number in range(1, world_size + 1) if world_size % number == 0]
    recompute: dict[str, list[object]] = {"none": ["selective", "full"], "selective": ["full"], "full": []}
    values: dict[str, list[object]] = {
        "parallel.tp": [n for n in divisors if n <= MOST_TENSOR_PARALLEL and n != parallel.tp],
        "parallel.pp": [n for n in divisors if n <= language.layers and n != parallel.pp],
        "parallel.ep": [n for n in divisors if language.moe and language.moe.routed_experts % n == 0 and n != parallel.ep],
        "parallel.distributed_optimizer": [] if parallel.distributed_optimizer else [True],
        "optim.moments_dtype": ["bf16"] if cfg.optim.moments_dtype == "fp32" else [],
        "parallel.recompute": recompute[parallel.recompute],
        "parallel.group": [n for n in (parallel.pp, 2 * parallel.pp) if parallel.pp > 1 and n != parallel.group],
        "data.micro_batch_size": [n for n in range(1, data.micro_batch_size) if data.micro_batch_size % n == 0],
    }
    encoder_trains = any(size.trains for part, size in sizes.items() if part.startswith(("siglip.", "sam.")))
    if encoder_trains:
        values["parallel.vision_recompute"] = [] if parallel.vision_recompute else [True]
        values["parallel.vision_tp"] = ["shard"] if parallel.vision_tp == "recompute" else []
    return [[Change(key, value) for value in options] for key, options in values.items() if options]
