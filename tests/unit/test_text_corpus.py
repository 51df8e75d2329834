"""Text corpora: written and read by megatron-core, cut into pieces, refused when they belong to another tokenizer or are damaged."""

from __future__ import annotations

import json
import logging
import os
import pickletools
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsvl_train.data.batch import IGNORE_INDEX
from dsvl_train.data.processor import Processor
from dsvl_train.data.sources import TextSource
from dsvl_train.data.text_corpus import TextCorpus, TextCorpusWriter, write_text_corpus
from tests.unit.made_data import VL2_FOLDER

SETTING = "data.sources.t.path"
TEXTS = ["", "A tile.", "Grüße, 世界! " * 40, "pack " * 100]


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_folder(VL2_FOLDER)


@pytest.fixture(scope="module")
def prefix(processor: Processor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "deep" / "text"
    write_text_corpus(path, TEXTS, processor.tokenizer)
    return path


def stored(processor: Processor, text: str) -> list[int]:
    tokenizer = processor.tokenizer
    return [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]


@pytest.mark.parametrize("seq_len", [2, 7, 64, 10_000])
def test_pieces_hold_every_document_in_order(processor: Processor, prefix: Path, seq_len: int) -> None:
    corpus = TextCorpus(prefix, seq_len, processor.tokenizer, SETTING)
    pieces = [corpus.read(piece).tolist() for piece in range(len(corpus))]
    expected = [stored(processor, text) for text in TEXTS]
    cut = [document[start : start + seq_len] for document in expected for start in range(0, len(document), seq_len)]
    assert pieces == [piece for piece in cut if len(piece) > 1]
    documents, starts, lengths = corpus.locate(np.arange(len(corpus)))
    assert lengths.tolist() == [len(piece) for piece in pieces]
    assert [expected[document][start] for document, start in zip(documents, starts, strict=True)] == [piece[0] for piece in pieces]
    assert corpus.piece_tokens == sum(map(len, pieces))
    assert corpus.pieces_per_chunk(3).sum() == len(corpus)


def test_the_card_says_what_is_in_it(processor: Processor, prefix: Path) -> None:
    card = json.loads(Path(f"{prefix}.json").read_text())
    assert card == {
        "format": 1,
        "tokenizer": processor.tokenizer.text_fingerprint,
        "documents": 4,
        "tokens": sum(len(stored(processor, text)) for text in TEXTS),
        "bytes": sum(len(text.encode()) for text in TEXTS),
    }


def test_all_but_the_first_token_of_a_piece_is_supervised(processor: Processor, prefix: Path) -> None:
    corpus = TextCorpus(prefix, 16, processor.tokenizer, SETTING)
    source = TextSource("t", corpus, processor.tokenizer.vocab_size)
    sample = source.read(2)
    assert sample.labels_t[0] == IGNORE_INDEX
    assert sample.labels_t[1:].tolist() == sample.tokens_t[1:].tolist()
    assert not sample.image_mask_t.any()
    assert (sample.tiles_wh, sample.pixels_nchw) == (None, None)


def test_megatron_reads_what_was_written_and_nothing_is_pickled(processor: Processor, prefix: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    assert [document.tolist() for document in dataset] == [stored(processor, text) for text in TEXTS]
    for suffix in (".idx", ".bin"):
        with pytest.raises(ValueError), Path(f"{prefix}{suffix}").open("rb") as stream:
            list(pickletools.genops(stream))


def test_a_corpus_of_another_tokenizer_is_refused(processor: Processor, prefix: Path, tmp_path: Path) -> None:
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(f"{prefix}{suffix}", tmp_path / f"t{suffix}")
    card = tmp_path / "t.json"
    card.write_text(card.read_text().replace(processor.tokenizer.text_fingerprint, "0" * 64))
    with pytest.raises(ValueError, match=r"data\.sources\.t\.path=.* another tokenizer \(000000000000…\)[\s\S]*data\.processor"):
        TextCorpus(tmp_path / "t", 16, processor.tokenizer, SETTING)
    card.write_text("{}")
    with pytest.raises(ValueError, match="not a corpus card"):
        TextCorpus(tmp_path / "t", 16, processor.tokenizer, SETTING)


def test_a_corpus_without_a_card_is_taken_with_a_warning(
    processor: Processor, prefix: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{prefix}{suffix}", tmp_path / f"t{suffix}")
    with caplog.at_level(logging.WARNING):
        assert len(TextCorpus(tmp_path / "t", 64, processor.tokenizer, SETTING)) > 4
    assert "nothing says which tokenizer made it" in caplog.text


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_and_damaged_files_are_named(processor: Processor, prefix: Path, tmp_path: Path, suffix: str) -> None:
    for each in (".bin", ".idx", ".json"):
        shutil.copy(f"{prefix}{each}", tmp_path / f"t{each}")
    damaged = tmp_path / f"t{suffix}"
    for size in (damaged.stat().st_size - 8, 40, 10, 0):
        os.truncate(damaged, max(size, 0))
        with pytest.raises(ValueError, match=r"data\.sources\.t\.path=.* write (the corpus|it) again"):
            TextCorpus(tmp_path / "t", 16, processor.tokenizer, SETTING)
    damaged.write_bytes(b"PK\x03\x04" * 100)
    with pytest.raises(ValueError, match=r"data\.sources\.t\.path="):
        TextCorpus(tmp_path / "t", 16, processor.tokenizer, SETTING)
    damaged.unlink()
    with pytest.raises(FileNotFoundError, match=rf"data\.sources\.t\.path=.*t\{suffix} does not exist"):
        TextCorpus(tmp_path / "t", 16, processor.tokenizer, SETTING)


def test_an_unfinished_corpus_never_appears(processor: Processor, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), TextCorpusWriter(tmp_path / "t", processor.tokenizer) as writer:
        writer.add("something")
        raise RuntimeError
    with pytest.raises(ValueError, match="no document"), TextCorpusWriter(tmp_path / "t", processor.tokenizer):
        pass
    assert list(tmp_path.iterdir()) == []


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=20), seq_len=st.integers(2, 12))
def test_piece_arithmetic(lengths: list[int], seq_len: int) -> None:
    corpus = TextCorpus.__new__(TextCorpus)
    corpus.seq_len = seq_len
    corpus._lengths = np.asarray(lengths)
    corpus._first_piece = np.concatenate([[0], np.cumsum((corpus._lengths + seq_len - 2) // seq_len)])
    expected = [
        (document, start, min(seq_len, length - start))
        for document, length in enumerate(lengths)
        for start in range(0, length, seq_len)
        if length - start > 1
    ]
    located = corpus.locate(np.arange(len(corpus)))
    assert list(zip(*(values.tolist() for values in located), strict=True)) == expected
