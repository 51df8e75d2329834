"""The grid of tiles against the released `select_best_resolution`."""

from __future__ import annotations

import json
from pathlib import Path

from dsvl_train.config.geometry import candidate_resolutions, select_tiles

DATA = Path(__file__).parent / "data" / "vl2"


def test_every_case_equals_the_released_choice() -> None:
    golden = json.loads((DATA / "tile_selection.json").read_text())
    chosen = [list(select_tiles(tuple(case["size"]), golden["tile"])) for case in golden["cases"]]
    assert len(chosen) > 100
    assert chosen == [case["tiles_wh"] for case in golden["cases"]]


def test_candidates_are_the_released_ones_in_their_order() -> None:
    released = json.loads((DATA / "mla_softmax" / "processor_config.json").read_text())["candidate_resolutions"]
    assert [list(pair) for pair in candidate_resolutions(42)] == released
