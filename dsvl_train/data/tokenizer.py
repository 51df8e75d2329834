"""Tokenizers in Hugging Face folders (JSON only, no transformers), and a small byte-level BPE for demos.

A folder holds `tokenizer.json` (vocabulary, merges, added tokens), `tokenizer_config.json` and, optionally,
`special_tokens_map.json` (which of them are bos, eos, pad). Special tokens are found by their string, never by number: their ids
differ between the released models.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

BOS_TOKEN = "<｜begin▁of▁sentence｜>"  # the vertical bars and underscores are the released ones
EOS_TOKEN = "<｜end▁of▁sentence｜>"
PAD_TOKEN = "<｜▁pad▁｜>"

VL_IMAGE_TOKEN = "<image_placeholder>"
VL2_IMAGE_TOKEN = "<image>"
USER_TOKEN = "<|User|>"
ASSISTANT_TOKEN = "<|Assistant|>"
VL_ADDED_TOKENS = (VL_IMAGE_TOKEN,)
"""What the released VL processor adds to a tokenizer that lacks it."""
VL2_ADDED_TOKENS = (
    VL2_IMAGE_TOKEN,
    "<|ref|>",
    "<|/ref|>",
    "<|det|>",
    "<|/det|>",
    "<|grounding|>",
    USER_TOKEN,
    ASSISTANT_TOKEN,
)
"""What the released VL2 processor adds, after the padding token, in its order."""

_CONFIG, _MAP, _VOCABULARY = "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"


class Tokenizer:
    """A tokenizer with the special tokens of a model family.

    Attributes:
        bos_id, eos_id, pad_id, image_id: ids of the special tokens; `pad_id` is `eos_id` where the family has no padding token (VL).
        vocab_size: highest id + 1. The rows that an embedding needs.
        prefix_ids, suffix_ids: what the released VL code's `tokenizer.encode(text)` puts around a text.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        image_token: str,
        bos_token: str,
        eos_token: str,
        pad_token: str | None,
        llama_bos_eos: tuple[bool, bool] | None = None,
        folder: Path | None = None,
        source_text: str | None = None,
    ) -> None:
        self._backend = backend
        self._folder = folder
        self._source_text = source_text
        self.image_token, self.bos_token, self.eos_token = image_token, bos_token, eos_token
        self.bos_id = self.token_id(bos_token)
        self.eos_id = self.token_id(eos_token)
        self.image_id = self.token_id(image_token)
        self.pad_id = self.eos_id if pad_token is None else self.token_id(pad_token)
        self.prefix_ids, self.suffix_ids = self._wrapping(llama_bos_eos)
        # A post-processor adds tokens around a text, which is done here by hand, or trims blanks from offsets, which must not be done:
        # offsets decide which tokens belong to an answer.
        backend.post_processor = None
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def from_folder(
        cls, folder: str | Path, *, image_token: str, added_tokens: Sequence[str] = (), pad_token: str | None = None
    ) -> Tokenizer:
        """Read a tokenizer folder.

        Args:
            folder: with tokenizer.json and tokenizer_config.json.
            image_token: the family's image tag, found in the vocabulary or among `added_tokens`.
            added_tokens: special tokens added when missing, in this order, as the released processors do when they load.
            pad_token: padding token, added when the folder names none; null = the folder's own, else eos.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is not what it should be, or a special token is not in it; names the file and the token.
        """
        folder = Path(folder)
        text = _read_text(folder / _VOCABULARY)
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the Rust library raises plain Exception
            raise ValueError(f"{folder / _VOCABULARY}: not a tokenizer: {error}") from error
        config = _read_json(folder / _CONFIG)
        special_map = _read_json(folder / _MAP) if (folder / _MAP).exists() else {}
        _add_config_tokens(backend, config, folder)
        bos_token = _special_token("bos_token", config, special_map, folder)
        eos_token = _special_token("eos_token", config, special_map, folder)
        for token in (bos_token, eos_token):
            if backend.token_to_id(token) is None:
                raise ValueError(f"{folder / _VOCABULARY}: special token {token!r}, named in {_CONFIG} or {_MAP}, is not in the vocabulary")
        own_pad = _token_text(config.get("pad_token") or special_map.get("pad_token"))
        if own_pad is None and pad_token is not None:
            backend.add_special_tokens([pad_token])
        # The image token only where it is missing, the others in any case: so does the released processor.
        backend.add_special_tokens([token for token in added_tokens if token != image_token or backend.token_to_id(token) is None])
        return cls(
            backend,
            image_token=image_token,
            bos_token=bos_token,
            eos_token=eos_token,
            pad_token=own_pad or pad_token,
            llama_bos_eos=_llama_bos_eos(config),
            folder=folder,
            source_text=text,
        )

    def encode(self, text: str) -> list[int]:
        """Ids of a text, special tokens within it recognised, nothing added around it."""
        return self._backend.encode(text, add_special_tokens=False).ids if text else []

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """`encode`, and for each token the (start, end) of its characters in the text; a part of a character has that character's."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """Text of ids."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def token_id(self, token: str) -> int:
        """Id of a token given by its string.

        Raises:
            ValueError: it is not in the vocabulary; names the file and the token.
        """
        token_id = self._backend.token_to_id(token)
        if token_id is None:
            where = "the tokenizer" if self._folder is None else str(self._folder / _VOCABULARY)
            raise ValueError(f"{where}: special token {token!r} is missing; add it to the vocabulary or use another tokenizer folder")
        return token_id

    def token(self, token_id: int) -> str:
        """String of a token, as it stands in the vocabulary (byte-level tokens look odd)."""
        token = self._backend.id_to_token(int(token_id))
        if token is None:
            raise ValueError(f"id {token_id} is not in the vocabulary of {self.vocab_size}")
        return token

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the special tokens, roles and tags among them."""
        return frozenset(token_id for token_id, token in self._backend.get_added_tokens_decoder().items() if token.special)

    def fingerprint(self) -> str:
        """Hash of vocabulary, merges and special tokens; equal for the same tokenizer however its file is laid out."""
        return self._fingerprint

    @cached_property
    def text_fingerprint(self) -> str:
        """Hash of what decides the ids of plain text: equal in the two families' folders of one tokenizer, whose image tokens differ."""
        source = _canonical_hash(self._source_text or self._backend.to_str())
        return hashlib.sha256(json.dumps([source, self.bos_id, self.eos_id]).encode()).hexdigest()

    @cached_property
    def _fingerprint(self) -> str:
        source = _canonical_hash(self._source_text or self._backend.to_str())
        special = [self.bos_id, self.eos_id, self.pad_id, self.image_id, self.prefix_ids, self.suffix_ids, self.vocab_size]
        return hashlib.sha256(json.dumps([source, special]).encode()).hexdigest()

    def _wrapping(self, llama_bos_eos: tuple[bool, bool] | None) -> tuple[list[int], list[int]]:
        """Ids before and after a text when special tokens are asked for: by Llama's flags, else by the post-processor of the file."""
        if llama_bos_eos is not None:
            return [self.bos_id] * llama_bos_eos[0], [self.eos_id] * llama_bos_eos[1]
        plain = self._backend.encode("a", add_special_tokens=False).ids
        wrapped = self._backend.encode("a", add_special_tokens=True).ids
        for start in range(len(wrapped) - len(plain) + 1):
            if wrapped[start : start + len(plain)] == plain:
                return wrapped[:start], wrapped[start + len(plain) :]
        return [], []


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: a tokenizer folder holds {_VOCABULARY} and {_CONFIG}")
    return path.read_text(encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(path))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _canonical_hash(text: str) -> str:
    return hashlib.sha256(json.dumps(json.loads(text), sort_keys=True).encode()).hexdigest()


