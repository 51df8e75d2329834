"""What a chain of stages would run, and the mistakes that it finds before it runs any."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from dsvl_train.checkpoints.folders import STATE_FILE, step_folder
from dsvl_train.checkpoints.manifest import manifest_of, write_manifest
from dsvl_train.checkpoints.publication import point_latest
from dsvl_train.cli import main
from dsvl_train.commands import chain


def planned(*arguments: str) -> list[chain.Stage]:
    parser = argparse.ArgumentParser()
    chain.add(parser.add_subparsers())
    return chain.plan(parser.parse_args(["chain", *arguments]))


def test_stages_follow_one_another() -> None:
    stages = planned(
        "deepseek_vl2", "shrink=tiny", "--root=r", "--launcher=srun -n 4 x", "--set=sft:optim.lr=1e-6", "--set=sft:init.from=w"
    )
    assert [stage.name for stage in stages] == ["align", "pretrain", "sft"]
    assert [stage.config.init.source for stage in stages] == [None, "r/align", "w"]
    assert [stage.config.run.dir for stage in stages] == ["r/align", "r/pretrain", "r/sft"]
    assert [stage.config.optim.lr for stage in stages] == [4.5e-4, 4.5e-4, 1e-6]
    assert stages[0].command == ["srun", "-n", "4", "x", "recipe=deepseek_vl2/align", "run.dir=r/align", "shrink=tiny"]


def test_some_stages_take_up_from_the_one_before() -> None:
    (stage,) = planned("demo_vl", "--stages=pretrain")
    assert (stage.config.init.source, stage.config.run.dir) == ("runs/demo_vl/align", "runs/demo_vl/pretrain")
    assert [stage.name for stage in planned("demo_vl", "--stages", "sft,lm")] == ["lm", "sft"]


def test_settings_may_stand_before_and_after_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chain", "demo_vl", "run.max_steps=1", "--stages=lm", "parallel.tp=3"]) == 2
    assert "stage lm: parallel.tp" in capsys.readouterr().err


def test_finished_is_read_from_the_checkpoint(tmp_path: Path) -> None:
    (stage,) = planned("demo_vl", "run.max_steps=5", "--stages=lm", f"--root={tmp_path}")
    assert (stage.steps_done, stage.finished) == (0, False)
    for step in (4, 5):
        folder = step_folder(tmp_path / "lm", step)
        folder.mkdir(parents=True)
        (folder / STATE_FILE).write_text("{}")
        write_manifest(folder, manifest_of(folder, step))
        point_latest(folder)
        assert (stage.steps_done, stage.finished) == (step, step == 5)
    (folder / STATE_FILE).unlink()
    assert not stage.finished, "a run that goes on from an earlier checkpoint has steps to do again"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["deepseek_vl3"], ["no family is called 'deepseek_vl3'", "nearest: deepseek_vl2"]),
        (["demo_vl", "--stages=lm,rlhf"], ["'rlhf'", "lm,align,pretrain,sft"]),
        (["demo_vl", "run.dir=x"], ["run.dir=x", "--root"]),
        (["demo_vl", "init.from=x"], ["init.from=x", "--set STAGE:init.from=x"]),
        (["demo_vl", "--set=sft.optim.lr=1"], ["--set sft.optim.lr=1", "STAGE:KEY=VALUE"]),
        (["demo_vl", "--set=sft:optim.lrr=1"], ["stage sft", "optim.lrr", "optim.lr"]),
        (["demo_vl", "--stages=lm", "parallel.tp=3"], ["stage lm", "parallel.tp"]),
        (["demo_vl", "shrink=tiny", "--launcher=/no/such/command"], ["--launcher /no/such/command"]),
    ],
)
def test_a_mistake_is_named_before_anything_runs(
    arguments: list[str], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["chain", *arguments]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert not list(tmp_path.iterdir())
