"""Callbacks, run against a stand-in for the trainer."""

from __future__ import annotations

import io
import itertools
import json
import logging
import resource
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dsvl_train.config.schema import (
    AdaptorConfig,
    CheckpointConfig,
    DataConfig,
    EngineConfig,
    InitConfig,
    LanguageConfig,
    LaunchConfig,
    LoggingConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    ParamRule,
    RunConfig,
    RunSettings,
    ScheduleConfig,
    SiglipConfig,
    StageConfig,
    VisionConfig,
)
from dsvl_train.data.batch import StepBatch
from dsvl_train.training.callbacks import Health, MetricsFile, Progress, Samples, Throughput, TrainerView, WandbLogger, default_callbacks
from dsvl_train.training.callbacks.progress import duration
from dsvl_train.training.callbacks.wandb_logger import flatten


def run_config(max_steps: int = 100, **logging_settings) -> RunConfig:
    model = ModelConfig(
        name="tiny",
        family="vl2",
        vision=VisionConfig(SiglipConfig(image_size=28, patch_size=14, width=8, layers=1, heads=1)),
        adaptor=AdaptorConfig("pixel_shuffle"),
        language=LanguageConfig(vocab_size=16, hidden_size=8, ffn_width=16, layers=1, heads=1),
    )
    return RunConfig(
        run=RunSettings(name="demo", dir="unused", max_steps=max_steps),
        model=model,
        stage=StageConfig("sft", [ParamRule("*", 1.0)]),
        data=DataConfig(processor="p", sources={}, seq_len=8, packing=True, batch_size=1),
        parallel=ParallelConfig(),
        engine=EngineConfig(),
        optim=OptimConfig(lr=1e-3, schedule=ScheduleConfig("constant")),
        checkpoint=CheckpointConfig(),
        logging=LoggingConfig(**logging_settings),
        launch=LaunchConfig(),
        init=InitConfig(),
    )


class Trainer:
    def __init__(self, run_dir: Path, cfg: RunConfig | None = None, is_main: bool = True, step: int = 0) -> None:
        self.cfg = cfg or run_config()
        self.run_dir, self.is_main, self.step = run_dir, is_main, step
        self.metrics: dict = {}
        self.batch: StepBatch | None = None

    def do_step(self, callbacks, **metrics) -> None:
        self.step += 1
        self.metrics = {"step": self.step, **metrics}
        for callback in callbacks:
            callback.on_step_end(self, self.metrics)


# ---------------------------------------------------------------------------------------------------------------- metrics file


def test_metrics_keep_all_digits_and_each_line_is_on_disk_at_once(tmp_path):
    trainer, callback = Trainer(tmp_path), MetricsFile()
    callback.on_run_start(trainer)
    for loss in (0.1 + 0.2, 1 / 3):
        trainer.do_step([callback], loss=loss)
        last = (tmp_path / "metrics.jsonl").read_text().splitlines()[-1]
        assert json.loads(last) == {"step": trainer.step, "loss": loss}
        assert repr(loss) in last
    callback.on_run_end(trainer, "finished")


def test_tensors_numpy_and_non_finite_values_become_strict_json(tmp_path):
    trainer, callback = Trainer(tmp_path), MetricsFile()
    callback.on_run_start(trainer)
    trainer.do_step(
        [callback],
        loss=torch.tensor(1.5),
        grad_norm=float("nan"),
        lr={"vision": np.float64(0.25)},
        expert_load=[torch.tensor([0.5, 0.5]), np.array([1.0, np.inf])],
        tiles=np.int64(3),
    )
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert line == {"step": 1, "loss": 1.5, "grad_norm": None, "lr": {"vision": 0.25}, "expert_load": [[0.5, 0.5], [1.0, None]], "tiles": 3}


def test_a_resumed_run_appends_and_is_not_glued_to_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    trainer, callback = Trainer(tmp_path, step=1), MetricsFile()
    callback.on_run_start(trainer)
    trainer.do_step([callback], loss=1.0)
    callback.on_exception(trainer, RuntimeError())
    assert path.read_text() == '{"step": 1}\n{"step": 2, "lo\n{"step": 2, "loss": 1.0}\n'


def test_lines_wait_in_memory_while_the_disk_is_full(tmp_path, caplog):
    trainer, callback = Trainer(tmp_path), MetricsFile()
    path = tmp_path / "metrics.jsonl"
    callback.on_run_start(trainer)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (70, limits[1]))
    try:
        for _ in range(5):
            trainer.do_step([callback], loss=1.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.stat().st_size == 70
    assert caplog.text.count("metrics.jsonl cannot be written") == 1
    trainer.do_step([callback], loss=1.0)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5, 6]
    callback.on_run_end(trainer, "finished")


def test_other_ranks_write_nothing(tmp_path, capsys):
    trainer, callbacks = Trainer(tmp_path, is_main=False), [MetricsFile(), Progress(), WandbLogger()]
    for callback in callbacks:
        callback.on_run_start(trainer)
    trainer.do_step(callbacks, loss=1.0)
    for callback in callbacks:
        callback.on_run_end(trainer, "finished")
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().err == ""


