"""The same numbers on every layout: losses, gradient norms and weights of one process, matched by several."""

from __future__ import annotations

import fnmatch
import functools
import itertools
import operator
from typing import Any

import numpy as np
import pytest

from dsvl_train.config.schema import ParamRule
from tests.distributed.harness import run_ranks
from tests.distributed.scenarios import count_encoded, train_tiny

MODALITIES = ["multimodal", "text", "multimodal", "text", "multimodal"]


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    """One process per family, the reference."""
    return {family: run_ranks(train_tiny, 1, family, {}, MODALITIES)[0] for family in ("vl", "vl2")}


SPREAD, FIRST_STAGE = {"vision_division": "spread"}, {"vision_division": "first_stage"}
SHARD, BALANCE, ZERO = {"vision_tp": "shard"}, {"tile_balance": True}, {"distributed_optimizer": True}
SELECTIVE, FULL = {"recompute": "selective"}, {"recompute": "full", "vision_recompute": True}
EVERY_CHANGE: list[tuple[str, int, dict[str, object]]] = [
    ("vl", 2, {}),
    ("vl", 2, {"tp": 2}),
    ("vl", 2, {"pp": 2} | SPREAD),
    ("vl", 4, {"tp": 2, "pp": 2} | SPREAD | SHARD),
    ("vl2", 2, ZERO),
    ("vl2", 2, {"tp": 2} | SHARD),
    ("vl2", 2, {"ep": 2} | BALANCE),
    ("vl2", 2, {"pp": 2, "vpp": 3} | SPREAD),
    ("vl2", 4, {"pp": 4} | SPREAD),
    ("vl2", 4, {"tp": 2, "ep": 2} | SHARD | BALANCE | ZERO | SELECTIVE),
    ("vl2", 4, {"pp": 2, "ep": 2} | FIRST_STAGE | BALANCE | FULL),
]
"""Run with every change: each kind of parallelism, each division, sharing, balancing and recomputation, and some products."""


def _full_matrix() -> list[tuple[str, int, dict[str, object]]]:
    """`make test-full`: every layout of both families with every way to place and share the encoder that makes a difference there."""
    layouts: list[tuple[int, dict[str, int]]] = [
        (2, {"tp": 2}),
        (2, {"pp": 2}),
        (4, {"pp": 4}),
        (2, {"pp": 2, "vpp": 3}),
        (2, {"ep": 2}),
        (2, {}),
        (4, {}),
        (4, {"tp": 2, "pp": 2}),
        (4, {"tp": 2, "ep": 2}),
        (4, {"pp": 2, "ep": 2}),
        (8, {"tp": 2, "pp": 2, "ep": 2}),
    ]
    cases: list[tuple[str, int, dict[str, object]]] = []
    for family, (ranks, layout) in itertools.product(("vl", "vl2"), layouts):
        if family == "vl" and "ep" in layout:
            continue
        divisions = (SPREAD, FIRST_STAGE) if "pp" in layout else ({},)
        shares = ({}, SHARD) if "tp" in layout else ({},)
        replicas = ranks // (layout.get("tp", 1) * layout.get("pp", 1))
        balances = ({}, BALANCE) if replicas > 1 else ({},)
        optimisers = ({}, ZERO) if replicas > 1 else ({},)
        for options in itertools.product(divisions, shares, balances, optimisers):
            case = (family, ranks, functools.reduce(operator.or_, options, dict(layout)))
            if case not in EVERY_CHANGE:
                cases.append(case)
    for family, (ranks, layout), option in itertools.product(("vl", "vl2"), layouts, (SELECTIVE, FULL)):
        if family == "vl2" or "ep" not in layout:
            cases.append((family, ranks, layout | option))
    return cases


def _name(value: object) -> str:
    return "-".join(f"{key}={each}" for key, each in value.items()) or "dp" if isinstance(value, dict) else str(value)


@pytest.mark.distributed
@pytest.mark.parametrize(("family", "ranks", "parallel"), EVERY_CHANGE, ids=_name)
def test_a_layout_changes_speed_not_numbers(alone: dict[str, Any], family: str, ranks: int, parallel: dict[str, Any]) -> None:
    require_same_numbers(alone[family], run_ranks(train_tiny, ranks, family, parallel, MODALITIES))


