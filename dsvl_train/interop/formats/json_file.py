"""`config.json` of others, read strictly: a value that this code does not implement is an error naming file, key and value."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

_REQUIRED = object()


class JsonConfig:
    """A JSON object, or a section of one, whose values are asked for one by one."""

    def __init__(self, path: Path, values: dict[str, Any], prefix: str = "") -> None:
        self.path = path
        self.values = values
        self.prefix = prefix

    @classmethod
    def read(cls, path: Path) -> JsonConfig:
        """Read a file.

        Raises:
            ValueError: it is missing or not a JSON object.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ValueError(f"{path} is missing") from error
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path}: expected a JSON object, found {type(values).__name__}")
        return cls(path, values)

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def section(self, key: str) -> JsonConfig:
        """An object inside; an absent one reads as empty, so that every key takes its default."""
        value = self.values.get(key)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise self.error(key, "expected an object")
        return JsonConfig(self.path, value, f"{self.prefix}{key}.")

    def integer(self, key: str, default: Any = _REQUIRED, least: int = 1) -> int:
        """A whole number, at least `least`."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.error(key, f"expected a whole number, at least {least}")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        """A finite number above 0."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.error(key, "expected a finite number above 0")
        return float(value)

    def boolean(self, key: str, default: Any = _REQUIRED) -> bool:
        """true or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "expected true or false")
        return value

    def text(self, key: str, default: Any = _REQUIRED) -> str:
        """A string."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.error(key, "expected text")
        return value

    def numbers(self, key: str, default: list[float], count: int = 3) -> list[float]:
        """A list of `count` numbers."""
        value = self._get(key, default)
        if value is None:
            value = default
        if not isinstance(value, list) or len(value) != count or not all(isinstance(n, int | float) and math.isfinite(n) for n in value):
            raise self.error(key, f"expected {count} numbers")
        return [float(n) for n in value]

    def integers(self, key: str, default: Any = _REQUIRED) -> list[int]:
        """A list of whole numbers."""
        value = self._get(key, default)
        if not isinstance(value, list | tuple) or not all(isinstance(n, int) and not isinstance(n, bool) for n in value):
            raise self.error(key, "expected a list of whole numbers")
        return list(value)

    def require(self, key: str, default: Any, *allowed: Any) -> Any:
        """One of the values that this code implements; the key's default counts as given where it is absent."""
        value = self._get(key, default)
        if not any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in allowed):
            shown = ", ".join(json.dumps(choice) for choice in allowed)
            raise self.error(key, f"only {shown} is supported" if len(allowed) == 1 else f"only these are supported: {shown}", default)
        return value

    def error(self, key: str, rule: str, default: Any = _REQUIRED) -> ValueError:
        """The error for a key's value."""
        value = self.values.get(key, None if default is _REQUIRED else default)
        absent = "" if key in self.values or default is _REQUIRED else " (its default; the key is absent)"
        return ValueError(f"{self.path}: {self.prefix}{key} = {json.dumps(value)}{absent}: {rule}")

    def _get(self, key: str, default: Any) -> Any:
        if key in self.values:
            return self.values[key]
        if default is _REQUIRED:
            raise ValueError(f"{self.path}: {self.prefix}{key} is missing")
        return default
