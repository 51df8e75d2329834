"""What a checkpoint of a run holds: a few numbers, and the tensors of model and optimiser.

No state of a random generator is among it: no step draws a random number, and the order of the data is a function of seed and step.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dsvl_train.checkpoints.folders import STATE_FILE
from dsvl_train.interop.native import Box, box, model_boxes, read_boxes
from dsvl_train.models.logical import LogicalTensor, logical_tensors
from dsvl_train.models.vlm import VisionLanguageModel
from dsvl_train.training.optimiser import ModalityOptimiser, ParameterState


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


def stored_boxes(model: VisionLanguageModel, optimiser: ModalityOptimiser) -> Iterator[tuple[str, Box]]:
    """Every box of this rank by its stored name. The optimiser's tensors are made whole one parameter at a time; every rank goes through
    all of it."""
    yield from model_boxes(model).items()
    for parameter, state, tensors in _optimiser_states(model, optimiser):
        whole = state.whole(parameter)
        for tensor in tensors:
            for name, values in whole.items():
                yield f"optim.{name}.{tensor.name}", box(tensor, values)


def load(folder: Path, model: VisionLanguageModel, optimiser: ModalityOptimiser) -> TrainState:
    """Read weights and optimiser state; every rank calls.

    Raises:
        ValueError: a tensor is missing or has another shape; names it.
    """
    state = TrainState(**json.loads((folder / STATE_FILE).read_text(encoding="utf-8")))
    optimiser.create_state(state.updates)
    boxes = model_boxes(model)
    read_into: list[tuple[ParameterState, dict[str, torch.Tensor]]] = []
    for parameter, held, tensors in _optimiser_states(model, optimiser):
        whole = held.to_read_into(parameter)
        read_into.append((held, whole))
        boxes |= {f"optim.{name}.{tensor.name}": box(tensor, values) for tensor in tensors for name, values in whole.items()}
    read_boxes(folder, boxes)
    for held, whole in read_into:
        held.absorb(whole)
    return state


def _optimiser_states(
    model: VisionLanguageModel, optimiser: ModalityOptimiser
) -> Iterator[tuple[torch.nn.Parameter, ParameterState, list[LogicalTensor]]]:
    """Each parameter that the optimiser has stepped, with the logical tensors (several, where gate and up are one) that it stores."""
    stores: dict[int, tuple[torch.nn.Parameter, list[LogicalTensor]]] = {}
    for tensor, local in logical_tensors(model):
        if isinstance(local, torch.nn.Parameter):
            stores.setdefault(id(local), (local, []))[1].append(tensor)
    for parameter, tensors in stores.values():
        state = optimiser.state_of(parameter)
        if state is not None:
            yield parameter, state, tensors
