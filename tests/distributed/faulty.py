"""A rank in which something goes wrong on purpose: `python -m tests.distributed.faulty FAULT RANK STEP CONFIG.yaml`.

Faults: `nan` (the loss of one micro-batch), `sleep` and `freeze` (in the forward pass), `signal PHASE` (SIGTERM as a phase of the step
begins).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from dsvl_train.failures import guarded


def install(fault: str, step: int) -> None:
    """Spoil this rank; megatron-core may be imported by now."""
    from dsvl_train.training.step import TrainStep
    from dsvl_train.training.watchdog import Watchdog

    call, loss, forward_backward, pulse = TrainStep.__call__, TrainStep._loss, TrainStep._forward_backward, Watchdog.pulse
    now = {"step": 0}

    def spoiled_call(self: Any, batch: Any, *rest: Any) -> Any:
        now["step"] = batch.step
        return call(self, batch, *rest)

    def spoiled_loss(self: Any, *inputs: Any) -> Any:
        inputs = (*inputs[:-1], inputs[-1] * float("nan")) if fault == "nan" and now["step"] == step else inputs
        return loss(self, *inputs)

    def spoiled_forward_backward(self: Any, batch: Any, counts: Any) -> None:
        if fault == "sleep" and batch.step == step:
            time.sleep(600)
        if fault == "freeze" and batch.step == step:
            os.kill(os.getpid(), signal.SIGSTOP)
        forward_backward(self, batch, counts)

    def spoiled_pulse(self: Any, at: int, phase: str, patience: float = 1.0) -> None:
        pulse(self, at, phase, patience)
        if fault == f"signal {phase}" and at == step:
            os.kill(os.getpid(), signal.SIGTERM)

    TrainStep.__call__ = spoiled_call  # type: ignore[method-assign]
    TrainStep._loss = spoiled_loss  # type: ignore[method-assign]
    TrainStep._forward_backward = spoiled_forward_backward  # type: ignore[method-assign]
    Watchdog.pulse = spoiled_pulse  # type: ignore[method-assign]


def main(fault: str, rank: int, step: int, config_path: str) -> int:
    """Run this rank; the exit code."""
    from dsvl_train.config.compose import load_run_config
    from dsvl_train.parallel import startup
    from dsvl_train.training.run import run

    started = startup.start

    def start(*arguments: Any) -> Any:
        world = started(*arguments)
        if world.rank == rank:
            install(fault, step)
        return world

    startup.start = start  # type: ignore[assignment]
    return run(load_run_config(config_path))


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])))
