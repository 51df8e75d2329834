"""From which checkpoint a run goes on: found and verified by all ranks together, never silently another one, never silently none."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import torch.distributed as dist

from dsvl_train.checkpoints.folders import CHECKPOINTS, LATEST_FILE, candidates, list_steps, looks_like_checkpoint
from dsvl_train.checkpoints.manifest import DamagedCheckpointError, find_damage, find_strangers, read_manifest
from dsvl_train.checkpoints.publication import clear_leftovers, point_latest
from dsvl_train.config.schema import RunConfig
from dsvl_train.training.checkpoint.agreement import from_main, gather

_log = logging.getLogger(__name__)


def prepare_resume(cfg: RunConfig) -> Path | None:
    """Clear what a killed run left in the run folder, and choose the checkpoint to go on from; every rank calls.

    Returns:
        A verified checkpoint, or None: start anew (resume=none, or no checkpoint was ever published).

    Raises:
        ValueError: the checkpoint is damaged (names the files), and checkpoint.fallback is off or finds no other; nothing is at
            resume=PATH.
        OSError: the run folder cannot be read or written.
    """
    run_dir = Path(cfg.run.dir)
    gone = from_main(lambda: clear_leftovers(run_dir))
    if gone and dist.get_rank() == 0:
        _log.info("cleared %s, which a run that was killed had left", ", ".join(gone))
    if cfg.resume == "none":
        return None
    if cfg.resume != "auto" and looks_like_checkpoint(Path(cfg.resume)):
        folder = Path(cfg.resume)
        _require_whole(folder, cfg)
        return folder
    source = run_dir if cfg.resume == "auto" else Path(cfg.resume)
    folders = from_main(lambda: _find(source, cfg))
    if not folders and cfg.resume != "auto":
        raise ValueError(f"resume={cfg.resume}: neither a checkpoint nor a run folder with one; resume=none starts anew")
    return _first_whole(folders, source, cfg) if folders else None


def verify_together(folder: Path, *, full: bool) -> None:
    """Check a checkpoint, each rank its share of the files; every rank calls.

    Raises:
        DamagedCheckpointError: on every rank, with the problems that any of them found.
    """
    try:
        manifest = read_manifest(folder)
        by_size = sorted(manifest.files.items(), key=lambda item: (-item[1].bytes, item[0]))
        mine = find_damage(folder, dict(by_size[dist.get_rank() :: dist.get_world_size()]), full=full)
        problems = mine + (find_strangers(folder, manifest) if dist.get_rank() == 0 else [])
    except DamagedCheckpointError as error:
        problems = error.problems
    found = dict.fromkeys(problem for of_rank in gather(problems) for problem in of_rank)
    if found:
        raise DamagedCheckpointError(folder, found)


def _find(source: Path, cfg: RunConfig) -> list[Path]:
    try:
        return candidates(source)
    except DamagedCheckpointError as error:
        if not cfg.checkpoint.fallback:
            raise ValueError(f"{error}; {_ways_out(source)}") from error
        _log.warning("%s; looking for the newest good checkpoint (checkpoint.fallback=true)", error)
        return list(reversed(list_steps(source)))


def _first_whole(folders: list[Path], source: Path, cfg: RunConfig) -> Path:
    is_main, damaged = dist.get_rank() == 0, []
    for folder in folders:
        try:
            verify_together(folder, full=cfg.checkpoint.verify == "full")
        except DamagedCheckpointError as error:
            if not cfg.checkpoint.fallback:
                raise ValueError(f"{error}; {_ways_out(source)}") from error
            damaged.append(str(error))
            continue
        if damaged and is_main:
            _log.warning("%s; going on from %s instead (checkpoint.fallback=true)", "; ".join(damaged), folder.name)
        if source == Path(cfg.run.dir):
            from_main(partial(_let_latest_name, folder))
        return folder
    raise ValueError(f"no good checkpoint in {source / CHECKPOINTS}: {'; '.join(damaged)}. resume=none starts anew")


def _require_whole(folder: Path, cfg: RunConfig) -> None:
    try:
        verify_together(folder, full=cfg.checkpoint.verify == "full")
    except DamagedCheckpointError as error:
        raise ValueError(f"resume={cfg.resume}: {error}; name another checkpoint") from error


def _let_latest_name(folder: Path) -> None:
    pointer = folder.parent / LATEST_FILE
    if not pointer.is_file() or pointer.read_bytes() != f"{folder.name}\n".encode():
        point_latest(folder)


def _ways_out(source: Path) -> str:
    return (
        "checkpoint.fallback=true goes on from the newest good checkpoint before it, resume=PATH from the one at PATH, resume=none starts "
        f"anew; `dsvl checkpoint list {source}` shows what there is"
    )
