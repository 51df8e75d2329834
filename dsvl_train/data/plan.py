"""The plan: what every global batch holds, before any byte is read.

    sources' lengths -> one shuffled stream of samples per modality (epochs, weights) -> windows, packed -> packs in a shuffled order
    step -> its modality (error diffusion) -> the next batch_size packs of that modality -> ranks and micro-batches, balanced

Without data.modality_grouping a step takes packs of both modalities, as many of each as the schedule says; each pack is still of one
modality and comes from the same streams, so that the two ways see the same packs and differ in nothing but the grouping (VL §4.4).

`Planner.plan` is a function of (sources, settings, seed, cursor). Nothing in it knows data-parallel size, workers or what was read; only
`assign` distributes a finished global batch over ranks. So runs on any layout see the same global batches, and a resume only needs the
cursor (`cursor.py`).

Every sample of a source is drawn exactly once per epoch of that source.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dsvl_train.config.schema import DataConfig
from dsvl_train.data.batch import Modality
from dsvl_train.data.cursor import Cursor, Draw, StreamCursor
from dsvl_train.data.mixing import count_text, draw_sources, normalised_weights, text_share_schedule
from dsvl_train.data.order import EpochOrder, Ints, name_key, seeded_permutation
from dsvl_train.data.packing import pack_window, spread_poor

MODALITIES: tuple[Modality, ...] = ("text", "multimodal")


class PlannableSource(Protocol):
    """What planning needs to know of a source."""

    name: str
    modality: Modality
    shard_sizes: Ints
    """Samples per shard, in the order of sample numbers."""

    def lengths(self, samples: Ints) -> Ints:
        """Tokens of samples."""
        ...

    def tiles(self, samples: Ints) -> Ints:
        """Tiles of samples."""
        ...

    def identity(self) -> str:
        """Changes when sample numbers would mean other samples."""
        ...


@dataclass(frozen=True)
class SampleRef:
    """One sample of the plan."""

    source: int
    """Place of its source in data.sources."""
    epoch: int
    index: int
    """Number of the sample within its source."""
    tokens: int
    tiles: int


@dataclass(frozen=True)
class Pack:
    """A sequence: samples laid end to end."""

    samples: tuple[SampleRef, ...]

    @property
    def tokens(self) -> int:
        return sum(sample.tokens for sample in self.samples)

    @property
    def tiles(self) -> int:
        return sum(sample.tiles for sample in self.samples)


@dataclass(frozen=True)
class GlobalBatchPlan:
    """What one optimiser step trains on, on all ranks together."""

    step: int
    modality: Modality
    """text: text packs alone. multimodal: some or all packs are multimodal."""
    packs: tuple[Pack, ...]
    text_share: float
    """Realised share of text sequences, this step's included; with modality grouping that is the share of text steps."""
    text_share_target: float
    """Mean of the schedule up to and including this step."""
    text_ratio: float
    """The schedule at this step."""
    fill: float
    """Tokens over capacity of the sequences; 1 when not packing."""


@dataclass(frozen=True)
class _Window:
    """A packed window and the cursor of the one after it."""

    packs: tuple[tuple[Draw, ...], ...]
    refs: Mapping[Draw, SampleRef]
    following: StreamCursor


