"""Learning-rate schedules against values worked out by hand."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsvl_train.config.schema import ScheduleConfig
from dsvl_train.training.schedules import learning_rate

VL2_STEP = ScheduleConfig("step", milestones=[0.5, 0.75], factors=[1 / math.sqrt(10), 0.1])
VL_STEP = ScheduleConfig("step", milestones=[0.8, 0.9], factors=[0.316, 0.1])


def test_warm_up_is_linear_from_zero_for_every_kind():
    for kind in ("cosine", "constant", "step"):
        schedule = ScheduleConfig(kind, warmup_steps=4)
        assert [learning_rate(s, 100, 8.0, schedule) for s in (1, 2, 3, 4)] == [2.0, 4.0, 6.0, 8.0]


def test_no_warm_up_starts_at_the_peak():
    assert learning_rate(1, 10, 3.0, ScheduleConfig("constant")) == 3.0
    assert learning_rate(1, 10, 3.0, VL2_STEP) == 3.0


def test_cosine_by_hand():
    schedule = ScheduleConfig("cosine", warmup_steps=2, min_ratio=0.1)
    # Ten steps, two of warm-up: progress is (step - 2) / 8.
    assert learning_rate(2, 10, 1.0, schedule) == 1.0
    assert learning_rate(4, 10, 1.0, schedule) == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2, rel=1e-12)
    assert learning_rate(6, 10, 1.0, schedule) == pytest.approx(0.55, rel=1e-12)
    assert learning_rate(10, 10, 1.0, schedule) == pytest.approx(0.1, rel=1e-12)


def test_cosine_ends_at_zero_by_default():
    assert learning_rate(50, 50, 2.0, ScheduleConfig("cosine")) == 0.0


def test_vl2_step_divides_by_sqrt_10_at_half_and_three_quarters():
    rates = [learning_rate(s, 100, 5.4e-4, VL2_STEP) for s in (50, 51, 75, 76, 100)]
    third = 5.4e-4 / math.sqrt(10)
    assert rates == pytest.approx([5.4e-4, third, third, 5.4e-5, 5.4e-5], rel=1e-12)


def test_vl_multi_step_at_80_and_90_percent():
    rates = [learning_rate(s, 42000, 4.2e-5, VL_STEP) for s in (33600, 33601, 37800, 37801, 42000)]
    assert rates == pytest.approx([4.2e-5, 4.2e-5 * 0.316, 4.2e-5 * 0.316, 4.2e-6, 4.2e-6], rel=1e-12)


def test_a_milestone_on_a_whole_step_holds_despite_float_rounding():
    schedule = ScheduleConfig("step", milestones=[0.55], factors=[0.5])
    assert 0.55 * 100 > 55
    assert [learning_rate(s, 100, 1.0, schedule) for s in (55, 56)] == [1.0, 0.5]


def test_a_milestone_between_steps_takes_effect_at_the_next():
    schedule = ScheduleConfig("step", milestones=[0.5], factors=[0.5])
    assert [learning_rate(s, 5, 1.0, schedule) for s in (3, 4)] == [1.0, 0.5]


def test_milestones_at_the_ends():
    schedule = ScheduleConfig("step", milestones=[0.0, 1.0], factors=[0.5, 0.25])
    assert [learning_rate(s, 4, 1.0, schedule) for s in (1, 4)] == [0.5, 0.5]


@pytest.mark.parametrize("kind", ["cosine", "constant", "step"])
def test_warm_up_longer_than_the_run_never_reaches_the_peak(kind):
    schedule = ScheduleConfig(kind, warmup_steps=2000)
    assert learning_rate(5, 5, 1.0, schedule) == 5 / 2000


def test_a_milestone_inside_the_warm_up_scales_it():
    schedule = ScheduleConfig("step", warmup_steps=8, milestones=[0.5], factors=[0.5])
    assert [learning_rate(s, 10, 1.0, schedule) for s in (5, 6, 8)] == [5 / 8, 3 / 8, 0.5]


def test_warm_up_as_long_as_the_run():
    assert learning_rate(4, 4, 1.0, ScheduleConfig("cosine", warmup_steps=4)) == 1.0


def test_steps_after_the_end_keep_the_last_value():
    schedule = ScheduleConfig("cosine", min_ratio=0.1)
    assert learning_rate(11, 10, 1.0, schedule) == learning_rate(10, 10, 1.0, schedule)


@pytest.mark.parametrize(
    ("step", "max_steps", "schedule", "message"),
    [
        (0, 10, ScheduleConfig("constant"), "steps count from 1"),
        (1, 0, ScheduleConfig("constant"), "run.max_steps is 0"),
        (1, 10, ScheduleConfig("step", milestones=[0.5], factors=[]), "optim.schedule.factors"),
        (1, 10, ScheduleConfig("step", milestones=[0.5, 0.5], factors=[0.5, 0.1]), "rising fractions"),
        (1, 10, ScheduleConfig("step", milestones=[1.5], factors=[0.5]), "rising fractions"),
        (1, 10, ScheduleConfig("linear"), "optim.schedule.kind is 'linear'"),  # type: ignore[arg-type]
    ],
)
def test_impossible_settings_say_what_to_change(step, max_steps, schedule, message):
    with pytest.raises(ValueError, match=message):
        learning_rate(step, max_steps, 1.0, schedule)


@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from(["cosine", "constant", "step"]),
    max_steps=st.integers(1, 500),
    warmup=st.integers(0, 600),
    min_ratio=st.floats(0, 1),
)
def test_never_above_the_peak_and_falling_after_the_warm_up(kind, max_steps, warmup, min_ratio):
    schedule = ScheduleConfig(kind, warmup, min_ratio, [0.5, 0.75], [0.316228, 0.1])
    rates = [learning_rate(s, max_steps, 1.0, schedule) for s in range(1, max_steps + 1)]
    assert all(0.0 <= rate <= 1.0 for rate in rates)
    after = rates[max(warmup - 1, 0) :]
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(after))
