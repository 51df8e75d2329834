"""The one error for a wrong configuration."""

from __future__ import annotations

from typing import Any


class ConfigError(ValueError):
    """A setting is unknown, missing, of the wrong type, or impossible together with others.

    Args:
        key: dotted name of the setting, as in an override (`data.text_ratio`); several, joined by commas, for a rule between them.
        value: what it was set to; leave it out where there is none.
        rule: what has to hold.
        fix: the setting to change, and to what.
        nearest: the valid key that looks most like a mistyped one.
    """

    _NO_VALUE: Any = object()

    def __init__(self, key: str, rule: str, *, value: Any = _NO_VALUE, fix: str = "", nearest: str = "") -> None:
        self.key, self.rule, self.fix = key, rule, fix
        self.value = None if value is self._NO_VALUE else value
        lines = [key if value is self._NO_VALUE else f"{key} = {_shown(value)}", f"  rule: {rule}"]
        if fix:
            lines.append(f"  change: {fix}")
        if nearest:
            lines.append(f"  nearest valid key: {nearest}")
        super().__init__("\n".join(lines))


def _shown(value: Any) -> str:
    """A value as one would write it in an override, cut where it is long."""
    text = {True: "true", False: "false", None: "null"}.get(value, str(value)) if isinstance(value, bool | None) else str(value)
    return text if len(text) <= 200 else text[:200] + "..."