@pytest.mark.distributed
@pytest.mark.full
@pytest.mark.parametrize(("family", "ranks", "parallel"), _full_matrix(), ids=_name)
def test_every_layout_gives_the_same_numbers(alone: dict[str, Any], family: str, ranks: int, parallel: dict[str, Any]) -> None:
    require_same_numbers(alone[family], run_ranks(train_tiny, ranks, family, parallel, MODALITIES))


def _deepspeed(stage: int, **more: object) -> dict[str, object]:
    """Options of a run with it; weights are partitioned however small they are, unless told otherwise."""
    options = {"name": "deepspeed", "zero_stage": stage, "zero_keep_whole": 0} | more
    return {f"engine.{key}": value for key, value in options.items()}


DEEPSPEED = [
    ("vl", 2, _deepspeed(1)),
    ("vl2", 2, _deepspeed(3)),
    pytest.param("vl", 2, _deepspeed(2), marks=pytest.mark.full),
    pytest.param("vl", 2, _deepspeed(3), marks=pytest.mark.full),
    pytest.param("vl2", 2, _deepspeed(1), marks=pytest.mark.full),
    pytest.param("vl2", 2, _deepspeed(2), marks=pytest.mark.full),
    pytest.param("vl2", 1, _deepspeed(3), marks=pytest.mark.full),
    *(pytest.param(family, 4, _deepspeed(stage), marks=pytest.mark.full) for family in ("vl", "vl2") for stage in (1, 2, 3)),
    *(pytest.param("vl", 2, _deepspeed(stage, offload="optimizer"), marks=pytest.mark.full) for stage in (1, 2, 3)),
    pytest.param("vl2", 2, _deepspeed(3, offload="all"), marks=pytest.mark.full),
    pytest.param("vl2", 2, _deepspeed(3, zero_keep_whole=1000), marks=pytest.mark.full),
    pytest.param("vl2", 2, _deepspeed(3) | {"parallel.tile_balance": True}, marks=pytest.mark.full),
    *(
        pytest.param(family, 2, _deepspeed(stage) | {f"parallel.{key}": value for key, value in again.items()}, marks=pytest.mark.full)
        for family in ("vl", "vl2")
        for stage in (2, 3)
        for again in (SELECTIVE, FULL)
    ),
]


@pytest.mark.distributed
@pytest.mark.parametrize(("family", "ranks", "options"), DEEPSPEED, ids=_name)
def test_deepspeed_gives_the_numbers_of_megatron(alone: dict[str, Any], family: str, ranks: int, options: dict[str, Any]) -> None:
    require_same_numbers(alone[family], run_ranks(train_tiny, ranks, family, {}, MODALITIES, options))


@pytest.mark.distributed
@pytest.mark.full
@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize(
    ("family", "trains", "modalities"),
    [
        ("vl", ["adaptor.*"], ["multimodal"]),
        ("vl", ["adaptor.*", "language.*"], ["multimodal", "text"]),
        ("vl", ["vision.siglip.*", "adaptor.*", "language.*"], ["multimodal", "text"]),
        ("vl2", ["vision.*", "adaptor.*"], ["multimodal"]),
        ("vl2", ["language.*"], ["text"]),
    ],
    ids=["vl align", "vl pretrain", "vl sft", "vl2 align", "lm"],
)
def test_deepspeed_trains_a_part(family: str, trains: list[str], modalities: list[str], stage: int) -> None:
    rules = [ParamRule(pattern, 0.1 if "vision" in pattern else 1.0) for pattern in trains] + [ParamRule("*", None)]
    policy = {"stage.policy": rules, "data.text_ratio": 0.5 if "text" in modalities else 0.0}
    (reference,) = run_ranks(train_tiny, 1, family, {}, modalities * 2, policy)
    require_same_numbers(reference, run_ranks(train_tiny, 2, family, {}, modalities * 2, policy | _deepspeed(stage)))


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("vl", _deepspeed(3)),
        pytest.param("vl", _deepspeed(1), marks=pytest.mark.full),
        pytest.param("vl", _deepspeed(2), marks=pytest.mark.full),
        *(pytest.param("vl", _deepspeed(stage, offload="optimizer"), marks=pytest.mark.full) for stage in (1, 2, 3)),
        *(pytest.param("vl2", _deepspeed(stage, precision="bf16"), marks=pytest.mark.full) for stage in (1, 2)),
    ],
    ids=_name,
)
def test_deepspeed_goes_on_after_steps_that_may_not_update(family: str, options: dict[str, Any]) -> None:
    """Nothing of their gradients is left in the next steps'. (ZeRO-3 is not compared in bf16, in which its linear layers round twice.)"""
    faults, precision = {2: "skip", 3: "nan"}, {key: value for key, value in options.items() if key == "engine.precision"}
    (reference,) = run_ranks(train_tiny, 1, family, {}, MODALITIES, precision, faults)
    ranks = run_ranks(train_tiny, 2, family, {}, MODALITIES, options, faults)
    assert [record["updated"] for record in ranks[0]["records"]] == [True, False, False, True, True]
    require_same_numbers(reference, ranks)


