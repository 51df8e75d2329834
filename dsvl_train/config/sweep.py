"""A sweep: the points that `train.py -m` runs, and the run folder of each.

Hydra's sweeper makes the points and its launcher starts them. Here the same points are composed and checked before the first one starts.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .compose import compose_run
from .errors import ConfigError
from .schema import RunConfig
from .validate import validate

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

DEFAULT_ROOT = Path("runs/sweeps")
"""Where sweeps lie that are given no `run.dir`, each in a folder named like its (first) run."""

_IN_A_NAME = re.compile(r"[^\w.+,=-]+")


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    label: str
    """What it sets, which is also its folder's name in the sweep's."""
    config: RunConfig


@dataclass(frozen=True)
class Sweep:
    """Runs that differ in some settings."""

    folder: Path
    points: list[Point]
    hydra_overrides: list[str]
    """What Hydra has to be told, so that `label_of` finds the point's folder again where the point runs."""


def plan_sweep(overrides: Sequence[str]) -> Sweep:
    """The points of a command line, each composed and checked.

    Args:
        overrides: as typed, some with several values (`data.text_ratio=0.5,0.6`). `run.dir` is the folder of the sweep.

    Raises:
        ConfigError: no point or several would run in one folder; or a point's own configuration is wrong.
    """
    parsed = _parsed(overrides)
    ours = [one for one in parsed.values() if not one.is_hydra_override()]
    base = parsed.get("run.dir")
    if base is not None and base.is_sweep_override():
        raise ConfigError("run.dir", "is the folder of a sweep, in which each point gets one of its own", fix="run.dir=runs/sweeps/NAME")
    swept = {one.key_or_group for one in ours if one.is_sweep_override()}
    if not swept:
        raise ConfigError("-m", "a sweep needs a setting with several values", fix="data.text_ratio=0.5,0.6,0.7, or leave out -m")
    fixed = sorted({one.key_or_group for one in ours} - swept)
    ours = [one for one in ours if one.key_or_group != "run.dir"]
    combinations = list(itertools.product(*(list(_texts(one)) for one in ours)))
    labels = [label_of(texts, fixed) for texts in combinations]
    for label, times in Counter(labels).items():
        if times > 1:
            raise ConfigError("-m", f"{times} points of the sweep would run in the same folder, {label}", fix="give each value once")
    folder = Path(str(base.value())) if base is not None else None
    hosts_ranks = "hydra/launcher" in parsed  # it may start several tasks for one point, which the point's run counts
    points = []
    for label, texts in zip(labels, combinations, strict=True):
        if folder is None:
            folder = DEFAULT_ROOT / compose_run(texts).run.name
        config = compose_run([*texts, f"run.dir='{folder / label}'"])
        if not hosts_ranks:
            validate(config, max(config.launch.nproc, 1))
        points.append(Point(label, config))
    assert folder is not None
    keys = ",".join(f"'{key}'" for key in fixed)
    return Sweep(folder, points, [f"hydra.sweep.dir='{folder}'", f"hydra.job.config.override_dirname.exclude_keys=[{keys}]"])


def label_of(overrides: Iterable[str], fixed: Iterable[str]) -> str:
    """The name of a point's folder: `text_ratio=0.6,lr=0.001`; whole keys where the last words of two are the same.

    Args:
        overrides: the point's, `KEY=VALUE` each.
        fixed: keys that are the same for all points.
    """
    pairs = [(key.lstrip("+~"), value) for key, _, value in (text.partition("=") for text in overrides)]
    varied = [(key, value) for key, value in pairs if key not in set(fixed)]
    last_words = Counter(key.rsplit(".", 1)[-1] for key, _ in varied)
    names = [(last if last_words[last := key.rsplit(".", 1)[-1]] == 1 else key, value) for key, value in varied]
    return ",".join(_IN_A_NAME.sub("-", f"{name}={value}").strip("-") for name, value in names)


def _parsed(overrides: Sequence[str]) -> dict[str, Override]:
    """By key; of several for one key the last counts, as for Hydra."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser = OverridesParser.create()
    return {override.key_or_group: override for override in (parser.parse_override(text) for text in overrides)}


def _texts(override: Override) -> Iterable[str]:
    if not override.is_sweep_override():
        return [str(override.input_line)]
    if not override.is_discrete_sweep():
        raise ConfigError(override.key_or_group, "a sweep takes lists of values", value=override.value(), fix="KEY=A,B,C or KEY=range(…)")
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
