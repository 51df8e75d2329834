"""The same numbers on every layout: losses, gradient norms and weights of one process, matched by several."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.distributed.harness import run_ranks
from tests.distributed.scenarios import train_tiny

MODALITIES = ["multimodal", "text", "multimodal", "text"]


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    """One process per family, the reference."""
    return {family: run_ranks(train_tiny, 1, family, {}, MODALITIES)[0] for family in ("vl", "vl2")}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("family", "ranks", "parallel"),
    [
        ("vl", 2, {}),
        ("vl", 2, {"tp": 2}),
        ("vl2", 2, {}),
        ("vl2", 2, {"tp": 2}),
        ("vl2", 2, {"ep": 2}),
        ("vl2", 4, {"tp": 2, "ep": 2}),
    ],
    ids=["vl-dp2", "vl-tp2", "vl2-dp2", "vl2-tp2", "vl2-ep2", "vl2-tp2-ep2-dp2"],
)
def test_a_layout_changes_speed_not_numbers(alone: dict[str, Any], family: str, ranks: int, parallel: dict[str, int]) -> None:
    reference = alone[family]
    result = run_ranks(train_tiny, ranks, family, parallel, MODALITIES)[0]
    for key in ("loss", "grad_norm"):
        got, want = ([record[key] for record in run["records"]] for run in (result, reference))
        np.testing.assert_allclose(got, want, rtol=1e-5, err_msg=key)
    assert result["weights"].keys() == reference["weights"].keys()
    for name, want in reference["weights"].items():
        np.testing.assert_array_equal(result["initial"][name], reference["initial"][name], err_msg=f"initial {name}")
        np.testing.assert_allclose(result["weights"][name], want, atol=1e-4, err_msg=name)
