"""Saving behind the training: the training thread copies, a background thread of each rank writes.

A save has two phases in the background: every rank writes its files, then rank 0 publishes (`checkpoints.publication`). Between them and
after them the training threads of all ranks meet at the end of a step (`Saver.poll`), exchange what came of it, and so go on alike: no
background thread talks to another rank, and an error of one rank's disk is every rank's error in the same step.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from dsvl_train.checkpoints.durable import FileEntry, write_file
from dsvl_train.checkpoints.folders import CHECKPOINTS, CONFIG_FILE, PROCESSOR_FOLDER, STATE_FILE, step_folder
from dsvl_train.checkpoints.manifest import Manifest
from dsvl_train.checkpoints.publication import publish, saving_folder
from dsvl_train.checkpoints.retention import remove_old
from dsvl_train.config.compose import to_plain, to_yaml
from dsvl_train.config.schema import RunConfig
from dsvl_train.interop.native import Box, write_boxes
from dsvl_train.models.vlm import VisionLanguageModel
from dsvl_train.parallel.startup import World
from dsvl_train.training.checkpoint.agreement import all_agree, gather
from dsvl_train.training.checkpoint.snapshot import HostCopy
from dsvl_train.training.checkpoint.state import TrainState
from dsvl_train.training.engine import Optimiser

_log = logging.getLogger(__name__)
T = TypeVar("T")

_PATIENCE_S = 0.1


class CheckpointError(OSError):
    """A checkpoint could not be written; says where, why, and what is left."""


@dataclass
class _Save:
    """A save on its way."""

    final: Path
    step: int
    boxes: list[tuple[str, Box]]
    small_files: dict[str, bytes]
    """Of rank 0."""
    work: Future[Any]
    """What this rank's background thread does now."""
    attempt: int = 1
    publishing: bool = False
    folders: list[Path] = field(default_factory=list)
    """Hidden folders of all attempts."""


class Saver:
    """Saves checkpoints of a run. Every rank calls every method at the same step."""

    def __init__(self, cfg: RunConfig, world: World, model: VisionLanguageModel, optimiser: Optimiser) -> None:
        self._cfg, self._world = cfg, world
        self._run_dir = Path(cfg.run.dir)
        self._copy = HostCopy(model, optimiser)
        self._constant = _constant_files(cfg) if world.is_main else {}
        self._save: _Save | None = None
        self._stall_s = 0.0
        self.failures = 0
        """Saves that were given up."""

    def save(self, state: TrainState, *, last: bool = False) -> list[Path]:
        """Save the state as it is now. A save that is on its way is finished first: there is one copy in memory.

        Args:
            last: nothing is saved after this, so wait for it, and take a failure for an error whatever checkpoint.on_error says.

        Returns:
            The checkpoints that were published by this call.

        Raises:
            CheckpointError: a checkpoint could not be written for good, and checkpoint.on_error=stop or it was the last.
        """
        published = self.finish()
        started = time.perf_counter()
        state_file = {STATE_FILE: json.dumps(vars(state), indent=1).encode()}
        boxes = self._copy.take()
        small_files = self._constant | state_file if self._world.is_main else {}
        self._save = _Save(step_folder(self._run_dir, state.step), state.step, boxes, small_files, work=Future())
        self._start_writing(self._save)
        self._stall_s += time.perf_counter() - started
        if last or not self._cfg.checkpoint.asynchronous:
            published += self.finish(last=last)
        return published

    def poll(self) -> list[Path]:
        """Bring a save on its way one phase further if all ranks are ready. Returns the checkpoint that was published by it, if any.

        Raises:
            CheckpointError: as `save`.
        """
        return self._advance(patient=False) if self._save is not None else []

    def finish(self, *, last: bool = False) -> list[Path]:
        """Wait for the save on its way; arguments, result and errors as those of `save`."""
        published: list[Path] = []
        failures = self.failures
        while self._save is not None:
            published += self._advance(patient=True)
        if last and self.failures > failures:
            raise CheckpointError(f"the last checkpoint of this run could not be written; {self._what_is_left()}")
        return published

    def take_stall_s(self) -> float:
        """Seconds for which the training thread stood still for checkpoints since the last call."""
        stall_s, self._stall_s = self._stall_s, 0.0
        return stall_s

    # ------------------------------------------------------------------------------------------------------------ phases

    def _advance(self, *, patient: bool) -> list[Path]:
        save, started = self._save, time.perf_counter()
        assert save is not None
        try:
            while not all_agree(save.work.done(), self._world.device):
                if not patient:
                    return []
                wait([save.work], timeout=_PATIENCE_S)  # all ranks ask again and again: no collective waits for a slow disk
            files, errors = _together(gather(_outcome(save.work)))
            if errors:
                self._fail(save, errors)
                return []
            if not save.publishing:
                self._start_publishing(save, files)
                return []
            self._save = None
            return [save.final]
        finally:
            self._stall_s += time.perf_counter() - started

    def _start_writing(self, save: _Save, pause_s: float = 0.0) -> None:
        folder = saving_folder(save.final, save.attempt)
        name = f"shard_{self._world.rank + 1:05d}_of_{self._world.size:05d}.safetensors"
        litter = list(save.folders) if self._world.is_main else []
        save.folders.append(folder)
        save.publishing = False

        def write() -> dict[str, FileEntry]:
            time.sleep(pause_s)
            for path in litter:
                shutil.rmtree(path, ignore_errors=True)
            return _write(folder, name, save.boxes, save.small_files)

        save.work = _in_background(write)

    def _start_publishing(self, save: _Save, files: dict[str, FileEntry]) -> None:
        save.publishing = True
        if not self._world.is_main:
            save.work = Future()
            save.work.set_result({})
            return
        manifest = Manifest(save.step, dict(sorted(files.items())), layout=_layout(self._cfg, self._world))
        retention = self._cfg.checkpoint

        def publish_and_tidy() -> dict[str, FileEntry]:
            publish(save.folders[-1], save.final, manifest)
            try:
                remove_old(self._run_dir, keep_last=retention.keep_last, keep_every=retention.keep_every)
            except (OSError, ValueError) as error:
                _log.warning("checkpoint %s is saved, but an old one could not be removed: %s", save.final.name, error)
            return {}

        save.work = _in_background(publish_and_tidy)

    def _fail(self, save: _Save, errors: list[str]) -> None:
        settings = self._cfg.checkpoint
        what = f"{save.final} could not be written: {'; '.join(errors[:3])}"
        what += f" (and {len(errors) - 3} more ranks)" if len(errors) > 3 else ""
        if save.attempt <= settings.retries:
            if self._world.is_main:
                _log.warning("%s; trying again in %g s (%d of %d)", what, settings.retry_s, save.attempt, settings.retries)
            save.attempt += 1
            self._start_writing(save, pause_s=settings.retry_s)
            return
        self._save = None
        self.failures += 1
        if self._world.is_main:
            for folder in save.folders:
                shutil.rmtree(folder, ignore_errors=True)
        if settings.on_error == "stop":
            raise CheckpointError(f"{what}. {self._what_is_left()}; checkpoint.on_error=continue trains on instead")
        if self._world.is_main:
            _log.warning("%s. Training goes on without it (checkpoint.on_error=continue)", what)

    def _what_is_left(self) -> str:
        return f"earlier checkpoints in {self._run_dir / CHECKPOINTS} are as they were, and the same command goes on from the latest"


