"""Which layers each pipeline rank holds: the division of encoder and language model over a pipeline (VL §3.3, VL2 §4.2).

A pure planner: costs of layers in, ranges of layers out. A pipeline runs at the pace of its slowest rank, and a run alternates two
pipelines over the same ranks: text steps run the language layers alone, image steps run the encoder's layers too. So the planner looks for
the division with the least

    text_share * time of a text step + (1 - text_share) * time of an image step

`spread` gives every rank a share of the encoder, as virtual chunk 0, and language layers as later chunks (VL2 §4.2). `first_stage` leaves
the encoder whole beside the embedding on rank 0 and divides the language layers around it (VL §3.3).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from dsvl_train.parallel.pipeline_simulation import group_size

VisionDivision = Literal["spread", "first_stage"]


@dataclass(frozen=True)
class LayerCosts:
    """Cost of one micro-batch's forward pass, in any one unit (FLOPs, seconds)."""

    siglip: tuple[float, ...]
    """Per layer."""
    sam: tuple[float, ...]
    """Per layer; empty without SAM."""
    vision_head: float
    """What follows the encoders' layers: norms, necks, convolutions, adaptor."""
    language: tuple[float, ...]
    """Per layer."""
    language_head: float
    """Output layer and loss."""

    @property
    def vision(self) -> float:
        """The whole encoder with its adaptor."""
        return sum(self.siglip) + sum(self.sam) + self.vision_head

    def divided(self, *, vision: float, language: float) -> LayerCosts:
        """The costs on a rank that does only a part of the encoder's and of the language layers' work."""
        return LayerCosts(
            tuple(cost / vision for cost in self.siglip),
            tuple(cost / vision for cost in self.sam),
            self.vision_head / vision,
            tuple(cost / language for cost in self.language),
            self.language_head / language,
        )


@dataclass(frozen=True)
class Division:
    """Layers by pipeline rank; ranges are of the whole model's layer numbers and follow one another."""

    spread: bool
    """The encoder is virtual chunk 0 of the image steps' pipeline; otherwise it is whole on rank 0, before the language layers there."""
    siglip: tuple[range, ...]
    """[rank]"""
    sam: tuple[range, ...]
    """[rank]"""
    language: tuple[tuple[range, ...], ...]
    """[chunk][rank]; layers go through the ranks of chunk 0, then of chunk 1, and so on."""

    @property
    def pp(self) -> int:
        """Pipeline ranks."""
        return len(self.siglip)

    @property
    def vpp(self) -> int:
        """Language chunks per rank."""
        return len(self.language)

    def vision_cost(self, costs: LayerCosts, rank: int) -> float:
        """Forward cost of this rank's part of the encoder."""
        layers = sum(costs.siglip[i] for i in self.siglip[rank]) + sum(costs.sam[i] for i in self.sam[rank])
        last = self.pp - 1 if self.spread else 0
        return layers + (costs.vision_head if rank == last else 0.0)

    def language_cost(self, costs: LayerCosts, rank: int, chunk: int) -> float:
        """Forward cost of a language chunk of this rank."""
        head = costs.language_head if rank == self.pp - 1 and chunk == self.vpp - 1 else 0.0
        return sum(costs.language[i] for i in self.language[chunk][rank]) + head

    def chunk_costs(self, costs: LayerCosts, images: bool) -> list[list[float]]:
        """[rank][chunk] of the pipeline that a step with or without images runs."""
        table = []
        for rank in range(self.pp):
            language = [self.language_cost(costs, rank, chunk) for chunk in range(self.vpp)]
            if images and self.spread:
                language.insert(0, self.vision_cost(costs, rank))
            elif images:
                language[0] += self.vision_cost(costs, rank)
            table.append(language)
        return table


def whole(siglip_layers: int, sam_layers: int, language_layers: int) -> Division:
    """No pipeline: everything on one rank."""
    return Division(False, (range(siglip_layers),), (range(sam_layers),), ((range(language_layers),),))


