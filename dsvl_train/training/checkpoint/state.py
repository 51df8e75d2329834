"""What a checkpoint of a run holds: a few numbers, and the tensors of model and optimiser.

No state of a random generator is among it: no step draws a random number, and the order of the data is a function of seed and step.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsvl_train.checkpoints.folders import STATE_FILE
from dsvl_train.interop.native import read_boxes
from dsvl_train.models.vlm import VisionLanguageModel
from dsvl_train.training.engine import Optimiser


@dataclass
class TrainState:
    """What a run needs beside tensors to go on where it was."""

    step: int
    data: dict[str, Any]
    """The data pipeline's cursor."""
    updates: dict[str, int]
    """Optimiser updates per chunk; Adam's bias correction counts them."""
    bad_samples: int
    """Bad samples so far, on all ranks, each counted once."""
    samples_seen: int = 0
    """Different samples that the steps so far held."""
    totals: dict[str, int] = field(default_factory=dict)
    """Sums over the steps so far: tokens, supervised_tokens, tiles."""
    guard: dict[str, Any] = field(default_factory=dict)
    """What `UpdateGuard` remembers."""


def load(folder: Path, model: VisionLanguageModel, optimiser: Optimiser) -> TrainState:
    """Read weights and optimiser state; every rank calls.

    Raises:
        ValueError: a tensor is missing or has another shape; names it.
    """
    state = TrainState(**json.loads((folder / STATE_FILE).read_text(encoding="utf-8")))
    with optimiser.restoring(model, state.updates) as boxes:
        read_boxes(folder, boxes)
    return state
