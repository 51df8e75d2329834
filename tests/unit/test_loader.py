"""The loader: what it hands out is the plan, whatever reads it; bad samples leave masked padding; errors are clear and surface."""

from __future__ import annotations

import json
import os
import threading
import traceback
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsvl_train.config.schema import DataConfig
from dsvl_train.data.assemble import lay_out, shift_labels
from dsvl_train.data.batch import IGNORE_INDEX, MicroBatch, StepBatch
from dsvl_train.data.cursor import Cursor
from dsvl_train.data.loader import DataPipeline, DataStalled, build_data
from dsvl_train.data.processor import Processor
from dsvl_train.data.shards import ShardWriter
from dsvl_train.data.sources import ShardSource, describe_sources
from dsvl_train.data.workers import WorkerPool
from tests.unit.made_data import VL2_FOLDER, VL_FOLDER, config, picture, shards_source, text_source, write_corpus, write_mixture

STEPS = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards and a corpus for VL2, and an index of the shards."""
    root = tmp_path_factory.mktemp("data")
    write_mixture(root / "shards", 24, shards=3)
    write_corpus(root / "text", Processor.from_folder(VL2_FOLDER))
    build_data(mixture(root), seed=0, max_steps=1, dp_rank=0, dp_size=1).close()
    return root


def mixture(root: Path, **settings: Any) -> DataConfig:
    sources = {"pictures": shards_source(root / "shards"), "books": text_source(root / "text")}
    return config(sources, **{"text_ratio": 0.4, "text_warmup_steps": 4, "seq_len": 512, "batch_size": 4, "window": 8, **settings})


def build(cfg: DataConfig, dp_rank: int = 0, dp_size: int = 1, steps: int = STEPS, seed: int = 11) -> DataPipeline:
    return build_data(cfg, seed=seed, max_steps=steps, dp_rank=dp_rank, dp_size=dp_size)


def collect(cfg: DataConfig, dp_rank: int = 0, dp_size: int = 1, steps: int = STEPS) -> list[StepBatch]:
    with build(cfg, dp_rank, dp_size, steps) as pipeline:
        return list(pipeline)


def samples_of(micro_batches: Iterable[MicroBatch]) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """(source, tokens, labels) of every sample, sorted: what a global batch holds, however it is shared out."""
    found = []
    for batch in micro_batches:
        bounds = batch.cu_seqlens.tolist()
        for source, start, end in zip(batch.source_s.tolist(), bounds[:-1], bounds[1:], strict=True):
            found.append((source, tuple(batch.tokens_t[start:end].tolist()), tuple(batch.labels_t[start:end].tolist())))
    return sorted(found)


def assert_same(left: StepBatch, right: StepBatch) -> None:
    apart = {"micro_batches": 0, "sample_names": 0}
    assert {**vars(left), **apart} == {**vars(right), **apart}
    assert left.sample_names() == right.sample_names()
    for one, other in zip(left.micro_batches, right.micro_batches, strict=True):
        for name, value in vars(one).items():
            theirs = getattr(other, name)
            assert (value is None and theirs is None) or (value.dtype == theirs.dtype and torch.equal(value, theirs)), name


def test_a_batch_is_what_encoding_gives_end_to_end(data: Path) -> None:
    cfg = mixture(data, micro_batch_size=2)
    with build(cfg) as pipeline:
        source = pipeline._sources[0]
        assert isinstance(source, ShardSource)
        multimodal = next(step for step in pipeline if step.modality == "multimodal")
        plan = next(plan for plan in plans_of(pipeline) if plan.step == multimodal.step)
    assert len(multimodal.micro_batches) == 2
    encoded = {ref.index: source.read(ref.index) for pack in plan.packs for ref in pack.samples}
    expected = sorted((0, tuple(one.tokens_t.tolist()), tuple(shift_labels(one.labels_t).tolist())) for one in encoded.values())
    assert samples_of(multimodal.micro_batches) == expected
    for batch in multimodal.micro_batches:
        assert (batch.tokens_t.dtype, batch.cu_seqlens.dtype, batch.image_mask_t.dtype) == (torch.int64, torch.int32, torch.bool)
        assert batch.cu_seqlens[0] == 0
        assert batch.cu_seqlens[-1] == len(batch.tokens_t) == len(batch.labels_t) == len(batch.padding_t)
        assert batch.pixels_nchw is not None and batch.pixels_nchw.dtype == torch.uint8
        assert batch.tiles_wh is not None and batch.tiles == int((batch.tiles_wh.prod(dim=1) + 1).sum())
        assert torch.equal(batch.image_mask_t, batch.tokens_t == pipeline.processor.tokenizer.image_id)
        assert not batch.padding_t.any()
    assert multimodal.tiles_per_rank == [sum(batch.tiles for batch in multimodal.micro_batches)]


def plans_of(pipeline: DataPipeline) -> list[Any]:
    plans, cursor = [], Cursor()
    for _ in range(STEPS):
        plan, cursor = pipeline.planner.plan(cursor)
        plans.append(plan)
    return plans


def test_labels_are_shifted_within_samples_and_never_across(data: Path) -> None:
    for step in collect(mixture(data)):
        for batch in step.micro_batches:
            bounds = batch.cu_seqlens.tolist()
            for start, end in pairwise(bounds):
                assert batch.labels_t[end - 1] == IGNORE_INDEX
                supervised = batch.labels_t[start : end - 1] != IGNORE_INDEX
                assert torch.equal(batch.labels_t[start : end - 1][supervised], batch.tokens_t[start + 1 : end][supervised])
                if step.modality == "text":
                    assert supervised.all()


def test_text_steps_have_no_pixels_and_shares_follow_the_schedule(data: Path) -> None:
    steps = collect(mixture(data))
    assert [step.step for step in steps] == list(range(1, STEPS + 1))
    assert {step.modality for step in steps} == {"text", "multimodal"}
    for done, step in enumerate(steps, start=1):
        assert all((batch.pixels_nchw is None) == (step.modality == "text") for batch in step.micro_batches)
        assert step.text_share * done == sum(earlier.modality == "text" for earlier in steps[:done])
        assert abs(step.text_share - step.text_share_target) * done <= 1
        assert 0 < step.pack_fill <= 1
    assert [step.text_ratio for step in steps[:5]] == pytest.approx([1.0, 0.85, 0.7, 0.55, 0.4])


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(data: Path, workers: int) -> None:
    alone = collect(mixture(data, workers=0))
    for left, right in zip(alone, collect(mixture(data, workers=workers, prefetch_steps=3)), strict=True):
        assert_same(left, right)


@pytest.mark.parametrize("settings", [{}, {"packing": False}, {"micro_batch_size": 2}])
def test_every_dp_size_sees_the_same_global_batches(data: Path, settings: dict[str, Any]) -> None:
    whole = collect(mixture(data, **settings))
    for dp_size in (2, 4):
        if 4 % (dp_size * settings.get("micro_batch_size", 1)):
            continue
        ranks = [collect(mixture(data, **settings), rank, dp_size) for rank in range(dp_size)]
        for step, shares in zip(whole, zip(*ranks, strict=True), strict=True):
            assert len({len(share.micro_batches) for share in shares}) == 1
            assert samples_of(batch for share in shares for batch in share.micro_batches) == samples_of(step.micro_batches)
            assert [sum(batch.tiles for batch in share.micro_batches) for share in shares] == shares[0].tiles_per_rank


@settings(max_examples=6)
@given(stop=st.integers(0, STEPS), workers=st.sampled_from([0, 2]))
def test_a_state_resumes_after_the_last_step_that_was_handed_out(data: Path, stop: int, workers: int) -> None:
    whole = collect(mixture(data))
    with build(mixture(data, workers=workers)) as first:
        for _ in range(stop):
            next(first)
        state = json.loads(json.dumps(first.state()))
    with build(mixture(data, workers=workers)) as second:
        next(second)
        second.load_state(state)
        for expected, step in zip(whole[stop:], second, strict=True):
            assert_same(expected, step)
        with pytest.raises(StopIteration):
            next(second)


def test_vl_has_one_tile_and_no_grid_per_image(tmp_path: Path) -> None:
    write_mixture(tmp_path, 6)
    cfg = config({"m": shards_source(tmp_path)}, processor=str(VL_FOLDER), seq_len=2048, batch_size=2)
    for step in collect(cfg, steps=2):
        for batch in step.micro_batches:
            assert batch.tiles_wh is not None
            assert batch.tiles == len(batch.tiles_wh)
            assert not batch.tiles_wh.any()
            assert batch.image_mask_t.sum() == 576 * batch.tiles


# ------------------------------------------------------------------------------------------------------------- bad samples


def damage(root: Path, name: str, change: Callable[[bytes], bytes], first: int = 1) -> int:
    """Change images of an indexed shard in place, sizes and times kept, from the `first` sample with an image on; returns how many."""
    with build(mixture(root)) as pipeline:
        index = pipeline._sources[0].index  # type: ignore[attr-defined]
    shard = root / "shards" / name
    stat = shard.stat()
    raw = bytearray(shard.read_bytes())
    number = index.shards.index(name)
    changed = 0
    for sample in range(len(index)):
        members = range(int(index.first_member_n[sample]) + 1, int(index.first_member_n[sample + 1]))
        if index.shard_n[sample] != number or not members or sample < first:
            continue
        for member in members:
            start, size = int(index.offset_m[member]), int(index.size_m[member])
            raw[start : start + size] = change(bytes(raw[start : start + size])).ljust(size, b"\0")[:size]
        changed += 1
    shard.write_bytes(raw)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return changed


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda raw: b"", "changed"),
        (lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]), "changed"),
    ],
    ids=["empty", "one bit"],
)
def test_a_sample_that_went_bad_leaves_masked_padding_of_its_planned_length(tmp_path: Path, change: Any, kind: str) -> None:
    write_mixture(tmp_path / "shards", 12, shards=3)
    write_corpus(tmp_path / "text", Processor.from_folder(VL2_FOLDER))
    before = collect(mixture(tmp_path, workers=2))
    changed = damage(tmp_path, "shard-000001.tar", change)
    assert changed == 3
    with build(mixture(tmp_path, workers=2, max_bad_fraction=1.0)) as pipeline:
        after = list(pipeline)
    bad = 0
    for whole, step in zip(before, after, strict=True):
        for one, other in zip(whole.micro_batches, step.micro_batches, strict=True):
            assert torch.equal(one.cu_seqlens, other.cu_seqlens)
            bounds = other.cu_seqlens.tolist()
            for start, end in pairwise(bounds):
                if other.padding_t[start]:
                    bad += 1
                    assert other.padding_t[start:end].all()
                    assert other.tokens_t[start:end].eq(pipeline.processor.tokenizer.pad_id).all()
                    assert other.labels_t[start:end].eq(IGNORE_INDEX).all()
                    assert not other.image_mask_t[start:end].any()
                else:
                    assert torch.equal(one.tokens_t[start:end], other.tokens_t[start:end])
                    assert torch.equal(one.labels_t[start:end], other.labels_t[start:end])
                    assert not other.padding_t[start:end].any()
            assert other.tiles == int((other.tiles_wh.prod(dim=1) + 1).sum()) if other.tiles_wh is not None else True
        assert (whole.tiles_per_rank, whole.pack_fill) == (step.tiles_per_rank, step.pack_fill)
    assert bad == sum(step.bad_samples for step in after) == len(pipeline.bad_samples) > 0
    assert {entry.kind for _, entry in pipeline.bad_samples} == {kind}
    assert all((entry.source, entry.shard) == ("pictures", "shard-000001.tar") for _, entry in pipeline.bad_samples)
    assert {entry.key for _, entry in pipeline.bad_samples} <= {f"{number:09d}" for number in range(4, 8)}
    assert [step for step, _ in pipeline.bad_samples] == sorted(step for step, _ in pipeline.bad_samples)


def test_a_shard_that_is_cut_or_removed_during_the_run_is_padding(tmp_path: Path) -> None:
    write_mixture(tmp_path / "shards", 12, shards=3)
    cfg = config({"m": shards_source(tmp_path / "shards")}, seq_len=512, batch_size=2, window=8, max_bad_fraction=1.0)
    with build(cfg, steps=12) as pipeline:
        assert next(pipeline).bad_samples == 0
        os.truncate(tmp_path / "shards" / "shard-000000.tar", 1000)
        (tmp_path / "shards" / "shard-000002.tar").unlink()
        pipeline._sources[0].reader.close()  # type: ignore[attr-defined]
        list(pipeline)
    assert {entry.kind for _, entry in pipeline.bad_samples} == {"unreadable"}
    assert {entry.shard for _, entry in pipeline.bad_samples} == {"shard-000000.tar", "shard-000002.tar"}


@pytest.mark.parametrize(
    ("image", "kind"), [(picture(60, 50)[:-40], "image_broken"), (picture(60, 50, kind="JPEG")[:-200], "image_broken")], ids=["png", "jpeg"]
)
def test_an_image_that_only_decoding_shows_to_be_broken_is_padding(tmp_path: Path, image: bytes, kind: str) -> None:
    with ShardWriter(tmp_path) as writer:
        for number in range(8):
            writer.write([{"role": "document", "content": "<image>x"}], [("png", image if number == 3 else picture(60, 50))])
    with build(config({"m": shards_source(tmp_path)}, batch_size=2, window=8, packing=False), steps=8) as pipeline:
        steps = list(pipeline)
    assert {(entry.kind, entry.key) for _, entry in pipeline.bad_samples} == {(kind, "000000003")}
    assert len(pipeline.bad_samples) == 2 == sum(step.bad_samples for step in steps)
    assert sum(step.first_seen for step in steps) == 8
    assert [step.first_seen for step in steps[4:]] == [0] * 4


def test_what_the_index_left_out_is_named(tmp_path: Path) -> None:
    write_mixture(tmp_path / "shards", 30)
    cfg = config({"m": shards_source(tmp_path / "shards")}, seq_len=90, max_bad_fraction=1.0)
    with build(cfg) as pipeline:
        left_out = list(pipeline.left_out())
        assert {(entry.kind, entry.source) for entry in left_out} == {("too_long", "m")}
        assert pipeline.bad_samples == []
        skipped = len(left_out)
        assert skipped > 10
        (summary,) = pipeline.summaries()
        assert (summary.samples, summary.skipped) == (30 - skipped, skipped)
        assert f"m: multimodal, weight 1, {30 - skipped} samples" in describe_sources([summary])
    with pytest.raises(ValueError, match=rf"data\.sources\.m\.path=.* {skipped} of 30 samples cannot be used \(too_long {skipped}\)"):
        build(config({"m": shards_source(tmp_path / "shards")}, seq_len=90))


@pytest.mark.parametrize("how", ["cut", "garbage", "not a tar"])
def test_a_damaged_shard_stops_the_start_unless_it_is_allowed(tmp_path: Path, how: str) -> None:
    write_mixture(tmp_path, 12, shards=2)
    shard = tmp_path / "shard-000001.tar"
    raw = shard.read_bytes()
    shard.write_bytes(
        {"cut": raw[: len(raw) // 2 + 100], "garbage": raw[:2048] + b"?" * 4096 + raw[6144:], "not a tar": b"text" * 999}[how]
    )
    sources = {"m": shards_source(tmp_path)}
    with pytest.raises(ValueError, match=r"data\.sources\.m\.path=.*1 of 2 shards are damaged: shard-000001\.tar: damaged at byte"):
        build(config(sources))
    with build(config(sources, max_bad_fraction=0.6)) as pipeline:
        assert pipeline.summaries()[0].damaged_shards == 1
        assert next(pipeline).bad_samples == 0


# ------------------------------------------------------------------------------------------------------------------ errors


def test_missing_data_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.sources\.pictures\.path=.*does not exist"):
        build(config({"pictures": shards_source(tmp_path / "nowhere")}))
    with pytest.raises(FileNotFoundError, match=r"data\.sources\.books\.path=.*\.bin does not exist"):
        build(config({"books": text_source(tmp_path / "nowhere")}, text_ratio=1.0))
    with pytest.raises(FileNotFoundError, match=r"data\.processor=.*nowhere: the folder does not exist"):
        build(config({"m": shards_source(tmp_path)}, processor=str(tmp_path / "nowhere")))
    write_mixture(tmp_path, 2)
    with pytest.raises(FileNotFoundError, match="dsvl data index"):
        build_data(config({"m": shards_source(tmp_path)}), seed=0, max_steps=1, dp_rank=0, dp_size=1, build_index=False)


def test_impossible_settings_are_refused(data: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.batch_size=4 .*3 data-parallel ranks .*data\.micro_batch_size=1.*multiple of 3"):
        build(mixture(data), dp_size=3)
    with pytest.raises(ValueError, match=r"data\.text_ratio=0\.4"):
        build(config({"pictures": shards_source(data / "shards")}, text_ratio=0.4))


class Broken(RuntimeError):
    pass


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_our_own_surfaces_with_its_traceback(data: Path, workers: int) -> None:
    with build(mixture(data, workers=workers)) as pipeline:

        def fail(sample: int) -> Any:
            raise Broken(f"sample {sample}")

        pipeline._sources[1].read = fail  # type: ignore[method-assign]
        with pytest.raises(Broken) as caught:
            list(pipeline)
    assert "in fail" in "".join(traceback.format_exception(caught.value))


def test_closing_stops_the_threads(data: Path) -> None:
    before = threading.active_count()
    pipeline = build(mixture(data, workers=3))
    next(pipeline)
    assert threading.active_count() == before + 3
    assert all(thread.daemon for thread in threading.enumerate() if thread.name.startswith("data-"))
    pipeline.close()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="closed"):
        next(pipeline)


def test_no_more_is_read_ahead_than_allowed(data: Path) -> None:
    with build(mixture(data, workers=1, prefetch_steps=2), steps=50) as pipeline:
        for _ in range(5):
            step = next(pipeline)
            assert pipeline._planned.step <= step.step + 2


def test_reading_ahead_is_bounded_in_bytes_too(data: Path) -> None:
    tight = mixture(data, workers=1, prefetch_steps=8, prefetch_gb=1e-9, text_ratio=0.0, text_warmup_steps=0)
    with build(tight, steps=50) as pipeline:
        for _ in range(5):
            step = next(pipeline)
            assert pipeline._planned.step == step.step + 1
    for left, right in zip(collect(tight), collect(mixture(data, workers=0, text_ratio=0.0, text_warmup_steps=0)), strict=True):
        assert_same(left, right)


def test_a_sample_that_hangs_is_named(data: Path) -> None:
    gate = threading.Event()
    with build(mixture(data, workers=2, stall_s=0.3)) as pipeline:
        source = pipeline._sources[1]
        source.read = lambda sample: gate.wait()  # type: ignore[method-assign, assignment, return-value]
        with pytest.raises(DataStalled, match=r"the data of step 1 .*data\.stall_s=0\.3.* books document \d+, token \d+ for \d+ s"):
            list(pipeline)
        gate.set()


def test_a_task_that_tries_to_end_its_thread_ends_the_run(data: Path) -> None:
    def leave(sample: int) -> Any:
        raise SystemExit("enough")

    with build(mixture(data, workers=1, stall_s=5)) as pipeline:
        pipeline._sources[1].read = leave  # type: ignore[method-assign]
        with pytest.raises(SystemExit, match="enough"):
            list(pipeline)


def test_a_step_is_read_in_the_order_of_its_shards_with_one_read_per_sample(data: Path) -> None:
    cfg = mixture(data, text_ratio=0.0, text_warmup_steps=0)
    seen: list[tuple[str, int]] = []
    with build(cfg) as pipeline:
        source = pipeline._sources[0]
        assert isinstance(source, ShardSource)
        pread = source.reader._read_exactly

        def record(descriptor: int, path: str, offset: int, length: int) -> bytes:
            seen.append((path, offset))
            return pread(descriptor, path, offset, length)

        source.reader._read_exactly = record  # type: ignore[method-assign]
        samples = 0
        for _ in range(STEPS):
            seen.clear()
            step = next(pipeline)
            assert seen == sorted(seen)
            assert len(seen) == sum(len(batch.source_s) for batch in step.micro_batches)
            samples += len(seen)
    assert samples > source.reader.opens == 3, "each of the three shards is opened once"


def test_a_pool_cancels_what_nobody_began() -> None:
    gate, pool = threading.Event(), WorkerPool(1, "test")
    running = pool.submit(gate.wait)
    waiting = [pool.submit(lambda: 1) for _ in range(3)]
    gate.set()
    running.result()
    pool.close()
    assert all(future.done() for future in waiting)


def test_shifting_one_sample() -> None:
    labels = torch.tensor([IGNORE_INDEX, 5, IGNORE_INDEX, 7]).numpy()
    assert shift_labels(labels).tolist() == [5, IGNORE_INDEX, 7, IGNORE_INDEX]


def test_a_multimodal_batch_without_images_has_empty_pixels(data: Path) -> None:
    with build(mixture(data)) as pipeline:
        sample = pipeline._sources[1].read(0)
    batch = lay_out([sample], [False], [1], "multimodal", 42)
    assert batch.pixels_nchw is not None and batch.pixels_nchw.shape == (0, 3, 42, 42)
    assert batch.tiles_wh is not None and batch.tiles_wh.shape == (0, 2)
    assert batch.tiles == 0