def predicted_time(chunk_costs: Sequence[Sequence[float]], micro_batches: int, group: int | None = None) -> float:
    """Forward time of a step: its slowest rank is busy with every micro-batch, and waits while the pipeline fills and drains.

    With several chunks per rank the ranks work through chunk after chunk nearly side by side, so each chunk runs at the pace of its own
    slowest rank; and the pipeline fills that much faster (Narayanan et al. 2021, §2.2), if the chunks are alike. Where they are not, as an
    encoder's beside a language model's, every turn from one chunk to another stalls the ranks behind; a turn comes after every `group`
    micro-batches (see `pipeline_simulation.group_size`). The backward pass scales it all.
    """
    ranks, chunks = len(chunk_costs), len(chunk_costs[0])
    pace = [max(row[chunk] for row in chunk_costs) for chunk in range(chunks)]
    everything = sum(sum(row) for row in chunk_costs)
    fill = (everything - everything / ranks) / chunks
    if chunks > 1:
        turns = -(-micro_batches // group_size(ranks, micro_batches, group)) - 1
        fill += (ranks - 1) * (max(pace) - sum(pace) / chunks + turns * (max(pace) - min(pace)) / 2)
    return micro_batches * sum(pace) + fill


def even_division(costs: LayerCosts, pp: int, vpp: int, kind: VisionDivision) -> Division:
    """Every chunk with as many layers as the next (the first ones one more), whatever they cost."""
    spread = kind == "spread"
    return Division(
        spread,
        _even(len(costs.siglip), pp) if spread else _on_first(len(costs.siglip), pp),
        _even(len(costs.sam), pp) if spread else _on_first(len(costs.sam), pp),
        _rows(_even(len(costs.language), pp * vpp), pp),
    )


@functools.lru_cache(maxsize=1024)
def plan_division(
    costs: LayerCosts,
    pp: int,
    vpp: int = 1,
    kind: VisionDivision = "spread",
    *,
    text_share: float = 0.5,
    micro_batches: int | None = None,
    group: int | None = None,
) -> Division:
    """The division with the least expected time of a step.

    Starts from the even one and moves single layers over the cuts while that helps; the encoder's layers are divided anew, exactly, for
    each division of the language layers.

    Args:
        vpp: language chunks per rank.
        text_share: share of text steps in the run.
        micro_batches: of a step; default 4 per rank.
        group: see `predicted_time`.

    Raises:
        ValueError: fewer language layers than chunks.
    """
    if len(costs.language) < pp * vpp:
        raise ValueError(
            f"parallel.pp={pp} times parallel.vpp={vpp} makes {pp * vpp} language chunks, but the model has {len(costs.language)} language "
            "layers: lower either"
        )
    micro_batches = micro_batches or 4 * pp

    def expected(division: Division) -> float:
        text, image = (predicted_time(division.chunk_costs(costs, images), micro_batches, group) for images in (False, True))
        return text_share * text + (1 - text_share) * image

    even = even_division(costs, pp, vpp, kind)
    best = min([even, *_fit_vision(even, costs)], key=expected)
    while True:
        options = [option for language in _neighbours(best.language) for option in _fit_vision(replace(best, language=language), costs)]
        better = min(options, key=expected, default=best)
        if expected(better) >= expected(best) * (1 - 1e-12):
            return best
        best = better


# ------------------------------------------------------------------------------------------------------------------- helpers


def _even(layers: int, parts: int) -> tuple[range, ...]:
    starts = [layers * part // parts for part in range(parts + 1)]
    return tuple(range(start, stop) for start, stop in itertools.pairwise(starts))


def _on_first(layers: int, parts: int) -> tuple[range, ...]:
    return (range(layers), *(range(layers, layers) for _ in range(parts - 1)))


def _rows(pieces: Sequence[range], pp: int) -> tuple[tuple[range, ...], ...]:
    return tuple(tuple(pieces[start : start + pp]) for start in range(0, len(pieces), pp))


def _neighbours(language: tuple[tuple[range, ...], ...]) -> Iterator[tuple[tuple[range, ...], ...]]:
    """Divisions that move one layer from one chunk to another, the chunks between them shifting along."""
    pp = len(language[0])
    sizes = [len(piece) for row in language for piece in row]
    for giver in range(len(sizes)):
        if sizes[giver] == 0:
            continue
        for taker in range(len(sizes)):
            if taker != giver:
                moved = list(sizes)
                moved[giver] -= 1
                moved[taker] += 1
                starts = [sum(moved[:i]) for i in range(len(moved) + 1)]
                yield _rows([range(a, b) for a, b in itertools.pairwise(starts)], pp)


def _fit_vision(division: Division, costs: LayerCosts) -> list[Division]:
    """The encoder divided for these language layers, in two ways: so that the busiest rank of an image step has as little as contiguous
    layers allow, which counts over many micro-batches, and so that the largest part of the encoder is as small, which counts where every
    turn from chunk to chunk waits for the slowest rank."""
    if not division.spread:
        return [division]
    busy = [sum(division.language_cost(costs, rank, chunk) for chunk in range(division.vpp)) for rank in range(division.pp)]
    return [_level(division, costs, beside) for beside in (busy, [0.0] * division.pp)]


def _level(division: Division, costs: LayerCosts, language: Sequence[float]) -> Division:
    """Divide the encoder so that no rank has more than it must of its part and `language` together."""
    low, high = 0.0, (max(language) + costs.vision) * (1 + 1e-9)
    fitted = _fill(costs, language, high)
    for _ in range(50):
        middle = (low + high) / 2
        candidate = _fill(costs, language, middle)
        if candidate is None:
            low = middle
        else:
            high, fitted = middle, candidate
    assert fitted is not None, "the first limit holds everything"
    return replace(division, siglip=fitted[0], sam=fitted[1])


def _fill(costs: LayerCosts, language: Sequence[float], limit: float) -> tuple[tuple[range, ...], tuple[range, ...]] | None:
    """Give each rank in turn as many encoder layers as keep it within `limit`; None when some are left over."""
    pieces: tuple[list[range], list[range]] = ([], [])
    nexts = [0, 0]
    for rank, busy in enumerate(language):
        room = limit - busy - (costs.vision_head if rank == len(language) - 1 else 0.0)
        for which in (1, 0):  # SAM's layers are the larger ones
            layers = (costs.siglip, costs.sam)[which]
            start = nexts[which]
            while nexts[which] < len(layers) and layers[nexts[which]] <= room:
                room -= layers[nexts[which]]
                nexts[which] += 1
            pieces[which].append(range(start, nexts[which]))
        if room < 0 and rank == len(language) - 1:
            return None
    if nexts != [len(costs.siglip), len(costs.sam)]:
        return None
    return tuple(pieces[0]), tuple(pieces[1])
