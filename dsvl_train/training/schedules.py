"""Learning-rate schedules: pure functions of the step.

The papers use three: cosine in alignment, "step" in pretraining, cosine (VL Table 4) or constant (VL2 Table 2) in SFT.
"""

from __future__ import annotations

import itertools
import math

from dsvl_train.config.schema import ScheduleConfig

_STEP_TOLERANCE = 1e-6
"""Steps by which a milestone may lie past a whole step and still count as on it: 0.55 * 100 is 55.00000000000001."""


def learning_rate(step: int, max_steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """Learning rate of one optimiser step, before any per-parameter multiplier.

    step: from 1 to max_steps. A later step keeps the last value, so evaluation or an extra step after the end is well defined.
    peak: `optim.lr`.

    * Warm-up is linear from 0: step k of w gets peak * k / w, so step w is the first at the peak. A warm-up longer than the run
      is allowed (short trials of long recipes); the peak is then never reached.
    * cosine: from the peak at the last warm-up step to min_ratio * peak at max_steps, exactly.
    * step: after a milestone's share of max_steps is done, its factor holds. With milestone 0.5 of 100 steps, step 50 is the last
      at the peak and step 51 the first after it. VL2 Table 2 divides by sqrt(10) at 50 % and 75 %; VL Table 4's "step" is taken as
      DeepSeek-LLM's: x0.316 at 80 %, x0.1 at 90 %. A milestone inside the warm-up scales the warm-up.
    * constant: the peak after the warm-up.

    Raises ValueError for a step below 1, a run without steps, or milestones and factors that do not fit together.
    """
    if max_steps < 1:
        raise ValueError(f"run.max_steps is {max_steps}; a run has at least one step")
    if step < 1:
        raise ValueError(f"step is {step}; steps count from 1")
    step = min(step, max_steps)
    warmup = schedule.warmup_steps
    warmth = min(1.0, step / warmup) if warmup > 0 else 1.0
    return peak * warmth * _shape(step, max_steps, schedule)


def _shape(step: int, max_steps: int, schedule: ScheduleConfig) -> float:
    """The schedule over the peak, warm-up apart."""
    if schedule.kind == "constant":
        return 1.0
    if schedule.kind == "cosine":
        return _cosine(step, max_steps, schedule)
    if schedule.kind == "step":
        return _milestone_factor(step, max_steps, schedule)
    raise ValueError(f"optim.schedule.kind is {schedule.kind!r}; it is one of cosine, step, constant")


def _cosine(step: int, max_steps: int, schedule: ScheduleConfig) -> float:
    warmup = max(schedule.warmup_steps, 0)
    if step <= warmup:
        return 1.0
    progress = (step - warmup) / (max_steps - warmup)
    return schedule.min_ratio + (1.0 - schedule.min_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))


def _milestone_factor(step: int, max_steps: int, schedule: ScheduleConfig) -> float:
    milestones, factors = schedule.milestones, schedule.factors
    if len(milestones) != len(factors):
        raise ValueError(
            f"optim.schedule.milestones has {len(milestones)} entries ({milestones}) and optim.schedule.factors {len(factors)} "
            f"({factors}); each milestone needs one factor"
        )
    if any(not 0.0 <= m <= 1.0 for m in milestones) or any(a >= b for a, b in itertools.pairwise(milestones)):
        raise ValueError(f"optim.schedule.milestones is {milestones}; they are rising fractions of run.max_steps, between 0 and 1")
    done = step - 1
    factor = 1.0
    for milestone, value in zip(milestones, factors, strict=True):
        if done >= milestone * max_steps - _STEP_TOLERANCE:
            factor = value
    return factor
