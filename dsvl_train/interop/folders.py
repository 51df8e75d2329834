"""Which folder is what: run, checkpoint or released model. Paths only, so that reading a folder's processor needs no model code."""

from __future__ import annotations

from pathlib import Path

STATE_FILE = "state.json"
"""Step, data cursor, updates; written last, so a folder that has it is whole."""
CONFIG_FILE = "config.yaml"
PROCESSOR_FOLDER = "processor"
"""Tokenizer and processor files, so that a checkpoint alone is enough to use the model."""
LATEST_FILE = "latest"


def find_latest(run_dir: Path) -> Path | None:
    """The run's newest complete checkpoint, or None.

    Raises:
        ValueError: `checkpoints/latest` names a folder that is not a checkpoint.
    """
    pointer = run_dir / "checkpoints" / LATEST_FILE
    if not pointer.exists():
        return None
    folder = pointer.parent / pointer.read_text().strip()
    if not (folder / STATE_FILE).is_file():
        raise ValueError(f"{pointer} names {folder.name}, which is not a checkpoint; name another folder in that file, or remove it")
    return folder


def resolve(path: str | Path) -> Path:
    """A checkpoint folder, or a run folder's latest.

    Raises:
        ValueError: neither.
    """
    path = Path(path)
    if (path / STATE_FILE).is_file():
        return path
    latest = find_latest(path)
    if latest is None:
        raise ValueError(f"{path} is neither a checkpoint (no {STATE_FILE}) nor a run folder with one (no checkpoints/{LATEST_FILE})")
    return latest