def require_same_numbers(reference: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    """Of one process, on several ranks; the first has the result."""
    assert not any(rank["touched_by_text"] for rank in ranks)
    result = ranks[0]
    for key in ("loss", "grad_norm"):
        got, want = ([record[key] if record["updated"] else 0.0 for record in run["records"]] for run in (result, reference))
        np.testing.assert_allclose(got, want, rtol=1e-5, err_msg=key)
    assert result["updates"] == reference["updates"]
    if "expert_load" in reference["records"][0]:
        for key in ("expert_load", "aux_loss"):
            np.testing.assert_allclose(result["records"][0][key], reference["records"][0][key], rtol=1e-4, err_msg=key)
        np.testing.assert_array_equal(result["records"][1]["expert_bias"], reference["records"][1]["expert_bias"])
    assert result["weights"].keys() == reference["weights"].keys() > reference["initial"].keys()
    for name, want in reference["initial"].items():
        np.testing.assert_array_equal(result["initial"][name], want, err_msg=f"initial {name}")
    for name, want in reference["weights"].items():
        np.testing.assert_allclose(result["weights"][name], want, atol=1e-4, err_msg=name)


@pytest.mark.distributed
def test_moments_in_bf16_are_shared_out_alike() -> None:
    half = {"optim.moments_dtype": "bf16"}
    (reference,), ranks = (run_ranks(train_tiny, size, "vl2", layout, MODALITIES, half) for size, layout in ((1, {}), (2, ZERO)))
    require_same_numbers(reference, ranks)


ONLY_VISION = [ParamRule("language.*", None), ParamRule("vision.*", 0.1), ParamRule("*", 1.0)]
FROZEN_EMBEDDING = [ParamRule("language.embedding.*", None), ParamRule("vision.*", None), ParamRule("*", 1.0)]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("policy", "modalities", "ranks", "parallel"),
    [
        (ONLY_VISION, ["multimodal"] * 2, 2, {"ep": 2}),
        pytest.param(ONLY_VISION, ["multimodal"] * 2, 2, {"ep": 2} | FULL, marks=pytest.mark.full),
        pytest.param(ONLY_VISION, ["multimodal"] * 2, 2, {"pp": 2} | FULL, marks=pytest.mark.full),
        pytest.param(ONLY_VISION, ["multimodal"] * 2, 2, {"tp": 2} | SELECTIVE, marks=pytest.mark.full),
        (FROZEN_EMBEDDING, MODALITIES, 2, {"ep": 2} | SELECTIVE),
        pytest.param(FROZEN_EMBEDDING, MODALITIES, 2, {"pp": 2} | SELECTIVE, marks=pytest.mark.full),
        pytest.param(FROZEN_EMBEDDING, MODALITIES, 2, {"tp": 2} | FULL, marks=pytest.mark.full),
    ],
    ids=["stage 1", "stage 1 full", "stage 1 pipeline", "stage 1 tensors", "embedding", "embedding pipeline", "embedding tensors"],
)
def test_frozen_parts_hold_up_nobody(policy: list[ParamRule], modalities: list[str], ranks: int, parallel: dict[str, Any]) -> None:
    """One rank's micro-batch has no image, so nothing in its language model wants a gradient; the other's has one, and shares experts."""
    text_ratio = 0.5 if "text" in modalities else 0.0
    options = {"stage.policy": policy, "data.text_ratio": text_ratio}
    (reference,), several = (run_ranks(train_tiny, n, "vl2", layout, modalities, options) for n, layout in ((1, {}), (ranks, parallel)))
    require_same_numbers(reference, several)


