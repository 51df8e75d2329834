"""A sweep from one command line: each point in a folder of its own, and nothing done twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from small_runs import losses, make_data, overrides, train

from dsvl_train.cli import main


def test_a_sweep_goes_on_where_it_was_and_names_the_point_that_failed(tmp_path: Path, capsys) -> None:
    data = make_data(tmp_path / "data")
    folder = tmp_path / "sweep"
    command = [
        "-m",
        *overrides(data, folder, "run.max_steps=2", "checkpoint.every=1", "data.text_warmup_steps=0", "data.text_ratio=0.5,0.6"),
    ]
    points = [folder / "text_ratio=0.5", folder / "text_ratio=0.6"]
    points[0].mkdir(parents=True)
    (points[0] / "log").write_text("a file where a folder should be")
    first = train(command)
    assert first.returncode == 1, first.stderr
    assert "1 of 2 points finished" in first.stderr
    assert "not finished: text_ratio=0.5, last checkpoint after step 0 of 2" in first.stderr
    assert len(losses(points[1])) == 2

    shutil.rmtree(points[0])
    second = train(command)
    assert second.returncode == 0, second.stderr
    assert f"text_ratio=0.6: finished before ({points[1]})" in second.stderr
    assert [len((point / "metrics.jsonl").read_text().splitlines()) for point in points] == [2, 2], "a finished point was run again"
    assert [json.loads((point / "metrics.jsonl").read_text().splitlines()[-1])["text_share_target"] for point in points] == [0.5, 0.6]

    assert main(["report", str(folder), "--out", str(tmp_path / "sweep.html")]) == 0
    table = capsys.readouterr().out
    assert "data.text_ratio" in table and table.count("finished") == 2
