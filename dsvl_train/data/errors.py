"""The one exception for a sample that cannot be used; the loader counts it by kind and puts masked padding in its place."""

from __future__ import annotations

from typing import Literal, get_args

SampleErrorKind = Literal[
    "image_broken",
    "image_bomb",
    "image_missing",
    "image_count",
    "too_long",
    "too_many_tiles",
    "bad_json",
    "bad_conversation",
    "too_large",
    "unreadable",
    "changed",
    "plan_mismatch",
]
"""image_broken: bytes that do not decode. image_bomb: more pixels than allowed. image_missing: named and not there. image_count: image tags
and images disagree. too_long: more tokens than a sequence holds. too_many_tiles: more tiles than a sequence may hold. bad_json: not a
sample. bad_conversation: roles or turns that the template does not allow. too_large: a member of gigabytes. unreadable: bytes of the shard
that cannot be read. changed: bytes that are not those that were indexed. plan_mismatch: tokens or tiles that are not what the index
says."""


class SampleError(ValueError):
    """A sample that cannot be used, and why; `kind` is what logs count."""

    def __init__(self, kind: SampleErrorKind, message: str) -> None:
        if kind not in get_args(SampleErrorKind):
            raise ValueError(f"unknown kind of sample error {kind!r}; one of {get_args(SampleErrorKind)}")
        super().__init__(message)
        self.kind: SampleErrorKind = kind

    def __reduce__(self) -> tuple[type[SampleError], tuple[str, str]]:
        """Keeps `kind` when the error travels between processes."""
        return type(self), (self.kind, str(self))