def _write(folder: Path, name: str, boxes: Iterable[tuple[str, Box]], small_files: Mapping[str, bytes]) -> dict[str, FileEntry]:
    """Write this rank's files, durably; runs in the background."""
    folder.mkdir(parents=True, exist_ok=True)
    written = write_boxes(folder / name, boxes)
    for path, data in small_files.items():
        (folder / path).parent.mkdir(exist_ok=True)
        written[path] = write_file(folder / path, data)
    return written


def _in_background(work: Callable[[], T]) -> Future[T]:
    """Run in a thread that does not keep a process alive that ends for another reason."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="checkpoint", daemon=True).start()
    return future


def _outcome(work: Future[dict[str, FileEntry]]) -> tuple[dict[str, FileEntry], str]:
    """The files that were written, and what went wrong in words."""
    error = work.exception()
    if error is None:
        return work.result(), ""
    return {}, str(error) if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {error}"


def _together(outcomes: list[tuple[dict[str, FileEntry], str]]) -> tuple[dict[str, FileEntry], list[str]]:
    files = {name: entry for of_rank, _ in outcomes for name, entry in of_rank.items()}
    return files, [f"rank {rank}: {error}" for rank, (_, error) in enumerate(outcomes) if error]


def _constant_files(cfg: RunConfig) -> dict[str, bytes]:
    """What every checkpoint holds alike; read once, so that a data folder that vanishes later costs no checkpoint."""
    processor = {f"{PROCESSOR_FOLDER}/{file.name}": file.read_bytes() for file in sorted(Path(cfg.data.processor).glob("*.json"))}
    return {CONFIG_FILE: to_yaml(cfg).encode(), **processor}


def _layout(cfg: RunConfig, world: World) -> dict[str, Any]:
    return {"ranks": world.size, "dp": world.dp_size, "precision": str(world.params_dtype).removeprefix("torch."), **to_plain(cfg.parallel)}
