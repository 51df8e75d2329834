"""The sources of a run, opened: what the planner asks of them, and how one sample is read.

Both kinds answer the same questions by sample number: how long, how many tiles, what tensors. A sample that cannot be read raises
`SampleError`; nothing else is caught here.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol, overload
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from dsvl_train.config.schema import DataConfig
from dsvl_train.data.bad_samples import BadSample
from dsvl_train.data.batch import IGNORE_INDEX, Modality
from dsvl_train.data.errors import SampleError
from dsvl_train.data.index import ShardIndex, SkippedSample
from dsvl_train.data.index_build import open_index
from dsvl_train.data.order import Ints
from dsvl_train.data.processes import usable_cores
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
    skipped: Sequence[SkippedSample]
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

    def name_of(self, sample: int) -> tuple[str, str]:
        """(shard, key): the same for the same sample in every run."""
        ...

    def close(self) -> None: ...

    def totals(self) -> tuple[int, int, int]:
        """(samples, tokens, tiles) of an epoch."""
        ...


class ShardSource:
    """Samples in webdataset shards. A sample number counts the samples of the index that plans may hold."""

    kind = "shards"

    def __init__(
        self,
        name: str,
        modality: Modality,
        index: ShardIndex,
        processor: Processor,
        reader: ShardReader,
        seq_len: int,
        max_tiles: int | None = None,
    ) -> None:
        """Samples over `seq_len` tokens or `max_tiles` tiles, and samples with images in a text source, are skipped and listed."""
        self.name, self.modality, self.seq_len, self.max_tiles = name, modality, seq_len, max_tiles
        self.index, self.processor, self.reader = index, processor, reader
        self.damaged_shards = [
            f"{damage.shard}: damaged at byte {damage.offset} ({damage.reason}), in {damage.places} places; {damage.samples} samples found"
            for damage in index.damaged
        ]
        self.shards = len(index.shards)
        # The few that are left out are kept, not the many that are not: an index may hold more samples than memory holds numbers.
        self._unfit = index.unfit(seq_len, images=modality != "text", max_tiles=max_tiles)
        self._usable_before = self._unfit - np.arange(len(self._unfit))
        self.skipped: Sequence[SkippedSample] = _Skipped(self)
        unfit_s = np.bincount(index.shard_n[self._unfit], minlength=self.shards)
        self.shard_sizes: Ints = (np.diff(index.first_sample_s) - unfit_s).astype(np.int64)

    def number(self, samples: Ints) -> Ints:
        """Numbers in the index."""
        return samples + np.searchsorted(self._usable_before, samples, side="right")

    def lengths(self, samples: Ints) -> Ints:
        return self.index.tokens_n[self.number(samples)].astype(np.int64)

    def tiles(self, samples: Ints) -> Ints:
        return self.index.tiles_n[self.number(samples)].astype(np.int64)

    def identity(self) -> str:
        return f"shards-{self.totals()[0]}-{self.index.digest}-{crc32(self._unfit.tobytes()):08x}"

    def read(self, sample: int) -> SampleArrays:
        text, images = self.index.read(self._number(sample), self.reader)
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
        return self.index.where(self._number(sample))

    def name_of(self, sample: int) -> tuple[str, str]:
        number = self._number(sample)
        return self.index.shard(number), self.index.key(number)

    def close(self) -> None:
        self.reader.close()

    def totals(self) -> tuple[int, int, int]:
        index, unfit = self.index, self._unfit
        left_out = int(index.tokens_n[unfit].sum(dtype=np.int64)), int(index.tiles_n[unfit].sum(dtype=np.int64))
        return len(index) - len(unfit), index.tokens - left_out[0], index.tiles - left_out[1]

    def _number(self, sample: int) -> int:
        return int(self.number(np.asarray([sample], dtype=np.int64))[0])


class _Skipped(Sequence[SkippedSample]):
    """What a source leaves out: the index's list, then the samples that this source cannot use; made one by one."""

    def __init__(self, source: ShardSource) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source.index.skipped) + len(self._source._unfit)

    @overload
    def __getitem__(self, place: int) -> SkippedSample: ...
    @overload
    def __getitem__(self, place: slice) -> list[SkippedSample]: ...
    def __getitem__(self, place: int | slice) -> SkippedSample | list[SkippedSample]:
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        source, index = self._source, self._source.index
        place %= len(self)
        if place < len(index.skipped):
            return index.skipped[place]
        sample = int(source._unfit[place - len(index.skipped)])
        tokens = int(index.tokens_n[sample])
        if tokens > source.seq_len:
            kind, reason = "too_long", f"{tokens} tokens; data.seq_len={source.seq_len}"
        elif source.modality != "text":
            kind, reason = "too_many_tiles", f"{int(index.tiles_n[sample])} tiles; data.max_tiles_per_sequence={source.max_tiles}"
        else:
            kind, reason = "image_in_text", f"it has images, but data.sources.{source.name}.modality is text"
        return SkippedSample(kind, index.shard(sample), index.key(sample), reason)


