"""Which checkpoints of a run are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsvl_train.checkpoints.folders import list_steps, named_latest, step_of
from dsvl_train.checkpoints.manifest import DamagedCheckpointError, check
from dsvl_train.checkpoints.publication import remove


@dataclass(frozen=True)
class Kept:
    """A checkpoint as retention sees it."""

    name: str
    step: int
    saved_at: str
    """When; empty where it is damaged."""
    is_latest: bool = False

    @property
    def good(self) -> bool:
        """All its files are there, in their sizes."""
        return self.saved_at != ""


def names_to_remove(checkpoints: Sequence[Kept], *, keep_last: int, keep_every: int) -> list[str]:
    """The checkpoints that go, the oldest first.

    Kept are what `latest` names, the `keep_last` that were saved last (0 = all), and every step that `keep_every` divides (0 = none).
    The order is that of saving, not of steps: a run that was started anew in an old folder keeps its own. A damaged one counts for
    nothing; it goes when something older than it would go, which is never before a good one that was saved after it is there.
    """
    if keep_last <= 0:
        return []
    good = sorted((one for one in checkpoints if one.good), key=lambda one: (one.is_latest, one.saved_at, one.step))
    kept = {one.name for one in good[-keep_last:]} | {one.name for one in good if keep_every > 0 and one.step % keep_every == 0}
    if not kept:
        return []
    oldest_of_last = min((one.step for one in good[-keep_last:]), default=0)
    damaged = [one.name for one in checkpoints if not one.good and not one.is_latest and one.step < oldest_of_last]
    return [*damaged, *(one.name for one in good if one.name not in kept)]


def remove_old(run_dir: Path, *, keep_last: int, keep_every: int) -> list[str]:
    """Remove what need not be kept, after a new checkpoint was published. Returns the names."""
    latest = named_latest(run_dir)
    checkpoints = {path.name: path for path in list_steps(run_dir)}
    seen = [_look_at(path, is_latest=path == latest) for path in checkpoints.values()]
    names = names_to_remove(seen, keep_last=keep_last, keep_every=keep_every)
    for name in names:
        remove(checkpoints[name])
    return names


def _look_at(path: Path, *, is_latest: bool) -> Kept:
    try:
        saved_at = check(path, full=False).saved_at
    except DamagedCheckpointError:
        saved_at = ""
    return Kept(path.name, step_of(path) or 0, saved_at, is_latest)
