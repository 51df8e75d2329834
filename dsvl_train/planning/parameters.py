"""How many parameters each part of a model has, and what a tensor- or expert-parallel rank holds of them.

A part is what the pipeline can cut apart: a layer of an encoder or of the language model, or what comes before or after the layers.
Tests hold the numbers against the parameters of models that were built on several ranks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

from dsvl_train.config.schema import ModelConfig, StageConfig
from dsvl_train.interop.shapes import logical_shapes
from dsvl_train.models.vision import STORED_ONLY
from dsvl_train.training.stages import resolve_policy

Part = str
"""`siglip.0`, `sam.0`, `language.0`, … (layers), what comes before and after an encoder's (`siglip.embed`, `siglip.finish`, …), `adaptor`,
`embedding`, and `head`: the final norm and the output layer."""

_LAYER = re.compile(r"^(?:vision\.(siglip|sam)\.blocks|(language)\.decoder\.layers)\.(\d+)\.")
_EMBEDS = re.compile(r"^vision\.(siglip|sam)\.(patch_embed|pos_embed)")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_SHARDED = re.compile(
    r"^language\..*(word_embeddings|output_layer|linear_qkv|linear_q_proj|linear_kv_up_proj|linear_proj|gate|up|linear_fc2)\.weight$"
)
"""Divided by the tensor parallel size (as `models.language` builds them), unless they are experts'."""


@dataclass(frozen=True)
class Share:
    """Elements on one rank, trained and frozen. Experts are counted apart: they are replicated over fewer ranks."""

    trained: int = 0
    frozen: int = 0
    trained_experts: int = 0
    frozen_experts: int = 0

    def __add__(self, other: Share) -> Share:
        return Share(
            self.trained + other.trained,
            self.frozen + other.frozen,
            self.trained_experts + other.trained_experts,
            self.frozen_experts + other.frozen_experts,
        )

    @property
    def total(self) -> int:
        """All elements."""
        return self.trained + self.frozen + self.trained_experts + self.frozen_experts


@dataclass(frozen=True)
class PartSize:
    """Elements of a part of the whole model, by how a layout divides them."""

    sharded: Share = Share()
    replicated: Share = Share()
    trains: bool = False

    def on_rank(self, tp: int, ep: int) -> Share:
        """What one tensor- and expert-parallel rank holds."""
        cut, whole = self.sharded, self.replicated
        return Share(
            cut.trained // tp + whole.trained,
            cut.frozen // tp + whole.frozen,
            cut.trained_experts // ep,
            cut.frozen_experts // ep,
        )


def part_sizes(model: ModelConfig, stage: StageConfig) -> dict[Part, PartSize]:
    """Every part of the model, frozen as the stage says.

    Raises:
        ValueError: the stage's policy does not fit the model.
    """
    sizes = {name: prod(shape) for name, shape in logical_shapes(model).items() if not name.endswith(".expert_bias")}
    names = {name: _parameter_name(name) for name in sizes}
    multipliers = resolve_policy(dict.fromkeys(names.values()), stage.policy)
    stored = {name for name in multipliers if any(fnmatchcase(name, glob) for glob in STORED_ONLY)}
    parts: dict[Part, list[tuple[str, bool]]] = {}
    for name, parameter in names.items():
        trains = multipliers[parameter] is not None and parameter not in stored
        parts.setdefault(_part(name), []).append((name, trains))
    return {part: _part_size(members, sizes) for part, members in parts.items()}


def total(sizes: dict[Part, PartSize], parts: Iterable[Part], tp: int, ep: int) -> Share:
    """What a rank holds of some parts together."""
    together = Share()
    for part in parts:
        together += sizes[part].on_rank(tp, ep)
    return together


# ------------------------------------------------------------------------------------------------------------------- helpers


def _parameter_name(logical: str) -> str:
    """The name that a stage's policy speaks of: gate and up are one parameter, experts are counted on their rank."""
    name = re.sub(r"\.(gate|up)\.weight$", ".linear_fc1.weight", logical)
    return _EXPERT.sub(r".experts.local_experts.\1.", name)


def _part(name: str) -> Part:
    if layer := _LAYER.match(name):
        return f"{layer[1] or layer[2]}.{layer[3]}"
    if name.startswith("vision."):
        encoder = "sam" if name.startswith(("vision.sam.", "vision.high_layer_norm.")) else "siglip"
        return f"{encoder}.embed" if _EMBEDS.match(name) else f"{encoder}.finish"
    if name.startswith("adaptor."):
        return "adaptor"
    return "embedding" if name.startswith("language.embedding.") else "head"


def _part_size(members: list[tuple[str, bool]], sizes: dict[str, int]) -> PartSize:
    sharded = replicated = Share()
    for name, trains in members:
        size = sizes[name]
        if _EXPERT.search(name):
            sharded += Share(trained_experts=size) if trains else Share(frozen_experts=size)
            continue
        share = Share(trained=size) if trains else Share(frozen=size)
        if _SHARDED.match(name):
            sharded += share
        else:
            replicated += share
    return PartSize(sharded, replicated, any(trains for _, trains in members))
