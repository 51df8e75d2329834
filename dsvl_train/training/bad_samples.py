"""Bad samples of all ranks: every rank learns of each one in the step it went bad, so all of them count, and stop, alike.

A step without bad samples costs no communication: how many there are travels with the step's other counts (`step.TrainStep`), and only
where there are some are they gathered.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dsvl_train.data.bad_samples import FILE, BadSample, Tally, extend_list, restart_list
from dsvl_train.data.batch import StepBatch


class BadSampleWatch:
    """Counts bad samples over all ranks, lists them in the run folder, and says when there are too many."""

    def __init__(self, run_dir: Path, max_fraction: float, *, is_main: bool) -> None:
        self.path, self.max_fraction, self.is_main = run_dir / FILE, max_fraction, is_main
        self.tally = Tally(max_fraction)
        self.new: list[BadSample] = []
        """Found by the last step."""

    def start(self, step: int, total: int, seen: int, left_out: Iterable[BadSample]) -> None:
        """Go on after `step`; every rank calls.

        Args:
            total, seen: bad samples, and samples, up to there.
            left_out: what no plan holds; listed as of step 0.
        """
        known: list[Any] = [None]
        if self.is_main:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            known = [[asdict(entry) for entry in restart_list(self.path, step, left_out)]]
        dist.broadcast_object_list(known, src=0)
        self.tally = Tally(self.max_fraction, (BadSample(**entry) for entry in known[0]), total=total, seen=seen)

    def update(self, batch: StepBatch, bad_samples: int) -> None:
        """Count a step; every rank calls.

        Args:
            bad_samples: of all ranks, the same number on each.
        """
        bad: list[BadSample] = []
        if bad_samples:
            of_ranks: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(of_ranks, [asdict(entry) for entry in batch.bad])
            bad = [BadSample(**entry) for of_rank in of_ranks for entry in of_rank]
        self.new = self.tally.add(bad, batch.first_seen)
        if self.new and self.is_main:
            extend_list(self.path, batch.step, self.new)

    def check(self, step: int) -> None:
        """Raise TooManyBadSamples beyond data.max_bad_fraction, on all ranks alike; a step that found no new one never does."""
        if self.new:
            self.tally.check(step, self.new[-1])
