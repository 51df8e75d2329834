"""A training run from its typed configuration: build, restore, train."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path

import torch

from dsvl_train.config.compose import load_run_config, to_yaml
from dsvl_train.config.schema import ModelConfig, RunConfig
from dsvl_train.parallel import startup
from dsvl_train.parallel.startup import World


def run(cfg: RunConfig) -> int:
    """Train as configured. Returns the exit code: 0 finished, 1 failed, 128 + signal stopped by one.

    A rank that fails says why once and leaves at once, so that its peers' collectives break and the job ends.
    """
    try:
        world = startup.start(cfg.engine, cfg.parallel, cfg.run.seed)
        code = _train(cfg, world)
    except Exception as error:
        _report(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # no clean-up that could wait for the other ranks
    startup.stop()
    return code


def _train(cfg: RunConfig, world: World) -> int:
    # megatron-core may be imported only after start-up, which prepares it for the device
    from dsvl_train.data.loader import build_data
    from dsvl_train.interop import native
    from dsvl_train.training import checkpoint
    from dsvl_train.training.callbacks import default_callbacks
    from dsvl_train.training.interrupt import StopRequest
    from dsvl_train.models.build import build_model
    from dsvl_train.training.setup import build_trainable, check_processor
    from dsvl_train.training.step import TrainStep
    from dsvl_train.training.trainer import Trainer

    stop = StopRequest()
    stop.install()
    run_dir = Path(cfg.run.dir)
    resume_from = _checkpoint_to_resume(cfg, run_dir)
    data = build_data(cfg.data, seed=cfg.run.seed, max_steps=cfg.run.max_steps, dp_rank=world.dp_rank, dp_size=world.dp_size)
    check_processor(cfg.model, data.processor)
    model = build_model(cfg.model, cfg.stage, cfg.parallel, world, cfg.run.seed)
    if resume_from is None and cfg.init.source is not None:
        source = native.resolve(cfg.init.source)
        _require_same_model(cfg.model, source)
        native.load_weights(source, model)
    chunks, optimiser = build_trainable(cfg, world, model)
    train_step = TrainStep(cfg, world, model, chunks, optimiser, data.source_names)
    trainer = Trainer(cfg, world, model, optimiser, data, train_step, default_callbacks(cfg.logging), stop)
    if resume_from is not None:
        _require_same_model(cfg.model, resume_from)
        state = checkpoint.load(resume_from, model, optimiser)
        data.load_state(state.data)
        trainer.step, trainer.bad_samples = state.step, state.bad_samples
    if world.is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(to_yaml(cfg))
    try:
        reason = trainer.fit()
    finally:
        data.close()
    if reason == "interrupted":
        number = stop.signal or signal.SIGTERM
        if world.is_main:
            print(f"stopped after step {trainer.step} ({number.name}) and saved; the same command goes on from there", file=sys.stderr)
        return 128 + number
    return 0


def _checkpoint_to_resume(cfg: RunConfig, run_dir: Path) -> Path | None:
    from dsvl_train.interop import native

    if cfg.resume == "none":
        return None
    return native.find_latest(run_dir) if cfg.resume == "auto" else native.resolve(cfg.resume)


def _require_same_model(model: ModelConfig, folder: Path) -> None:
    """Raises ValueError where a checkpoint holds another model than the run's."""
    stored = load_run_config(folder / "config.yaml").model
    if stored == model:
        return
    differing = [key for key in vars(model) if getattr(stored, key) != getattr(model, key)]
    raise ValueError(
        f"{folder} holds the model {stored.name!r}, this run has {model.name!r}; they differ in "
        + ", ".join(f"model.{key}" for key in differing)
        + ". Set the model group as in its config.yaml, or use resume=none / another init.from"
    )


def _report(error: Exception) -> None:
    """Say on stderr what went wrong: one block for a user's mistake, a traceback for ours."""
    rank = os.environ.get("RANK", "0")
    if _lost_its_peers(error):
        return  # another rank failed first, and said so
    if isinstance(error, ValueError | FileNotFoundError | FloatingPointError):
        shown = os.environ.get("DSVL_TRACEBACK") == "1"
        text = traceback.format_exc() if shown else f"{error}\n"
        print(f"error (rank {rank}): {text}", file=sys.stderr, end="")
    else:
        print(f"error (rank {rank}):\n{traceback.format_exc()}", file=sys.stderr, end="")


def _lost_its_peers(error: Exception) -> bool:
    if not isinstance(error, RuntimeError) or not torch.distributed.is_initialized():
        return False
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited", "Socket closed")
    return any(sign in str(error) for sign in signs)
