"""A training run from its typed configuration: build, restore, train."""

from __future__ import annotations

import logging
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from dsvl_train.config.compose import load_run_config, to_yaml
from dsvl_train.config.schema import RunConfig
from dsvl_train.parallel import startup
from dsvl_train.parallel.startup import World

_POLL_S = 0.2

if TYPE_CHECKING:
    from dsvl_train.data.loader import DataPipeline
    from dsvl_train.data.sharing import Sharing
    from dsvl_train.models.vlm import VisionLanguageModel


def run(cfg: RunConfig) -> int:
    """Train as configured. Returns the exit code: 0 finished, 128 + signal stopped by one.

    Raises:
        ValueError, FileNotFoundError: configuration, data, model and checkpoint do not fit together; says what to change.
    """
    world = startup.start(cfg.engine, cfg.parallel, cfg.run.seed)
    if world.is_main:
        logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
        logging.getLogger("dsvl_train").setLevel(logging.INFO)
    code = _train(cfg, world)
    startup.stop()
    return code


def _train(cfg: RunConfig, world: World) -> int:
    # these import megatron-core, which start-up has to prepare for the device first
    from dsvl_train.checkpoints.folders import CONFIG_FILE
    from dsvl_train.interop.checks import require_same_model
    from dsvl_train.models.build import build_model
    from dsvl_train.models.costs import choose_division
    from dsvl_train.training import checkpoint
    from dsvl_train.training.bad_samples import BadSampleWatch
    from dsvl_train.training.callbacks import Samples, default_callbacks
    from dsvl_train.training.callbacks.evaluation import Evaluation
    from dsvl_train.training.interrupt import StopRequest
    from dsvl_train.training.setup import build_trainable, building_place, check_processor
    from dsvl_train.training.step import TrainStep
    from dsvl_train.training.trainer import Trainer
    from dsvl_train.training.watchdog import Watchdog

    stop = StopRequest()
    stop.install()
    run_dir = Path(cfg.run.dir)
    resume_from = checkpoint.prepare_resume(cfg)
    data = _open_data(cfg, world)
    check_processor(cfg.model, data.processor)
    model = build_model(cfg.model, cfg.stage, cfg.parallel, building_place(cfg, world), cfg.run.seed, choose_division(cfg))
    if resume_from is None:
        _load_initial_weights(cfg, world, model)
    chunks, optimiser = build_trainable(cfg, world, model)
    watchdog = Watchdog(cfg.guard.hang_s, world.rank, world.size, run_dir / "log")
    train_step = TrainStep(cfg, world, model, chunks, optimiser, data.source_names, watchdog.pulse)
    bad_samples = BadSampleWatch(run_dir, cfg.data.max_bad_fraction, is_main=world.is_main)
    saver = checkpoint.Saver(cfg, world, model, optimiser)
    samples = Samples(data.processor, data.source_names) if cfg.logging.samples else None
    evaluation = None
    if cfg.eval.every:
        evaluation = Evaluation(cfg, world, model, watchdog.pulse, lambda: stop.requested, optimiser.whole_weights)
    callbacks = default_callbacks(cfg.logging, samples, evaluation)
    trainer = Trainer(cfg, world, model, optimiser, data, train_step, callbacks, stop, bad_samples, watchdog, saver)
    bad_so_far = samples_seen = 0
    if resume_from is not None:
        require_same_model(cfg.model, load_run_config(resume_from / CONFIG_FILE).model, str(resume_from))
        state = checkpoint.load(resume_from, model, optimiser)
        data.load_state(state.data)
        train_step.guard.load_state(state.guard)
        trainer.step, bad_so_far, samples_seen = state.step, state.bad_samples, state.samples_seen
        trainer.totals |= state.totals
    bad_samples.start(trainer.step, bad_so_far, samples_seen, data.left_out())
    if world.is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(to_yaml(cfg))
    with data:
        reason = trainer.fit()
    if reason != "interrupted":
        return 0
    number = stop.signal or signal.SIGTERM
    if world.is_main:
        print(f"stopped after step {trainer.step} ({number.name}) and saved; the same command goes on from there", file=sys.stderr)
    return 128 + number


def _open_data(cfg: RunConfig, world: World) -> DataPipeline:
    """Rank 0 measures what is not measured yet; then every rank opens the same indexes."""
    from dsvl_train.data.loader import build_data

    def build(measure: bool) -> DataPipeline:
        return build_data(
            cfg.data,
            seed=cfg.run.seed,
            max_steps=cfg.run.max_steps,
            dp_rank=world.dp_rank,
            dp_size=world.dp_size,
            build_index=measure,
            sharing=_data_sharing(world),
            pin_memory=world.device.type == "cuda",
        )

    if world.size == 1:
        return build(measure=True)
    # Not a barrier: measuring a large data set takes longer than a collective may.
    store, key = dist.distributed_c10d._get_default_store(), "dsvl_train/data_is_measured"
    if world.is_main:
        data = build(measure=True)
        store.set(key, "1")
        return data
    while not store.check([key]):
        time.sleep(_POLL_S)
    return build(measure=False)


def _data_sharing(world: World) -> Sharing | None:
    """Tensor- and pipeline-parallel peers share one read; the first pipeline rank's need pixels."""
    from megatron.core import parallel_state

    from dsvl_train.data.sharing import Sharing

    group = parallel_state.get_model_parallel_group()
    if group.size() == 1:
        return None
    holds_vision = parallel_state.is_pipeline_first_stage()
    return Sharing(
        group=group,
        reader=parallel_state.get_model_parallel_src_rank(),
        device=world.device,
        pixel_group=parallel_state.get_tensor_model_parallel_group() if holds_vision else None,
    )


def _load_initial_weights(cfg: RunConfig, world: World, model: VisionLanguageModel) -> None:
    """Weights from `init.from`, or from parts (`init.language`, …); what stays random is listed."""
    from dsvl_train.interop.assemble import has_parts, load_parts
    from dsvl_train.interop.loading import load_any_weights

    if has_parts(cfg.init):
        random = load_parts(cfg.init, model, cfg.model)
        if world.is_main:
            print(f"random weights, as init.expect_random allows: {', '.join(random) or 'none'}", file=sys.stderr)
    elif cfg.init.source is not None:
        load_any_weights(cfg.init.source, model, cfg.model)
