"""Between the command line and Hydra: overrides are checked first, and Hydra's own errors become ours."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from .compose import hydra_error
from .overrides import checked_overrides


def compose_with(main: Callable[[], None], conf_dir: Path) -> int:
    """Call a function that `hydra.main` made, with checked overrides.

    Raises:
        ConfigError: an override or a composition that is wrong.
    """
    from hydra.errors import HydraException

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra would print errors itself and end the process with 1
    sys.argv[1:] = _checked_arguments(sys.argv[1:], conf_dir)
    try:
        main()
    except HydraException as error:
        raise hydra_error(error) from error
    return 0


def _checked_arguments(arguments: list[str], conf_dir: Path) -> list[str]:
    """The arguments with every override checked; Hydra's flags stay as they are."""
    from hydra._internal.utils import get_args_parser

    flags = get_args_parser().parse_args(arguments)
    if flags.help or flags.hydra_help or flags.shell_completion:
        return arguments
    closed = not (flags.config_dir or flags.config_path or flags.config_name)
    checked = dict(zip(flags.overrides, checked_overrides(flags.overrides, conf_dir, closed=closed), strict=True))
    return [checked.get(argument, argument) for argument in arguments]