def _token_text(value: Any) -> str | None:
    """A special token as the files write it: a string, or an object with its `content`."""
    return value.get("content") if isinstance(value, dict) else value


def _special_token(name: str, config: dict[str, Any], special_map: dict[str, Any], folder: Path) -> str:
    token = _token_text(config.get(name) or special_map.get(name))
    if not token:
        raise ValueError(f"{folder / _CONFIG}: {name} is missing (nor is it in {_MAP})")
    return token


def _add_config_tokens(backend: tokenizers.Tokenizer, config: dict[str, Any], folder: Path) -> None:
    """Add tokens that only `added_tokens_decoder` of tokenizer_config.json lists, as transformers does."""
    listed = sorted((int(token_id), entry) for token_id, entry in config.get("added_tokens_decoder", {}).items())
    for token_id, entry in listed:
        flags = {key: bool(entry.get(key, False)) for key in ("lstrip", "rstrip", "normalized", "single_word", "special")}
        token = tokenizers.AddedToken(entry["content"], **flags)
        if backend.token_to_id(entry["content"]) is None:
            (backend.add_special_tokens if flags["special"] else backend.add_tokens)([token])
        if backend.token_to_id(entry["content"]) != token_id:
            actual = backend.token_to_id(entry["content"])
            raise ValueError(f"{folder / _CONFIG}: added token {entry['content']!r} has id {token_id}, but {actual} in {_VOCABULARY}")


