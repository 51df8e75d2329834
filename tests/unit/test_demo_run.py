"""The demo's driver: it fails when the thresholds are missed, and never takes one run for another."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_recipes.demo import run


@pytest.fixture(autouse=True)
def working_folder_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver goes to the repository's root."""
    monkeypatch.chdir(tmp_path)


def results(digits: float, bits_before: float, bits_after: float) -> list[run.StageResult]:
    tasks = {"digits": {"metric": "exact_match", "score": digits, "n": 300}}
    return [
        run.StageResult("lm", 1.0, {"text": 4.2}, {"bits_per_byte": bits_before, "tasks": {}}),
        run.StageResult("sft", 2.0, {"text": 3.9, "multimodal": 0.5}, {"bits_per_byte": bits_after, "tasks": tasks}),
    ]


@pytest.mark.parametrize(
    ("digits", "bits_after", "code", "complaint"),
    [
        (0.90, 2.20, 0, ""),
        (0.97, 1.90, 0, ""),
        (0.89, 2.00, 1, "held-out digits are read 89.0% right, under 90%"),
        (0.97, 2.21, 1, "held-out text went from 2.000 to 2.210 bits per byte, more than 10 % worse"),
    ],
)
def test_thresholds_decide_the_exit_code(
    digits: float, bits_after: float, code: int, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run._judge(results(digits, 2.0, bits_after)) == code
    printed = capsys.readouterr()
    assert complaint in printed.err and ("met" in printed.out) == (code == 0)


def test_table_has_a_line_per_stage_and_per_task() -> None:
    lines = run._table(results(0.97, 2.0, 1.9)).splitlines()
    assert lines[1].split()[-4:] == ["1.0", "4.200", "-", "2.000"]
    assert lines[2].split()[-4:] == ["2.0", "3.900", "0.500", "1.900"]
    assert lines[-1].split() == ["held-out", "digits", "exact", "match", "97.0%", "of", "300"]


def test_runs_of_another_seed_are_not_taken_for_this_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = tmp_path / "vl2" / "lm"
    stage.mkdir(parents=True)
    (stage / "config.yaml").write_text("run: {seed: 0, name: demo_vl2_lm}\n")
    assert run.main(["--root", str(tmp_path), "--seed", "1"]) == 2
    assert (
        capsys.readouterr().err
        == f"error: {stage} was trained with seed 0, not 1: remove earlier runs with --fresh, or use another --root\n"
    )


def test_a_step_that_fails_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").write_text("years of work")
    assert run.main(["--root", str(tmp_path)]) == 1
    assert "error: this step failed (exit code 2): " in capsys.readouterr().err
