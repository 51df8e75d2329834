"""From YAML to a typed `RunConfig`, once, and back.

`to_run_config` is where Hydra's untyped tree ends: it checks every key and every type against the dataclasses of `config.schema`, so
that the rest of the code meets no wrong type and no unknown key. `to_yaml` writes what `load_run_config` reads back to an equal
`RunConfig`.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .errors import ConfigError
from .names import YAML_NAMES, nearest_key, nearest_name, without_none, yaml_fields
from .schema import ModelConfig, RunConfig

if TYPE_CHECKING:
    from omegaconf import DictConfig

CONF_DIR = Path(__file__).resolve().parents[2] / "conf"
"""The YAML groups of this repository."""

MISSING = "???"
"""How YAML says that a value must be given (OmegaConf's mark)."""


def to_run_config(composed: DictConfig) -> RunConfig:
    """The typed configuration of what Hydra composed.

    Raises:
        ConfigError: an unknown key, a wrong type, a missing value, or an interpolation that leads nowhere.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        plain = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", None) or "configuration")
        raise ConfigError(key, str(error).splitlines()[0]) from error
    return from_plain(plain)


def from_plain(plain: Any) -> RunConfig:
    """The typed configuration of plain dicts, lists and scalars, as YAML gives them.

    Raises:
        ConfigError: see `to_run_config`.
    """
    config = _typed(plain, RunConfig, "")
    assert isinstance(config, RunConfig)
    return config


def from_plain_model(plain: Any) -> ModelConfig:
    """One model, from a plain `conf/model` file.

    Raises:
        ConfigError: see `to_run_config`.
    """
    model = _typed(plain, ModelConfig, "model")
    assert isinstance(model, ModelConfig)
    return model


def compose_run(overrides: Sequence[str]) -> RunConfig:
    """What `python train.py OVERRIDES` would run, without running it.

    Raises:
        ConfigError: see `to_run_config`; also for an override that names no setting or no file of `conf/`.
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException

    from .overrides import checked_overrides

    checked = checked_overrides(overrides, CONF_DIR)
    try:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            return to_run_config(compose("config", checked))
    except HydraException as error:
        raise hydra_error(error) from error


def hydra_error(error: Exception) -> ConfigError:
    """What Hydra says of a composition that fails, as our error."""
    text = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ConfigError("configuration", "; ".join(text) or type(error).__name__)


def to_yaml(config: RunConfig) -> str:
    """The configuration as YAML text, every setting with its value, in the order of the schema."""
    return yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True, width=140)


def load_run_config(path: str | Path) -> RunConfig:
    """Reads what `to_yaml` wrote.

    Raises:
        ConfigError: the file is missing, is not YAML, or does not fit the schema.
    """
    try:
        plain = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(str(path), f"must be a configuration in YAML ({error})") from error
    return from_plain(plain)


def to_plain(value: Any) -> Any:
    """A config object as dicts, lists and scalars, named as in YAML."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        renamed = YAML_NAMES.get(type(value), {})
        return {renamed.get(f.name, f.name): to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {name: to_plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [to_plain(item) for item in value]
    return value


def _typed(value: Any, hint: Any, key: str) -> Any:
    """`value` as the type `hint` says, or a ConfigError that names `key`."""
    hint, optional = without_none(hint)
    if value is None and optional:
        return None
    if isinstance(value, str) and value == MISSING:
        raise ConfigError(key, "this setting has no default and must be given", fix=f"{key}=...")
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint):
        return _typed_dataclass(value, typing.cast(type, hint), key)
    if origin is list:
        if not isinstance(value, list):
            raise _wrong_type(key, value, "a list")
        return [_typed(item, typing.get_args(hint)[0], f"{key}[{index}]") for index, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise _wrong_type(key, value, "a mapping of names")
        for name in value:
            if not isinstance(name, str):
                raise _wrong_type(key, name, "a mapping whose names are text")
        return {name: _typed(item, typing.get_args(hint)[1], f"{key}.{name}") for name, item in value.items()}
    if origin is typing.Literal:
        return _typed_literal(value, typing.get_args(hint), key)
    return _typed_scalar(value, hint, key, optional)


def _typed_dataclass(value: Any, cls: type, key: str) -> Any:
    prefix = key + "." if key else ""
    if not isinstance(value, dict):
        raise _wrong_type(key or "configuration", value, "a section with settings")
    fields = yaml_fields(cls)
    for name in value:
        if name not in fields:
            raise _unknown_key(f"{prefix}{name}", value[name])
    arguments = {}
    for name, (field, hint) in fields.items():
        if name in value:
            arguments[field.name] = _typed(value[name], hint, prefix + name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(prefix + name, "this setting has no default and must be given", fix=f"{prefix}{name}=...")
    return cls(**arguments)


def _typed_literal(value: Any, allowed: tuple[Any, ...], key: str) -> Any:
    if any(value == choice and type(value) is type(choice) for choice in allowed):
        return value
    names = [str(choice) for choice in allowed]
    raise ConfigError(key, f"must be one of {', '.join(names)}", value=value, fix=f"{key}={nearest_name(str(value), names)}")


def _typed_scalar(value: Any, hint: Any, key: str, optional: bool) -> Any:
    if hint is float and type(value) in (int, float):
        return float(value)
    if hint in (bool, int, float, str) and type(value) is hint:
        return value
    wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[hint]
    fix = ""
    if hint is int and isinstance(value, float) and value.is_integer():
        fix = f"{key}={int(value)}"
    elif hint is str and isinstance(value, bool | int | float):
        fix = f"""{key}="'{value}'" (quoted, so that it is read as text)"""
    raise _wrong_type(key, value, wanted + (" or null" if optional else ""), fix)


def _wrong_type(key: str, value: Any, wanted: str, fix: str = "") -> ConfigError:
    found = {
        dict: "a section",
        list: "a list",
        type(None): "null",
        str: "text",
        float: "a number with a fraction",
        int: "a whole number",
        bool: "a truth value",
    }
    return ConfigError(key, f"must be {wanted}, not {found.get(type(value), type(value).__name__)}", value=value, fix=fix)


def _unknown_key(key: str, value: Any) -> ConfigError:
    return ConfigError(key, "no setting has this name", value=value, nearest=nearest_key(key))