def _llama_bos_eos(config: dict[str, Any]) -> tuple[bool, bool] | None:
    """Whether a Llama tokenizer adds bos and eos; its flags, not the file's post-processor, decide."""
    if config.get("tokenizer_class") not in ("LlamaTokenizer", "LlamaTokenizerFast"):
        return None
    return bool(config.get("add_bos_token", True)), bool(config.get("add_eos_token", False))


# --------------------------------------------------------------------------------------------------------------- demo tokenizers


def train_byte_level_bpe(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE over `texts` with the special tokens of both families; deterministic.

    Ids: bos, eos, pad first, then bytes and merges, then VL2's added tokens in the released order, then VL's image tag.

    Args:
        vocab_size: entries at most, special tokens included (fewer if the texts run out of pairs to merge).

    Raises:
        ValueError: `vocab_size` has no room for the 256 bytes and the special tokens.
    """
    added = [*VL2_ADDED_TOKENS, *VL_ADDED_TOKENS]
    first = [BOS_TOKEN, EOS_TOKEN, PAD_TOKEN]
    smallest = 256 + len(first) + len(added)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size={vocab_size} is too small: 256 bytes and {len(first) + len(added)} special tokens need {smallest}")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(added),
        special_tokens=first,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(added)
    return tokenizer


def save_tokenizer_folder(tokenizer: tokenizers.Tokenizer, folder: str | Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json, with special tokens that serve both families.

    Special tokens that `tokenizer` lacks are added, VL2's in the released order, then VL's image tag.

    Raises:
        ValueError: bos or eos is not in the vocabulary.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for token in (BOS_TOKEN, EOS_TOKEN):
        if tokenizer.token_to_id(token) is None:
            raise ValueError(f"special token {token!r} is not in the vocabulary; train_byte_level_bpe puts it there")
    extra = [*VL2_ADDED_TOKENS, *VL_ADDED_TOKENS]
    tokenizer.add_special_tokens([token for token in (PAD_TOKEN, *extra) if tokenizer.token_to_id(token) is None])
    tokenizer.save(str(folder / _VOCABULARY))
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    special = {"bos_token": BOS_TOKEN, "eos_token": EOS_TOKEN, "pad_token": PAD_TOKEN}
    decoder = {
        str(token_id): {"content": token.content, **plain, "special": True}
        for token_id, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }
    config: dict[str, Any] = {
        "added_tokens_decoder": decoder,
        "additional_special_tokens": extra,
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(1e30),
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
    }
    special_map: dict[str, Any] = {"additional_special_tokens": [{"content": token, **plain} for token in extra], **special}
    for name, value in ((_CONFIG, config), (_MAP, special_map)):
        (folder / name).write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
