"""The freeze and learning-rate policy of a training stage.

A policy is one ordered list of rules, pattern -> multiplier, `None` = frozen (`stage.policy`). Everything about who trains is in that
list; nothing else in the code knows a stage by name. Names are those of the **whole** model: a rank of a parallel run holds only some
parameters, and a rule that matches none of its own is no mistake.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from dsvl_train.config.schema import ParamRule

_NAMES_SHOWN = 5


def resolve_policy(names: Iterable[str], policy: Sequence[ParamRule]) -> dict[str, float | None]:
    """Learning-rate multiplier of each parameter of the whole model; None = frozen.

    The first rule whose glob matches a name wins (case-sensitive, `*` also crosses dots).

    Raises ValueError for a parameter without a rule, for a rule that decides no parameter (it matches nothing, or earlier rules took
    all that it matches), and for a multiplier that is not above 0 (null freezes).
    """
    for rule in policy:
        if rule.lr_multiplier is not None and not rule.lr_multiplier > 0.0:
            raise ValueError(
                f"stage.policy: rule {rule.pattern!r} has lr_multiplier {rule.lr_multiplier}; it is above 0, or null to freeze"
            )
    resolved: dict[str, float | None] = {}
    decided = [0] * len(policy)
    uncovered: list[str] = []
    for name in names:
        index = next((i for i, rule in enumerate(policy) if fnmatchcase(name, rule.pattern)), None)
        if index is None:
            uncovered.append(name)
        else:
            decided[index] += 1
            resolved[name] = policy[index].lr_multiplier
    if uncovered:
        raise ValueError(
            f"stage.policy has no rule for {len(uncovered)} parameter(s): {_some(uncovered)}. Each parameter needs a rule; add one, "
            "with lr_multiplier null to freeze them"
        )
    for index, rule in enumerate(policy):
        if decided[index] == 0:
            raise ValueError(_idle_rule(rule, policy[:index], list(resolved)))
    return resolved


def apply_policy(parameters: Mapping[str, nn.Parameter], resolved: Mapping[str, float | None]) -> None:
    """Set requires_grad of parameters (this rank's, under their whole-model names) as resolved.

    Raises ValueError for a parameter that `resolved` does not know.
    """
    unknown = [name for name in parameters if name not in resolved]
    if unknown:
        raise ValueError(
            f"no policy was resolved for {len(unknown)} parameter(s) of this rank: {_some(unknown)}; resolve_policy takes "
            "the names of the whole model"
        )
    for name, parameter in parameters.items():
        parameter.requires_grad_(resolved[name] is not None)


@dataclass(frozen=True)
class PartSummary:
    """What a policy does to one top-level part of the model (the first word of its parameters' names)."""

    part: str
    trainable: int
    """Parameters (elements) that train."""
    frozen: int
    multipliers: tuple[float, ...]
    """Distinct learning-rate multipliers in the part, rising; empty = all frozen."""


def summary(sizes: Mapping[str, int], resolved: Mapping[str, float | None]) -> list[PartSummary]:
    """Trainable and frozen elements per top-level part, in the order in which parts appear in `sizes` (name -> elements)."""
    parts: dict[str, list[str]] = {}
    for name in sizes:
        parts.setdefault(name.partition(".")[0], []).append(name)
    summaries = []
    for part, names in parts.items():
        trainable = [name for name in names if resolved[name] is not None]
        multipliers = {value for name in trainable if (value := resolved[name]) is not None}
        total = sum(sizes[name] for name in names)
        learning = sum(sizes[name] for name in trainable)
        summaries.append(PartSummary(part, learning, total - learning, tuple(sorted(multipliers))))
    return summaries


def format_summary(parts: Sequence[PartSummary]) -> str:
    """The summary as aligned lines for the log."""
    width = max((len(part.part) for part in parts), default=0)
    lines = []
    for part in parts:
        factors = ", ".join(f"x{value:g}" for value in part.multipliers)
        state = f"learning rate {factors}" if factors else "frozen"
        lines.append(f"{part.part:<{width}}  {part.trainable:>15,} trainable  {part.frozen:>15,} frozen  {state}")
    return "\n".join(lines)


def _idle_rule(rule: ParamRule, earlier: Sequence[ParamRule], names: Sequence[str]) -> str:
    matches = [name for name in names if fnmatchcase(name, rule.pattern)]
    if not matches:
        tops = sorted({name.partition(".")[0] for name in names})
        return (
            f"stage.policy: rule {rule.pattern!r} matches no parameter; the model's parts are {', '.join(tops) or '(none)'}. "
            "Correct or remove the rule"
        )
    takers = [other.pattern for other in earlier if any(fnmatchcase(name, other.pattern) for name in matches)]
    return (
        f"stage.policy: rule {rule.pattern!r} decides nothing: earlier rules ({', '.join(map(repr, takers))}) already match all "
        f"{len(matches)} of its parameters. The first match wins; move the rule up or remove it"
    )


def _some(names: Sequence[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
