"""Names of settings: which dotted keys the schema knows, and which of them is nearest to a mistyped one."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator
from typing import Any

from . import schema

YAML_NAMES: dict[type, dict[str, str]] = {schema.InitConfig: {"source": "from"}}
"""Fields whose name in YAML is a Python keyword: dataclass -> field name -> name in YAML."""


def yaml_fields(cls: type) -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    """Name in YAML -> (field, resolved type) of a config dataclass."""
    hints = typing.get_type_hints(cls)
    renamed = YAML_NAMES.get(cls, {})
    return {renamed.get(f.name, f.name): (f, hints[f.name]) for f in dataclasses.fields(cls)}


def without_none(hint: Any) -> tuple[Any, bool]:
    """`X | None` -> (X, True); any other type -> (type, False)."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        arms = [arm for arm in typing.get_args(hint) if arm is not type(None)]
        if len(arms) == 1:
            return arms[0], True
    return hint, False


def known_keys(cls: type = schema.RunConfig, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the schema, sections included; the names inside a mapping (`data.sources`) are written `*`."""
    for name, (_, hint) in yaml_fields(cls).items():
        key = prefix + name
        yield key
        hint, _ = without_none(hint)
        if typing.get_origin(hint) is dict:
            key, hint = key + ".*", typing.get_args(hint)[1]
            yield key
        if dataclasses.is_dataclass(hint):
            yield from known_keys(typing.cast(type, hint), key + ".")


def matching_key(key: str) -> str | None:
    """The schema's key that `key` names (`data.sources.mine.path` -> `data.sources.*.path`), or None where there is none."""
    parts = key.split(".")
    for known in known_keys():
        known_parts = known.split(".")
        if len(known_parts) == len(parts) and all(k in ("*", p) for k, p in zip(known_parts, parts, strict=True)):
            return known
    return None


def nearest_key(key: str) -> str:
    """The valid key that looks most like `key`; names inside mappings are kept."""
    parts = key.split(".")
    candidates = []
    for known in known_keys():
        known_parts = known.split(".")
        candidates.append(".".join(p if k == "*" else k for k, p in zip(known_parts, parts + ["NAME"] * len(known_parts), strict=False)))

    def likeness(candidate: str) -> tuple[float, float]:
        whole = difflib.SequenceMatcher(None, key, candidate).ratio()
        last = difflib.SequenceMatcher(None, parts[-1], candidate.rsplit(".", 1)[-1]).ratio()
        same_section = candidate.rpartition(".")[0] == key.rpartition(".")[0]
        return (whole + last + (0.5 if same_section and "." in key else 0.0), -len(candidate))

    return max(candidates, key=likeness)


def nearest_name(name: str, names: list[str]) -> str:
    """The member of `names` that looks most like `name`; one that has all its words (`max_steps` for `steps`) comes first."""

    def likeness(candidate: str) -> float:
        has_words = set(name.split("_")) <= set(candidate.split("_"))
        return difflib.SequenceMatcher(None, name, candidate).ratio() + (0.3 if has_words else 0.0)

    return max(names, key=likeness)