class TextSource:
    """Pieces of tokenised documents."""

    kind = "text"
    modality: Modality = "text"

    def __init__(self, name: str, corpus: TextCorpus, vocab_size: int) -> None:
        self.name, self.corpus, self.vocab_size = name, corpus, vocab_size
        self.skipped: Sequence[SkippedSample] = []
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

    def name_of(self, sample: int) -> tuple[str, str]:
        return f"{self.corpus.prefix}.bin", self.where(sample)

    def close(self) -> None:
        """Nothing to close: the corpus is memory-mapped."""

    def totals(self) -> tuple[int, int, int]:
        return len(self.corpus), self.corpus.piece_tokens, 0


def read_as_planned(source: Source, sample: int, tokens: int, tiles: int) -> SampleArrays | BadSample:
    """A sample, or why it cannot be used: read and decoded, and as long as the index says."""
    try:
        arrays = source.read(sample)
        if (len(arrays.tokens_t), arrays.tiles) != (tokens, tiles):
            found = f"{len(arrays.tokens_t)} tokens and {arrays.tiles} tiles"
            raise SampleError("plan_mismatch", f"{found}; the index says {tokens} and {tiles}")
    except SampleError as error:
        return BadSample(error.kind, source.name, *source.name_of(sample), str(error))
    return arrays


def open_sources(cfg: DataConfig, processor: Processor, *, build_index: bool = True, rebuild: bool = False) -> list[Source]:
    """Open every source of a configuration, in its order, however much of it is bad (`check_health`).

    Args:
        build_index: make missing indexes.
        rebuild: make stale ones too, instead of refusing them.

    Raises:
        FileNotFoundError: a folder, shard, corpus or index is missing; names the setting.
        ValueError: a corpus or an index that cannot be used.
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
                command=index_command(cfg, source.path),
                build=build_index,
                rebuild=rebuild,
                workers=usable_cores(),
                index_dir=cfg.index_dir,
                remote=remote,
            )
            sources.append(ShardSource(name, source.modality, index, processor, reader, cfg.seq_len, cfg.max_tiles_per_sequence))
    return sources


INDEX_SETTINGS = ("mask_prompt", "tile_selection", "max_tiles", "tiling_image_limit", "max_image_pixels")
"""Settings of `data` that decide what an index says, besides data.processor; `dsvl data index` has an option for each."""


def index_command(cfg: DataConfig, pattern: str) -> str:
    """The command that makes the index which a run with these settings asks for; for a shell."""
    defaults = {one.name: one.default for one in fields(DataConfig)}
    words = ["dsvl", "data", "index", pattern, "--processor", cfg.processor]
    for name in (*INDEX_SETTINGS, "index_dir"):
        value = getattr(cfg, name)
        if value != defaults[name]:
            words += [f"--{name.replace('_', '-')}", str(value).lower() if isinstance(value, bool) else str(value)]
    return shlex.join(words)


def check_health(sources: Sequence[Source], cfg: DataConfig) -> None:
    """Raise ValueError for a source of which more than data.max_bad_fraction cannot be used."""
    for source in sources:
        _check_health(source, f"data.sources.{source.name}.path", cfg.sources[source.name].path, cfg.max_bad_fraction)


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
    kinds = Counter(entry.kind for entry in skipped)
    return ", ".join(f"{kind} {kinds[kind]}" for kind in sorted(kinds))


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
