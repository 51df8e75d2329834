"""The loader: carries out the plan.

    planner -> global batch -> this rank's micro-batches -> threads read, decode, tile -> micro-batches in their planned order
                                                            (one rank of several peers reads, and hands over: `sharing.py`)

What is planned never depends on what is read: a sample that fails leaves masked padding of its planned length, so the plan holds on every
rank. Threads only decide when a micro-batch is ready, never what is in it. They suffice: decoding and resizing leave Python's lock alone.
A step's samples are read in the order in which they lie in their shards.

Memory: the tiles of the step in use, those prepared ahead (below data.prefetch_gb before the last step was begun; at least one step),
twice those of one micro-batch per thread while it is laid out, and the decoded image per thread (data.max_image_pixels at most).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dsvl_train.config.schema import DataConfig
from dsvl_train.data.assemble import lay_out, placeholder
from dsvl_train.data.bad_samples import BadSample
from dsvl_train.data.batch import MicroBatch, Modality, StepBatch
from dsvl_train.data.cursor import Cursor
from dsvl_train.data.mixing import text_share_schedule
from dsvl_train.data.plan import GlobalBatchPlan, Pack, Planner, RankShare, SampleRef, assign, check_divides
from dsvl_train.data.processor import Processor
from dsvl_train.data.sharing import Sharing, receive, send, send_failure
from dsvl_train.data.sources import (
    SampleArrays,
    Source,
    SourceSummary,
    check_health,
    describe_sources,
    open_sources,
    read_as_planned,
    summarise,
)
from dsvl_train.data.workers import WorkerPool

log = logging.getLogger(__name__)


class DataStalled(RuntimeError):
    """A batch was not ready within data.stall_s: storage hangs, or a sample takes for ever."""


@dataclass
class _Pending:
    """A step whose micro-batches are being made."""

    plan: GlobalBatchPlan
    after: Cursor
    shares: list[RankShare]
    micro_batches: list[Future[tuple[MicroBatch, list[BadSample]]]]
    """Empty on a rank that does not read."""
    pixel_bytes: int
    """Of this rank's tiles."""


Read = tuple[SampleRef, Callable[[], None]]
"""A sample to read, and what reads it."""


