"""Reading everything once, before a run does: what would be skipped, and why.

The samples come from the same index, and are read and decoded by the same code (`sources.read_as_planned`), as in a run, so what is found
here is what the loader would find.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from dsvl_train.config.schema import DataConfig
from dsvl_train.data.bad_samples import BadSample
from dsvl_train.data.index_build import Progress
from dsvl_train.data.processes import map_tasks
from dsvl_train.data.processor import Processor
from dsvl_train.data.sources import Source, open_sources, read_as_planned

_SAMPLES_PER_TASK = 256
_TASKS_PER_PROCESS = 4
"""A process takes seconds to start: one for each so many tasks at most."""


@dataclass
class SourceReport:
    """What one source holds."""

    name: str
    samples: int
    """In plans: those that can be used, and those that only reading shows to be bad."""
    shards: int
    damaged_shards: list[str]
    bad: list[BadSample] = field(default_factory=list)
    """Left out by the index, or bad when read; by shard and key."""
    left_out: int = 0
    """How many of `bad` are in no plan."""

    def kinds(self) -> dict[str, int]:
        """Kind -> samples that cannot be used."""
        return dict(sorted(Counter(entry.kind for entry in self.bad).items()))


def check_data(
    cfg: DataConfig, processor: Processor, *, workers: int, progress: Callable[[int], Progress] | None = None
) -> list[SourceReport]:
    """Read every sample of every source once.

    Args:
        workers: processes at most.
        progress: called with the number of samples; returns what is told how far it is.

    Raises:
        FileNotFoundError, ValueError: as `open_sources`; missing and stale indexes are made.
    """
    sources = open_sources(cfg, processor, rebuild=True)
    reports = [_start(source) for source in sources]
    tasks = list(_tasks(sources))
    total = sum(end - start for _, start, end in tasks)
    report = None if progress is None else progress(total)
    done = 0
    processes = min(workers, len(tasks) // _TASKS_PER_PROCESS + 1)
    for number, count, bad in map_tasks(partial(_prepare, cfg, processor), tasks, processes):
        reports[number].bad += bad
        done += count
        if report is not None:
            report(done, total)
    for source, one in zip(sources, reports, strict=True):
        source.close()
        one.bad.sort(key=lambda entry: (entry.shard, entry.key, entry.kind))
    return reports


def write_report(path: Path, reports: list[SourceReport]) -> None:
    """One JSON object per sample that cannot be used."""
    with path.open("w", encoding="utf-8") as stream:
        for report in reports:
            for entry in report.bad:
                stream.write(json.dumps(asdict(entry)) + "\n")


def _start(source: Source) -> SourceReport:
    left_out = [BadSample(one.kind, source.name, one.shard, one.key, one.reason) for one in source.skipped]
    return SourceReport(source.name, source.totals()[0], source.shards, list(source.damaged_shards), left_out, len(left_out))


_Task = tuple[int, int, int]
"""Number of a source, and samples from where to where."""


def _tasks(sources: list[Source]) -> Iterator[_Task]:
    for number, source in enumerate(sources):
        samples = source.totals()[0]
        for start in range(0, samples, _SAMPLES_PER_TASK):
            yield number, start, min(start + _SAMPLES_PER_TASK, samples)


def _prepare(cfg: DataConfig, processor: Processor) -> Callable[[_Task], tuple[int, int, list[BadSample]]]:
    sources = open_sources(cfg, processor, build_index=False)

    def work(task: _Task) -> tuple[int, int, list[BadSample]]:
        number, start, end = task
        source = sources[number]
        samples = np.arange(start, end, dtype=np.int64)
        planned = zip(samples.tolist(), source.lengths(samples).tolist(), source.tiles(samples).tolist(), strict=True)
        read = (read_as_planned(source, sample, tokens, tiles) for sample, tokens, tiles in planned)
        return number, end - start, [entry for entry in read if isinstance(entry, BadSample)]

    return work
