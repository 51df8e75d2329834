"""Peers share one read: the same batches as reading alone, pixels only where they are needed, no peer that waits for a failed reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dsvl_train.data.processor import Processor
from tests.distributed.harness import run_ranks
from tests.unit.made_data import VL2_FOLDER, config, shards_source, text_source, write_corpus, write_mixture

STEPS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_mixture(root / "shards", 24, shards=3)
    write_corpus(root / "text", Processor.from_folder(VL2_FOLDER))
    return root


def settings(root: str, **more: Any) -> Any:
    sources = {"pictures": shards_source(f"{root}/shards"), "books": text_source(f"{root}/text")}
    return config(sources, **{"text_ratio": 0.4, "seq_len": 512, "batch_size": 4, "window": 8, "workers": 2, **more})


def read_batches(root: str, parallel: dict[str, int], fault: str = "") -> dict[str, Any]:
    """One rank's batches as plain arrays, and what reading them took."""
    from dsvl_train.config.schema import EngineConfig, ParallelConfig
    from dsvl_train.data.errors import SampleError
    from dsvl_train.data.loader import build_data
    from dsvl_train.parallel import startup
    from dsvl_train.training.run import _data_sharing

    world = startup.start(EngineConfig(device="cpu"), ParallelConfig(**parallel), seed=0)
    pipeline = build_data(
        settings(root, max_bad_fraction=1.0 if fault == "bad" else 0.01),
        seed=5,
        max_steps=STEPS,
        dp_rank=world.dp_rank,
        dp_size=world.dp_size,
        sharing=_data_sharing(world),
    )
    source: Any = pipeline._sources[0]
    read = source.read

    def faulty(sample: int) -> Any:
        if fault == "crash":
            raise RuntimeError(f"sample {sample} crashes its reader")
        if sample % 3 == 0:
            raise SampleError("image_broken", f"sample {sample}")
        return read(sample)

    if fault:
        source.read = faulty
    error, steps = "", []
    try:
        for step in pipeline:
            micro = [{k: None if v is None else v.numpy().copy() for k, v in vars(one).items()} for one in step.micro_batches]
            steps.append({**vars(step), "micro_batches": micro, "sample_names": step.sample_names()})
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    reads = source.reader.reads
    bad, state = pipeline.bad_samples, pipeline.state()
    pipeline.close()
    startup.stop()
    return {"steps": steps, "reads": reads, "error": error, "bad": bad, "state": state, "dp_rank": world.dp_rank}


def assert_equal(found: Any, wanted: Any, pixels: bool = True) -> None:
    import numpy as np

    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert {**one, "micro_batches": 0} == {**other, "micro_batches": 0}
        for mine, theirs in zip(one["micro_batches"], other["micro_batches"], strict=True):
            for name, value in mine.items():
                if name == "pixels_nchw" and not pixels:
                    assert value is None
                    continue
                assert (value is None) == (theirs[name] is None), name
                if value is not None:
                    assert value.dtype == theirs[name].dtype
                    np.testing.assert_array_equal(value, theirs[name], err_msg=name)


@pytest.mark.distributed
def test_tensor_parallel_ranks_share_one_read(data: Path) -> None:
    (alone,) = run_ranks(read_batches, 1, str(data), {})
    first, second = run_ranks(read_batches, 2, str(data), {"tp": 2})
    assert (first["error"], second["error"]) == ("", "")
    assert_equal(first["steps"], alone["steps"])
    assert_equal(second["steps"], alone["steps"])
    assert first["reads"] == alone["reads"] > 0
    assert second["reads"] == 0
    assert first["state"] == second["state"] == alone["state"]


@pytest.mark.distributed
def test_each_data_parallel_share_has_its_reader(data: Path) -> None:
    ranks = run_ranks(read_batches, 4, str(data), {"tp": 2})
    for rank in ranks:
        assert_equal(rank["steps"], next(one for one in ranks if one["dp_rank"] == rank["dp_rank"])["steps"])
    assert [rank["reads"] > 0 for rank in ranks] == [True, False, True, False]


@pytest.mark.distributed
def test_later_pipeline_ranks_have_all_but_the_pixels(data: Path) -> None:
    (alone,) = run_ranks(read_batches, 1, str(data), {})
    ranks = run_ranks(read_batches, 4, str(data), {"tp": 2, "pp": 2})
    for number, rank in enumerate(ranks):
        assert rank["error"] == ""
        assert_equal(rank["steps"], alone["steps"], pixels=number < 2)
    assert [rank["reads"] > 0 for rank in ranks] == [True, False, False, False]


@pytest.mark.distributed
def test_bad_samples_and_failures_of_the_reader_reach_its_peers(data: Path) -> None:
    first, second = run_ranks(read_batches, 2, str(data), {"tp": 2}, "bad")
    assert_equal(second["steps"], first["steps"])
    assert first["bad"] == second["bad"] != []
    assert any(step["bad"] for step in second["steps"])
    first, second = run_ranks(read_batches, 2, str(data), {"tp": 2}, "crash")
    assert first["error"].startswith("RuntimeError: sample")
    assert second["error"] == f"ReaderFailed: rank 0, which reads the data for this rank, failed: {first['error']}"
