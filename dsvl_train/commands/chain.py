"""`dsvl chain`: the stages of a family one after another, each from the last one's weights, in one command.

Every stage is a run of its own, started as a user would start it. The same command goes on where it was interrupted: finished stages are
left as they are, and the run that was stopped resumes.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from dsvl_train.checkpoints.folders import steps_done
from dsvl_train.config.compose import CONF_DIR, compose_run
from dsvl_train.config.errors import ConfigError
from dsvl_train.config.names import nearest_name
from dsvl_train.config.overrides import options_of
from dsvl_train.config.schema import RunConfig
from dsvl_train.config.validate import validate
from dsvl_train.failures import DONE, STOP_SIGNALS

NAME = "chain"
ORDER = ("lm", "align", "pretrain", "sft")
"""Stages of any family, in the order in which they follow one another."""
PER_STAGE = ("recipe", "run.dir", "init.from")
"""Settings that the chain gives each stage."""


@dataclass(frozen=True)
class Stage:
    """One run of a chain."""

    name: str
    config: RunConfig
    command: list[str]

    @property
    def steps_done(self) -> int:
        return steps_done(Path(self.config.run.dir))

    @property
    def finished(self) -> bool:
        return self.steps_done >= self.config.run.max_steps


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser(
        NAME,
        help="run the stages of a family one after another, each from the last one's weights",
        description="Runs recipe=FAMILY/STAGE for every stage of a family, in ROOT/STAGE, from the weights of the stage before. The same "
        "command goes on after an interruption. Exit code: that of the stage that did not end well, else 0.",
    )
    parser.add_argument("family", metavar="FAMILY", help="a folder of conf/recipe, for example deepseek_vl2_tiny")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of all stages, as for train.py")
    parser.add_argument("--stages", help="which, with commas between them (default: all that the family has)")
    parser.add_argument("--root", help="folder of the run folders (default: runs/FAMILY)")
    parser.add_argument("--set", action="append", default=[], metavar="STAGE:KEY=VALUE", help="a setting of one stage; repeat for several")
    parser.add_argument("--launcher", help="what starts a run instead of train.py, for example launch/torchrun.sh or 'srun …'")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check all stages, then run those that are not finished.

    Raises:
        ConfigError, ValueError: a stage or a setting is wrong; nothing was started then.
    """
    stages = plan(arguments)
    with Relay() as relay:
        for stage in stages:
            if stage.finished and stage.config.resume == "auto":
                print(f"== {stage.config.run.name}: finished before ({stage.config.run.dir})", file=sys.stderr, flush=True)
                continue
            print(f"== {stage.config.run.name}: {shlex.join(stage.command)}", file=sys.stderr, flush=True)
            if code := relay.run(stage.command):
                return code
            if not stage.finished:
                done, wanted = stage.steps_done, stage.config.run.max_steps
                print(f"== {stage.config.run.name} ended after step {done} of {wanted}; the next stage waits for it", file=sys.stderr)
                return DONE
    return DONE


def plan(arguments: argparse.Namespace) -> list[Stage]:
    """The stages, each composed and checked.

    Raises:
        ConfigError: of a stage's settings.
        ValueError: no such family or stage, or a setting for all stages that each has for itself.
    """
    families = sorted({name.split("/")[0] for name in options_of(CONF_DIR / "recipe")})
    family = arguments.family
    if family not in families:
        raise ValueError(f"no family is called {family!r}; there are {', '.join(families)} (nearest: {nearest_name(family, families)})")
    existing = [stage for stage in ORDER if f"{family}/{stage}" in options_of(CONF_DIR / "recipe")]
    chosen = _chosen(arguments.stages, existing)
    for override in arguments.overrides:
        key = override.partition("=")[0].lstrip("+~")
        if key in PER_STAGE:
            raise ValueError(f"{override}: each stage has a {key} of its own; see --root, or give it to one stage: --set STAGE:{override}")
    own = [_own_setting(text, existing) for text in arguments.set]
    root = Path(arguments.root or f"runs/{family}")
    launcher = shlex.split(arguments.launcher) if arguments.launcher else [sys.executable, str(CONF_DIR.parent / "train.py")]
    stages = []
    for name in chosen:
        before = existing[: existing.index(name)][-1:]
        overrides = [
            f"recipe={family}/{name}",
            f"run.dir={root / name}",
            *(f"init.from={root / previous}" for previous in before),
            *arguments.overrides,
            *(setting for stage, setting in own if stage == name),
        ]
        config = _composed(name, overrides, world_size_known=arguments.launcher is None)
        stages.append(Stage(name, config, [*launcher, *overrides]))
    return stages


def _chosen(stages: str | None, existing: Sequence[str]) -> list[str]:
    wanted = stages.split(",") if stages else list(existing)
    for stage in wanted:
        if stage not in existing:
            raise ValueError(f"--stages {stages}: {stage!r} is not among the family's stages {','.join(existing)}")
    return [stage for stage in existing if stage in wanted]


def _own_setting(text: str, existing: Sequence[str]) -> tuple[str, str]:
    stage, colon, setting = text.partition(":")
    if not colon or stage not in existing:
        raise ValueError(f"--set {text}: write STAGE:KEY=VALUE with a stage of {','.join(existing)}")
    return stage, setting


def _composed(name: str, overrides: Sequence[str], *, world_size_known: bool) -> RunConfig:
    """The stage's configuration; how many processes another launcher starts is for its run to check."""
    try:
        config = compose_run(overrides)
        if world_size_known:
            validate(config, max(config.launch.nproc, 1))
    except ConfigError as error:
        raise ValueError(f"stage {name}: {error}") from error
    return config


class Relay:
    """Runs commands one at a time and hands them the signals that this process gets.

    A context. A command runs in a session of its own, so that Ctrl-C reaches it once, through here.
    """

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._stopped_by: int | None = None
        self._handlers: dict[int, object] = {}

    def __enter__(self) -> Relay:
        for number in (*STOP_SIGNALS, signal.SIGHUP):
            self._handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def run(self, command: Sequence[str]) -> int:
        """The command's exit code, as shells count; after a signal, 128 + its number, whatever the command made of it."""
        if self._stopped_by is not None:
            return 128 + self._stopped_by
        try:
            self._child = subprocess.Popen(command, start_new_session=True)
        except OSError as error:
            raise ValueError(f"--launcher {command[0]} cannot be started: {error.strerror}") from error
        if self._stopped_by is not None:  # it came while the command started
            self._child.send_signal(self._stopped_by)
        code = self._child.wait()
        self._child = None
        if self._stopped_by is not None:
            return 128 + self._stopped_by
        return code if code >= 0 else 128 - code

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._stopped_by is None:
            self._stopped_by = number
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(number)
