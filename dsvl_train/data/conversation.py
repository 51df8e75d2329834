"""Conversation templates of both families, token by token, with what is supervised.

A template turns messages into `TokenisedText`: ids with ONE image id per image, and for each token whether the loss counts it. How many
visual tokens an image takes is geometry, and is put in later (`processor.py`).

Three forms:

* VL2 (`Vl2Template`): the released `format_messages_v2`. Each turn is tokenised on its own.
* VL (`VlTemplate`): the released flat "deepseek" template, tokenised as one string. The released code has no labels, so these are ours.
* documents (both families, ours): captions, interleaved documents and other texts without roles, written as one message of the role
  `document`. `[bos] content [eos]`, everything supervised except images. The ids and labels are what the released VL2 `process_one` gives
  for a raw `prompt`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .errors import SampleError
from .tokenizer import ASSISTANT_TOKEN, EOS_TOKEN, USER_TOKEN, VL2_IMAGE_TOKEN, VL_IMAGE_TOKEN, Tokenizer

Role = Literal["user", "assistant", "system", "document"]

ROLES: dict[str, Role] = {
    "user": "user",
    "User": "user",
    USER_TOKEN: "user",
    "assistant": "assistant",
    "Assistant": "assistant",
    ASSISTANT_TOKEN: "assistant",
    "system": "system",
    "document": "document",
}
"""Names that messages may give their role: ours, VL's and VL2's."""

VL_SYSTEM_PROMPT = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
"""The released VL processor puts this before every conversation."""

_TURN_SEPARATOR = "\n\n"
_IMAGE_TAGS = (VL2_IMAGE_TOKEN, VL_IMAGE_TOKEN)


@dataclass(frozen=True)
class Message:
    role: Role
    content: str


@dataclass
class TokenisedText:
    """Ids of a conversation with one image id per image.

    Attributes:
        ids: token ids.
        supervised: for each id, whether the loss counts it (images are taken out later, whatever is said here).
        image_at: positions in `ids` of the images, in order.
        turn_at: position in `ids` where each message begins; the first is 0, so what stands before it (bos, a system prompt that the
            template adds) belongs to the first message.
    """

    ids: list[int]
    supervised: list[bool]
    image_at: list[int]
    turn_at: list[int]

    def add(self, ids: Sequence[int], *, supervised: bool) -> None:
        self.ids.extend(ids)
        self.supervised.extend([supervised] * len(ids))

    def add_image(self, image_id: int) -> None:
        self.image_at.append(len(self.ids))
        self.add([image_id], supervised=False)


def parse_messages(messages: Sequence[Mapping[str, str]], image_token: str, image_count: int) -> list[Message]:
    """Check roles and order, and give every message its canonical role and the family's image tag.

    The tag of the other family stands for an image too, but only in a sample that has images and none of the family's own tags, which the
    released code would refuse: so one data set serves both families, and a text that merely mentions the other tag stays as it is.

    Raises:
        SampleError: `bad_conversation` - no messages, a role or content that is none, a system message that is not first, a document that
            is not alone, a conversation of nothing but a system message.
    """
    parsed = [_parse_message(position, message) for position, message in enumerate(messages)]
    if not parsed:
        raise SampleError("bad_conversation", "the conversation is empty; give at least one message")
    roles = [message.role for message in parsed]
    if "system" in roles[1:]:
        raise SampleError("bad_conversation", f"a system message must come first; the roles are {roles}")
    if "document" in roles and len(parsed) > 1:
        raise SampleError("bad_conversation", f"a document is a sample of one message; the roles are {roles}")
    if roles == ["system"]:
        raise SampleError("bad_conversation", "the conversation has a system message and no turn")
    if image_count and not any(image_token in message.content for message in parsed):
        for other in _IMAGE_TAGS:
            parsed = [Message(message.role, message.content.replace(other, image_token)) for message in parsed]
    return parsed


def _parse_message(position: int, message: Mapping[str, str]) -> Message:
    if not isinstance(message, Mapping):
        raise SampleError("bad_conversation", f"message {position} is a {type(message).__name__}; expected role and content")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise SampleError("bad_conversation", f"message {position} has the unknown role {role!r}; known are {list(ROLES)}")
    if not isinstance(content, str):
        raise SampleError("bad_conversation", f"message {position} ({role}) has content of type {type(content).__name__}; expected text")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise SampleError(
            "bad_conversation", f"message {position} ({role}) holds half a surrogate pair, which is no text: {error}"
        ) from error
    return Message(ROLES[role], content)


def check_image_count(tags: int, image_count: int, image_token: str) -> None:
    """Raise SampleError `image_count` unless there is one image per tag."""
    if tags != image_count:
        raise SampleError("image_count", f"{tags} {image_token} tags in the text, but {image_count} images; each image needs one tag")


def tokenise_document(content: str, tokenizer: Tokenizer, image_count: int, *, inference: bool = False) -> TokenisedText:
    """`[bos] content [eos]`, all supervised except images; `inference` leaves eos out, so that the text can be continued.

    Raises:
        SampleError: `image_count`.
    """
    check_image_count(content.count(tokenizer.image_token), image_count, tokenizer.image_token)
    text = TokenisedText([], [], [], [0])
    text.add([tokenizer.bos_id], supervised=True)
    _add_text_with_images(text, content, tokenizer, supervised=True)
    if not inference:
        text.add([tokenizer.eos_id], supervised=True)
    return text


def tokenise_continuation(context: str, continuation: str, tokenizer: Tokenizer, image_count: int) -> TokenisedText:
    """`[bos] context continuation`, tokenised as one text; supervised is every token that holds a character of the continuation.

    Raises:
        SampleError: `image_count`, or `bad_conversation` for an image tag in the continuation.
    """
    if tokenizer.image_token in continuation:
        raise SampleError("bad_conversation", f"{tokenizer.image_token} in what continues a document; images go before it")
    check_image_count(context.count(tokenizer.image_token), image_count, tokenizer.image_token)
    before, tag, last = context.rpartition(tokenizer.image_token)
    text = TokenisedText([], [], [], [0])
    text.add([tokenizer.bos_id], supervised=False)
    if tag:
        _add_text_with_images(text, before, tokenizer, supervised=False)
        text.add_image(tokenizer.image_id)
    ids, offsets = tokenizer.encode_with_offsets(last + continuation)
    text.ids.extend(ids)
    text.supervised.extend(_touching(offsets, [(len(last), len(last + continuation))]))
    return text


def _add_text_with_images(text: TokenisedText, content: str, tokenizer: Tokenizer, *, supervised: bool) -> None:
    """Tokenise the pieces between image tags each on its own, as the released VL2 `tokenize_with_images`."""
    for position, piece in enumerate(content.split(tokenizer.image_token)):
        if position:
            text.add_image(tokenizer.image_id)
        text.add(tokenizer.encode(piece), supervised=supervised)


class Vl2Template:
    """The released VL2 "deepseek" template, turn by turn (`format_messages_v2`).

    `[bos]`, then per turn: system (first only): its text, stripped, nothing around it. user: `<|User|>: {content}\\n\\n<|Assistant|>:`.
    assistant: its text, stripped, and eos, with no blank after the colon. Supervised: bos (as released; it is no next token, so the loss
    never sees it), every answer and its eos, and with `mask_prompt=False` the prompts too. An empty user turn loses its separator, as
    released.
    """

    name = "vl2-deepseek"

    def __init__(self, tokenizer: Tokenizer, *, mask_prompt: bool = True) -> None:
        self._tokenizer = tokenizer
        self._mask_prompt = mask_prompt
        for token in (USER_TOKEN, ASSISTANT_TOKEN):
            tokenizer.token_id(token)

    def tokenise(self, messages: Sequence[Message], image_count: int, *, inference: bool = False) -> TokenisedText:
        """Ids and supervision of a conversation.

        Args:
            inference: leave out the final eos, so that the last answer (possibly empty) can be continued.

        Raises:
            SampleError: `image_count`, or `bad_conversation` for an image tag in a system or assistant message.
        """
        tokenizer = self._tokenizer
        if messages[0].role == "document":
            return tokenise_document(messages[0].content, tokenizer, image_count, inference=inference)
        for message in messages:
            if message.role != "user" and tokenizer.image_token in message.content:
                raise SampleError(
                    "bad_conversation", f"{tokenizer.image_token} in a message of the {message.role}; VL2 has images in user turns"
                )
        tags = sum(message.content.count(tokenizer.image_token) for message in messages)
        check_image_count(tags, image_count, tokenizer.image_token)

        prompts_count = not self._mask_prompt
        text = TokenisedText([], [], [], [])
        text.add([tokenizer.bos_id], supervised=True)
        for message in messages:
            text.turn_at.append(len(text.ids) if text.turn_at else 0)
            content = message.content.strip()
            if message.role == "system":
                text.add(tokenizer.encode(content), supervised=prompts_count)
            elif message.role == "user":
                question = f"{USER_TOKEN}: {content}{_TURN_SEPARATOR}" if content else f"{USER_TOKEN}:"
                _add_text_with_images(text, f"{question}{ASSISTANT_TOKEN}:", tokenizer, supervised=prompts_count)
            else:
                text.add([*tokenizer.encode(content), tokenizer.eos_id], supervised=True)
        if inference and text.ids[-1] == tokenizer.eos_id:
            text.ids.pop()
            text.supervised.pop()
        return text


class VlTemplate:
    """The released VL "deepseek" template: one flat string, tokenised at once.

    `SYSTEM\\n\\nUser: question\\n\\nAssistant: answer<eos>User: ...`; contents and the whole are stripped; an empty message leaves
    `Assistant:`, where generation starts. Around it stands what the tokenizer itself adds (bos for a Llama tokenizer). A first message of
    the role system replaces the default system prompt; with empty content there is none.

    Supervised: in every turn the answer and its eos. An answer begins right after `Assistant:`, blank included, since that is where
    generation begins. A token that holds any character of an answer is supervised, so one that straddles the border is too: left out, the
    answer's first characters would never be learnt. Image tags are allowed in any message, and never supervised.

    The released template places separators by position, not by role; the two agree only where user and assistant alternate, so anything
    else is refused.
    """

    name = "vl-deepseek"

    def __init__(self, tokenizer: Tokenizer, *, mask_prompt: bool = True) -> None:
        self._tokenizer = tokenizer
        self._mask_prompt = mask_prompt
        if tokenizer.eos_token != EOS_TOKEN:
            raise ValueError(
                f"eos_token is {tokenizer.eos_token!r}, but the template ends answers with {EOS_TOKEN!r}; name that as eos_token"
            )

    def tokenise(self, messages: Sequence[Message], image_count: int, *, inference: bool = False) -> TokenisedText:
        """Ids and supervision of a conversation.

        Args:
            inference: leave out a document's eos; a conversation is the same either way, as released: give an empty last answer.

        Raises:
            SampleError: `image_count`, or `bad_conversation` for turns that do not alternate.
        """
        tokenizer = self._tokenizer
        if messages[0].role == "document":
            return tokenise_document(messages[0].content, tokenizer, image_count, inference=inference)
        flat, answers, starts = self.render(messages)
        check_image_count(flat.count(tokenizer.image_token), image_count, tokenizer.image_token)
        ids, offsets = tokenizer.encode_with_offsets(flat)
        image_at = np.flatnonzero(np.asarray(ids, dtype=np.int64) == tokenizer.image_id) + len(tokenizer.prefix_ids)
        check_image_count(len(image_at), image_count, tokenizer.image_token)
        turn_at = [0, *(len(tokenizer.prefix_ids) + first for first in _first_at(offsets, starts[1:]))]
        text = TokenisedText([], [], image_at.tolist(), turn_at)
        text.add(tokenizer.prefix_ids, supervised=not self._mask_prompt)
        text.ids.extend(ids)
        text.supervised.extend(_touching(offsets, answers) if self._mask_prompt else [True] * len(ids))
        text.add(tokenizer.suffix_ids, supervised=not self._mask_prompt)
        return text

    def render(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]], list[int]]:
        """The flat string, the (start, end) characters of each answer with its eos, and the first character of each message.

        Raises:
            SampleError: `bad_conversation` for turns that do not alternate between user and assistant, from user on.
        """
        system, starts = VL_SYSTEM_PROMPT, []
        if messages[0].role == "system":
            system, messages, starts = messages[0].content, messages[1:], [0]
        roles = [message.role for message in messages]
        if any(role != ("user", "assistant")[turn % 2] for turn, role in enumerate(roles)):
            raise SampleError("bad_conversation", f"turns of a VL conversation must alternate user, assistant; the roles are {roles}")
        flat = system.lstrip() + _TURN_SEPARATOR if system.strip() else ""
        answers = []
        for message in messages:
            starts.append(len(flat))
            content = message.content.strip()
            if message.role == "user":
                flat += f"User: {content}{_TURN_SEPARATOR}" if content else "User:"
            elif content:
                flat += "Assistant:"
                start = len(flat)
                flat += f" {content}{EOS_TOKEN}"
                answers.append((start, len(flat)))
            else:
                flat += "Assistant:"
        return flat.rstrip(), answers, starts


def _first_at(offsets: Sequence[tuple[int, int]], starts: Sequence[int]) -> list[int]:
    """For each character, the number of the first token that begins there or after it."""
    begins = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)[:, 0]
    return np.searchsorted(np.maximum.accumulate(begins), np.asarray(starts, dtype=np.int64)).tolist()


def _touching(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """For each token, whether it holds a character of one of the spans (both in order)."""
    bounds = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    touching = np.zeros(len(bounds), dtype=bool)
    for start, end in spans:
        touching |= (bounds[:, 1] > start) & (bounds[:, 0] < end)
    return touching.tolist()


TEMPLATES: dict[str, type[VlTemplate] | type[Vl2Template]] = {"vl": VlTemplate, "vl2": Vl2Template}
"""The template "deepseek" of each family; the other released templates are not used by the released models."""