# ------------------------------------------------------------------------------------------------------------------ throughput


def test_throughput_is_sums_over_sums_in_the_window(tmp_path):
    trainer, callback = Trainer(tmp_path), Throughput(window=2)
    trainer.do_step([callback], tokens=1000, tiles=0, step_s=1.0)
    trainer.do_step([callback], tokens=100, tiles=6, step_s=1.5, data_wait_s=0.5)
    assert trainer.metrics["tokens_per_s"] == 100 / 1.5 and trainer.metrics["tiles_per_s"] == 4.0
    assert trainer.metrics["tokens_per_s_avg"] == 1100 / 3 and trainer.metrics["tiles_per_s_avg"] == 2.0
    trainer.do_step([callback], tokens=100, tiles=0, step_s=2.0, tokens_per_s=7.0)
    assert trainer.metrics["tokens_per_s"] == 7.0 and trainer.metrics["tokens_per_s_avg"] == 50.0
    trainer.do_step([callback], tokens=100)
    assert "tokens_per_s_avg" not in trainer.metrics


# -------------------------------------------------------------------------------------------------------------------- progress


def progress_lines(tmp_path, steps: int, start: int = 0, seconds_per_step: float = 1.0, every: int = 1, stop_after: int | None = None):
    now = SimpleNamespace(s=0.0)
    stream, trainer = io.StringIO(), Trainer(tmp_path, run_config(max_steps=steps, every=every), step=start)
    trainer.cfg.run.stop_after = stop_after
    callback = Progress(stream, clock=lambda: now.s)
    callback.on_run_start(trainer)
    while trainer.step < (stop_after or steps):
        now.s += seconds_per_step
        modality = "text" if trainer.step % 2 else "multimodal"
        trainer.do_step(
            [callback], modality=modality, loss=2.0, text_share=0.5, tokens_per_s=1234.5, step_s=seconds_per_step, tokens_per_s_avg=2345.6
        )
    callback.on_run_end(trainer, "finished")
    return stream.getvalue().splitlines()


def test_plain_progress_has_about_twenty_lines_first_and_last_among_them(tmp_path):
    lines = progress_lines(tmp_path, 397)
    steps = [int(line.split("/")[0].split()[1]) for line in lines[1:-1]]
    assert 20 <= len(steps) <= 22 and steps[0] == 1 and steps[-1] == 397
    assert lines[0] == "demo: 397 steps" and lines[-1] == "demo: finished after step 397"
    assert lines[2] == "step  20/397  loss multimodal 2.0000 / text 2.0000, text share 50%, 2,346 tokens/s  ETA 6:17"


def test_a_short_run_prints_every_step(tmp_path):
    assert len(progress_lines(tmp_path, 5)) == 7


def test_a_slow_run_speaks_every_five_minutes_but_only_every_n_steps(tmp_path):
    lines = progress_lines(tmp_path, 1000, seconds_per_step=60.0)
    steps = [int(line.split("/")[0].split()[1]) for line in lines[1:-1]]
    assert max(b - a for a, b in itertools.pairwise(steps)) == 5
    lines = progress_lines(tmp_path, 1000, seconds_per_step=60.0, every=25)
    assert all(int(line.split("/")[0].split()[1]) % 25 == 0 for line in lines[2:-1])


def test_a_resumed_run_says_where_it_goes_on_and_a_stopped_one_ends_there(tmp_path):
    lines = progress_lines(tmp_path, 1000, start=90, stop_after=100)
    assert lines[0] == "demo: going on after step 90 of 100" and lines[-1] == "demo: finished after step 100"
    assert lines[1].startswith("step  91/100") and len(lines) == 12


def test_an_error_ends_the_progress_with_its_name(tmp_path):
    stream, trainer = io.StringIO(), Trainer(tmp_path)
    callback = Progress(stream)
    callback.on_run_start(trainer)
    trainer.do_step([callback], modality="text", loss=1.0, step_s=1.0)
    trainer.do_step([callback], modality="text", loss=1.0, step_s=1.0)
    callback.on_exception(trainer, KeyboardInterrupt())
    lines = stream.getvalue().splitlines()
    assert lines[-2].startswith("step   2/100") and lines[-1] == "demo: KeyboardInterrupt after step 2"


def test_a_terminal_gets_a_bar(tmp_path):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream, trainer = Terminal(), Trainer(tmp_path, run_config(max_steps=3))
    callback = Progress(stream)
    callback.on_run_start(trainer)
    for _ in range(3):
        trainer.do_step([callback], modality="text", loss=1.25, text_share=1.0, tokens_per_s=10.0, step_s=1.0)
    callback.on_run_end(trainer, "finished")
    text = stream.getvalue()
    assert "3/3" in text and "loss text 1.2500, text share 100%, 10 tokens/s" in text and text.endswith("demo: finished after step 3\n")


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (723, "12:03"), (11045, "3:04:05"), (-1, "0:00")])
def test_duration(seconds, text):
    assert duration(seconds) == text


