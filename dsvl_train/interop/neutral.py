"""The run configuration of a model that no run of ours made: its model, and settings that leave everything at rest."""

from __future__ import annotations

from pathlib import Path

from dsvl_train.config.schema import (
    CheckpointConfig,
    DataConfig,
    EngineConfig,
    InitConfig,
    LaunchConfig,
    LoggingConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    ParamRule,
    RunConfig,
    RunSettings,
    ScheduleConfig,
    StageConfig,
)


def neutral_run(model: ModelConfig, processor: str | Path) -> RunConfig:
    """A valid configuration around `model`, whose processor lies in `processor`."""
    policy = [ParamRule("vision.*", 1.0), ParamRule("adaptor.*", 1.0), ParamRule("language.*", 1.0)]
    return RunConfig(
        run=RunSettings(name=model.name, dir="unused", max_steps=1),
        model=model,
        stage=StageConfig("sft", policy),
        data=DataConfig(processor=str(processor), sources={}, seq_len=model.language.max_positions, packing=True, batch_size=1),
        parallel=ParallelConfig(),
        engine=EngineConfig(),
        optim=OptimConfig(lr=1e-5, schedule=ScheduleConfig("constant")),
        checkpoint=CheckpointConfig(),
        logging=LoggingConfig(),
        launch=LaunchConfig(),
        init=InitConfig(),
    )
