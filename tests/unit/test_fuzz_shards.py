"""A thousand of the corrupted shards of `tests/fuzz_shards.py`; `make fuzz` runs ten thousand."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests import fuzz_shards


def test_corrupted_shards_cost_only_what_was_touched(tmp_path: Path) -> None:
    before = sorted(Path.cwd().iterdir())
    work = fuzz_shards.prepare(tmp_path)
    outcomes = [work(number) for number in range(1000)]
    kinds = sum((outcome.skipped for outcome in outcomes), Counter[str]())
    assert {"bad_json", "image_missing", "image_bomb", "image_broken"} <= set(kinds)
    assert sum(outcome.intact for outcome in outcomes) > 1500, "the cases hardly leave a sample whole"
    assert sum(outcome.compared for outcome in outcomes) > 500, "tarfile hardly ever got through"
    assert 300 < sum(outcome.damaged for outcome in outcomes) < 900
    assert sorted(Path.cwd().iterdir()) == before


def test_the_watch_notices_what_is_written(tmp_path: Path) -> None:
    for write in (lambda: (tmp_path / "a").write_text("x"), lambda: (tmp_path / "b").mkdir(), lambda: (tmp_path / "c").symlink_to("/")):
        with pytest.raises(AssertionError, match="written or changed"), fuzz_shards.no_file_is_written():
            write()
    with fuzz_shards.no_file_is_written():
        (tmp_path / "a").read_text()
