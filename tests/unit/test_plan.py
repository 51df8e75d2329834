"""The plan: exact epochs, packs that hold, the same global batches on every layout and after every restart."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsvl_train.config.schema import SourceConfig
from dsvl_train.data.cursor import Cursor
from dsvl_train.data.order import EpochOrder, seeded_permutation
from dsvl_train.data.plan import GlobalBatchPlan, Pack, Planner, SampleRef, assign, attention_cost
from tests.unit.made_data import MadeSource, config, long_tailed, shards_source, text_source

CAPACITY = 64


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[list[MadeSource], dict[str, SourceConfig], dict[str, Any]]:
    """Sources of both modalities with random lengths, weights, shards and settings."""
    sources, configs = [], {}
    for modality, make in (("text", text_source), ("multimodal", shards_source)):
        for number in range(draw(st.integers(1, 2))):
            name = f"{modality}{number}"
            lengths = draw(st.lists(st.integers(1, CAPACITY), min_size=1, max_size=40))
            tiles = [length % 4 if modality == "multimodal" else 0 for length in lengths]
            sources.append(MadeSource(name, modality, lengths, tiles, shards=draw(st.integers(1, min(4, len(lengths))))))
            configs[name] = make("unused", weight=draw(st.floats(0.1, 5.0)))
    chosen = {
        "packing": draw(st.booleans()),
        "batch_size": draw(st.sampled_from([4, 8])),
        "window": draw(st.sampled_from([2, 5, 16, 64])),
        "text_ratio": draw(st.floats(0, 1)),
        "text_warmup_steps": draw(st.integers(0, 10)),
        "modality_grouping": draw(st.booleans()),
        "max_tiles_per_sequence": draw(st.sampled_from([None, 3, 5])),
        "seq_len": CAPACITY,
    }
    return sources, configs, chosen


def run(planner: Planner, cursor: Cursor, steps: int) -> tuple[list[GlobalBatchPlan], Cursor]:
    plans = []
    for _ in range(steps):
        plan, cursor = planner.plan(cursor)
        plans.append(plan)
    return plans, cursor


def modality_of(pack: Pack, sources: list[MadeSource]) -> str:
    """All samples of a pack are of one modality, which the caller checks for the others."""
    return sources[pack.samples[0].source].modality


@settings(max_examples=40)
@given(mixture=mixtures(), seed=st.integers(0, 2**40))
def test_every_sample_once_per_epoch_and_no_pack_overflows(mixture: Any, seed: int) -> None:
    sources, configs, chosen = mixture
    planner = Planner(sources, config(configs, **chosen), seed)
    plans, cursor = run(planner, Cursor(), 25)
    used = Counter()
    for plan in plans:
        text = sum(modality_of(pack, sources) == "text" for pack in plan.packs)
        assert plan.modality == ("text" if text == len(plan.packs) else "multimodal")
        assert not chosen["modality_grouping"] or text in (0, len(plan.packs))
        assert len(plan.packs) == chosen["batch_size"]
        for pack in plan.packs:
            assert 0 < pack.tokens <= CAPACITY
            assert pack.tiles <= (chosen["max_tiles_per_sequence"] or pack.tiles)
            assert chosen["packing"] or len(pack.samples) == 1
            for ref in pack.samples:
                source = sources[ref.source]
                assert source.modality == modality_of(pack, sources)
                assert (ref.tokens, ref.tiles) == (source.length[ref.index], source.tile[ref.index])
                used[ref.source, ref.epoch, ref.index] += 1
    waiting = Counter()
    for modality, stream in cursor.streams.items():
        window = planner._window(modality, stream)  # type: ignore[arg-type]
        for pack in (*window.packs[stream.offset :], *window.following.started):
            for source, ordinal in pack:
                number = planner.number[stream.names[source]]
                waiting[(number, *planner.orders[number].sample(ordinal))] += 1
        for source, name in enumerate(stream.names):
            number, drawn = planner.number[name], window.following.drawn[source]
            expected = Counter((number, *planner.orders[number].sample(ordinal)) for ordinal in range(drawn))
            assert Counter({key: count for key, count in (used + waiting).items() if key[0] == number}) == expected
            samples = len(sources[number].length)
            whole_epochs = drawn // samples
            assert all(expected[number, epoch, sample] == 1 for epoch in range(whole_epochs) for sample in range(samples))


@settings(max_examples=25)
@given(mixture=mixtures(), data=st.data())
def test_a_restart_anywhere_gives_the_same_global_batches(mixture: Any, data: st.DataObject) -> None:
    sources, configs, chosen = mixture
    cfg = config(configs, **chosen)
    plans, _ = run(Planner(sources, cfg, 7), Cursor(), 20)
    stop = data.draw(st.integers(0, 20))
    before = Planner(sources, cfg, 7)
    _, cursor = run(before, Cursor(), stop)
    state = json.loads(json.dumps(before.state(cursor)))
    after = Planner(sources, cfg, 7)
    resumed, _ = run(after, after.restore(state), 20 - stop)
    assert resumed == plans[stop:]


@settings(max_examples=25)
@given(mixture=mixtures(), micro_batch_size=st.sampled_from([1, 2]))
def test_every_layout_shares_out_the_same_global_batch_evenly(mixture: Any, micro_batch_size: int) -> None:
    sources, configs, chosen = mixture
    plans, _ = run(Planner(sources, config(configs, **chosen), 3), Cursor(), 6)
    for plan in plans:
        for dp_size in (1, 2, 4, 8):
            if chosen["batch_size"] % (dp_size * micro_batch_size):
                continue
            shares = assign(plan.packs, dp_size, micro_batch_size)
            assert {len(share) for share in shares} == {chosen["batch_size"] // dp_size // micro_batch_size}
            assert all(len(packs) == micro_batch_size for share in shares for packs in share)
            dealt = Counter(pack for share in shares for packs in share for pack in packs)
            assert dealt == Counter(plan.packs)


@settings(max_examples=25)
@given(mixture=mixtures())
def test_the_realised_text_share_follows_the_schedule(mixture: Any) -> None:
    sources, configs, chosen = mixture
    plans, _ = run(Planner(sources, config(configs, **chosen), 0), Cursor(), 40)
    batch_size = chosen["batch_size"]
    parts = 1 if chosen["modality_grouping"] else batch_size
    text = 0
    for done, plan in enumerate(plans, start=1):
        assert plan.step == done
        text += sum(modality_of(pack, sources) == "text" for pack in plan.packs)
        assert plan.text_share == pytest.approx(text / batch_size / done)
        assert abs(plan.text_share - plan.text_share_target) * done <= 1 / parts


def test_grouping_can_change_on_resume_and_changes_which_steps_see_a_pack_not_the_packs() -> None:
    sources = [MadeSource("t", "text", range(5, 45)), MadeSource("m", "multimodal", range(7, 50), [3] * 43)]
    parts, state = [], None
    for grouped in (True, False, True):
        made = {"t": text_source("t"), "m": shards_source("m")}
        planner = Planner(sources, config(made, seq_len=CAPACITY, text_ratio=0.3, window=16, modality_grouping=grouped), 0)
        plans, cursor = run(planner, Cursor() if state is None else planner.restore(state), 7)
        state = json.loads(json.dumps(planner.state(cursor)))
        assert grouped == all(len({modality_of(pack, sources) for pack in plan.packs}) == 1 for plan in plans)
        parts += plans
    grouped_alone = config({"t": text_source("t"), "m": shards_source("m")}, seq_len=CAPACITY, text_ratio=0.3, window=16)
    alone, _ = run(Planner(sources, grouped_alone, 0), Cursor(), 30)
    for modality in ("text", "multimodal"):
        found, wanted = ([pack for plan in of for pack in plan.packs if modality_of(pack, sources) == modality] for of in (parts, alone))
        assert found == wanted[: len(found)]
    assert all(abs(plan.text_share - plan.text_share_target) * plan.step <= 1 for plan in parts)


def test_order_depends_on_seed_and_epoch() -> None:
    source, cfg = MadeSource("m", "multimodal", range(1, 31)), config({"m": shards_source("m")}, packing=False)
    orders = [
        [ref.index for plan in run(Planner([source], cfg, seed), Cursor(), 15)[0] for pack in plan.packs for ref in pack.samples]
        for seed in (0, 1)
    ]
    assert sorted(orders[0][:30]) == sorted(orders[0][30:60]) == list(range(30))
    assert orders[0][:30] != orders[0][30:60]
    assert orders[0] != orders[1]


def test_shuffle_keeps_shards_together_in_blocks() -> None:
    order = EpochOrder(np.asarray([10] * 20), seed=1, name="s", block=30)
    samples = [order.sample(ordinal)[1] for ordinal in range(200)]
    assert sorted(samples) == list(range(200))
    for start in range(0, 180, 30):
        assert len({sample // 10 for sample in samples[start : start + 30]}) == 3
    assert [order.sample(200 + ordinal)[0] for ordinal in (0, 199)] == [1, 1]


@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any), block=st.integers(1, 40), epoch=st.integers(0, 3))
def test_an_epoch_is_a_permutation_whatever_the_shards(sizes: list[int], block: int, epoch: int) -> None:
    order = EpochOrder(np.asarray(sizes), seed=5, name="s", block=block)
    count = sum(sizes)
    assert sorted(order.sample(epoch * count + place) for place in range(count)) == [(epoch, sample) for sample in range(count)]


def test_the_permutation_is_the_same_in_every_version() -> None:
    assert seeded_permutation(8, 3, 1, 4).tolist() == [4, 5, 0, 3, 7, 6, 2, 1]


def test_fill_of_a_realistic_mixture() -> None:
    rng = np.random.default_rng(0)
    visual = rng.choice([0, 421, 617, 1037, 1205, 2017], 5000)
    text = np.minimum(np.exp(rng.normal(4.5, 1.3, 5000)).astype(int) + 5, 2000)
    source = MadeSource("m", "multimodal", visual + text)
    cfg = config({"m": shards_source("m")}, seq_len=4096, batch_size=32, window=1024)
    plans, _ = run(Planner([source], cfg, 0), Cursor(), 40)
    assert np.mean([plan.fill for plan in plans]) >= 0.98


def pack(tokens: int, tiles: int, number: int) -> Pack:
    return Pack((SampleRef(0, 0, number, tokens, tiles),))


def imbalance(loads: Sequence[float]) -> float:
    return max(loads) / (sum(loads) / len(loads))


def test_tokens_and_tiles_are_balanced_over_ranks() -> None:
    rng = np.random.default_rng(0)
    packs = [pack(int(rng.integers(3950, 4097)), int(rng.poisson(8)), number) for number in range(64)]
    shares = assign(packs, 8, 1)
    assert imbalance([sum(pack.tiles for packs in share for pack in packs) for share in shares]) <= 1.03
    assert imbalance([sum(pack.tokens for packs in share for pack in packs) for share in shares]) <= 1.02
    arrival = [sum(pack.tiles for pack in packs[start : start + 8]) for start in range(0, 64, 8)]
    assert imbalance(arrival) > 1.1


def test_every_global_batch_of_a_long_tailed_set_is_full_and_balanced_by_planning_alone() -> None:
    """Images of 100 to 4,000 pixels, 1 to 8 per sample, texts of 5 to 4,000 tokens, as `long_tailed` draws them; 8 ranks of 4 sequences."""
    tokens, tiles = long_tailed(14_000, seed=0)
    cfg = config({"m": shards_source("m")}, seq_len=4096, batch_size=32, window=1024)
    plans, _ = run(Planner([MadeSource("m", "multimodal", tokens, tiles)], cfg, 0), Cursor(), 120)
    arrival = []
    for plan in plans:
        assert plan.fill >= 0.98
        shares = assign(plan.packs, 8, 1)
        assert sorted(map(id, plan.packs)) == sorted(id(pack) for share in shares for packs in share for pack in packs)
        assert imbalance([sum(pack.tiles for packs in share for pack in packs) for share in shares]) <= 1.1
        assert imbalance([sum(pack.tokens for packs in share for pack in packs) for share in shares]) <= 1.02
        assert imbalance([sum(attention_cost(pack) for packs in share for pack in packs) for share in shares]) <= 1.25
        arrival.append(imbalance([sum(attention_cost(pack) for pack in plan.packs[rank::8]) for rank in range(8)]))
    assert max(arrival) > 1.4


def test_new_weights_hold_from_the_next_step_and_old_draws_come_back() -> None:
    """`a` is switched off within a window: the next step has none of it. What was drawn and not used comes when it is on again."""
    sources = [MadeSource("a", "multimodal", [16] * 40), MadeSource("b", "multimodal", [16] * 40)]
    state, plans = None, []
    for of_a, of_b, steps, expected in ((1.0, 1.0, 1, {0, 1}), (0.0, 1.0, 1, {1}), (1.0, 0.0, 1, {0}), (1.0, 1.0, 12, {0, 1})):
        weights = {"a": shards_source("a", weight=of_a), "b": shards_source("b", weight=of_b)}
        planner = Planner(sources, config(weights, seq_len=CAPACITY, window=64), 0)
        more, cursor = run(planner, Cursor() if state is None else planner.restore(state), steps)
        assert {ref.source for pack in more[0].packs for ref in pack.samples} == expected
        state = json.loads(json.dumps(planner.state(cursor)))
        plans += more
    used = Counter((ref.source, ref.epoch, ref.index) for plan in plans for pack in plan.packs for ref in pack.samples)
    assert set(used.values()) == {1}
    assert {key for key in used if key[1] == 0} == {(source, 0, sample) for source in (0, 1) for sample in range(40)}


def test_a_little_sft_data_in_the_pretraining_mixture_comes_at_its_share() -> None:
    """VL §3.2.2: some instruction data already in stage 2."""
    sources = [MadeSource("pretrain", "multimodal", range(5, 60)), MadeSource("sft", "multimodal", [9] * 20)]
    cfg = config({"pretrain": shards_source("p", weight=0.95), "sft": shards_source("s", weight=0.05)}, seq_len=CAPACITY, packing=False)
    plans, _ = run(Planner(sources, cfg, 0), Cursor(), 100)
    from_sft = [ref.source == 1 for plan in plans for pack in plan.packs for ref in pack.samples]
    assert len(from_sft) == 400
    assert all(abs(sum(from_sft[:done]) - 0.05 * done) <= 1 for done in range(len(from_sft)))


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.batch_size=6 .* 4 data-parallel ranks .*\n?.*data\.micro_batch_size=1.*multiple of 4"):
        assign([pack(1, 0, number) for number in range(6)], 4, 1)


def test_new_weights_and_window_lose_and_repeat_nothing() -> None:
    sources = [MadeSource("a", "multimodal", range(5, 45)), MadeSource("b", "multimodal", range(5, 25))]
    old = config({"a": shards_source("a", weight=3.0), "b": shards_source("b")}, seq_len=CAPACITY, window=16)
    planner = Planner(sources, old, 0)
    first, cursor = run(planner, Cursor(), 3)
    state = json.loads(json.dumps(planner.state(cursor)))
    new = config(
        {"a": shards_source("a"), "c": shards_source("c", weight=2.0), "b": shards_source("b", weight=3.0)}, seq_len=CAPACITY, window=24
    )
    sources = [sources[0], MadeSource("c", "multimodal", range(10, 40)), sources[1]]
    resumed = Planner(sources, new, 0)
    second, _ = run(resumed, resumed.restore(state), 30)
    names = {0: ["a", "b"], 1: ["a", "c", "b"]}
    used = Counter(
        (names[part][ref.source], ref.epoch, ref.index)
        for part, plans in enumerate((first, second))
        for plan in plans
        for pack in plan.packs
        for ref in pack.samples
    )
    assert set(used.values()) == {1}
    assert all(used["a", 0, sample] == 1 for sample in range(40))
    assert sum(key[0] == "c" for key in used) > 0.2 * used.total()


def test_sources_in_another_order_keep_their_weights_and_samples() -> None:
    sources = {"a": MadeSource("a", "multimodal", [16] * 60), "b": MadeSource("b", "multimodal", [21] * 60)}
    weights = {"a": 3.0, "b": 1.0}
    state, plans = None, []
    for order in ("ab", "ba", "ab"):
        cfg = config({name: shards_source(name, weight=weights[name]) for name in order}, seq_len=CAPACITY, window=10)
        planner = Planner([sources[name] for name in order], cfg, 0)
        more, cursor = run(planner, Cursor() if state is None else planner.restore(state), 2)
        state = json.loads(json.dumps(planner.state(cursor), sort_keys=True))
        plans += [(order, plan) for plan in more]
    used = Counter((order[ref.source], ref.epoch, ref.index) for order, plan in plans for pack in plan.packs for ref in pack.samples)
    assert set(used.values()) == {1}
    assert sum(name == "a" for name, _, _ in used) / used.total() == pytest.approx(0.75, abs=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, r"run\.seed=1"),
        ({"seq_len": 32}, r"data\.seq_len=32"),
        ({"max_tiles": 9}, r"data\.max_tiles_per_sequence=9, but .* made with null"),
        ({"lengths": range(1, 12)}, r"data of data\.sources\.m changed"),
        ({"name": "other"}, r"data\.sources\.m is in the checkpoint"),
    ],
)
def test_a_state_that_means_other_samples_is_refused(change: dict[str, Any], message: str) -> None:
    def planner(
        seed: int = 0, seq_len: int = CAPACITY, lengths: Any = range(1, 11), name: str = "m", max_tiles: int | None = None
    ) -> Planner:
        cfg = config({name: shards_source("m")}, seq_len=seq_len, max_tiles_per_sequence=max_tiles)
        return Planner([MadeSource(name, "multimodal", lengths)], cfg, seed)

    first = planner()
    _, cursor = run(first, Cursor(), 2)
    with pytest.raises(ValueError, match=message):
        planner(**change).restore(first.state(cursor))


def test_a_source_without_samples_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.sources\.m holds no usable sample"):
        Planner([MadeSource("m", "multimodal", [])], config({"m": shards_source("m")}), 0)


def test_the_cursor_stays_small() -> None:
    source = MadeSource("m", "multimodal", [20, 30, 50] * 3000)
    planner = Planner([source], config({"m": shards_source("m")}, seq_len=4096, batch_size=4, window=1024), 0)
    _, cursor = run(planner, Cursor(), 20)
    assert len(json.dumps(planner.state(cursor))) < 20_000
