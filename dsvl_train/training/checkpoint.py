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

import torch.distributed as dist

from dsvl_train.config.compose import to_yaml
from dsvl_train.config.schema import RunConfig
from dsvl_train.interop.native import CONFIG_FILE, LATEST_FILE, PROCESSOR_FOLDER, STATE_FILE, read_boxes, write_boxes
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
    guard: dict[str, Any] = field(default_factory=dict)
    """What `UpdateGuard` remembers."""


def step_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lives."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def save(folder: Path, cfg: RunConfig, model: VisionLanguageModel, optimiser: Optimiser, state: TrainState) -> None:
    """Write a checkpoint; every rank calls. It gets its name, and `latest` its content, when all shards are on disk."""
    is_main = dist.get_rank() == 0
    unfinished = folder.with_name(f".unfinished_{folder.name}")
    if is_main:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    dist.barrier()
    write_boxes(unfinished, optimiser.boxes(model))
    if is_main:
        _copy_processor(Path(cfg.data.processor), unfinished / PROCESSOR_FOLDER)
        (unfinished / CONFIG_FILE).write_text(to_yaml(cfg))
        (unfinished / STATE_FILE).write_text(json.dumps(vars(state), indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(unfinished, folder)
        _write_atomically(folder.parent / LATEST_FILE, folder.name + "\n")
        _remove_old(folder.parent, cfg.checkpoint.keep_last)
    dist.barrier()


def load(folder: Path, model: VisionLanguageModel, optimiser: Optimiser) -> TrainState:
    """Read weights and optimiser state; every rank calls.

    Raises:
        ValueError: a tensor is missing or has another shape; names it.
    """
    state = TrainState(**json.loads((folder / STATE_FILE).read_text()))
    with optimiser.restoring(model, state.updates) as boxes:
        read_boxes(folder, boxes)
    return state


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
