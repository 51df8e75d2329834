"""Saving and resuming a run. The format is `interop.native`'s; the optimiser's tensors lie beside the model's.

A folder becomes visible under its name only when it is complete, and `checkpoints/latest` names it after that.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dsvl_train.config.compose import to_yaml
from dsvl_train.config.schema import RunConfig
from dsvl_train.interop.native import CONFIG_FILE, LATEST_FILE, PROCESSOR_FOLDER, STATE_FILE, Box, box, model_boxes, read_boxes, write_boxes
from dsvl_train.models.logical import logical_tensors
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
    guard: dict[str, Any] = field(default_factory=dict)
    """What `UpdateGuard` remembers."""


def step_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lives."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def save(folder: Path, cfg: RunConfig, model: VisionLanguageModel, optimiser: ModalityOptimiser, state: TrainState) -> None:
    """Write a checkpoint; every rank calls. It gets its name, and `latest` its content, when all shards are on disk."""
    is_main = dist.get_rank() == 0
    unfinished = folder.with_name(f".unfinished_{folder.name}")
    if is_main:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    dist.barrier()
    write_boxes(unfinished, model_boxes(model) | _OptimiserTensors(model, optimiser).boxes)
    if is_main:
        _copy_processor(Path(cfg.data.processor), unfinished / PROCESSOR_FOLDER)
        (unfinished / CONFIG_FILE).write_text(to_yaml(cfg))
        (unfinished / STATE_FILE).write_text(json.dumps(vars(state), indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(unfinished, folder)
        _write_atomically(folder.parent / LATEST_FILE, folder.name + "\n")
        _remove_old(folder.parent, cfg.checkpoint.keep_last)
    dist.barrier()


def load(folder: Path, model: VisionLanguageModel, optimiser: ModalityOptimiser) -> TrainState:
    """Read weights and optimiser state; every rank calls.

    Raises:
        ValueError: a tensor is missing or has another shape; names it.
    """
    state = TrainState(**json.loads((folder / STATE_FILE).read_text()))
    optimiser.create_state(state.updates)
    tensors = _OptimiserTensors(model, optimiser)
    read_boxes(folder, model_boxes(model) | tensors.boxes)
    tensors.absorb()
    return state


class _OptimiserTensors:
    """The optimiser's tensors of this rank's parameters, whole, as boxes to write or to read into."""

    def __init__(self, model: VisionLanguageModel, optimiser: ModalityOptimiser) -> None:
        self.boxes: dict[str, Box] = {}
        self._whole: dict[int, tuple[ParameterState, dict[str, torch.Tensor]]] = {}
        for tensor, local in logical_tensors(model):
            if not isinstance(local, torch.nn.Parameter):
                continue
            if id(local) not in self._whole:  # a parameter may be several logical tensors
                state = optimiser.state_of(local)
                if state is None:
                    continue
                self._whole[id(local)] = state, state.whole(local)
            _, whole = self._whole[id(local)]
            self.boxes |= {f"optim.{name}.{tensor.name}": box(tensor, values) for name, values in whole.items()}

    def absorb(self) -> None:
        """Hand what was read to the optimiser."""
        for state, whole in self._whole.values():
            state.absorb(whole)


def _copy_processor(source: Path, target: Path) -> None:
    target.mkdir()
    for file in sorted(source.glob("*.json")):
        shutil.copyfile(file, target / file.name)


def _write_atomically(path: Path, text: str) -> None:
    scratch = path.with_name(f".{path.name}.new")
    scratch.write_text(text)
    os.replace(scratch, path)


def _remove_old(folder: Path, keep_last: int) -> None:
    if keep_last > 0:
        for old in sorted(folder.glob("step_*"))[:-keep_last]:
            shutil.rmtree(old)
