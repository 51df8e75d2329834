"""Text corpora: Megatron `.bin/.idx` of tokenised documents, written and read by megatron-core's own classes.

Beside `PREFIX.bin` and `PREFIX.idx` lies a card, `PREFIX.json`: the tokenizer's fingerprint, and how many documents, tokens and UTF-8 bytes
there are (bits per byte need the last). A corpus of another tokenizer is refused.

Every document is stored as `[bos] tokens [eos]`. Documents longer than a sequence are cut into pieces of `seq_len` tokens; a piece is a
sample. All its tokens are supervised except its first, which nothing predicts. A last piece of one token would have nothing to learn and is
left out.

megatron-core is imported late: it takes seconds.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dsvl_train.data.order import Ints

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

log = logging.getLogger(__name__)

_HEADER = b"MMIDIDX\x00\x00"
_COUNTS_END = 34
"""Bytes before the arrays of an .idx: header 9, version 8, type 1, sequences 8, documents 8."""


class CorpusTokenizer(Protocol):
    """What writing a corpus needs of a tokenizer."""

    bos_id: int
    eos_id: int
    vocab_size: int

    def encode(self, text: str) -> list[int]: ...

    @property
    def text_fingerprint(self) -> str: ...


def _indexed_dataset() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


class TextCorpusWriter:
    """Writes a corpus; its three files appear together, when the context manager ends without an exception."""

    def __init__(self, prefix: str | Path, tokenizer: CorpusTokenizer) -> None:
        self.prefix = str(prefix)
        self.tokenizer = tokenizer
        Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
        module = _indexed_dataset()
        self._builder = module.IndexedDatasetBuilder(self._unfinished(".bin"), dtype=module.DType.optimal_dtype(tokenizer.vocab_size))
        self.documents = self.tokens = self.bytes = 0

    def add(self, text: str) -> None:
        """Add a document: `[bos] tokens [eos]`."""
        ids = [self.tokenizer.bos_id, *self.tokenizer.encode(text), self.tokenizer.eos_id]
        self._builder.add_document(np.asarray(ids), [len(ids)])
        self.documents += 1
        self.tokens += len(ids)
        self.bytes += len(text.encode())

    def close(self) -> None:
        """Finish and publish.

        Raises:
            ValueError: no document was added.
        """
        if self.documents == 0:
            self.discard()
            raise ValueError(f"text corpus {self.prefix}: no document was added")
        self._builder.finalize(self._unfinished(".idx"))
        card = {
            "format": 1,
            "tokenizer": self.tokenizer.text_fingerprint,
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.bytes,
        }
        Path(self._unfinished(".json")).write_text(json.dumps(card, indent=1) + "\n")
        Path(self.prefix + ".json").unlink(missing_ok=True)
        for suffix in (".bin", ".idx", ".json"):
            os.replace(self._unfinished(suffix), self.prefix + suffix)

    def discard(self) -> None:
        """Remove what was written so far."""
        self._builder.data_file.close()
        for suffix in (".bin", ".idx", ".json"):
            Path(self._unfinished(suffix)).unlink(missing_ok=True)

    def __enter__(self) -> TextCorpusWriter:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if error_type is None:
            self.close()
        else:
            self.discard()

    def _unfinished(self, suffix: str) -> str:
        return f"{self.prefix}.unfinished{suffix}"


class TextCorpus:
    """A corpus as pieces of at most `seq_len` tokens."""

    def __init__(self, prefix: str | Path, seq_len: int, tokenizer: CorpusTokenizer, setting: str) -> None:
        """
        Args:
            setting: name of the setting that holds the prefix, for errors.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the files are damaged, hold nothing to learn from, or come from another tokenizer.
        """
        self.prefix, self.seq_len = str(prefix), seq_len
        if seq_len < 2:
            raise ValueError(f"data.seq_len={seq_len}: a sequence needs 2 tokens at least, to predict one")
        for suffix in (".bin", ".idx"):
            if not Path(self.prefix + suffix).is_file():
                raise FileNotFoundError(
                    f"{setting}={self.prefix}: {self.prefix + suffix} does not exist; the setting is the path of a Megatron .bin/.idx pair "
                    "without its ending: write the corpus there, or correct the setting"
                )
        self.card = self._read_card(tokenizer, setting)
        self._check_files(setting)
        self._dataset: IndexedDataset = _indexed_dataset().IndexedDataset(self.prefix)
        lengths = np.asarray(self._dataset.sequence_lengths, dtype=np.int64)
        self._check_bounds(lengths, setting)
        self.documents = len(lengths)
        self.tokens = int(lengths.sum())
        # A remainder of one token makes no piece: (length + seq_len - 2) // seq_len = ceil((length - 1) / seq_len).
        self._first_piece = np.concatenate([[0], np.cumsum((lengths + seq_len - 2) // seq_len)]).astype(np.int64)
        self._lengths = lengths
        self.piece_tokens = self.tokens - int((lengths % seq_len == 1).sum())
        """Tokens of all pieces: those of the documents less the remainders of one token."""
        if len(self) == 0:
            raise ValueError(f"{setting}={self.prefix}: no document of 2 tokens or more")

    def __len__(self) -> int:
        """Pieces."""
        return int(self._first_piece[-1])

    def locate(self, pieces: Ints) -> tuple[Ints, Ints, Ints]:
        """(document, first token, tokens) of pieces."""
        documents = np.searchsorted(self._first_piece, pieces, side="right") - 1
        starts = (pieces - self._first_piece[documents]) * self.seq_len
        return documents, starts, np.minimum(self._lengths[documents] - starts, self.seq_len)

    def pieces_per_chunk(self, documents: int) -> Ints:
        """Pieces in each run of that many documents: what shards are to a source of shards."""
        return np.diff(self._first_piece[np.append(np.arange(0, self.documents, documents), self.documents)])

    def read(self, piece: int) -> NDArray[np.int64]:
        """Tokens of a piece. From any thread."""
        document, start, length = (int(value[0]) for value in self.locate(np.asarray([piece], dtype=np.int64)))
        return np.asarray(self._dataset.get(document, offset=start, length=length), dtype=np.int64)

    def identity(self) -> str:
        """Changes when piece numbers would mean other tokens."""
        return f"text-{self.documents}-{self.tokens}-{self.seq_len}-{zlib.crc32(self._lengths.astype('<i8').tobytes()):08x}"

    def _read_card(self, tokenizer: CorpusTokenizer, setting: str) -> dict[str, Any]:
        path = Path(self.prefix + ".json")
        if not path.is_file():
            log.warning(
                "%s=%s: no %s beside it, so nothing says which tokenizer made it; its ids are taken as the processor's",
                setting,
                self.prefix,
                path,
            )
            return {}
        try:
            card = json.loads(path.read_text())
            theirs = card["tokenizer"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{setting}={self.prefix}: {path} is not a corpus card: {error!r}; write the corpus again") from error
        if theirs != tokenizer.text_fingerprint:
            raise ValueError(
                f"{setting}={self.prefix} was written with another tokenizer ({theirs[:12]}…) than data.processor's "
                f"({tokenizer.text_fingerprint[:12]}…): its ids mean other words. Write the corpus again with this tokenizer, or set "
                "data.processor to the one that wrote it"
            )
        return card

    def _check_files(self, setting: str) -> None:
        """What megatron-core would answer with an AssertionError, or not notice."""
        idx = Path(self.prefix + ".idx")
        with idx.open("rb") as stream:
            head = stream.read(_COUNTS_END)
        sequences, documents = (int.from_bytes(head[at : at + 8], "little") for at in (18, 26))
        whole = len(head) == _COUNTS_END and head.startswith(_HEADER) and head[9:17] == (1).to_bytes(8, "little") and 1 <= head[17] <= 8
        if not whole or idx.stat().st_size < _COUNTS_END + sequences * 12 + documents * 8:
            raise ValueError(f"{setting}={self.prefix}: {idx} is not a whole Megatron index; write the corpus again")
        if sequences == 0 or Path(self.prefix + ".bin").stat().st_size == 0:
            raise ValueError(f"{setting}={self.prefix}: the corpus is empty; write it again")

    def _check_bounds(self, lengths: Ints, setting: str) -> None:
        ends = np.asarray(self._dataset.index.sequence_pointers, dtype=np.int64) + lengths * self._dataset.index.dtype_size
        size = Path(self.prefix + ".bin").stat().st_size
        if len(lengths) and (int(ends.max()) > size or int(lengths.min()) < 0 or int(self._dataset.index.sequence_pointers.min()) < 0):
            raise ValueError(
                f"{setting}={self.prefix}: {self.prefix}.bin has {size} bytes; its index speaks of {int(ends.max())}: "
                "write the corpus again"
            )


def write_text_corpus(prefix: str | Path, texts: Sequence[str], tokenizer: CorpusTokenizer) -> dict[str, Any]:
    """Write a corpus of texts, one document each; returns its card."""
    with TextCorpusWriter(prefix, tokenizer) as writer:
        for text in texts:
            writer.add(text)
    return json.loads(Path(f"{prefix}.json").read_text())
