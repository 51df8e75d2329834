"""Which folder is what: run, checkpoint or released model."""

from __future__ import annotations

import re
from pathlib import Path

from dsvl_train.checkpoints.manifest import MANIFEST_FILE, DamagedCheckpointError, check

STATE_FILE = "state.json"
"""Step, data cursor, updates, counters."""
CONFIG_FILE = "config.yaml"
PROCESSOR_FOLDER = "processor"
"""Tokenizer and processor files, so that a checkpoint alone is enough to use the model."""
LATEST_FILE = "latest"
CHECKPOINTS = "checkpoints"
"""Folder of a run's checkpoints in its run folder."""

_STEP = re.compile(r"step_(\d{8,})")


def step_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lives."""
    return run_dir / CHECKPOINTS / f"step_{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step that a checkpoint's name says; None where it says none."""
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match else None


def list_steps(run_dir: Path) -> list[Path]:
    """The run's checkpoint folders by step, damaged ones too."""
    found = [(step, path) for path in (run_dir / CHECKPOINTS).glob("step_*") if (step := step_of(path)) is not None and path.is_dir()]
    return [path for _, path in sorted(found)]


def named_latest(run_dir: Path) -> Path | None:
    """The folder that `latest` names, there or not; None where there is no `latest`.

    Raises:
        DamagedCheckpointError: it holds something else than a checkpoint's name.
    """
    pointer = run_dir / CHECKPOINTS / LATEST_FILE
    try:
        name = pointer.read_bytes().decode(errors="backslashreplace").strip()
    except FileNotFoundError:
        return None
    if not _STEP.fullmatch(name):
        raise DamagedCheckpointError(pointer, [f"it says {name!r}, which is no name of a checkpoint"])
    return pointer.parent / name


def candidates(run_dir: Path) -> list[Path]:
    """What a run may go on from, the best first: what `latest` names, then earlier steps. Nothing else is read.

    Where `latest` is missing though there are checkpoints (the run was killed just before it was written, or somebody removed it), all
    of them, the newest step first.

    Raises:
        DamagedCheckpointError: `latest` holds something else than a checkpoint's name.
    """
    latest, steps = named_latest(run_dir), list(reversed(list_steps(run_dir)))
    if latest is None:
        return steps
    return [latest, *(path for path in steps if (step_of(path) or 0) < (step_of(latest) or 0))]


def find_latest(run_dir: Path) -> Path | None:
    """The run's newest checkpoint, all its files there in their sizes; None where there is none.

    Raises:
        ValueError: it is damaged.
    """
    found = candidates(run_dir)
    if not found:
        return None
    check(found[0], full=False)
    return found[0]


def steps_done(run_dir: Path) -> int:
    """Step of the run's newest checkpoint; 0 without one, or if it is damaged: the run knows from which other one to go on."""
    try:
        latest = find_latest(run_dir)
    except DamagedCheckpointError:
        return 0
    return 0 if latest is None else step_of(latest) or 0


def looks_like_checkpoint(path: Path) -> bool:
    """Whether a folder is a checkpoint of ours, whole or not."""
    return any((path / name).is_file() for name in (MANIFEST_FILE, STATE_FILE))


def resolve(path: str | Path) -> Path:
    """A checkpoint folder, or a run folder's latest, all its files there in their sizes.

    Raises:
        ValueError: neither, or it is damaged; names the file.
    """
    path = Path(path)
    if looks_like_checkpoint(path):
        check(path, full=False)
        return path
    latest = find_latest(path)
    if latest is None:
        raise ValueError(f"{path} is neither a checkpoint (no {MANIFEST_FILE}) nor a run folder with one (no {CHECKPOINTS}/{LATEST_FILE})")
    return latest
