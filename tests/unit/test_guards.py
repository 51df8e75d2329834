"""Which updates are made, and how a job that stands still is described."""

from __future__ import annotations

import math
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dsvl_train.config.schema import GuardConfig
from dsvl_train.training.guards import TrainingDiverged, UpdateGuard
from dsvl_train.training.watchdog import Report, Watchdog, locate


def steady(guard: UpdateGuard, steps: int = 40, modality: str = "text") -> None:
    for step in range(steps):
        assert guard.judge(step, modality, 2.0 + 0.01 * (step % 5), 1.0).update  # type: ignore[arg-type]


@pytest.mark.parametrize(("loss", "norm", "word"), [(math.nan, 1.0, "loss is nan"), (2.0, math.inf, "gradient norm is inf")])
def test_what_is_not_finite_is_skipped_and_counted(loss: float, norm: float, word: str) -> None:
    guard = UpdateGuard(GuardConfig())
    verdict = guard.judge(1, "text", loss, norm)
    assert not verdict.update and word in (verdict.trouble or "")
    assert (guard.skipped, guard.in_a_row) == (1, 1)
    assert guard.judge(2, "text", 2.0, 1.0).update
    assert (guard.skipped, guard.in_a_row) == (1, 0)


def test_only_so_many_in_a_row(tmp_path: Path) -> None:
    guard = UpdateGuard(GuardConfig(max_skipped=3))
    guard.judge(1, "text", math.nan, 1.0)
    guard.judge(2, "multimodal", math.nan, 1.0)
    with pytest.raises(TrainingDiverged, match=r"step 3 .*update 3 in a row .*guard.max_skipped"):
        guard.judge(3, "text", math.nan, 1.0)


def test_stop_stops_at_once() -> None:
    with pytest.raises(TrainingDiverged, match=r"guard.nonfinite=stop"):
        UpdateGuard(GuardConfig(nonfinite="stop")).judge(1, "text", math.nan, 1.0)


@pytest.mark.parametrize(("spike", "update"), [("warn", True), ("skip", False)])
def test_a_spike_is_told_or_skipped(spike: Any, update: bool) -> None:
    guard = UpdateGuard(GuardConfig(spike=spike))
    steady(guard)
    verdict = guard.judge(41, "text", 3.0, 1.0)
    assert verdict.update is update and "the loss 3 is" in (verdict.trouble or "")
    assert "gradient norm" in (guard.judge(42, "text", 2.0, 9.0).trouble or "")


def test_a_spike_is_one_among_steps_of_its_modality() -> None:
    guard = UpdateGuard(GuardConfig(spike="skip"))
    steady(guard)
    assert guard.judge(41, "multimodal", 30.0, 10.0).trouble is None, "the first image step has nothing to be compared with"
    assert guard.judge(42, "text", 1.0, 0.1).trouble is None, "a fall is no spike"
    assert guard.judge(43, "text", 2.05, 1.0).trouble is None


def test_state_goes_on_where_it_was() -> None:
    whole, first, second = (UpdateGuard(GuardConfig(spike="skip", spike_window=20)) for _ in range(3))
    values = [2.0 + math.sin(step) * 0.05 + (3.0 if step in (30, 45) else 0.0) for step in range(60)]
    expected = [whole.judge(step, "text", value, value).update for step, value in enumerate(values)]
    got = [first.judge(step, "text", value, value).update for step, value in enumerate(values[:25])]
    second.load_state(first.state())
    got += [second.judge(step, "text", value, value).update for step, value in enumerate(values[25:])]
    assert got == expected and expected.count(False) == 2


# ------------------------------------------------------------------------------------------------------------------ watchdog


def test_a_process_that_stands_still_is_told_on_and_one_that_moves_is_not(tmp_path: Path) -> None:
    said: list[str | None] = []
    with Watchdog(0.3, 0, 1, tmp_path / "log", said.append) as watchdog:
        for step in range(8):
            watchdog.pulse(step, "updating")
            time.sleep(0.1)
        assert said == []
        watchdog.pulse(8, "saving", patience=3)
        time.sleep(0.6)
        assert said == [], "saving may take longer"
        watchdog.pulse(9, "updating")
        time.sleep(0.8)
    assert len(said) == 1 and "rank 0 stands still: step 9, updating, at " in str(said[0])
    assert "test_guards.py" in (tmp_path / "log" / "stacks_rank_0.txt").read_text()


def test_the_one_that_does_not_answer_and_the_one_that_computes_come_first(tmp_path: Path) -> None:
    watchdog = Watchdog(5, 0, 4, tmp_path)
    waiting = [Report(rank, 7, "forward and backward", 6.0, "step.py:1 `dist.all_reduce(x)`", True) for rank in (0, 3)]
    lines = watchdog.describe([*waiting, Report(1, 7, "waiting for data", 6.0, "loader.py:2", False)]).splitlines()
    assert "no progress for 6 s" in lines[0]
    assert "rank 2 does not answer" in lines[1]
    assert "rank 1 stands still: step 7, waiting for data" in lines[2]
    assert all("waits for others" in line for line in lines[3:5])


def test_a_place_is_a_line_of_ours_and_a_collective_is_known() -> None:
    import torch.distributed as dist

    ready = threading.Event()

    def sleeps() -> None:
        ready.set()
        time.sleep(1.0)

    thread = threading.Thread(target=sleeps)
    thread.start()
    ready.wait()
    time.sleep(0.05)
    place, waits = locate(sys._current_frames()[thread.ident or 0])
    thread.join()
    assert not waits
    code = compile("def waiting(frame): return frame()", dist.distributed_c10d.__file__, "exec")
    space: dict[str, Any] = {}
    exec(code, space)
    found = space["waiting"](sys._getframe)
    assert locate(found)[1]
    assert place
