"""Tokenizer folders: special tokens by string, errors that name file and token, and the demo tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from dsvl_train.data.tokenizer import (
    BOS_TOKEN,
    EOS_TOKEN,
    PAD_TOKEN,
    VL2_ADDED_TOKENS,
    VL_IMAGE_TOKEN,
    Tokenizer,
    save_tokenizer_folder,
    train_byte_level_bpe,
)

TEXTS = ["A red circle left of a blue square.", "Which shape is larger? The circle is larger.", "Grüße, 世界!"] * 4
GOLDEN_VL2 = Path(__file__).parents[1] / "golden" / "data" / "vl2" / "mla_softmax"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer_folder(train_byte_level_bpe(TEXTS, 400), path)
    return path


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def change(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text())
    content.update(values)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def load(folder: Path, image_token: str = "<image>") -> Tokenizer:
    return Tokenizer.from_folder(folder, image_token=image_token, added_tokens=VL2_ADDED_TOKENS, pad_token=PAD_TOKEN)


def test_text_survives_a_round_trip(folder: Path) -> None:
    tokenizer = load(folder)
    for text in [*TEXTS, "", " blanks  inside ", "\n\n", "🙂"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_nothing_is_added_and_special_tokens_in_text_are_recognised(folder: Path) -> None:
    tokenizer = load(folder)
    ids = tokenizer.encode(f"red<image>{EOS_TOKEN}")
    assert ids[-2:] == [tokenizer.image_id, tokenizer.eos_id]
    assert tokenizer.bos_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "red"


def test_special_tokens_have_the_released_order(folder: Path) -> None:
    tokenizer = load(folder)
    assert [tokenizer.token_id(token) for token in (BOS_TOKEN, EOS_TOKEN, PAD_TOKEN)] == [0, 1, 2]
    added = [tokenizer.token_id(token) for token in (*VL2_ADDED_TOKENS, VL_IMAGE_TOKEN)]
    assert added == list(range(added[0], added[0] + len(added)))
    assert tokenizer.vocab_size == added[-1] + 1 <= 400


def test_training_is_deterministic(folder: Path) -> None:
    assert train_byte_level_bpe(TEXTS, 400).to_str() == train_byte_level_bpe(iter(TEXTS), 400).to_str()
    with pytest.raises(ValueError, match=r"vocab_size=260 is too small.*268"):
        train_byte_level_bpe(TEXTS, 260)


def test_tokens_that_the_folder_lacks_are_added_in_the_released_order(broken: Path) -> None:
    """The released processor adds its tokens when it loads, so a folder need not hold them."""
    backend = json.loads((broken / "tokenizer.json").read_text())
    backend["added_tokens"] = [token for token in backend["added_tokens"] if token["content"] in (BOS_TOKEN, EOS_TOKEN, PAD_TOKEN)]
    (broken / "tokenizer.json").write_text(json.dumps(backend))
    change(broken / "tokenizer_config.json", added_tokens_decoder={}, additional_special_tokens=[])
    first = len(backend["model"]["vocab"])
    tokenizer = load(broken)
    assert [tokenizer.token_id(token) for token in VL2_ADDED_TOKENS] == list(range(first, first + len(VL2_ADDED_TOKENS)))
    assert tokenizer.encode("a<|User|>")[-1] == tokenizer.token_id("<|User|>")


def test_tokens_listed_only_in_the_config_are_added(broken: Path) -> None:
    listed = json.loads((broken / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    backend = json.loads((broken / "tokenizer.json").read_text())
    backend["added_tokens"] = backend["added_tokens"][:3]
    (broken / "tokenizer.json").write_text(json.dumps(backend))
    tokenizer = load(broken)
    assert {str(tokenizer.token_id(entry["content"])) for entry in listed.values()} == set(listed)
    change(broken / "tokenizer_config.json", added_tokens_decoder={"9": {"content": "<image>"}})
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: added token '<image>' has id 9"):
        load(broken)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_missing_or_broken_file_is_named(broken: Path, name: str) -> None:
    (broken / name).write_text("{")
    with pytest.raises(ValueError, match=name):
        load(broken)
    (broken / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load(broken)


def test_a_missing_special_token_is_named_with_its_file(broken: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json: special token '<nowhere>' is missing"):
        Tokenizer.from_folder(broken, image_token="<nowhere>")
    change(broken / "tokenizer_config.json", eos_token="</s>")
    with pytest.raises(ValueError, match=r"tokenizer\.json: special token '</s>'"):
        load(broken)
    change(broken / "tokenizer_config.json", bos_token=...)
    change(broken / "special_tokens_map.json", bos_token=...)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: bos_token is missing"):
        load(broken)


def test_special_tokens_may_be_objects_or_stand_in_the_map(broken: Path) -> None:
    expected = load(broken)
    change(broken / "tokenizer_config.json", bos_token={"content": BOS_TOKEN}, eos_token=None, pad_token=None)
    tokenizer = load(broken)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (expected.bos_id, expected.eos_id, expected.pad_id)


def test_padding_falls_back_to_eos(broken: Path) -> None:
    change(broken / "tokenizer_config.json", pad_token=None)
    change(broken / "special_tokens_map.json", pad_token=None)
    tokenizer = Tokenizer.from_folder(broken, image_token=VL_IMAGE_TOKEN)
    assert tokenizer.pad_id == tokenizer.eos_id


def test_what_the_tokenizer_puts_around_a_text(broken: Path) -> None:
    """The released VL code lets the tokenizer add bos: by flag for a Llama tokenizer, by post-processor for others."""
    assert load(broken).prefix_ids == []
    change(broken / "tokenizer_config.json", tokenizer_class="LlamaTokenizerFast")
    assert (load(broken).prefix_ids, load(broken).suffix_ids) == ([0], [])
    change(broken / "tokenizer_config.json", add_bos_token=False)
    assert load(broken).prefix_ids == []
    change(broken / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    backend = tokenizers.Tokenizer.from_file(str(broken / "tokenizer.json"))
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS_TOKEN} $A {EOS_TOKEN}", special_tokens=[(BOS_TOKEN, 0), (EOS_TOKEN, 1)]
    )
    backend.save(str(broken / "tokenizer.json"))
    tokenizer = load(broken)
    assert (tokenizer.prefix_ids, tokenizer.suffix_ids) == ([0], [1])
    assert 0 not in tokenizer.encode("red")


def test_offsets_keep_blanks(broken: Path) -> None:
    """A post-processor that trims blanks from offsets would take the blank before an answer out of it."""
    plain = load(broken).encode_with_offsets("a red circle")
    backend = tokenizers.Tokenizer.from_file(str(broken / "tokenizer.json"))
    backend.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    backend.save(str(broken / "tokenizer.json"))
    assert load(broken).encode_with_offsets("a red circle") == plain
    assert [start for start, _ in plain[1][1:]] == [end for _, end in plain[1][:-1]]


def test_fingerprint_follows_content_not_layout(broken: Path) -> None:
    before = load(broken).fingerprint()
    path = broken / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=7))
    assert load(broken).fingerprint() == before
    assert load(broken, image_token=VL_IMAGE_TOKEN).fingerprint() != before
    backend = json.loads(path.read_text())
    backend["model"]["merges"].pop()
    path.write_text(json.dumps(backend))
    assert load(broken).fingerprint() != before


def test_unknown_ids_and_tokens(folder: Path) -> None:
    tokenizer = load(folder)
    assert tokenizer.token(tokenizer.image_id) == "<image>"
    with pytest.raises(ValueError, match="id 100000 is not in the vocabulary"):
        tokenizer.token(100000)


def test_released_layout_loads() -> None:
    tokenizer = load(GOLDEN_VL2)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.image_id, tokenizer.vocab_size) == (0, 1, 2, 560, 568)
