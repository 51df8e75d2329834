"""A few of the kills of `make chaos`."""

from __future__ import annotations

from pathlib import Path

from tests.chaos import chaos


def test_a_run_killed_at_every_kind_of_moment_ends_with_the_bits_of_one_that_was_not(tmp_path: Path) -> None:
    outcome = chaos(tmp_path, kills=4, seed=1)
    assert not outcome.problems
    assert outcome.kills.total() + outcome.missed == 4
    assert outcome.kills.total() >= 3
