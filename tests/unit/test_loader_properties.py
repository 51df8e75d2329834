"""Properties of the whole loader: for random mixtures, sizes, ranks, workers, stops and restarts, what is read is what was planned.

Together with `test_plan.py`, where the plan itself is held to exact epochs, this makes every sample of an epoch read exactly once.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsvl_train.config.schema import DataConfig
from dsvl_train.data.batch import StepBatch
from dsvl_train.data.cursor import Cursor
from dsvl_train.data.loader import DataPipeline
from dsvl_train.data.plan import GlobalBatchPlan, Planner
from dsvl_train.data.processor import Processor
from dsvl_train.data.sources import Source, open_sources
from tests.unit.made_data import VL2_FOLDER, config, shards_source, text_source, write_corpus, write_mixture

STEPS = 10
Sample = tuple[int, tuple[int, ...]]
"""A sample by its source and tokens; no two of the made ones are equal."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Processor]:
    """Three sets of shards of unlike sizes and two corpora."""
    root, processor = tmp_path_factory.mktemp("data"), Processor.from_folder(VL2_FOLDER)
    for number, (samples, shards) in enumerate([(23, 3), (9, 1), (40, 5)]):
        write_mixture(root / f"shards{number}", samples, shards=shards, seed=number)
    for number, documents in enumerate([30, 7]):
        write_corpus(root / f"text{number}", processor, documents, seed=number)
    return root, processor


@st.composite
def runs(draw: st.DrawFn) -> tuple[dict[str, float], dict[str, Any], list[tuple[int, int, int]]]:
    """Weights of some sources, settings, and the parts of a run: (last step, ranks, workers)."""
    pictures = draw(st.lists(st.sampled_from(["shards0", "shards1", "shards2"]), min_size=1, unique=True))
    texts = draw(st.lists(st.sampled_from(["text0", "text1"]), unique=True))
    weights = {name: draw(st.floats(0.2, 5.0)) for name in pictures + texts}
    micro_batch_size = draw(st.sampled_from([1, 2]))
    chosen: dict[str, Any] = {
        "batch_size": draw(st.sampled_from([8, 16])) * micro_batch_size,
        "micro_batch_size": micro_batch_size,
        "seq_len": draw(st.sampled_from([300, 512, 1000])),
        "packing": draw(st.booleans()),
        "window": draw(st.sampled_from([3, 20, 64])),
        "modality_grouping": draw(st.booleans()),
        "max_tiles_per_sequence": draw(st.sampled_from([None, 4])),
        "prefetch_steps": draw(st.integers(1, 3)),
    }
    if texts:
        chosen |= {
            "text_ratio": draw(st.floats(0, 1)),
            "text_warmup_steps": draw(st.integers(0, 6)),
            "text_warmup_shape": draw(st.sampled_from(["linear", "cosine", "step"])),
        }
    stops = [*sorted(draw(st.sets(st.integers(1, STEPS - 1), max_size=3))), STEPS]
    layouts = st.tuples(st.sampled_from([1, 2, 4, 8]), st.integers(0, 4))
    return weights, chosen, [(stop, *draw(layouts)) for stop in stops]


@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(run=runs(), seed=st.integers(0, 2**40))
def test_every_layout_reads_the_planned_global_batches_whatever_stops_it(data: Any, run: Any, seed: int) -> None:
    (root, processor), (weights, chosen, parts) = data, run
    made = {
        name: (text_source if name.startswith("text") else shards_source)(root / name, weight=weight) for name, weight in weights.items()
    }
    cfg = config(made, **chosen, max_bad_fraction=1.0)
    sources = open_sources(cfg, processor)
    plans = planned(sources, cfg, seed)
    state, drawn = None, Counter()
    for first, (stop, dp_size, workers) in zip([0, *(stop for stop, _, _ in parts)], parts, strict=False):
        ranks = [
            DataPipeline(replace(cfg, workers=workers), sources, processor, seed=seed, max_steps=STEPS, dp_rank=rank, dp_size=dp_size)
            for rank in range(dp_size)
        ]
        for rank in ranks if state is not None else []:
            rank.load_state(json.loads(state))
        for plan in plans[first:stop]:
            batches = [next(rank) for rank in ranks]
            require_planned(batches, plan, sources, cfg)
            drawn += Counter((ref.source, ref.epoch, ref.index) for pack in plan.packs for ref in pack.samples)
        states = {json.dumps(rank.state(), sort_keys=True) for rank in ranks}
        assert len(states) == 1
        state = states.pop()
        for rank in ranks:
            rank.close()
    assert set(drawn.values()) == {1}


def planned(sources: list[Source], cfg: DataConfig, seed: int) -> list[GlobalBatchPlan]:
    planner, cursor, plans = Planner(sources, cfg, seed), Cursor(), []
    for _ in range(STEPS):
        plan, cursor = planner.plan(cursor)
        plans.append(plan)
    return plans


def require_planned(batches: list[StepBatch], plan: GlobalBatchPlan, sources: list[Source], cfg: DataConfig) -> None:
    """All ranks together hold the planned samples, each whole and once; every rank as many sequences; none over a limit."""
    assert {(batch.step, batch.modality, batch.bad_samples) for batch in batches} == {(plan.step, plan.modality, 0)}
    found: Counter[Sample] = Counter()
    for batch in batches:
        assert len(batch.micro_batches) * len(batches) * cfg.micro_batch_size == cfg.batch_size
        for micro in batch.micro_batches:
            assert len(micro.tokens_t) <= cfg.micro_batch_size * cfg.seq_len or not cfg.packing
            assert micro.tiles <= cfg.micro_batch_size * (cfg.max_tiles_per_sequence or micro.tiles)
            assert (micro.pixels_nchw is None) == (plan.modality == "text")
            assert micro.pixels_nchw is None or len(micro.pixels_nchw) == micro.tiles
            bounds = zip(micro.source_s.tolist(), pairwise(micro.cu_seqlens.tolist()), strict=True)
            found += Counter((source, tuple(micro.tokens_t[start:end].tolist())) for source, (start, end) in bounds)
    refs = [ref for pack in plan.packs for ref in pack.samples]
    assert found == Counter((ref.source, tuple(sources[ref.source].read(ref.index).tokens_t.tolist())) for ref in refs)
    assert [sum(micro.tiles for micro in batch.micro_batches) for batch in batches] == batches[0].tiles_per_rank
    parts = 1 if cfg.modality_grouping else cfg.batch_size
    assert abs(plan.text_share - plan.text_share_target) * plan.step <= 1 / parts