@pytest.mark.distributed
@pytest.mark.parametrize("parallel", [{"pp": 2, "vpp": 2}, {"pp": 2, **FIRST_STAGE}], ids=_name)
def test_tied_embeddings_stay_one_weight_over_a_pipeline(parallel: dict[str, Any]) -> None:
    tied = {"model.language.tie_embeddings": True}
    (reference,), ranks = (run_ranks(train_tiny, ranks, "vl", layout, MODALITIES, tied) for ranks, layout in ((1, {}), (2, parallel)))
    assert "language.output_layer.weight" not in ranks[0]["weights"]
    require_same_numbers(reference, ranks)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("trains", "sends"),
    [(["adaptor.*"], False), (["vision.sam.*", "adaptor.*"], True), (["vision.*"], True)],
    ids=["stage 1", "part of the encoder", "encoder alone"],
)
def test_a_frozen_encoder_sends_no_gradients(trains: list[str], sends: bool) -> None:
    """The gradients of encoder states that the second pipeline rank sends back: one per micro-batch with images, three in a step."""
    policy = {"stage.policy": [ParamRule(pattern, 1.0) for pattern in trains] + [ParamRule("*", None)], "data.text_ratio": 0.0}
    steps = ["multimodal", "multimodal"]
    reference = run_ranks(train_tiny, 1, "vl", {}, steps, policy)[0]
    ranks = run_ranks(train_tiny, 2, "vl", {"pp": 2}, steps, policy)
    require_same_numbers(reference, ranks)
    for name, initial in reference["initial"].items():
        if not any(fnmatch.fnmatch(name, pattern) for pattern in trains):
            np.testing.assert_array_equal(ranks[0]["weights"][name], initial, err_msg=name)
    assert ranks[1]["encoder_gradients_sent"] == (3 * len(steps) if sends else 0)


@pytest.mark.distributed
def test_sharing_divides_the_encoders_work_and_balancing_evens_it() -> None:
    """Counted at the encoder: images of 1 to 10 tiles on four data-parallel ranks, then on two tensor-parallel ones."""
    skewed = [[10, 1, 1, 1], [9, 2, 1, 1], [1, 10, 2, 1]]  # [micro-batch][rank]
    without, balanced = (run_ranks(count_encoded, 4, {"tile_balance": on}, skewed) for on in (False, True))
    totals = [sum(micro[rank] for micro in skewed) for rank in range(4)]
    assert [rank["encoded"] for rank in without] == totals
    assert max(totals) / np.mean(totals) >= 1.5
    encoded = [rank["encoded"] for rank in balanced]
    assert sum(encoded) == sum(totals) and max(encoded) / np.mean(encoded) <= 1.05
    np.testing.assert_allclose([rank["loss"] for rank in balanced], [rank["loss"] for rank in without], rtol=1e-6)
    assert balanced[0]["tile_imbalance_encoded"] == pytest.approx(max(encoded) / np.mean(encoded))
    at_once = run_ranks(count_encoded, 4, {"tile_balance": True, "overlap_tile_exchange": False}, skewed)
    assert [rank["loss"] for rank in at_once] == [rank["loss"] for rank in balanced]
    assert {tuple(rank["order"]) for rank in at_once} == {("pixels", "encode") * 3}
    assert {tuple(rank["order"]) for rank in balanced} == {("pixels", "pixels", "encode", "pixels", "encode", "encode")}
    one_rank = [[7], [4], [10]]
    shared = [rank["encoded"] for rank in run_ranks(count_encoded, 2, {"tp": 2, "vision_tp": "shard"}, one_rank)]
    assert sum(shared) == 21 and abs(shared[0] - shared[1]) <= len(one_rank)
    assert [rank["encoded"] for rank in run_ranks(count_encoded, 2, {"tp": 2}, one_rank)] == [21, 21]