class DataPipeline:
    """Global batches of a run, one rank's share of each; iterate to get `StepBatch`es of steps start + 1 to max_steps.

    Attributes:
        source_names: names of the sources, in the order of data.sources (`MicroBatch.source_s` counts in it).
        bad_samples: (step, sample) of this rank's share that were replaced by masked padding.
        processor: what encodes the samples.
    """

    def __init__(
        self,
        cfg: DataConfig,
        sources: Sequence[Source],
        processor: Processor,
        *,
        seed: int,
        max_steps: int,
        dp_rank: int,
        dp_size: int,
        sharing: Sharing | None = None,
        pin_memory: bool = False,
    ) -> None:
        check_divides(cfg.batch_size, cfg.micro_batch_size, dp_size)
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"dp_rank={dp_rank} of dp_size={dp_size}")
        self.cfg, self.processor, self.max_steps = cfg, processor, max_steps
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.source_names = [source.name for source in sources]
        self.bad_samples: list[tuple[int, BadSample]] = []
        self.planner = Planner(sources, cfg, seed)
        self._sources = list(sources)
        self._sharing, self._pin_memory = sharing, pin_memory
        self._reads = sharing is None or sharing.reads
        self._pool = WorkerPool(cfg.workers if self._reads else 0, "data")
        self._in_progress: dict[int, tuple[SampleRef, float]] = {}  # by thread: what it reads, and since when
        self._ahead = max(cfg.prefetch_steps, 1) if cfg.workers else 0
        self._pending: deque[_Pending] = deque()
        self._yielded = Cursor()
        self._planned = Cursor()
        self._closed = False

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        """The next step's micro-batches of this rank.

        Raises:
            DataStalled: not ready within data.stall_s.
            ReaderFailed: the rank that reads for this one failed.
        """
        if self._closed:
            raise RuntimeError("the data pipeline is closed")
        self._look_ahead(max(self._ahead, 1))
        if not self._pending:
            raise StopIteration
        step = self._pending.popleft()
        micro_batches, bad = self._receive(step)
        self._look_ahead(self._ahead)
        self._yielded = step.after
        self._account(step, bad)
        return StepBatch(
            step=step.plan.step,
            modality=step.plan.modality,
            micro_batches=micro_batches,
            text_share=step.plan.text_share,
            text_share_target=step.plan.text_share_target,
            text_ratio=step.plan.text_ratio,
            pack_fill=step.plan.fill,
            tiles_per_rank=[sum(pack.tiles for packs in share for pack in packs) for share in step.shares],
            bad=bad,
            first_seen=sum(sample.epoch == 0 for pack in step.plan.packs for sample in pack.samples),
            sample_names=partial(self._names, step.plan),
        )

    # ------------------------------------------------------------------------------------------------------------- state

    def state(self) -> dict[str, Any]:
        """The cursor after the last step that was handed out: JSON-able, small, the same on every rank and for every layout."""
        return self.planner.state(self._yielded)

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on after the step that `state` was taken at; what was read ahead is dropped.

        Raises:
            ValueError: the data or the settings behind the order changed (`Planner.restore`).
        """
        cursor = self.planner.restore(state)
        for step in self._pending:
            for future in step.micro_batches:
                future.cancel()
        self._pending.clear()
        self._yielded = self._planned = cursor

    def close(self) -> None:
        """Stop the threads. Nothing can be read afterwards."""
        self._closed = True
        self._pool.close()
        self._pending.clear()
        for source in self._sources:
            source.close()

    def __enter__(self) -> DataPipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def left_out(self) -> Iterator[BadSample]:
        """Samples that are in no plan, one by one: there may be many."""
        for source in self._sources:
            for skipped in source.skipped:
                yield BadSample(skipped.kind, source.name, skipped.shard, skipped.key, skipped.reason)

    def summaries(self) -> list[SourceSummary]:
        """What each source holds."""
        weights = {name: weight for of_modality in self.planner.weights.values() for name, weight in of_modality.items()}
        return summarise(self._sources, weights)

    # ------------------------------------------------------------------------------------------------------------- steps

    def _look_ahead(self, steps: int) -> None:
        """Plan and begin to read until `steps` steps are pending, or those pending hold data.prefetch_gb of tiles."""
        tile_bytes = 3 * self.processor.image_size**2
        limit = self.cfg.prefetch_gb * 1e9
        while len(self._pending) < steps and self._planned.step < self.max_steps:
            if self._pending and sum(step.pixel_bytes for step in self._pending) >= limit:
                return
            plan, self._planned = self.planner.plan(self._planned)
            shares = assign(plan.packs, self.dp_size, self.cfg.micro_batch_size)
            mine = shares[self.dp_rank]
            reads: list[Read] = []
            micro_batches = [self._begin(packs, plan.modality, reads) for packs in mine] if self._reads else []
            for _, read in sorted(reads, key=lambda entry: (entry[0].source, entry[0].index)):
                self._pool.submit(read)
            tiles = sum(pack.tiles for packs in mine for pack in packs)
            self._pending.append(_Pending(plan, self._planned, shares, micro_batches, tiles * tile_bytes))

    def _begin(self, packs: Sequence[Pack], modality: Modality, reads: list[Read]) -> Future[tuple[MicroBatch, list[BadSample]]]:
        """Add the samples of a micro-batch to `reads`; the thread that finishes the last one lays them out."""
        refs = [sample for pack in packs for sample in pack.samples]
        done: Future[tuple[MicroBatch, list[BadSample]]] = Future()
        results: list[SampleArrays | BadSample | None] = [None] * len(refs)
        left = len(refs)
        lock = threading.Lock()

        def read(place: int) -> None:
            nonlocal left
            if done.cancelled() or done.done():
                return
            thread = threading.get_ident()
            self._in_progress[thread] = (refs[place], time.monotonic())
            try:
                results[place] = self._read(refs[place])
                with lock:
                    left -= 1
                    last = left == 0
                if last:
                    done.set_result(self._lay_out(refs, results, modality))
            except BaseException as error:  # not swallowed: raised again in the training thread, with its traceback
                with lock:
                    if not done.done():
                        done.set_exception(error)
            finally:
                self._in_progress.pop(thread, None)

        reads += [(refs[place], partial(read, place)) for place in range(len(refs))]
        return done

    def _receive(self, step: _Pending) -> tuple[list[MicroBatch], list[BadSample]]:
        """The micro-batches of a step, and the samples that went bad: made here, or handed over by the rank that reads."""
        sharing = self._sharing
        if sharing is None:
            return self._wait(step)
        if not sharing.reads:
            micro_batches, notes = receive(sharing, pin_memory=self._pin_memory)
            return micro_batches, [BadSample(**note) for note in notes]
        try:
            micro_batches, bad = self._wait(step)
        except Exception as error:
            send_failure(error, sharing)
            raise
        send(micro_batches, [vars(entry) for entry in bad], sharing)
        return micro_batches, bad

    def _wait(self, step: _Pending) -> tuple[list[MicroBatch], list[BadSample]]:
        deadline = time.monotonic() + self.cfg.stall_s
        made = []
        for future in step.micro_batches:
            wait([future], timeout=max(deadline - time.monotonic(), 0.0))
            if not future.done():
                raise DataStalled(self._describe_stall(step.plan.step))
            made.append(future.result())
        return [micro_batch for micro_batch, _ in made], [entry for _, entries in made for entry in entries]

    def _describe_stall(self, step: int) -> str:
        now = time.monotonic()
        reading = [
            f"{self._sources[ref.source].name} {self._sources[ref.source].where(ref.index)} for {now - since:.0f} s"
            for ref, since in sorted(self._in_progress.copy().values(), key=lambda entry: entry[1])
        ]
        return (
            f"the data of step {step} were not ready within data.stall_s={self.cfg.stall_s:g} seconds; being read: "
            f"{', '.join(reading) or 'nothing'}. Check their storage; where it is only slow, raise data.workers or data.stall_s"
        )

    def _read(self, ref: SampleRef) -> SampleArrays | BadSample:
        """A sample as planned, or why not."""
        return read_as_planned(self._sources[ref.source], ref.index, ref.tokens, ref.tiles)

    def _lay_out(
        self, refs: Sequence[SampleRef], results: Sequence[SampleArrays | BadSample | None], modality: Modality
    ) -> tuple[MicroBatch, list[BadSample]]:
        samples, bad = [], []
        for ref, result in zip(refs, results, strict=True):
            assert result is not None
            if isinstance(result, BadSample):
                bad.append(result)
                samples.append(placeholder(ref.tokens, self.processor.tokenizer.pad_id))
            else:
                samples.append(result)
        is_bad = [isinstance(result, BadSample) for result in results]
        return lay_out(samples, is_bad, [ref.source for ref in refs], modality, self.processor.image_size, pin_memory=self._pin_memory), bad

    def _names(self, plan: GlobalBatchPlan) -> list[str]:
        refs = [sample for pack in plan.packs for sample in pack.samples]
        return [f"{self._sources[ref.source].name} {self._sources[ref.source].where(ref.index)}" for ref in refs]

    def _account(self, step: _Pending, bad: Sequence[BadSample]) -> None:
        """Name bad samples in the log."""
        for entry in bad:
            if self._reads:  # its peers know the same
                where = f"{entry.shard}:{entry.key}"
                log.warning("step %d: bad sample in %s, %s: %s: %s", step.plan.step, entry.source, where, entry.kind, entry.message)
            self.bad_samples.append((step.plan.step, entry))


def open_processor(cfg: DataConfig) -> Processor:
    """The processor that a configuration asks for.

    Raises:
        FileNotFoundError: its folder, or a file in it, is missing; names data.processor.
    """
    if not Path(cfg.processor).is_dir():
        raise FileNotFoundError(
            f"data.processor={cfg.processor}: the folder does not exist; it holds tokenizer.json and processor_config.json: prepare the "
            "data, or correct the setting"
        )
    return Processor.from_folder(
        cfg.processor,
        mask_prompt=cfg.mask_prompt,
        tile_selection=cfg.tile_selection,
        max_tiles=cfg.max_tiles,
        tiling_image_limit=cfg.tiling_image_limit,
        max_image_pixels=cfg.max_image_pixels,
        decode=cfg.decode,
    )


def build_data(
    cfg: DataConfig,
    *,
    seed: int,
    max_steps: int,
    dp_rank: int,
    dp_size: int,
    build_index: bool = True,
    sharing: Sharing | None = None,
    pin_memory: bool = False,
) -> DataPipeline:
    """Open everything that a configuration names, and lay out the run from step 1.

    Args:
        sharing: this rank's place among those that train on the same micro-batches; None = it is alone.
        pin_memory: hand pixels over in pinned memory, for a GPU.
        build_index: make missing indexes. True in one process only; the others call with False once that one is done.

    Raises:
        FileNotFoundError: processor, shards, corpus or index missing; names the setting and what to do.
        ValueError: settings or data that cannot work together.
    """
    text_share_schedule(cfg)
    check_divides(cfg.batch_size, cfg.micro_batch_size, dp_size)
    processor = open_processor(cfg)
    sources = open_sources(cfg, processor, build_index=build_index)
    check_health(sources, cfg)
    pipeline = DataPipeline(
        cfg,
        sources,
        processor,
        seed=seed,
        max_steps=max_steps,
        dp_rank=dp_rank,
        dp_size=dp_size,
        sharing=sharing,
        pin_memory=pin_memory,
    )
    if dp_rank == 0:
        log.info("data:\n%s", describe_sources(pipeline.summaries()))
    return pipeline
