"""Command-line overrides, checked against the schema before Hydra sees them.

Hydra only lets an override change what some YAML file already says, and answers a mistyped key with advice to add it. Here every key is
looked up in the schema instead: a wrong one is an error with the nearest right one, and a right one works whether or not a YAML file
mentions it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigError
from .names import known_keys, matching_key, nearest_key, nearest_name

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override


def options_of(group: Path) -> list[str]:
    """Names of the YAML files of a config group, as one gives them in an override (`demo_vl2/pretrain`)."""
    return sorted(str(path.relative_to(group).with_suffix("")) for path in group.rglob("*.yaml"))


def groups_of(conf_dir: Path) -> list[str]:
    """Names of the config groups."""
    return sorted(path.name for path in conf_dir.iterdir() if path.is_dir())


def checked_overrides(overrides: Sequence[str], conf_dir: Path, *, closed: bool = True) -> list[str]:
    """The overrides in a form that Hydra takes.

    Args:
        overrides: as typed, `recipe=demo_vl2/lm`, `optim.lr=1e-3`, `+data.sources.mine.path=...`, `~data.sources.text`.
        conf_dir: folder of the config groups.
        closed: the groups of `conf_dir` are all there are; False where the command line adds a folder of configs.

    Raises:
        ConfigError: an override that cannot be parsed, or that names no setting, no group, or no file of a group; no recipe at all.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    checked, has_recipe = [], False
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            rule = str(error).splitlines()[0]
            fix = f"write KEY=VALUE; quote a value with special characters: {_quoted(text)}"
            raise ConfigError(text, f"must be an override in Hydra's grammar ({rule})", fix=fix) from error
        has_recipe |= override.key_or_group == "recipe"
        checked.append(_checked(override, text, conf_dir, closed))
    if closed and not has_recipe:
        raise ConfigError(
            "recipe", _listed("a recipe must be given; there are", options_of(conf_dir / "recipe")), fix="recipe=FAMILY/STAGE"
        )
    return checked


def _checked(override: Override, text: str, conf_dir: Path, closed: bool) -> str:
    from hydra.core.override_parser.types import OverrideType

    key = override.key_or_group
    if key == "hydra" or key.startswith(("hydra.", "hydra/")):
        return text
    groups = groups_of(conf_dir)
    if "/" in key or key in groups:
        values = list(_choices(override))
        if closed and key not in groups:
            raise ConfigError(key, _listed("no config group has this name; there are", groups), fix=f"{nearest_name(key, groups)}=...")
        if not any(isinstance(value, dict | list) for value in values):
            _check_options(key, values, conf_dir, closed)
        return text
    if matching_key(key) is None:
        raise ConfigError(key, "no setting has this name", value=override.value(), nearest=_nearest(key, groups))
    if override.type in (OverrideType.CHANGE, OverrideType.ADD):
        return "++" + text.removeprefix("+")
    return text


def _nearest(key: str, groups: list[str]) -> str:
    if "." in key:
        return nearest_key(key)
    shorter = {known.rsplit(".", 1)[-1]: known for known in known_keys() if "*" not in known}
    shorter.update((group, group) for group in groups)
    return shorter[nearest_name(key, list(shorter))]


def _choices(override: Override) -> Iterable[Any]:
    """The value of an override, or each of them in a sweep (`recipe=a,b`)."""
    if override.is_delete():
        return []
    return list(override.sweep_iterator()) if override.is_sweep_override() else [override.value()]


def _check_options(group: str, values: Iterable[Any], conf_dir: Path, closed: bool) -> None:
    options = options_of(conf_dir / group)
    for value in values:
        if not isinstance(value, str) or (closed and value not in options):
            rule = _listed(f"conf/{group}/ has no such file; there are", options)
            raise ConfigError(group, rule, value=value, fix=f"{group}={nearest_name(str(value), options)}" if options else "")


def _listed(text: str, names: list[str]) -> str:
    return f"{text} {', '.join(names) or 'none'}"


def _quoted(text: str) -> str:
    key, _, value = text.partition("=")
    return f"""'{key or "KEY"}="{value or "VALUE"}"'"""
