"""Processor and tokenizer files: our checkpoints keep the released layout; transformers has one of its own for DeepSeek-VL.

Pure files: nothing here tokenises or touches pixels.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsvl_train.config.geometry import VL_MIN_SIDE
from dsvl_train.config.schema import ModelConfig
from dsvl_train.interop.formats.json_file import JsonConfig
from dsvl_train.interop.formats.transformers_vl import DEFAULT_IMAGE_TOKEN_ID, read_image_processor

VL_IMAGE_TAG = "<image_placeholder>"

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model")
_RELEASED_FILES = (*_TOKENIZER_FILES, "processor_config.json", "preprocessor_config.json", "chat_template.jinja", "chat_template.json")

_SYSTEM_PROMPT = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)


def chat_template(eos: str, image_tag: str) -> str:
    """DeepSeek-VL's conversation (released template "deepseek") in Jinja; contents are text, or lists of text and image parts."""
    content = (
        "{%- if message['content'] is string -%}{{ message['content'] | trim }}"
        "{%- else -%}{%- for part in message['content'] -%}"
        "{%- if part['type'] == 'image' -%}" + image_tag + "{%- else -%}{{ part['text'] }}{%- endif -%}"
        "{%- endfor -%}{%- endif -%}"
    )
    return (
        f"{_SYSTEM_PROMPT}{{{{ '\\n\\n' }}}}"
        "{%- for message in messages -%}"
        "{%- if message['role'] | lower == 'user' -%}{{ 'User: ' }}" + content + "{{ '\\n\\n' }}"
        "{%- else -%}{{ 'Assistant: ' }}" + content + eos + "{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}Assistant:{%- endif -%}"
    )


@dataclass(frozen=True)
class TokenIds:
    """Ids that a config.json mentions; None where the tokenizer's files do not tell."""

    bos: int | None
    eos: int | None
    image: int | None


def read_token_ids(folder: Path) -> TokenIds:
    """The special ids of a processor folder in the released layout."""
    if not (folder / "tokenizer.json").is_file():
        return TokenIds(None, None, None)
    ids = _vocabulary(folder)
    config = JsonConfig.read(folder / "tokenizer_config.json").values if (folder / "tokenizer_config.json").is_file() else {}
    processor = JsonConfig.read(folder / "processor_config.json").values if (folder / "processor_config.json").is_file() else {}
    image = processor.get("image_tag") or processor.get("image_token") or VL_IMAGE_TAG
    return TokenIds(ids.get(_content(config.get("bos_token"))), ids.get(_content(config.get("eos_token"))), ids.get(image))


def _vocabulary(folder: Path) -> dict[Any, int]:
    tokenizer = JsonConfig.read(folder / "tokenizer.json")
    vocabulary = tokenizer.section("model").values.get("vocab", {})
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    return ids | {token["content"]: token["id"] for token in tokenizer.values.get("added_tokens", [])}


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def copy_released(source: Path, target: Path) -> None:
    """Copy processor and tokenizer files in the released layout."""
    for name in _RELEASED_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def from_transformers(source: Path, target: Path, model: ModelConfig) -> None:
    """Write the released layout of a transformers folder's processor."""
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if not (target / "tokenizer.json").is_file():
        return
    tokenizer = JsonConfig.read(source / "tokenizer_config.json").values if (source / "tokenizer_config.json").is_file() else {}
    extra = tokenizer.get("extra_special_tokens")
    tag = tokenizer.get("image_token") or (extra.get("image_token") if isinstance(extra, dict) else None) or VL_IMAGE_TAG
    images = read_image_processor(source)
    encoder = model.vision.siglip if model.vision.sam is None else model.vision.sam
    _write(
        target / "preprocessor_config.json",
        {
            "background_color": [int(255 * value) for value in encoder.pixel_mean],
            "do_normalize": False,
            "image_mean": encoder.pixel_mean,
            "image_std": encoder.pixel_std,
            "image_processor_type": "VLMImageProcessor",
            "image_size": encoder.image_size,
            "min_size": images.integer("min_size", VL_MIN_SIDE),
            "rescale_factor": 1 / 255,
        },
    )
    _write(
        target / "processor_config.json",
        {
            "add_special_token": False,
            "ignore_id": -100,
            "image_tag": _content(tag),
            "mask_prompt": True,
            "num_image_tokens": model.vision.siglip.tokens,
            "processor_class": "VLChatProcessor",
            "sft_format": "deepseek",
        },
    )


def to_transformers(source: Path, target: Path, model: ModelConfig) -> None:
    """Write transformers' layout of a released folder's processor: tokenizer, image processor, processor, chat template."""
    if not (source / "tokenizer.json").is_file():
        return
    shutil.copyfile(source / "tokenizer.json", target / "tokenizer.json")
    settings = JsonConfig.read(source / "processor_config.json").values
    tag = settings.get("image_tag", VL_IMAGE_TAG)
    tokenizer = dict(JsonConfig.read(source / "tokenizer_config.json").values) if (source / "tokenizer_config.json").is_file() else {}
    eos = _content(tokenizer.get("eos_token"))
    # the class that takes tokenizer.json as it is; transformers 5's Llama class would put its own pre-tokeniser in its place
    tokenizer |= {"tokenizer_class": "PreTrainedTokenizerFast", "extra_special_tokens": {"image_token": tag}}
    tokenizer.pop("chat_template", None)
    if tokenizer.get("pad_token") is None:
        tokenizer["pad_token"] = eos
    _write(target / "tokenizer_config.json", tokenizer)
    name = "DeepseekVL" if model.vision.sam is None else "DeepseekVLHybrid"
    preprocessor = JsonConfig.read(source / "preprocessor_config.json")
    _write(target / "preprocessor_config.json", _image_processor(model, preprocessor.integer("min_size", VL_MIN_SIDE), name))
    _write(target / "processor_config.json", {"num_image_tokens": model.vision.siglip.tokens, "processor_class": f"{name}Processor"})
    (target / "chat_template.jinja").write_text(chat_template(eos or "", tag), encoding="utf-8")


def _image_processor(model: ModelConfig, min_size: int, name: str) -> dict[str, Any]:
    siglip, sam = model.vision.siglip, model.vision.sam
    settings: dict[str, Any] = {
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": siglip.pixel_mean,
        "image_processor_type": f"{name}ImageProcessor",
        "image_std": siglip.pixel_std,
        "min_size": min_size,
        "processor_class": f"{name}Processor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": siglip.image_size, "width": siglip.image_size},
    }
    if sam is not None:
        settings |= {
            "high_res_image_mean": sam.pixel_mean,
            "high_res_image_std": sam.pixel_std,
            "high_res_resample": 3,
            "high_res_size": {"height": sam.image_size, "width": sam.image_size},
            "resample": 2,
        }
    return settings


def image_token_id(ids: TokenIds) -> int:
    """transformers' `image_token_id`: the tokenizer's, or the released one."""
    return DEFAULT_IMAGE_TOKEN_ID if ids.image is None else ids.image


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(dict(sorted(values.items())), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
