"""The sources of a run, opened: what the planner asks of them, and how one sample is read.

Both kinds answer the same questions by sample number: how long, how many tiles, what tensors. A sample that cannot be read raises
`SampleError`; nothing else is caught here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from dsvl_train.config.schema import DataConfig
from dsvl_train.data.batch import IGNORE_INDEX, Modality
from dsvl_train.data.errors import SampleError
from dsvl_train.data.index import ShardIndex, SkippedSample, open_index
from dsvl_train.data.order import Ints
from dsvl_train.data.processor import Processor
from dsvl_train.data.sample import parse_sample
from dsvl_train.data.shards import ShardReader
from dsvl_train.data.storage import open_remote_files
from dsvl_train.data.text_corpus import TextCorpus

_CHUNK_DOCUMENTS = 4096
"""Documents of a text corpus that stay together in the shuffle, as the samples of a shard do."""


@dataclass(frozen=True)
class SampleArrays:
    """One sample, ready to be laid into a micro-batch."""

    tokens_t: NDArray[np.int64]
    labels_t: NDArray[np.int64]
    """Not shifted: the token itself, or IGNORE_INDEX."""
    image_mask_t: NDArray[np.bool_]
    tiles_wh: NDArray[np.int64] | None
    """[i, 2]; None without images."""
    pixels_nchw: NDArray[np.uint8] | None
    """None without images."""

    @property
    def tiles(self) -> int:
        return 0 if self.pixels_nchw is None else len(self.pixels_nchw)


@dataclass(frozen=True)
class SourceSummary:
    """What a source holds, for logs."""

    name: str
    kind: str
    modality: Modality
    weight: float
    """Share of the samples of its modality."""
    samples: int
    tokens: int
    tiles: int
    skipped: int
    """Samples that no plan holds."""
    damaged_shards: int


class Source(Protocol):
    """A source of samples by number."""

    name: str
    modality: Modality
    kind: str
    shard_sizes: Ints
    skipped: list[SkippedSample]
    damaged_shards: list[str]
    """One line for each."""
    shards: int

    def lengths(self, samples: Ints) -> Ints: ...

    def tiles(self, samples: Ints) -> Ints: ...

    def identity(self) -> str: ...

    def read(self, sample: int) -> SampleArrays:
        """Raises SampleError. From any thread."""
        ...

    def where(self, sample: int) -> str:
        """A name for logs."""
        ...

    def close(self) -> None: ...

    def totals(self) -> tuple[int, int, int]:
        """(samples, tokens, tiles) of an epoch."""
        ...


class ShardSource:
    """Samples in webdataset shards."""

    kind = "shards"

    def __init__(self, name: str, modality: Modality, index: ShardIndex, processor: Processor, reader: ShardReader, seq_len: int) -> None:
        """Samples that no sequence can hold, and samples with images in a text source, are skipped and listed."""
        self.name, self.modality = name, modality
        self.index, self.processor, self.reader = index, processor, reader
        self.skipped = list(index.skipped)
        self.damaged_shards = [
            f"{damage.shard}: damaged at byte {damage.offset} ({damage.reason}); {damage.samples} samples before it can be read"
            for damage in index.damaged
        ]
        self.shards = len(index.shards)
        too_long = index.tokens_n > seq_len
        image_in_text = (index.images_n > 0) & (modality == "text")
        for sample in np.flatnonzero(too_long | image_in_text).tolist():
            if too_long[sample]:
                self._skip(sample, "too_long", f"{int(index.tokens_n[sample])} tokens; data.seq_len={seq_len}")
            else:
                self._skip(sample, "image_in_text", f"it has images, but data.sources.{name}.modality is text")
        self.usable = np.flatnonzero(~(too_long | image_in_text)).astype(np.int64)
        """Numbers in the index of the samples that plans may hold; a sample number is a place in this list."""
        self.shard_sizes = np.bincount(index.shard_n[self.usable], minlength=len(index.shards)).astype(np.int64)

    def lengths(self, samples: Ints) -> Ints:
        return self.index.tokens_n[self.usable[samples]].astype(np.int64)

    def tiles(self, samples: Ints) -> Ints:
        return self.index.tiles_n[self.usable[samples]].astype(np.int64)

    def identity(self) -> str:
        where = crc32(self.index.offset_m.tobytes(), crc32(self.usable.tobytes()))
        return f"shards-{len(self.usable)}-{crc32(self.index.tokens_n.tobytes()):08x}-{crc32(self.index.crc_n.tobytes()):08x}-{where:08x}"

    def read(self, sample: int) -> SampleArrays:
        text, images = self.index.read(int(self.usable[sample]), self.reader)
        encoded = self.processor.encode(parse_sample(text).messages, images)
        has_images = encoded.image_count > 0
        return SampleArrays(
            tokens_t=encoded.input_ids.numpy(),
            labels_t=encoded.labels.numpy(),
            image_mask_t=encoded.image_mask.numpy(),
            tiles_wh=encoded.tiles_wh.numpy() if has_images else None,
            pixels_nchw=encoded.pixels.numpy() if has_images else None,
        )

    def where(self, sample: int) -> str:
        return self.index.where(int(self.usable[sample]))

    def close(self) -> None:
        self.reader.close()

    def totals(self) -> tuple[int, int, int]:
        tokens, tiles = self.index.tokens_n[self.usable], self.index.tiles_n[self.usable]
        return len(self.usable), int(tokens.sum(dtype=np.int64)), int(tiles.sum(dtype=np.int64))

    def _skip(self, sample: int, kind: str, reason: str) -> None:
        shard = self.index.shards[int(self.index.shard_n[sample])]
        self.skipped.append(SkippedSample(kind, shard, "@" + self.index.where(sample).rpartition("@")[2], reason))


class TextSource:
    """Pieces of tokenised documents."""

    kind = "text"
    modality: Modality = "text"

    def __init__(self, name: str, corpus: TextCorpus, vocab_size: int) -> None:
        self.name, self.corpus, self.vocab_size = name, corpus, vocab_size
        self.skipped: list[SkippedSample] = []
        self.damaged_shards: list[str] = []
        self.shards = 1
        self.shard_sizes = corpus.pieces_per_chunk(_CHUNK_DOCUMENTS)

    def lengths(self, samples: Ints) -> Ints:
        return self.corpus.locate(samples)[2]

    def tiles(self, samples: Ints) -> Ints:
        return np.zeros(len(samples), dtype=np.int64)

    def identity(self) -> str:
        return self.corpus.identity()

    def read(self, sample: int) -> SampleArrays:
        tokens_t = self.corpus.read(sample)
        if int(tokens_t.min()) < 0 or int(tokens_t.max()) >= self.vocab_size:
            highest = self.vocab_size - 1
            raise SampleError("unreadable", f"ids {int(tokens_t.min())} to {int(tokens_t.max())}; the tokenizer has 0 to {highest}")
        labels_t = tokens_t.copy()
        labels_t[0] = IGNORE_INDEX
        return SampleArrays(tokens_t, labels_t, np.zeros(len(tokens_t), dtype=bool), None, None)

    def where(self, sample: int) -> str:
        document, start, _ = (int(value[0]) for value in self.corpus.locate(np.asarray([sample], dtype=np.int64)))
        return f"document {document}, token {start}"

    def close(self) -> None:
        """Nothing to close: the corpus is memory-mapped."""

    def totals(self) -> tuple[int, int, int]:
        return len(self.corpus), self.corpus.piece_tokens, 0


def open_sources(cfg: DataConfig, processor: Processor, *, build_index: bool = True) -> list[Source]:
    """Open every source of a configuration, in its order.

    Raises:
        FileNotFoundError: a folder, shard, corpus or index is missing; names the setting.
        ValueError: a corpus that cannot be used, or too much of a source is bad for `data.max_bad_fraction`.
    """
    remote = open_remote_files(cfg.cache_dir, cfg.cache_gb, cfg.read_retries)
    reader = ShardReader(remote=remote, skip_unreachable=cfg.unreachable == "skip")
    sources: list[Source] = []
    for name, source in cfg.sources.items():
        setting = f"data.sources.{name}.path"
        if source.kind == "text":
            if source.modality != "text":
                raise ValueError(f"data.sources.{name}.modality={source.modality}: a source of kind text has no images; set it to text")
            corpus = TextCorpus(source.path, cfg.seq_len, processor.tokenizer, setting)
            sources.append(TextSource(name, corpus, processor.tokenizer.vocab_size))
        else:
            index = open_index(
                source.path,
                processor,
                setting=setting,
                processor_folder=cfg.processor,
                build=build_index,
                workers=max(cfg.workers, 1),
                index_dir=cfg.index_dir,
                remote=remote,
            )
            sources.append(ShardSource(name, source.modality, index, processor, reader, cfg.seq_len))
        _check_health(sources[-1], setting, source.path, cfg.max_bad_fraction)
    return sources


def _check_health(source: Source, setting: str, path: str, max_bad_fraction: float) -> None:
    """Refuse a source of which too much is bad: damaged shards by number of shards, samples by number of samples (more than 10)."""
    damaged = source.damaged_shards
    if len(damaged) > max_bad_fraction * source.shards:
        more = f" (and {len(damaged) - 3} more)" if len(damaged) > 3 else ""
        raise ValueError(
            f"{setting}={path}: {len(damaged)} of {source.shards} shards are damaged: {'; '.join(damaged[:3])}{more}. Write them again or "
            f"remove them; to train on what can be read, set data.max_bad_fraction (now {max_bad_fraction}) higher"
        )
    samples = source.totals()[0]
    skipped = len(source.skipped)
    if skipped > 10 and skipped > max_bad_fraction * (samples + skipped):
        raise ValueError(
            f"{setting}={path}: {skipped} of {samples + skipped} samples cannot be used ({_kinds(source.skipped)}), for instance "
            f"{source.skipped[0].shard} {source.skipped[0].key}: {source.skipped[0].reason}. Correct the data, or set "
            f"data.max_bad_fraction (now {max_bad_fraction}) higher"
        )


def _kinds(skipped: Sequence[SkippedSample]) -> str:
    kinds = [entry.kind for entry in skipped]
    return ", ".join(f"{kind} {kinds.count(kind)}" for kind in sorted(set(kinds)))


def summarise(sources: Sequence[Source], weights: dict[str, float]) -> list[SourceSummary]:
    """What each source holds; `weights` are the normalised shares."""
    return [
        SourceSummary(
            source.name,
            source.kind,
            source.modality,
            weights.get(source.name, 0.0),
            *source.totals(),
            skipped=len(source.skipped),
            damaged_shards=len(source.damaged_shards),
        )
        for source in sources
    ]


def describe_sources(summaries: Sequence[SourceSummary]) -> str:
    """One line per source for the log at start."""
    lines = []
    for summary in summaries:
        bad = f", {summary.skipped} skipped" if summary.skipped else ""
        bad += f", {summary.damaged_shards} damaged shards" if summary.damaged_shards else ""
        lines.append(
            f"{summary.name}: {summary.modality}, weight {summary.weight:.3g}, {summary.samples:,} samples, {summary.tokens:,} tokens, "
            f"{summary.tiles:,} tiles{bad}"
        )
    return "\n".join(lines)
