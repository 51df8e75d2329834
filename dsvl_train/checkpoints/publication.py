"""How a checkpoint becomes visible, and what is cleared away after runs that were killed meanwhile.

A checkpoint is written into a hidden folder (`.saving_step_…`). When all of it is durable, the folder gets its name, and when that is
durable, `latest` names it. What has to go gets a hidden name (`.removing_step_…`) before it is deleted. So a kill at any moment leaves
every visible checkpoint whole, and `latest` on one of them.

One moment is special: a step is saved a second time and `latest` names its first checkpoint. That one is hidden before the new one gets
the name; a kill between the two leaves `latest` without its folder, and `clear_leftovers` gives the name to the new one, which is whole.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from dsvl_train.checkpoints.durable import replacing, sync_folder
from dsvl_train.checkpoints.folders import CHECKPOINTS, LATEST_FILE, named_latest
from dsvl_train.checkpoints.manifest import DamagedCheckpointError, Manifest, check, find_damage, find_strangers, write_manifest

_SAVING, _REMOVING = ".saving_", ".removing_"


def saving_folder(final: Path, attempt: int = 1) -> Path:
    """The hidden folder in which a checkpoint is written that is to be `final`."""
    return final.with_name(f"{_SAVING}{final.name}" + (f".{attempt}" if attempt > 1 else ""))


def publish(saving: Path, final: Path, manifest: Manifest) -> None:
    """Make a written checkpoint visible, and `latest` name it. Its files are durable already; every other step is made so here.

    Raises:
        OSError: the disk fails.
        DamagedCheckpointError: the folder does not hold what the ranks wrote into it, so they do not see the same folder.
    """
    problems = find_damage(saving, manifest.files, full=False) + find_strangers(saving, manifest)
    if problems:
        raise DamagedCheckpointError(saving, [*problems, "do all ranks write to the same file system?"])
    write_manifest(saving, manifest)
    for folder in {saving, *((saving / name).parent for name in manifest.files)}:
        sync_folder(folder)
    with replacing(final.parent / LATEST_FILE, final.name + "\n"):
        _rename_over(saving, final)


def point_latest(final: Path) -> None:
    """Let `latest` name a checkpoint."""
    with replacing(final.parent / LATEST_FILE, final.name + "\n"):
        pass


def remove(folder: Path) -> None:
    """Delete a checkpoint; killed in the middle, it leaves no half of one under its name."""
    shutil.rmtree(_hide(folder))


def clear_leftovers(run_dir: Path) -> list[str]:
    """Clear what a killed run left; one process calls before anything is read. Returns the names of what went."""
    folder = run_dir / CHECKPOINTS
    if not folder.is_dir():
        return []
    with suppress(DamagedCheckpointError):  # a damaged `latest` is for whoever reads it next
        latest = named_latest(run_dir)
        if latest is not None and not latest.exists():
            _finish(latest)
    gone = [path for path in sorted(folder.iterdir()) if path.name.startswith((_SAVING, _REMOVING)) and path.is_dir()]
    for path in gone:
        shutil.rmtree(path)
    (folder / f".{LATEST_FILE}.new").unlink(missing_ok=True)
    return [path.name for path in gone]


def _finish(final: Path) -> None:
    """Give a checkpoint its name that was replacing another when the run was killed."""
    for saving in sorted(final.parent.glob(f"{_SAVING}{final.name}*")):
        try:
            check(saving, full=False)
        except DamagedCheckpointError:
            continue
        os.rename(saving, final)
        sync_folder(final.parent)
        return


def _rename_over(saving: Path, final: Path) -> None:
    hidden = _hide(final) if final.exists() else None
    try:
        os.rename(saving, final)
    except OSError:
        if hidden is not None:
            os.rename(hidden, final)
        raise
    sync_folder(final.parent)
    sync_folder(final.parent.parent)
    if hidden is not None:
        shutil.rmtree(hidden)


def _hide(folder: Path) -> Path:
    hidden = folder.with_name(f"{_REMOVING}{folder.name}")
    if hidden.exists():
        shutil.rmtree(hidden)
    os.rename(folder, hidden)
    sync_folder(folder.parent)
    return hidden