class Planner:
    """Lays out global batches; see the module's docstring."""

    def __init__(self, sources: Sequence[PlannableSource], cfg: DataConfig, seed: int) -> None:
        """`sources` in the order of `cfg.sources`.

        Raises:
            ValueError: settings that contradict each other or a source without samples.
        """
        if cfg.batch_size < 1 or cfg.window < 1:
            raise ValueError(f"data.batch_size={cfg.batch_size} and data.window={cfg.window} must be 1 or more")
        self.cfg = cfg
        self.seed = seed % 2**64
        self.schedule = text_share_schedule(cfg)
        self.sources = list(sources)
        self.number = {source.name: number for number, source in enumerate(self.sources)}
        self.weights = {modality: normalised_weights(cfg.sources, modality) for modality in MODALITIES}
        for source in self.sources:
            if int(np.sum(source.shard_sizes)) == 0 and cfg.sources[source.name].weight > 0:
                raise ValueError(f"data.sources.{source.name} holds no usable sample ({_limits(cfg)})")
        self.orders = [EpochOrder(source.shard_sizes, self.seed, source.name) for source in self.sources]
        self._windows: dict[Modality, tuple[StreamCursor, _Window]] = {}

    def plan(self, cursor: Cursor) -> tuple[GlobalBatchPlan, Cursor]:
        """The global batch after `cursor`, and the cursor after it."""
        step = cursor.step + 1
        ratio = self.schedule.at(step)
        target_sum = cursor.target_sum + ratio
        batch_size = self.cfg.batch_size
        parts = 1 if self.cfg.modality_grouping else batch_size
        text = count_text(target_sum, cursor.text_steps, parts) * (batch_size // parts)
        text_steps = cursor.text_steps + text / batch_size
        packs: list[Pack] = []
        streams = dict(cursor.streams)
        for modality, count in zip(MODALITIES, (text, batch_size - text), strict=True):
            if count:
                stream = streams.get(modality) or StreamCursor.fresh(tuple(self.weights[modality]))
                taken, streams[modality] = self._take(modality, stream, count)
                packs += taken
        plan = GlobalBatchPlan(
            step=step,
            modality="text" if text == batch_size else "multimodal",
            packs=tuple(packs),
            text_share=text_steps / step,
            text_share_target=target_sum / step,
            text_ratio=ratio,
            fill=sum(pack.tokens for pack in packs) / (len(packs) * self.cfg.seq_len) if self.cfg.packing else 1.0,
        )
        return plan, Cursor(step, text_steps, target_sum, streams)

    # ------------------------------------------------------------------------------------------------------------- state

    def state(self, cursor: Cursor) -> dict[str, Any]:
        """The cursor as JSON, with what it was planned from."""
        return {
            **cursor.as_json(),
            "plan": {
                "seed": self.seed,
                "seq_len": self.cfg.seq_len,
                "max_tiles_per_sequence": self.cfg.max_tiles_per_sequence,
                "packing": self.cfg.packing,
                "window": self.cfg.window,
                "weights": {modality: dict(weights) for modality, weights in self.weights.items()},
                "identity": {source.name: source.identity() for source in self.sources},
            },
        }

    def restore(self, state: Mapping[str, Any]) -> Cursor:
        """The cursor of a state. Batch size, schedule, modality grouping, layout and workers may have changed freely.

        When weights, window, packing or the order of the sources changed, or some were added, the next step follows the new settings
        already: what was drawn by the old ones and not used goes back to its source, to come first when that is drawn again, so no sample
        is lost or repeated.

        Raises:
            ValueError: seed, seq_len, max_tiles_per_sequence or a source's data changed: the same numbers would mean other samples.
        """
        cursor = Cursor.from_json(dict(state))
        then = state["plan"]
        for name, now in (
            ("run.seed", self.seed),
            ("data.seq_len", self.cfg.seq_len),
            ("data.max_tiles_per_sequence", self.cfg.max_tiles_per_sequence),
        ):
            before = then.get(name.partition(".")[2])
            if before != now:
                raise ValueError(
                    f"{name}={_shown(now)}, but the checkpoint's data order was made with {_shown(before)}: set it back, or resume=none"
                )
        for name, identity in then["identity"].items():
            if name not in self.number:
                raise ValueError(
                    f"data.sources.{name} is in the checkpoint's data state and not in the configuration: "
                    "keep it, or start the order anew with resume=none"
                )
            if self.sources[self.number[name]].identity() != identity:
                raise ValueError(
                    f"the data of data.sources.{name} changed since the checkpoint: its place in it is lost; put it back, or resume=none"
                )
        unchanged = (
            then["packing"] == self.cfg.packing
            and then["window"] == self.cfg.window
            and then["weights"] == self.weights
            and all(tuple(self.weights[of]) == stream.names for of in MODALITIES if (stream := cursor.streams.get(of)))
        )
        return cursor if unchanged else replace(cursor, streams=self._carry_over(cursor.streams, then))

    def _carry_over(self, streams: Mapping[str, StreamCursor], then: Mapping[str, Any]) -> dict[str, StreamCursor]:
        """Streams that go on under new settings, with what is left of the old ones' windows given back to the sources."""
        old = Planner(self.sources, replace(self.cfg, packing=then["packing"], window=then["window"]), self.seed)
        moved: dict[str, StreamCursor] = {}
        for modality in MODALITIES:
            stream, names = streams.get(modality), tuple(self.weights[modality])
            if stream is None or not names:
                continue
            if missing := [name for name in stream.names if name not in names]:
                raise ValueError(f"data.sources.{missing[0]} had modality {modality} in the checkpoint: set it back, or resume=none")
            old.weights[modality] = {name: then["weights"][modality][name] for name in stream.names}
            window = old._window(modality, stream)
            returned: dict[str, list[int]] = {name: [] for name in names}
            for name, ordinals in zip(stream.names, window.following.returned, strict=False):
                returned[name] += ordinals
            for pack in (*window.packs[stream.offset :], *window.following.started):
                for source, ordinal in pack:
                    returned[stream.names[source]].append(ordinal)
            drawn = dict(zip(stream.names, window.following.drawn, strict=True))
            moved[modality] = StreamCursor(
                names=names,
                drawn=tuple(drawn.get(name, 0) for name in names),
                credits=(0.0,) * len(names),
                window=stream.window + 1,
                returned=tuple(tuple(sorted(returned[name])) for name in names),
            )
        return moved

    # ----------------------------------------------------------------------------------------------------------- streams

    def _take(self, modality: Modality, stream: StreamCursor, count: int) -> tuple[list[Pack], StreamCursor]:
        """The next `count` packs of a stream."""
        taken: list[Pack] = []
        while len(taken) < count:
            window = self._window(modality, stream)
            draws = window.packs[stream.offset : stream.offset + count - len(taken)]
            taken += [Pack(tuple(window.refs[draw] for draw in pack)) for pack in draws]
            used = stream.offset + len(draws)
            stream = replace(stream, offset=used) if used < len(window.packs) else window.following
        return taken, stream

    def _window(self, modality: Modality, stream: StreamCursor) -> _Window:
        """The window that a stream stands in; the last one of each modality is remembered."""
        start = replace(stream, offset=0)
        known = self._windows.get(modality)
        if known is None or known[0] != start:
            known = (start, self._make_window(modality, start))
            self._windows[modality] = known
        return known[1]

    def _make_window(self, modality: Modality, start: StreamCursor) -> _Window:
        chosen, credits = draw_sources(list(self.weights[modality].values()), start.credits, self.cfg.window)
        drawn = list(start.drawn)
        returned = [deque(ordinals) for ordinals in start.returned] or [deque[int]() for _ in drawn]
        draws: list[Draw] = [draw for pack in start.started for draw in pack]
        carried = len(draws)
        for source in chosen:
            if returned[source]:
                draws.append((source, returned[source].popleft()))
            else:
                draws.append((source, drawn[source]))
                drawn[source] += 1
        refs = self._refs(start.names, draws)
        packs: list[tuple[Draw, ...]]
        if self.cfg.packing:
            places = iter(range(carried))
            started = [[next(places) for _ in pack] for pack in start.started]
            lengths, tiles = [ref.tokens for ref in refs], [ref.tiles for ref in refs]
            packed = pack_window(lengths, self.cfg.seq_len, started, tiles=tiles, max_tiles=self.cfg.max_tiles_per_sequence)
            shuffle = seeded_permutation(len(packed.closed), self.seed, name_key(modality), start.window)
            fill = [sum(refs[place].tokens for place in pack) / self.cfg.seq_len for pack in packed.closed]
            packs = [tuple(draws[place] for place in packed.closed[at]) for at in spread_poor(shuffle.tolist(), fill)]
            still_open = tuple(tuple(draws[place] for place in pack) for pack in packed.open)
        else:
            packs, still_open = [(draw,) for draw in draws], ()
        left = tuple(tuple(ordinals) for ordinals in returned) if any(returned) else ()
        following = StreamCursor(start.names, tuple(drawn), tuple(credits), still_open, start.window + 1, returned=left)
        return _Window(tuple(packs), dict(zip(draws, refs, strict=True)), following)

    def _refs(self, names: Sequence[str], draws: Sequence[Draw]) -> list[SampleRef]:
        """Samples of draws, with their lengths."""
        refs: list[SampleRef | None] = [None] * len(draws)
        for of_modality, name in enumerate(names):
            places = [place for place, (source, _) in enumerate(draws) if source == of_modality]
            number = self.number[name]
            found = [self.orders[number].sample(draws[place][1]) for place in places]
            samples = np.asarray([sample for _, sample in found], dtype=np.int64)
            lengths, tiles = self.sources[number].lengths(samples), self.sources[number].tiles(samples)
            for place, (epoch, sample), length, tile in zip(places, found, lengths.tolist(), tiles.tolist(), strict=True):
                refs[place] = SampleRef(number, epoch, sample, length, tile)
        return [ref for ref in refs if ref is not None]


def _limits(cfg: DataConfig) -> str:
    tiles = cfg.max_tiles_per_sequence
    return f"data.seq_len={cfg.seq_len}" + (f", data.max_tiles_per_sequence={tiles}" if tiles is not None else "")


def _shown(value: int | None) -> str:
    """As a setting says it."""
    return "null" if value is None else str(value)


# ---------------------------------------------------------------------------------------------------------------- ranks

RankShare = tuple[tuple[Pack, ...], ...]
"""A rank's micro-batches, each some packs."""


def check_divides(batch_size: int, micro_batch_size: int, dp_size: int) -> None:
    """Raises ValueError unless a global batch divides over ranks and micro-batches."""
    if min(batch_size, micro_batch_size, dp_size) < 1 or batch_size % (dp_size * micro_batch_size):
        raise ValueError(
            f"data.batch_size={batch_size} does not divide into {dp_size} data-parallel ranks of micro-batches of "
            f"data.micro_batch_size={micro_batch_size}: set data.batch_size to a multiple of {dp_size * micro_batch_size}, "
            "or change data.micro_batch_size or the number of ranks"
        )


def attention_cost(pack: Pack) -> float:
    """What attention computes in a pack, in units of one score: no sample attends to another."""
    return float(sum(sample.tokens**2 for sample in pack.samples))


def assign(packs: Sequence[Pack], dp_size: int, micro_batch_size: int) -> list[RankShare]:
    """Distribute a global batch: per rank the same number of packs, with tokens, tiles and attention as even as swaps make them.

    Starts from `assign_greedily` and swaps packs between the rank that deviates most and any other while that helps. What counts is the
    sum over ranks of the squared relative deviations, tokens and tiles weighing more than attention, which is the smaller cost. Within a
    rank the packs are divided over micro-batches and those ordered by falling cost, so that micro-batches that ranks compute at the same
    time are alike.

    Raises:
        ValueError: the packs do not divide.
    """
    check_divides(len(packs), micro_batch_size, dp_size)
    loads_nd = _relative_loads(packs, dp_size)
    costs = loads_nd[:, :2].sum(axis=1).tolist()
    per_rank = len(packs) // dp_size
    ranks = _swap(_spread(list(range(len(packs))), costs, dp_size, per_rank), loads_nd * _WEIGHTS)
    return [_micro_batches(packs, members, costs, per_rank // micro_batch_size, micro_batch_size) for members in ranks]


def assign_greedily(packs: Sequence[Pack], dp_size: int, micro_batch_size: int) -> list[RankShare]:
    """Longest processing time first: the costliest pack goes to the rank with the least so far, a pack's cost being its tokens and tiles.

    `assign` starts from it; on its own it is what benchmarks compare with.
    """
    check_divides(len(packs), micro_batch_size, dp_size)
    costs = _relative_loads(packs, dp_size)[:, :2].sum(axis=1).tolist()
    per_rank = len(packs) // dp_size
    ranks = _spread(list(range(len(packs))), costs, dp_size, per_rank)
    return [_micro_batches(packs, members, costs, per_rank // micro_batch_size, micro_batch_size) for members in ranks]


_WEIGHTS = np.asarray([4.0, 1.0, 0.25])
"""Of deviations in tokens (which vary little), tiles and attention."""
_LEAST_GAIN = 1e-4
"""A swap must lower the sum of squared deviations by this: a hundredth of a rank's mean is one of these. Less is not worth the search."""


def _relative_loads(packs: Sequence[Pack], dp_size: int) -> NDArray[np.float64]:
    """[pack, (tokens, tiles, attention)], each over a rank's mean."""
    loads_nd = np.asarray([(pack.tokens, pack.tiles, attention_cost(pack)) for pack in packs], dtype=np.float64)
    return loads_nd * (dp_size / np.maximum(loads_nd.sum(axis=0), 1.0))


def _micro_batches(packs: Sequence[Pack], members: Sequence[int], costs: Sequence[float], count: int, size: int) -> RankShare:
    groups = _spread(members, costs, count, size)
    groups.sort(key=lambda group: (-sum(costs[pack] for pack in group), min(group)))
    return tuple(tuple(packs[pack] for pack in sorted(group)) for group in groups)


def _swap(ranks: list[list[int]], loads_nd: NDArray[np.float64]) -> list[list[int]]:
    """Swap members between ranks while that lowers the sum of the ranks' squared deviations from the mean."""
    totals_rd = np.stack([loads_nd[members].sum(axis=0) for members in ranks])
    mean_d = totals_rd.mean(axis=0)
    owner_n = np.empty(len(loads_nd), dtype=np.int64)
    for rank, members in enumerate(ranks):
        owner_n[members] = rank
    tried: set[int] = set()
    while len(tried) < len(ranks):
        deviation_r = ((totals_rd - mean_d) ** 2).sum(axis=1)
        deviation_r[list(tried)] = -1.0
        worst = int(deviation_r.argmax())
        gives = np.flatnonzero(owner_n == worst)
        moved_mnd = loads_nd[None, :, :] - loads_nd[gives][:, None, :]  # what `worst` gains when its m-th pack is swapped for pack n
        here_mnd = (totals_rd[worst] - mean_d + moved_mnd) ** 2
        there_mnd = (totals_rd[owner_n] - mean_d - moved_mnd) ** 2
        before_n = ((totals_rd[owner_n] - mean_d) ** 2 + (totals_rd[worst] - mean_d) ** 2).sum(axis=1)
        gain_mn = before_n - (here_mnd + there_mnd).sum(axis=2)
        gain_mn[:, gives] = 0.0
        m, n = divmod(int(gain_mn.argmax()), gain_mn.shape[1])
        if gain_mn[m, n] <= _LEAST_GAIN:
            tried.add(worst)
            continue
        tried.clear()
        mine, theirs = int(gives[m]), int(n)
        other = int(owner_n[theirs])
        totals_rd[worst] += moved_mnd[m, n]
        totals_rd[other] -= moved_mnd[m, n]
        owner_n[mine], owner_n[theirs] = other, worst
    return [np.flatnonzero(owner_n == rank).tolist() for rank in range(len(ranks))]


def _spread(members: Sequence[int], costs: Sequence[float], groups: int, size: int) -> list[list[int]]:
    """Divide members into groups of equal size with sums of costs alike; ties go to the earlier member and group."""
    chosen: list[list[int]] = [[] for _ in range(groups)]
    heap = [(0.0, group) for group in range(groups)]
    for member in sorted(members, key=lambda member: (-costs[member], member)):
        total, group = heapq.heappop(heap)
        chosen[group].append(member)
        if len(chosen[group]) < size:
            heapq.heappush(heap, (total + costs[member], group))
    return chosen
