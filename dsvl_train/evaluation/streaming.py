"""Text while it is generated, token by token."""

from __future__ import annotations

from dsvl_train.data.tokenizer import Tokenizer

_UNFINISHED = "\ufffd"
"""What bytes that are no character decode to: a character's first bytes until the others come."""


class TextStream:
    """Turns ids into pieces of text that together are the decoded answer, stripped.

    A character whose bytes come in several tokens is held back until it is whole, and blanks until something follows them.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._settled = 0
        """Ids whose text has been taken; the last few of them stay as context, since some tokenizers decode by what stands before."""
        self._context = 0
        self._blanks: str | None = None
        """Blanks held back; None before the first text."""

    def push(self, token: int) -> str:
        """The text that this token adds, possibly none yet."""
        self._ids.append(token)
        text = self._new_text()
        if text.endswith(_UNFINISHED):
            return ""
        self._context, self._settled = self._settled, len(self._ids)
        return self._hold_blanks(text)

    def finish(self) -> str:
        """What was held back and will not become more; trailing blanks are dropped."""
        text = self._new_text()
        self._context = self._settled = len(self._ids)
        return self._hold_blanks(text)

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._ids[self._context : self._settled])
        return self._tokenizer.decode(self._ids[self._context :])[len(before) :]

    def _hold_blanks(self, text: str) -> str:
        text = text.lstrip() if self._blanks is None else self._blanks + text
        if not text:
            return ""
        shown = text.rstrip()
        self._blanks = text[len(shown) :] if shown or self._blanks is not None else None
        return shown
