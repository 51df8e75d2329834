"""Runs the points of a sweep (`train.py -m`) so that the same command goes on where it was interrupted.

Hydra's launcher calls `run_point` for each point: one after another in this process, or each in a job of its own (submitit). Finished
points are left as they are and the others resume; a point that fails leaves the rest their turn.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig

from dsvl_train.checkpoints.folders import steps_done
from dsvl_train.config.compose import to_run_config
from dsvl_train.config.schema import RunConfig
from dsvl_train.config.sweep import Sweep, label_of
from dsvl_train.config.validate import validate
from dsvl_train.failures import DONE, FAILED, STOP_SIGNALS, guarded
from dsvl_train.launcher import launch, start

_IN_A_JOB = "SUBMITIT_EXECUTOR"
"""Environment variable by which submitit marks its jobs."""
_STOPPED = {128 + number for number in STOP_SIGNALS}


class PointFailedError(RuntimeError):
    """A point of a sweep ended with an error, which was told already."""


def run_sweep(sweep: Sweep, run_all: Callable[[], None]) -> int:
    """Run all points by Hydra's launcher and name those that failed; the exit code."""
    code = DONE
    try:
        run_all()
    except PointFailedError:
        code = FAILED
    except Exception as error:
        if not type(error).__module__.startswith("submitit"):
            raise
        _say(f"a job was lost: {error}")
        code = FAILED
    done = [(point, steps_done(Path(point.config.run.dir))) for point in sweep.points]
    unfinished = [(point, step) for point, step in done if step < point.config.run.max_steps]
    _say(f"sweep {sweep.folder}: {len(done) - len(unfinished)} of {len(done)} points finished")
    for point, step in unfinished:
        _say(f"not finished: {point.label}, last checkpoint after step {step} of {point.config.run.max_steps}")
    return code


def is_point() -> bool:
    """Whether Hydra runs this as a point of a sweep."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    return bool(HydraConfig.get().mode == RunMode.MULTIRUN)


def run_point(composed: DictConfig) -> None:
    """Run the point that Hydra composed, in its folder, unless it is finished.

    Raises:
        PointFailedError: it went wrong.
        SystemExit: it was asked to stop, and so is the sweep.
    """
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    label = label_of(hydra.overrides.task, hydra.job.config.override_dirname.exclude_keys)
    composed.run.dir = str(Path(hydra.sweep.dir) / label)
    code = guarded(lambda: _run_unless_finished(label, to_run_config(composed)))
    if code in _STOPPED:
        if _IN_A_JOB in os.environ:
            signal.raise_signal(code - 128)  # the run has saved; submitit, which has its handlers back, returns the job to the queue
        raise SystemExit(code)
    if code != DONE:
        raise PointFailedError(f"{label} ended with exit code {code}")


def _run_unless_finished(label: str, config: RunConfig) -> int:
    if config.resume == "auto" and steps_done(Path(config.run.dir)) >= config.run.max_steps:
        _say(f"{label}: finished before ({config.run.dir})")
        return DONE
    _say(f"{label}: {config.run.dir}")
    return _run(config)


def _run(config: RunConfig) -> int:
    """In processes of its own, since the next point needs a fresh one; as one rank where a job has a task for each."""
    if _tasks_of_the_job() > 1:
        from submitit.helpers import TorchDistributedEnvironment

        handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        TorchDistributedEnvironment().export(overwrite=True, set_cuda_visible_devices=False)
        try:
            return start(config)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    ranks = max(config.launch.nproc, 1)
    validate(config, ranks)
    return launch(config, ranks)


def _tasks_of_the_job() -> int:
    if _IN_A_JOB not in os.environ:
        return 1
    from submitit import JobEnvironment

    return int(JobEnvironment().num_tasks)


def _say(text: str) -> None:
    print(f"== {text}", file=sys.stderr, flush=True)
