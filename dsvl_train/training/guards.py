"""Guards of the update: what would harm the model is not applied, on any rank.

Everything here is a function of numbers of the global batch, which every rank is told alike, so every rank decides alike.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsvl_train.config.schema import GuardConfig
from dsvl_train.data.batch import Modality

FILE = "skipped_steps.jsonl"
_LEAST_HISTORY = 16
"""Steps of a modality before spikes are looked for."""
_LEAST_SIGMA = 0.01
"""Of the mean: a standard deviation smaller than this counts as this, or a flat curve would make noise a spike."""


class TrainingDiverged(FloatingPointError):
    """Loss or gradients are not numbers any more, or jumped, for too many steps in a row."""


@dataclass(frozen=True)
class Verdict:
    """What becomes of a step's update."""

    update: bool
    trouble: str | None = None
    """Why the step is remarkable; None = it is not."""


class UpdateGuard:
    """Judges steps in their order.

    A loss or gradient norm that is not finite, and with `guard.spike=skip` one that is more than `guard.spike_sigma` standard deviations
    above the mean of the last `guard.spike_window` steps of its modality, costs the step its update.
    """

    def __init__(self, cfg: GuardConfig) -> None:
        self.cfg = cfg
        self.skipped = self.in_a_row = 0
        self._recent: dict[str, deque[float]] = {}

    def judge(self, step: int, modality: Modality, loss: float, grad_norm: float) -> Verdict:
        """
        Raises:
            TrainingDiverged: this step's update may not be made, and skipping it is switched off or was done guard.max_skipped times in a
                row.
        """
        values = {"loss": loss, "gradient norm": grad_norm}
        trouble = [f"the {name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        update = not trouble
        if not trouble and self.cfg.spike != "off":
            trouble = [spike for name, value in values.items() if (spike := self._spike(name, modality, value))]
            update = not trouble or self.cfg.spike == "warn"
        words = "; ".join(trouble) or None
        if update:
            self.in_a_row = 0
            for name, value in values.items():
                self._window(name, modality).append(value)
        else:
            self._count(step, modality, words or "")
        return Verdict(update, words)

    def state(self) -> dict[str, Any]:
        """JSON-able; what decides about later steps."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "recent": {key: list(values) for key, values in self._recent.items()}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; an empty one is a run's start."""
        self.skipped, self.in_a_row = state.get("skipped", 0), state.get("in_a_row", 0)
        self._recent = {key: deque(values, maxlen=self.cfg.spike_window) for key, values in state.get("recent", {}).items()}

    def _count(self, step: int, modality: Modality, words: str) -> None:
        self.skipped += 1
        self.in_a_row += 1
        if self.cfg.nonfinite == "stop":
            raise TrainingDiverged(f"step {step} ({modality}): {words}; nothing was updated, as guard.nonfinite=stop wants")
        if self.in_a_row >= self.cfg.max_skipped:
            raise TrainingDiverged(
                f"step {step} ({modality}): {words}; this is update {self.in_a_row} in a row that was not made (guard.max_skipped). The "
                f"samples of these steps are in {FILE}; lower optim.lr, or go on from an earlier checkpoint (resume=PATH)"
            )

    def _spike(self, name: str, modality: Modality, value: float) -> str | None:
        window = self._window(name, modality)
        if len(window) < min(_LEAST_HISTORY, self.cfg.spike_window):
            return None
        mean = statistics.fmean(window)
        sigma = max(statistics.pstdev(window, mean), _LEAST_SIGMA * abs(mean))
        above = (value - mean) / sigma if sigma else 0.0
        return f"the {name} {value:.4g} is {above:.1f} sigma above its mean {mean:.4g}" if above > self.cfg.spike_sigma else None

    def _window(self, name: str, modality: Modality) -> deque[float]:
        return self._recent.setdefault(f"{name}/{modality}", deque(maxlen=self.cfg.spike_window))


def note_step(run_dir: Path, record: Mapping[str, Any]) -> None:
    """Append a remarkable step to `skipped_steps.jsonl` in the run folder."""
    with (run_dir / FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
