"""Mixing: the realised shares track the wanted ones at every step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsvl_train.data.mixing import TextShareSchedule, count_text, draw_sources, normalised_weights, text_share_schedule
from tests.unit.made_data import config, shards_source, text_source

SHARE = st.floats(0, 1)


@given(
    start=SHARE,
    target=SHARE,
    warmup=st.integers(0, 60),
    shape=st.sampled_from(["linear", "cosine", "step"]),
    parts=st.sampled_from([1, 6, 8, 256]),
)
def test_the_realised_text_share_is_within_half_a_part_of_the_schedule_at_every_step(
    start: float, target: float, warmup: int, shape: str, parts: int
) -> None:
    """A part is a step where modalities are grouped, a sequence where they are not."""
    schedule = TextShareSchedule(start, target, warmup, shape)  # type: ignore[arg-type]
    wanted, done = 0.0, 0.0
    for step in range(1, 200):
        wanted += schedule.at(step)
        text = count_text(wanted, done, parts)
        assert 0 <= text <= parts
        done += text / parts
        assert abs(done - wanted) * parts <= 0.5 + 1e-9


@pytest.mark.parametrize(
    ("shape", "shares"),
    [
        ("linear", [1.0, 0.85, 0.7, 0.55, 0.4, 0.4]),
        ("cosine", [1.0, 0.9121, 0.7, 0.4879, 0.4, 0.4]),
        ("step", [1.0, 1.0, 1.0, 1.0, 0.4, 0.4]),
    ],
)
def test_shapes_of_the_warmup(shape: str, shares: list[float]) -> None:
    schedule = TextShareSchedule(1.0, 0.4, 4, shape)  # type: ignore[arg-type]
    assert [schedule.at(step) for step in range(1, 7)] == pytest.approx(shares, abs=1e-4)


def test_without_warmup_the_share_is_at_its_target_from_the_first_step() -> None:
    assert TextShareSchedule(1.0, 0.3).at(1) == 0.3


@given(weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=6), count=st.integers(1, 300), cut=st.integers(0, 300))
def test_sources_are_drawn_by_their_weights_and_a_draw_can_be_cut_anywhere(weights: list[float], count: int, cut: int) -> None:
    weights = [weight / sum(weights) for weight in weights]
    zeros = [0.0] * len(weights)
    drawn, credits = draw_sources(weights, zeros, count)
    for source, weight in enumerate(weights):
        for place in range(count + 1):
            assert drawn[:place].count(source) <= weight * place + 1 + 1e-9
            assert drawn[:place].count(source) >= weight * place - len(weights)
    cut = min(cut, count)
    first, between = draw_sources(weights, zeros, cut)
    rest, after = draw_sources(weights, between, count - cut)
    assert first + rest == drawn
    assert after == credits


def test_two_sources_stay_within_one_sample_of_their_share() -> None:
    drawn, _ = draw_sources([0.7, 0.3], [0.0, 0.0], 1000)
    assert all(abs(drawn[:place].count(1) - 0.3 * place) <= 1 for place in range(1000))


def test_weights_are_normalised_within_a_modality() -> None:
    sources = {"a": text_source("a", 3.0), "b": shards_source("b", "multimodal", 5.0), "c": text_source("c", 1.0)}
    assert normalised_weights(sources, "text") == {"a": 0.75, "c": 0.25}
    with pytest.raises(ValueError, match=r"data\.sources\.a\.weight=-1"):
        normalised_weights({"a": text_source("a", -1.0)}, "text")


def test_a_run_of_one_modality_has_steps_of_that_modality_only() -> None:
    assert text_share_schedule(config({"t": text_source("t")}, text_ratio=1.0)).at(1) == 1.0
    assert text_share_schedule(config({"m": shards_source("m")})).at(1) == 0.0


@pytest.mark.parametrize(
    ("modality", "settings"),
    [
        ("text", {"text_ratio": 0.0}),
        ("text", {"text_ratio": 1.0, "text_ratio_start": 0.5, "text_warmup_steps": 3}),
        ("multimodal", {"text_ratio": 0.3}),
        ("multimodal", {"text_ratio": 0.0, "text_warmup_steps": 3}),
        ("multimodal", {"text_ratio": 1.5}),
    ],
)
def test_a_share_that_the_sources_cannot_give_is_refused(modality: str, settings: dict[str, float]) -> None:
    source = text_source("x") if modality == "text" else shards_source("x")
    with pytest.raises(ValueError, match=r"data\.text_ratio"):
        text_share_schedule(config({"x": source}, **settings))
