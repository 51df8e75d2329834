"""Sweeps: the points of a command line, and the report that sets them side by side."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_reporting import alternating, make_run, read_page, record

from dsvl_train.cli import main
from dsvl_train.config.errors import ConfigError
from dsvl_train.config.sweep import label_of, plan_sweep

RECIPE = "recipe=demo_vl2/pretrain"


def test_each_point_has_a_folder_named_by_what_it_sets() -> None:
    sweep = plan_sweep([RECIPE, "data.text_ratio=0.5,0.6", "optim.lr=1e-3,1e-4", "launch.nproc=2", "run.dir=runs/mine"])
    assert [point.label for point in sweep.points] == [
        f"text_ratio={ratio},lr={lr}" for ratio in ("0.5", "0.6") for lr in ("0.001", "0.0001")
    ]
    assert [(p.config.data.text_ratio, p.config.optim.lr) for p in sweep.points] == [(0.5, 1e-3), (0.5, 1e-4), (0.6, 1e-3), (0.6, 1e-4)]
    assert [p.config.run.dir for p in sweep.points] == [f"runs/mine/{point.label}" for point in sweep.points]
    assert plan_sweep([RECIPE, "data.text_ratio=0.5,0.6"]).folder == Path("runs/sweeps/demo_vl2_pretrain")


def test_labels_are_names_of_one_folder() -> None:
    assert label_of(["recipe=demo_vl2/sft", "++data.sources.a.path=x", "++data.sources.b.path='/p q'", "run.seed=1"], ["run.seed"]) == (
        "recipe=demo_vl2-sft,data.sources.a.path=x,data.sources.b.path=-p-q"
    )


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.text_ratio=0.5"], "several values"),
        (["data.text_ratio=0.5,0.5"], "same folder"),
        (["data.text_ratio=0.5,0.6", "run.dir=a,b"], "run.dir"),
        (["data.text_ratio=0.5,much"], "text_ratio"),
        (["parallel.tp=1,2"], "parallel.tp"),
    ],
)
def test_a_sweep_with_a_wrong_point_is_refused_before_it_starts(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan_sweep([RECIPE, *overrides])


def test_the_report_of_a_sweep_is_true_to_its_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "ratios"
    whole = [*alternating(19), record(20, "multimodal", loss=1.25, **{"eval/made": 0.875, "eval/seconds": 3.0})]
    make_run(folder / "text_ratio=0.6", whole, data={"text_ratio": 0.6}, run={"name": "a", "dir": "x", "max_steps": 20})
    make_run(folder / "text_ratio=0.15", alternating(4), data={"text_ratio": 0.15}, run={"name": "b", "dir": "y", "max_steps": 20})
    make_run(folder / "text_ratio=1", [], data={"text_ratio": 1}, run={"name": "c", "dir": "z", "max_steps": 20})
    (folder / ".submitit").mkdir()
    page = tmp_path / "page.html"
    assert main(["report", str(folder), "--out", str(page)]) == 0
    heads, *rows = [line.split("  ") for line in capsys.readouterr().out.splitlines()[:4]]
    rows = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert [cell.strip() for cell in heads if cell.strip()] == [
        "Point", "data.text_ratio", "Text loss", "Multimodal loss", "eval/made", "Tokens/s", "Status"
    ]  # fmt: skip
    text = {step: record(step)["loss"] for step in (3, 4, 19)}
    assert rows == [
        ["text_ratio=0.15", "0.15", f"{text[3]:.4f}", f"{text[4]:.4f}", "–", "182", "step 4 of 20"],
        ["text_ratio=0.6", "0.6", f"{text[19]:.4f}", "1.2500", "0.875", "182", "finished"],
        ["text_ratio=1", "1", "–", "–", "–", "–", "step 0 of 20"],
    ]

    drawn = read_page(page)
    assert all(cell in drawn.text for row in rows for cell in row)
    assert not [value for _, name, value in drawn.attributes if name in ("src", "href")], "the page needs something from outside"
    (final,) = drawn.titled("Final loss")
    assert final["x_label"] == "data.text_ratio"
    by_modality = {series["name"]: (series["x"], series["y"]) for series in final["series"]}
    assert by_modality["text"] == ([0.15, 0.6, 1.0], [pytest.approx(text[3]), pytest.approx(text[19]), None])
    assert by_modality["multimodal"] == ([0.15, 0.6, 1.0], [pytest.approx(text[4]), 1.25, None])
    (curves,) = drawn.titled("Text loss")
    assert [(series["name"], series["x"]) for series in curves["series"]] == [
        ("text_ratio=0.15", [1, 3]),
        ("text_ratio=0.6", [float(step) for step in range(1, 20, 2)]),
    ]


def test_points_without_an_order_are_numbered_and_not_joined(tmp_path: Path) -> None:
    folder = tmp_path / "two"
    for place, (ratio, rate) in enumerate([(0.3, 1e-4), (0.7, 1e-4), (0.3, 1e-3)]):
        records = [record(step, loss=2.0 + place) for step in range(1, 4)]
        make_run(folder / f"lr={rate},text_ratio={ratio}", records, data={"text_ratio": ratio}, optim={"lr": rate})
    page = tmp_path / "page.html"
    assert main(["report", str(folder), "--out", str(page)]) == 0
    drawn = read_page(page)
    (final,) = drawn.titled("Final loss")
    assert final["x_label"] == "point, by its number in the table" and final["x"] == [0.5, 3.5]
    assert [(series["x"], series["y"]) for series in final["series"]] == [([1.0, 2.0, 3.0], [2.0, 3.0, 4.0])]
    assert "1 lr=0.0001,text_ratio=0.3" in drawn.text.replace("1lr", "1 lr")
    classes = [value for tag, name, value in drawn.attributes if tag == "path" and name == "class"]
    assert classes.count("points text") == 1
    final_svg = page.read_text(encoding="utf-8").split('aria-label="Final loss')[1].split("</svg>")[0]
    assert "points text" in final_svg and "line text" not in final_svg
