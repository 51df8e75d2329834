"""The freeze and learning-rate policy."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dsvl_train.config.schema import ParamRule
from dsvl_train.training.stages import apply_policy, format_summary, resolve_policy, summary

NAMES = [
    "vision.siglip.patch.weight",
    "vision.sam.neck.weight",
    "adaptor.fc1.weight",
    "language.layers.0.mlp.weight",
    "language.head.weight",
]


def test_vl_stage_3_freezes_sam_alone():
    policy = [ParamRule("vision.sam.*", None), ParamRule("vision.*", 1.0), ParamRule("adaptor.*", 1.0), ParamRule("language.*", 1.0)]
    assert resolve_policy(NAMES, policy) == dict(zip(NAMES, [1.0, None, 1.0, 1.0, 1.0], strict=True))


def test_the_first_rule_that_matches_wins():
    resolved = resolve_policy(NAMES, [ParamRule("vision.*", 0.1), ParamRule("language.head.*", None), ParamRule("*", 1.0)])
    assert resolved == dict(zip(NAMES, [0.1, 0.1, 1.0, 1.0, None], strict=True))


def test_patterns_are_case_sensitive():
    with pytest.raises(ValueError, match=r"'Vision\.\*' matches no parameter"):
        resolve_policy(NAMES, [ParamRule("Vision.*", None), ParamRule("*", 1.0)])


def test_an_uncovered_parameter_is_named_with_the_setting():
    with pytest.raises(ValueError, match=r"stage\.policy has no rule for 2 parameter\(s\): language\.layers\.0\.mlp\.weight, language"):
        resolve_policy(NAMES, [ParamRule("vision.*", None), ParamRule("adaptor.*", 1.0)])


def test_many_uncovered_parameters_are_counted_not_listed():
    with pytest.raises(ValueError, match=r"40 parameter\(s\): p0, p1, p2, p3, p4 and 35 more\."):
        resolve_policy([f"p{i}" for i in range(40)], [])


def test_a_rule_that_matches_nothing_raises_with_the_parts_there_are():
    with pytest.raises(ValueError, match=r"'projector\.\*' matches no parameter; the model's parts are adaptor, language, vision"):
        resolve_policy(NAMES, [ParamRule("projector.*", 1.0), ParamRule("*", None)])


def test_a_shadowed_rule_raises_and_names_what_shadows_it():
    policy = [ParamRule("vision.*", 0.1), ParamRule("vision.sam.*", None), ParamRule("*", 1.0)]
    with pytest.raises(ValueError, match=r"'vision\.sam\.\*' decides nothing: earlier rules \('vision\.\*'\) already match all 1"):
        resolve_policy(NAMES, policy)


@pytest.mark.parametrize("multiplier", [0.0, -1.0, float("nan")])
def test_a_multiplier_of_zero_or_less_is_refused(multiplier):
    with pytest.raises(ValueError, match="above 0, or null to freeze"):
        resolve_policy(NAMES, [ParamRule("*", multiplier)])


def test_apply_policy_sets_requires_grad_both_ways():
    layer = nn.Linear(2, 2)
    layer.weight.requires_grad_(False)
    apply_policy({"adaptor.weight": layer.weight, "adaptor.bias": layer.bias}, {"adaptor.weight": 1.0, "adaptor.bias": None, "x": 1.0})
    assert layer.weight.requires_grad and not layer.bias.requires_grad
    layer.weight.sum().backward()
    assert layer.bias.grad is None and torch.equal(layer.weight.grad, torch.ones(2, 2))


def test_apply_policy_refuses_a_parameter_that_was_not_resolved():
    with pytest.raises(ValueError, match=r"no policy was resolved for 1 parameter\(s\) of this rank: adaptor\.weight"):
        apply_policy({"adaptor.weight": nn.Parameter(torch.zeros(1))}, {})


def test_summary_counts_elements_per_part():
    sizes = dict(zip(NAMES, [10, 20, 3, 100, 50], strict=True))
    resolved = resolve_policy(
        NAMES, [ParamRule("vision.sam.*", None), ParamRule("vision.*", 0.1), ParamRule("adaptor.*", 1.0), ParamRule("language.*", None)]
    )
    parts = {part.part: (part.trainable, part.frozen, part.multipliers) for part in summary(sizes, resolved)}
    assert parts == {"vision": (10, 20, (0.1,)), "adaptor": (3, 0, (1.0,)), "language": (0, 150, ())}
    lines = format_summary(summary(sizes, resolved)).splitlines()
    assert len(lines) == 3 and "x0.1" in lines[0] and lines[2].endswith("frozen") and "150" in lines[2]
