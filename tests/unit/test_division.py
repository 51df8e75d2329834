"""The pipeline's planner: nothing lost, better than the even split, and its prediction held against a simulation of the schedules."""

from __future__ import annotations

from itertools import chain

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsvl_train.config.compose import compose_run
from dsvl_train.models.costs import layer_costs, usual_tiles
from dsvl_train.parallel.division import Division, LayerCosts, even_division, plan_division, predicted_time
from dsvl_train.parallel.pipeline_simulation import group_size, rank_order, simulate

RELEASED = ["deepseek_vl_1b", "deepseek_vl_7b", "deepseek_vl2_tiny", "deepseek_vl2_small", "deepseek_vl2"]
SEQUENCE = 4096

costs_of_layers = st.lists(st.floats(0.1, 10.0), min_size=1, max_size=12).map(tuple)


@st.composite
def problems(draw: st.DrawFn) -> tuple[LayerCosts, int, int]:
    pp, vpp = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    language = tuple(draw(st.lists(st.floats(0.1, 10.0), min_size=pp * vpp, max_size=pp * vpp + 12)))
    sam = draw(st.one_of(st.just(()), costs_of_layers))
    return LayerCosts(draw(costs_of_layers), sam, draw(st.floats(0, 5)), language, draw(st.floats(0, 5))), pp, vpp


def expected(division: Division, costs: LayerCosts, micro_batches: int, text_share: float) -> float:
    """Simulated time of an average step."""
    text, image = (simulate(division.chunk_costs(costs, images), micro_batches).makespan for images in (False, True))
    return text_share * text + (1 - text_share) * image


@given(problems(), st.sampled_from(["spread", "first_stage"]))
@settings(max_examples=60, deadline=None)
def test_every_layer_is_on_one_rank_and_in_order(problem: tuple[LayerCosts, int, int], kind: str) -> None:
    costs, pp, vpp = problem
    division = plan_division(costs, pp, vpp, kind)  # type: ignore[arg-type]
    assert list(chain(*division.siglip)) == list(range(len(costs.siglip)))
    assert list(chain(*division.sam)) == list(range(len(costs.sam)))
    assert list(chain(*(layers for row in division.language for layers in row))) == list(range(len(costs.language)))
    assert (division.pp, division.vpp) == (pp, vpp)
    if kind == "first_stage":
        assert not any(chain(*division.siglip[1:], *division.sam[1:]))
    whole = costs.vision + sum(costs.language) + costs.language_head
    assert sum(map(sum, division.chunk_costs(costs, images=True))) == pytest.approx(whole)


@given(problems(), st.sampled_from(["spread", "first_stage"]), st.sampled_from([0.0, 0.3, 1.0]))
@settings(max_examples=60, deadline=None)
@example((LayerCosts((1.0, 1.0), (), 0.0, (1.0, 2.0), 0.0), 2, 1), "spread", 0.0)
def test_never_predicted_slower_than_the_even_division(problem: tuple[LayerCosts, int, int], kind: str, text_share: float) -> None:
    costs, pp, vpp = problem
    planned = plan_division(costs, pp, vpp, kind, text_share=text_share, micro_batches=8)  # type: ignore[arg-type]
    even = even_division(costs, pp, vpp, kind)  # type: ignore[arg-type]

    def predicted(division: Division) -> float:
        text, image = (predicted_time(division.chunk_costs(costs, images), 8) for images in (False, True))
        return text_share * text + (1 - text_share) * image

    assert predicted(planned) <= predicted(even) * (1 + 1e-9)


def paper_costs(name: str) -> tuple[LayerCosts, float]:
    cfg = compose_run([f"recipe=demo_{'vl2' if 'vl2' in name else 'vl'}/align", f"model={name}", "data.seq_len=2048"]).model
    return layer_costs(cfg, SEQUENCE, usual_tiles(cfg, SEQUENCE)), 0.3 if "vl2" in name else 0.7


@pytest.mark.parametrize("pp", [2, 4, 8])
@pytest.mark.parametrize("name", RELEASED)
def test_beats_the_even_division_on_the_papers_models(name: str, pp: int) -> None:
    costs, text_share = paper_costs(name)
    for kind in ("spread", "first_stage"):
        planned, even = plan_division(costs, pp, 1, kind, text_share=text_share), even_division(costs, pp, 1, kind)
        assert expected(planned, costs, 4 * pp, text_share) <= expected(even, costs, 4 * pp, text_share) * 1.001
        for images in (False, True):
            table = planned.chunk_costs(costs, images)
            assert 3 * predicted_time(table, 4 * pp) == pytest.approx(simulate(table, 4 * pp).makespan, rel=0.2)


@pytest.mark.parametrize("name", RELEASED)
def test_spreading_the_encoder_has_the_smaller_bubble(name: str) -> None:
    costs, text_share = paper_costs(name)
    spread, first = (plan_division(costs, 4, 1, kind, text_share=text_share) for kind in ("spread", "first_stage"))
    bubbles = [simulate(division.chunk_costs(costs, True), 16).bubble for division in (spread, first)]
    assert bubbles[0] < bubbles[1]
    assert expected(spread, costs, 16, text_share) < expected(first, costs, 16, text_share)


def test_a_plain_pipeline_takes_the_textbooks_time() -> None:
    """1F1B with equal stages: (micro-batches + ranks - 1) forward and backward passes; interleaving v chunks divides the bubble by v."""
    pp, micro_batches = 4, 8
    plain = simulate([[1.0]] * pp, micro_batches)
    assert plain.makespan == 3.0 * (micro_batches + pp - 1)
    assert plain.bubble == pytest.approx((pp - 1) / (micro_batches + pp - 1))
    interleaved = simulate([[0.5, 0.5]] * pp, micro_batches)
    assert interleaved.makespan == pytest.approx(3.0 * (micro_batches + (pp - 1) / 2))


def test_larger_groups_idle_less_where_chunks_differ() -> None:
    """An encoder chunk a third of the language chunk's cost: each turn between them stalls the ranks behind."""
    table = [[0.5, 1.5]] * 4
    bubbles = [simulate(table, 16, wanted_group=group).bubble for group in (4, 8, 16)]
    assert bubbles == sorted(bubbles, reverse=True) and bubbles[0] > 1.5 * bubbles[-1]
    for group in (4, 8, 16):
        assert 3 * predicted_time(table, 16, group) == pytest.approx(simulate(table, 16, wanted_group=group).makespan, rel=0.08)


@given(st.integers(2, 6), st.integers(1, 4), st.integers(0, 20))
@settings(max_examples=60, deadline=None)
def test_each_rank_does_everything_once_and_the_schedule_ends(pp: int, chunks: int, more: int) -> None:
    micro_batches = pp + more
    size = group_size(pp, micro_batches)
    assert size >= pp and (micro_batches % size == 0 or micro_batches % size >= pp)
    for rank in range(pp):
        order = rank_order(pp, chunks, rank, micro_batches)
        assert len(set(order)) == len(order) == 2 * chunks * micro_batches
    assert simulate([[1.0] * chunks] * pp, micro_batches).makespan >= 3.0 * chunks * micro_batches


def test_too_few_layers_or_micro_batches_are_refused() -> None:
    costs = LayerCosts((1.0,), (), 0.0, (1.0, 1.0, 1.0), 0.0)
    with pytest.raises(ValueError, match="4 language chunks, but the model has 3 language layers"):
        plan_division(costs, 2, 2)
    with pytest.raises(ValueError, match=r"cannot fill a pipeline of parallel\.pp=4"):
        group_size(4, 3)
