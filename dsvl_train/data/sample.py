"""The sample schema: what lies in a shard under one key.

    000123.json    {"messages": [{"role": "user", "content": "<image>\\nWhich digit?"}, {"role": "assistant", "content": "7"}],
                    "images": ["0.png"], "id": "digits/17", "meta": {...}}
    000123.0.png   the image file

`messages` covers every kind of data: a conversation (roles user, assistant, and a first system message) with any number of turns and
images; a caption, an interleaved document, grounding text or plain text as one message of the role `document`. `images` names the members
of the images in the order of the image tags: what follows the key and a dot, or the whole member name. `id` and `meta` are kept, not read.

Nothing here trusts its input: whatever is wrong with a sample becomes a `SampleError`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsvl_train.data.errors import SampleError

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "avif", "jp2"})
"""A member with one of these endings is an image that the sample must name."""

_FIELDS = frozenset({"messages", "images", "id", "meta"})


@dataclass(frozen=True)
class Sample:
    """A parsed sample, images by name."""

    messages: list[dict[str, str]]
    images: list[str] = field(default_factory=list)
    id: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> bytes:
        """The bytes of its .json member."""
        value: dict[str, Any] = {"messages": self.messages}
        if self.images:
            value["images"] = self.images
        if self.id is not None:
            value["id"] = self.id
        if self.meta:
            value["meta"] = self.meta
        return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()


def parse_sample(raw: bytes) -> Sample:
    """Read a .json member.

    Raises:
        SampleError: `bad_json` - not UTF-8 JSON, an unknown field, or a field of the wrong type. Roles are checked by the processor.
    """
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or a number of thousands of digits
        raise SampleError("bad_json", f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise SampleError("bad_json", f"expected an object, found {type(value).__name__}")
    if unknown := sorted(set(value) - _FIELDS):
        raise SampleError("bad_json", f"unknown field {unknown[0]!r}; a sample has {sorted(_FIELDS)}")
    messages = value.get("messages")
    if not isinstance(messages, list) or not messages or not all(_is_message(message) for message in messages):
        raise SampleError(
            "bad_json", "`messages` must be a list of objects with the texts `role` and `content`, at least one, nothing else"
        )
    images = value.get("images", [])
    if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
        raise SampleError("bad_json", "`images` must be a list of member names")
    identity, meta = value.get("id"), value.get("meta", {})
    if not isinstance(identity, str | None) or not isinstance(meta, dict):
        raise SampleError("bad_json", "`id` must be a text and `meta` an object")
    if not _is_unicode(messages):
        raise SampleError("bad_json", "a text holds half a surrogate pair, which is no character")
    return Sample(messages=messages, images=images, id=identity, meta=meta)


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and set(message) == {"role", "content"}
        and isinstance(message["role"], str)
        and isinstance(message["content"], str)
    )


def _is_unicode(messages: Sequence[Mapping[str, str]]) -> bool:
    """Whether all texts can be encoded; JSON may spell lone surrogates, and tokenizers refuse them in their own ways."""
    try:
        for message in messages:
            message["role"].encode()
            message["content"].encode()
    except UnicodeEncodeError:
        return False
    return True


def find_images(names: Sequence[str], key: str, extensions: Sequence[str]) -> list[int]:
    """Which members the image names mean: positions in `extensions` (what follows the key and a dot in each member's name).

    Names are compared, never used as paths.

    Raises:
        SampleError: `image_missing` - no such member under this key. `bad_json` - images lie there and the sample names none.
    """
    if not names:
        stray = [extension for extension in extensions if extension.rpartition(".")[2].lower() in IMAGE_EXTENSIONS]
        if stray:
            raise SampleError("bad_json", f"image member {key}.{stray[0]} is not named in `images`")
        return []
    at = {extension: position for position, extension in enumerate(extensions)}
    found = []
    for name in names:
        position = at.get(name, at.get(name.removeprefix(f"{key}.")))
        if position is None:
            raise SampleError("image_missing", f"image {name!r} is not among the members of {key!r}: {sorted(extensions)}")
        found.append(position)
    return found
