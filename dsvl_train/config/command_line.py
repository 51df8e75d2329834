"""Between the command line and Hydra: overrides are checked first, and Hydra's own errors become ours."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from .compose import hydra_error
from .errors import ConfigError
from .overrides import checked_overrides
from .sweep import Sweep, plan_sweep


def compose_with(main: Callable[[], None], conf_dir: Path, sweep_with: Callable[[Sweep, Callable[[], None]], int]) -> int:
    """Call a function that `hydra.main` made, with checked overrides; for a sweep (`-m`) through `sweep_with`. The exit code.

    Raises:
        ConfigError: an override or a composition that is wrong.
    """
    from hydra.errors import HydraException

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra would print errors itself and end the process with 1
    sys.argv[1:], sweep = _checked_arguments(sys.argv[1:], conf_dir)
    try:
        if sweep is not None:
            return sweep_with(sweep, main)
        main()
    except HydraException as error:
        raise hydra_error(error) from error
    return 0


def _checked_arguments(arguments: list[str], conf_dir: Path) -> tuple[list[str], Sweep | None]:
    """The arguments with every override checked, Hydra's flags as they are; and the sweep that they ask for."""
    from hydra._internal.utils import get_args_parser

    flags = get_args_parser().parse_args(arguments)
    if flags.help or flags.hydra_help or flags.shell_completion:
        return arguments, None
    closed = not (flags.config_dir or flags.config_path or flags.config_name)
    checked = dict(zip(flags.overrides, checked_overrides(flags.overrides, conf_dir, closed=closed), strict=True))
    again = [checked.get(argument, argument) for argument in arguments]
    if not flags.multirun or flags.cfg or flags.info:
        return again, None
    if not closed:
        raise ConfigError("-m", "a sweep takes its configurations from conf/ alone, without --config-dir and its like")
    sweep = plan_sweep(flags.overrides)
    return again + sweep.hydra_overrides, sweep
