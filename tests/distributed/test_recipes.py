"""Every recipe of the papers, shrunk, trains: its stage, mixture, schedule and features, for three steps on two ranks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from data_recipes.make_tiny import main as make_tiny
from dsvl_train.config.compose import compose_run, to_yaml
from dsvl_train.reporting.metrics import read_metrics
from tests.distributed.harness import reserved_ports, run_ranks

MODELS = ["deepseek_vl_1b", "deepseek_vl_7b", "deepseek_vl2_tiny", "deepseek_vl2_small", "deepseek_vl2"]
STAGES = ["align", "pretrain", "sft"]
STEPS = {"align": "mmm", "vl/pretrain": "tmt", "vl2/pretrain": "mtm", "sft": "mtm"}
"""Modalities of three steps at the mixtures' shares of text: none, 0.7, 0.3, and 0.479 or 0.3."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    recipes = [f"--recipe={model}/{stage}" for model in MODELS for stage in STAGES]
    assert make_tiny([*recipes, "--out", str(folder), "--samples", "12"]) == 0
    return folder


def run_one_after_another(configs: list[str], ports: list[int]) -> None:
    """Runs of one pair of processes, each with a process group of its own."""
    import os

    from dsvl_train.config.compose import load_run_config
    from dsvl_train.parallel import startup
    from dsvl_train.training.run import run

    for config, port in zip(configs, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        assert run(load_run_config(config)) == 0
        startup.stop()


def test_every_recipe_trains_for_three_steps(data: Path, tmp_path: Path) -> None:
    names = [f"{model}/{stage}" for model in MODELS for stage in STAGES]
    configs = []
    for name in names:
        overrides = [f"recipe={name}", "shrink=tiny", f"data.root={data}", f"run.dir={tmp_path / name}", "data.workers=0"]
        path = tmp_path / f"{name.replace('/', '_')}.yaml"
        path.write_text(to_yaml(compose_run(overrides)))
        configs.append(str(path))
    with reserved_ports(len(configs)) as ports:
        run_ranks(run_one_after_another, 2, configs, ports)
    for name in names:
        records = read_metrics(tmp_path / name / "metrics.jsonl")
        family, stage = "vl2" if "vl2" in name else "vl", name.split("/")[1]
        assert "".join(record["modality"][0] for record in records) == (STEPS.get(stage) or STEPS[f"{family}/{stage}"]), name
        for record in records:
            assert math.isfinite(record["loss"]) and record["grad_norm"] > 0, name
            assert record["bad_samples"] == 0
        if family == "vl2":
            assert min(record["tile_imbalance_encoded"] for record in records if record["tiles"]) >= 1.0
        assert (tmp_path / name / "checkpoints" / "latest").read_text().strip() == "step_00000003"