# ----------------------------------------------------------------------------------------------------------------------- wandb


class FakeWandb(types.ModuleType):
    """Records what is logged; fails where told to."""

    def __init__(self, fail_at: str = "") -> None:
        super().__init__("wandb")
        self.fail_at = fail_at
        self.logged: list = []
        self.inits: list = []
        self.exit_codes: list = []
        self.Settings = lambda **settings: settings

    def _maybe_fail(self, where: str) -> None:
        if self.fail_at == where:
            raise OSError("no such luck")

    def init(self, **settings):
        self._maybe_fail("init")
        self.inits.append(settings)
        return self

    def log(self, metrics, step):
        self._maybe_fail("log")
        self.logged.append((step, metrics))

    def finish(self, exit_code):
        self._maybe_fail("finish")
        self.exit_codes.append(exit_code)


def wandb_run(tmp_path, monkeypatch, fake, steps=3):
    monkeypatch.setitem(sys.modules, "wandb", fake)
    trainer, callback = Trainer(tmp_path, run_config(wandb="offline")), WandbLogger()
    callback.on_run_start(trainer)
    for _ in range(steps):
        trainer.do_step([callback], modality="text", loss=1.5, lr={"vision": 0.1})
    callback.on_run_end(trainer, "finished")


def test_wandb_gets_group_stage_and_flat_numbers_and_a_resumed_run_keeps_its_id(tmp_path, monkeypatch):
    fake = FakeWandb()
    wandb_run(tmp_path, monkeypatch, fake, steps=1)
    wandb_run(tmp_path, monkeypatch, fake, steps=0)
    first, second = fake.inits
    assert first["mode"] == "offline" and first["group"] == "tiny" and first["job_type"] == "sft" and "sft" in first["tags"]
    assert first["config"]["stage"]["name"] == "sft" and first["id"] == second["id"] and first["resume"] == "allow"
    assert fake.logged == [(1, {"step": 1, "loss": 1.5, "loss/text": 1.5, "lr/vision": 0.1})]
    assert fake.exit_codes == [0, 0]


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_failing_wandb_costs_one_warning_and_not_the_run(tmp_path, monkeypatch, caplog, where):
    with caplog.at_level(logging.WARNING):
        wandb_run(tmp_path, monkeypatch, FakeWandb(fail_at=where))
    assert [record.message for record in caplog.records] == [
        "Weights & Biases is off for the rest of this run (OSError: no such luck); metrics.jsonl goes on"
    ]


def test_a_missing_wandb_costs_one_warning(tmp_path, monkeypatch, caplog):
    with caplog.at_level(logging.WARNING):
        wandb_run(tmp_path, monkeypatch, None)
    assert len(caplog.records) == 1


def test_flatten_leaves_out_words_tables_and_non_finite_numbers():
    metrics = {
        "modality": "multimodal",
        "loss": torch.tensor(2.0),
        "grad_norm": float("inf"),
        "expert_load": [[0.5, 0.5]],
        "expert_max_violation": [0.25, np.float32(0.5)],
        "tiles": 3,
    }
    assert flatten(metrics) == {
        "loss": 2.0,
        "loss/multimodal": 2.0,
        "expert_max_violation/0": 0.25,
        "expert_max_violation/1": 0.5,
        "tiles": 3,
    }


def test_a_rank_that_is_slow_over_a_whole_window_is_named(tmp_path, caplog):
    trainer, health = Trainer(tmp_path), Health()
    trainer.cfg.guard.straggler_window = 4
    for step in range(1, 9):
        slow = 3.0 if step > 2 else 1.0
        trainer.do_step([health], rank_s=[1.0, 1.1, slow, 0.9], rank_free_memory=[0.5] * 4)
        assert "rank_s" not in trainer.metrics
        assert trainer.metrics["straggler"] == (2 if step in (4, 8) else None)
    assert trainer.metrics["slowest_over_median"] == pytest.approx(3.0)
    assert caplog.text.count("rank 2 computes") == 2


def test_a_machine_that_runs_out_of_memory_is_named_once(tmp_path, caplog):
    trainer, health = Trainer(tmp_path), Health()
    for free in (0.5, 0.04, 0.03):
        trainer.do_step([health], rank_free_memory=[0.5, free])
    assert caplog.text.count("rank 1's machine") == 1
    assert "rank_free_memory" not in trainer.metrics


def test_default_callbacks_follow_the_settings():
    def names(**settings):
        return [type(callback).__name__ for callback in default_callbacks(LoggingConfig(**settings))]

    assert names() == ["Throughput", "Health", "MetricsFile", "Progress"]
    with_samples = default_callbacks(LoggingConfig(), Samples(None, []))  # type: ignore[arg-type]
    assert [type(callback).__name__ for callback in with_samples] == ["Throughput", "Health", "Samples", "MetricsFile", "Progress"]
    assert names(wandb="offline", progress=False) == ["Throughput", "Health", "MetricsFile", "WandbLogger"]


def test_the_stand_in_is_a_trainer_view(tmp_path):
    view: TrainerView = Trainer(tmp_path)
    assert view.step == 0
