"""kill -9 in the middle of reading, then on with other ranks and workers: the global batches are those of a run left alone."""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dsvl_train.config.schema import DataConfig
from dsvl_train.data.loader import build_data
from dsvl_train.data.processor import Processor
from tests.unit.made_data import VL2_FOLDER, config, shards_source, text_source, write_corpus, write_mixture

STEPS, SAVE_EVERY, CASES = 20, 3, 20
_PROCESSES = multiprocessing.get_context("forkserver")


def settings(root: Path, grouped: bool, workers: int) -> DataConfig:
    sources = {"pictures": shards_source(root / "shards"), "books": text_source(root / "text")}
    made = config(sources, text_ratio=0.4, text_warmup_steps=4, seq_len=512, batch_size=8, window=8, workers=workers)
    return replace(made, modality_grouping=grouped)


def read_on(root: Path, run_dir: Path, grouped: bool, dp_size: int, workers: int) -> None:
    """All ranks of a layout, from the saved state to the end: a line with each global batch's digest, the state every few steps."""
    ranks = [
        build_data(settings(root, grouped, workers), seed=3, max_steps=STEPS, dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)
    ]
    saved = run_dir / "state.json"
    if saved.exists():
        for rank in ranks:
            rank.load_state(json.loads(saved.read_text()))
    with (run_dir / "batches.jsonl").open("a", encoding="utf-8") as log:
        for batches in zip(*ranks, strict=True):
            samples = []
            for micro in (micro for batch in batches for micro in batch.micro_batches):
                bounds = micro.cu_seqlens.tolist()
                samples += [micro.tokens_t[start:stop].tolist() for start, stop in itertools.pairwise(bounds)]
            digest = hashlib.sha256(json.dumps(sorted(samples)).encode()).hexdigest()
            log.write(json.dumps([batches[0].step, batches[0].modality, digest]) + "\n")
            log.flush()
            if batches[0].step % SAVE_EVERY == 0:
                states = {json.dumps(rank.state(), sort_keys=True) for rank in ranks}
                assert len(states) == 1, "a cursor depends on the rank"
                (run_dir / "new.json").write_text(states.pop())
                os.replace(run_dir / "new.json", saved)
    for rank in ranks:
        rank.close()


def records(run_dir: Path) -> list[list[object]]:
    lines = (run_dir / "batches.jsonl").read_text().splitlines() if (run_dir / "batches.jsonl").exists() else []
    return [json.loads(line) for line in lines if line.endswith("]")]


def start(root: Path, run_dir: Path, grouped: bool, dp_size: int, workers: int) -> multiprocessing.Process:
    process = _PROCESSES.Process(target=read_on, args=(root, run_dir, grouped, dp_size, workers))
    process.start()
    return process  # type: ignore[return-value]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_mixture(root / "shards", 40, shards=4)
    write_corpus(root / "text", Processor.from_folder(VL2_FOLDER))
    build_data(settings(root, True, 0), seed=3, max_steps=1, dp_rank=0, dp_size=1).close()
    return root


@pytest.fixture(scope="module")
def left_alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, dict[object, list[object]]]:
    """By grouping of modalities and step: what each global batch holds."""
    _PROCESSES.set_forkserver_preload(["dsvl_train.data.loader", "tests.unit.made_data"])
    runs = {}
    for grouped in (True, False):
        run_dir = tmp_path_factory.mktemp("alone")
        process = start(data, run_dir, grouped, 1, 0)
        process.join(120)
        assert process.exitcode == 0
        runs[grouped] = {record[0]: record for record in records(run_dir)}
        assert len(runs[grouped]) == STEPS and len({record[2] for record in runs[grouped].values()}) == STEPS
    assert runs[True] != runs[False]
    return runs


@pytest.mark.parametrize("case", [*range(6), *(pytest.param(case, marks=pytest.mark.full) for case in range(6, CASES))])
def test_a_killed_run_goes_on_with_the_same_global_batches(
    data: Path, left_alone: dict[bool, dict[object, list[object]]], tmp_path: Path, case: int
) -> None:
    rng = random.Random(case)
    grouped = case % 3 != 2
    for _ in range(rng.randint(1, 3)):
        process = start(data, tmp_path, grouped, rng.choice([1, 2, 4, 8]), rng.randint(0, 4))
        target = len(records(tmp_path)) + rng.randint(1, STEPS // 2)
        deadline = time.monotonic() + 120
        while len(records(tmp_path)) < target and process.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(rng.random() * 0.02)
        process.kill()
        process.join()
    process = start(data, tmp_path, grouped, rng.choice([1, 2, 4, 8]), rng.randint(0, 4))
    process.join(120)
    assert process.exitcode == 0
    found, wanted = records(tmp_path), left_alone[grouped]
    assert {record[0]: record for record in found} == wanted
    assert all(record == wanted[record[0]] for record in found), "also what was read twice, before and after a kill"
