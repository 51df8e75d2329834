"""A discrete simulation of Megatron's pipeline schedules: when each rank runs which chunk of which micro-batch, and how long it idles.

It follows the orders of `megatron.core.pipeline_parallel.schedules` (1F1B, and its interleaved form for several chunks per rank): the
order of a rank's work is fixed, and a piece of work starts when the rank is free and what it needs has arrived. Communication is free.
`dsvl_train.parallel.division` plans with a formula; tests hold the formula against this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple


class Work(NamedTuple):
    """One chunk's pass over one micro-batch."""

    direction: Literal["forward", "backward"]
    chunk: int
    micro_batch: int


@dataclass(frozen=True)
class Timeline:
    """What a simulation found; times are in the unit of the costs."""

    makespan: float
    busy: tuple[float, ...]
    """Per rank."""

    @property
    def bubble(self) -> float:
        """Share of all ranks' time that is idle."""
        return 1.0 - sum(self.busy) / (len(self.busy) * self.makespan)


def rank_order(pp: int, chunks: int, rank: int, micro_batches: int, wanted_group: int | None = None) -> list[Work]:
    """What a rank does, in order (1F1B; interleaved for more than one chunk, in groups of `group_size` micro-batches)."""
    group = group_size(pp, micro_batches, wanted_group) if chunks > 1 else 1
    forward = _table(chunks, micro_batches, group)
    backward = [(chunks - 1 - chunk, micro) for chunk, micro in forward]
    warm_up = pp - rank - 1 if chunks == 1 else 2 * (pp - rank - 1) + (chunks - 1) * group
    warm_up = min(warm_up, len(forward))
    order = [Work("forward", *item) for item in forward[:warm_up]]
    for ahead, behind in zip(forward[warm_up:], backward, strict=False):
        order += [Work("forward", *ahead), Work("backward", *behind)]
    return order + [Work("backward", *item) for item in backward[len(forward) - warm_up :]]


def group_size(pp: int, micro_batches: int, wanted: int | None = None) -> int:
    """Micro-batches that a rank runs through one chunk before it turns to the next: `wanted` (default 4 * pp), or the next that fits.

    With Megatron's own default, pp, the ranks would idle more on image steps than without spreading the encoder (simulated for the
    released models), since its chunk and the language model's differ in cost and every turn stalls the ranks behind. Megatron asks that
    the last, smaller group be empty or at least pp micro-batches.

    Raises:
        ValueError: fewer micro-batches than pipeline ranks.
    """
    for size in range(max(min(wanted or 4 * pp, micro_batches), pp), micro_batches + 1):
        rest = micro_batches % size
        if rest == 0 or rest >= pp:
            return size
    raise ValueError(
        f"a step of {micro_batches} micro-batches per data-parallel rank cannot fill a pipeline of parallel.pp={pp} ranks: raise "
        "data.batch_size or lower data.micro_batch_size until there are as many micro-batches as pipeline ranks"
    )


def simulate(
    chunk_costs: Sequence[Sequence[float]], micro_batches: int, backward_ratio: float = 2.0, wanted_group: int | None = None
) -> Timeline:
    """Run a step's pipeline.

    Args:
        chunk_costs: [rank][chunk], the forward cost of a micro-batch.
        backward_ratio: cost of a backward pass over that of its forward pass (3 with full recomputation).
        wanted_group: see `group_size`.
    """
    pp, chunks = len(chunk_costs), len(chunk_costs[0])
    todo = [rank_order(pp, chunks, rank, micro_batches, wanted_group) for rank in range(pp)]
    place, clock, busy = [0] * pp, [0.0] * pp, [0.0] * pp
    done: dict[tuple[int, Work], float] = {}
    while any(place[rank] < len(todo[rank]) for rank in range(pp)):
        moved = False
        for rank in range(pp):
            while place[rank] < len(todo[rank]):
                work = todo[rank][place[rank]]
                needs = [done.get(need) for need in _needs(pp, chunks, rank, work)]
                if None in needs:
                    break
                cost = chunk_costs[rank][work.chunk] * (1.0 if work.direction == "forward" else backward_ratio)
                clock[rank] = max([clock[rank], *(need for need in needs if need is not None)]) + cost
                busy[rank] += cost
                done[rank, work] = clock[rank]
                place[rank] += 1
                moved = True
        if not moved:
            raise AssertionError("the schedule waits for itself")
    return Timeline(max(clock), tuple(busy))


def most_kept(kept: Sequence[float], pp: int, rank: int, micro_batches: int, wanted_group: int | None = None) -> tuple[float, list[int]]:
    """The most that a rank keeps between forward and backward passes, and how many micro-batches of each chunk that is.

    Args:
        kept: [chunk], what a micro-batch's forward pass leaves for its backward pass.
    """
    now, most, at_most = [0] * len(kept), 0.0, [0] * len(kept)
    for work in rank_order(pp, len(kept), rank, micro_batches, wanted_group):
        now[work.chunk] += 1 if work.direction == "forward" else -1
        total = sum(number * each for number, each in zip(now, kept, strict=True))
        if total > most or not any(at_most):
            most, at_most = total, list(now)
    return most, at_most


def _table(chunks: int, micro_batches: int, group: int) -> list[tuple[int, int]]:
    """(chunk, micro-batch) in the order of the forward passes."""
    return [
        (chunk, micro)
        for start in range(0, micro_batches, group)
        for chunk in range(chunks)
        for micro in range(start, min(start + group, micro_batches))
    ]


def _needs(pp: int, chunks: int, rank: int, work: Work) -> list[tuple[int, Work]]:
    """What must be done before: the pass on the neighbouring stage, and a backward pass's own forward pass."""
    stage = work.chunk * pp + rank
    if work.direction == "forward":
        return [(_rank_of(stage - 1, pp), work._replace(chunk=(stage - 1) // pp))] if stage else []
    own = (rank, work._replace(direction="forward"))
    if stage == chunks * pp - 1:
        return [own]
    return [own, (_rank_of(stage + 1, pp), work._replace(chunk=(stage + 1) // pp))]


def _rank_of(stage: int, pp: int) -> int:
    return stage % pp
