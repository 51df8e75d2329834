"""Samples that went bad in a run: counted once each, listed in `bad_samples.jsonl`, too many of them an error.

A sample is known by source, shard and key. One that is read again, in a later epoch or after a resume, is the same bad sample. Everything
here is a function of what it is told, so ranks that are told the same decide the same (`training.bad_samples` tells them).
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FILE = "bad_samples.jsonl"
_ALWAYS_ALLOWED = 10
"""So many bad samples stop no run: early in it, a few are a large share."""


@dataclass(frozen=True)
class BadSample:
    """A sample that was replaced by padding."""

    kind: str
    source: str
    shard: str
    key: str
    message: str

    @property
    def sample(self) -> str:
        """For logs."""
        return f"{self.shard}:{self.key}"

    @property
    def identity(self) -> tuple[str, str, str]:
        return self.source, self.shard, self.key


class TooManyBadSamples(ValueError):
    """More samples than data.max_bad_fraction allows could not be used."""


class Tally:
    """Bad samples of a run so far."""

    def __init__(self, max_fraction: float, known: Iterable[BadSample] = (), *, total: int = 0, seen: int = 0) -> None:
        """
        Args:
            known: those of the run before it was interrupted.
            total: how many there were then, if the list of them was lost.
            seen: samples seen then.
        """
        self.max_fraction, self.seen = max_fraction, seen
        self.kinds: Counter[tuple[str, str]] = Counter()
        """(source, kind) -> bad samples."""
        self.total = 0
        self._known: set[tuple[str, str, str]] = set()
        self.add(known, 0)
        self.total = max(total, self.total)

    def add(self, bad: Iterable[BadSample], first_seen: int) -> list[BadSample]:
        """Count the bad samples of a step, of all ranks; returns those that are new.

        Args:
            first_seen: samples of the step that no earlier one held.
        """
        self.seen += first_seen
        new = []
        for entry in bad:
            if entry.identity not in self._known:
                self._known.add(entry.identity)
                self.kinds[entry.source, entry.kind] += 1
                new.append(entry)
        self.total += len(new)
        return new

    def by_source(self) -> dict[str, dict[str, int]]:
        """Source -> kind -> bad samples."""
        return {
            source: {kind: count for (of, kind), count in sorted(self.kinds.items()) if of == source}
            for source in sorted({source for source, _ in self.kinds})
        }

    def check(self, step: int, last: BadSample | None = None) -> None:
        """Raise TooManyBadSamples above the share that is allowed."""
        if self.total <= max(_ALWAYS_ALLOWED, self.max_fraction * self.seen):
            return
        listed = ", ".join(f"{source} {kind} {count}" for (source, kind), count in sorted(self.kinds.items()))
        example = f", the last one {last.sample} ({last.message})" if last is not None else ""
        raise TooManyBadSamples(
            f"{self.total} of {self.seen} samples were bad by step {step} ({listed}){example}: above "
            f"data.max_bad_fraction={self.max_fraction}. {FILE} in the run folder lists them. Correct the data of these sources, or set "
            "data.max_bad_fraction higher"
        )


# -------------------------------------------------------------------------------------------------------------- the list


def record(entry: BadSample, step: int) -> dict[str, Any]:
    """A line of the list."""
    return {"step": step, **asdict(entry)}


def restart_list(path: Path, step: int, left_out: Iterable[BadSample]) -> list[BadSample]:
    """Write the list as it was after `step`: what the index left out (step 0), then what went bad up to there. Returns the latter.

    What a dead run did after its last checkpoint is done again, and listed again then.
    """
    kept = [(at, entry) for at, entry in _read_list(path) if 0 < at <= step]
    unfinished = path.with_name(f".{path.name}.new")
    with unfinished.open("w", encoding="utf-8") as stream:
        for entry in left_out:
            stream.write(json.dumps(record(entry, 0), ensure_ascii=True) + "\n")
        for at, entry in kept:
            stream.write(json.dumps(record(entry, at), ensure_ascii=True) + "\n")
    os.replace(unfinished, path)
    return [entry for _, entry in kept]


def extend_list(path: Path, step: int, new: Iterable[BadSample]) -> None:
    """Add what went bad in a step."""
    with path.open("a", encoding="utf-8") as stream:
        for entry in new:
            stream.write(json.dumps(record(entry, step), ensure_ascii=True) + "\n")


def _read_list(path: Path) -> Iterator[tuple[int, BadSample]]:
    """(step, sample) of each whole line; a run that died while it wrote leaves a torn one."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            try:
                value = json.loads(line)
                yield int(value.pop("step")), BadSample(**value)
            except (ValueError, TypeError, KeyError, AttributeError):
                continue
