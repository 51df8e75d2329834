"""What was imported by one process trains on any layout, and what was trained there is exported by one process: the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dsvl_train.config.schema import ModelConfig, ParamRule
from dsvl_train.interop.blocks import read_whole
from dsvl_train.interop.exporter import export_model
from dsvl_train.interop.formats import deepseek_vl2
from dsvl_train.interop.importer import import_model
from dsvl_train.interop.shapes import logical_shapes
from dsvl_train.interop.sources import open_weights
from tests.distributed.harness import run_ranks
from tests.made_models import bits, write_model, write_multi_modality, write_vl_processor
from tests.tiny import tiny_model

LEARNING_RATE = 1e-3
LAYOUTS = [
    (1, {}),
    (2, {"tp": 2}),
    (2, {"ep": 2}),
    (2, {"pp": 2}),
    (8, {"tp": 2, "pp": 2, "ep": 2}),
]
"""Ranks and layout; the first is the reference. The same import, one step, the same export."""


def train_one_step(source: str, run_dir: str, parallel: dict[str, int], policy: list[ParamRule]) -> list[float]:
    """Start from a folder, whoever wrote it, train one multimodal step and save. Runs on each rank; returns loss and gradient norm."""
    from dsvl_train.parallel import startup
    from tests.tiny import SOURCES, tiny_batch, tiny_run

    cfg = tiny_run("vl2", run_dir, **parallel)
    cfg.stage.policy, cfg.stage.aux_loss_weight, cfg.stage.expert_bias_rate = policy, 0.0, 0.0
    cfg.optim.lr = LEARNING_RATE
    cfg.data.processor = f"{run_dir}/processor"
    world = startup.start(cfg.engine, cfg.parallel, seed=0)
    from dsvl_train.interop.loading import load_any_weights
    from dsvl_train.interop.released import is_released, open_released
    from dsvl_train.models.build import build_model
    from dsvl_train.models.costs import choose_division
    from dsvl_train.training import checkpoint
    from dsvl_train.training.setup import build_trainable
    from dsvl_train.training.step import TrainStep

    cfg.model = open_released(source)[0] if is_released(source) else checkpoint_model(source)
    if cfg.model.language.moe is not None and cfg.model.language.moe.expert_bias:
        cfg.stage.aux_loss_weight, cfg.stage.expert_bias_rate = 0.01, 0.01
    model = build_model(cfg.model, cfg.stage, cfg.parallel, world, seed=7, division=choose_division(cfg))
    load_any_weights(source, model, cfg.model)
    chunks, optimiser = build_trainable(cfg, world, model)
    step = TrainStep(cfg, world, model, chunks, optimiser, SOURCES)
    batch = tiny_batch(cfg.model, 1, "multimodal", world.dp_rank, world.dp_size)
    metrics, _ = step(batch, cfg.optim.lr, stop_requested=False)
    state = checkpoint.TrainState(1, {}, optimiser.steps_taken(), 0)
    checkpoint.Saver(cfg, world, model, optimiser).save(state, last=True)
    startup.stop()
    return [metrics["loss"], metrics["grad_norm"]]


def checkpoint_model(folder: str) -> ModelConfig:
    from dsvl_train.config.compose import load_run_config

    return load_run_config(Path(folder) / "config.yaml").model


def released_vl2(folder: Path) -> Path:
    """The tiny VL2 of the training tests, as a released folder."""
    model = tiny_model("vl2")
    generator = torch.Generator().manual_seed(5)
    shapes = deepseek_vl2.relate(model, logical_shapes(model)).foreign
    state = {name: torch.randn(shape, generator=generator) * 0.1 + ("norm" in name) for name, shape in shapes.items()}
    config = deepseek_vl2.write(model, bos_id=0, eos_id=1, dtype="float32", aux_loss_alpha=0.001, candidates=None)
    return write_model(folder, config, state)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    source = open_weights(folder)
    return {name: read_whole(source, name) for name in source.infos()}


def test_import_train_export_agree_on_every_layout(tmp_path: Path) -> None:
    released = released_vl2(tmp_path / "released")
    import_model(released, tmp_path / "imported")
    policy = [ParamRule("vision.*", 0.1), ParamRule("adaptor.*", 1.0), ParamRule("language.*", 1.0)]
    results: list[dict[str, torch.Tensor]] = []
    numbers: list[Any] = []
    for ranks, parallel in LAYOUTS:
        run_dir = tmp_path / ("run" + "".join(f"_{key}{value}" for key, value in parallel.items()))
        (run_dir / "processor").mkdir(parents=True)
        # from the checkpoint and from the released folder itself, in turn
        source = released if len(results) % 2 else tmp_path / "imported"
        numbers.append(run_ranks(train_one_step, ranks, str(source), str(run_dir), parallel, policy)[0])
        export_model(run_dir, run_dir / "exported", "deepseek_vl_v2", show_progress=False)
        results.append(weights(run_dir / "exported"))
    before = weights(released)
    reference = results[0]
    moved = [float((reference[name] - before[name]).abs().max()) for name in before]
    assert max(moved) > 0.9 * LEARNING_RATE and min(moved) > 0.0
    for (_, parallel), got, values in zip(LAYOUTS[1:], results[1:], numbers[1:], strict=True):
        assert values == pytest.approx(numbers[0], rel=1e-5)
        assert got.keys() == before.keys()
        for name, tensor in reference.items():
            torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-4, msg=lambda text, n=name, p=parallel: f"{p} {n}: {text}")


def test_what_does_not_train_comes_back_bit_for_bit(tmp_path: Path) -> None:
    """A 7B-like model trained on two ranks with a frozen tower, the pooling head and the two norms that nothing uses in it."""
    released = write_multi_modality(tmp_path / "released", hybrid=True)
    run_dir = tmp_path / "run"
    (run_dir / "processor").mkdir(parents=True)
    write_vl_processor(run_dir / "processor", hybrid=True)
    policy = [ParamRule("vision.*", None), ParamRule("adaptor.*", 1.0), ParamRule("language.*", 1.0)]
    run_ranks(train_one_step, 2, str(released), str(run_dir), {"tp": 2}, policy)
    export_model(run_dir, tmp_path / "back", "multi_modality", show_progress=False)
    before, after = weights(released), weights(tmp_path / "back")
    assert before.keys() == after.keys()
    unchanged = {name for name in before if torch.equal(bits(before[name]), bits(after[name]))}
    assert unchanged == {name for name in before if name.startswith("vision_model.")}
    assert (tmp_path / "back" / "tokenizer.json").is_file()
