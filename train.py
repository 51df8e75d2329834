"""The entry of every run: `python train.py recipe=FAMILY/STAGE [KEY=VALUE ...]`.

It only wires: Hydra composes `conf/` and the overrides, `to_run_config` makes them typed, `start` checks and runs them. One process when
called plainly, one rank under torchrun, and the launcher of its own ranks with `launch.nproc=N`. With `-m` it runs every point of a sweep.
"""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from dsvl_train.config.command_line import compose_with
from dsvl_train.config.compose import to_run_config
from dsvl_train.failures import guarded
from dsvl_train.launcher import start
from dsvl_train.sweep import is_point, run_point, run_sweep


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def train(composed: DictConfig) -> None:
    """Run what Hydra composed; ends the process unless it went well."""
    if is_point():
        run_point(composed)
    elif code := guarded(lambda: start(to_run_config(composed))):
        raise SystemExit(code)


if __name__ == "__main__":
    sys.exit(guarded(lambda: compose_with(train, Path(__file__).resolve().parent / "conf", run_sweep)))
