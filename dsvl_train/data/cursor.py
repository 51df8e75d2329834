"""Where a run stands in its data: what a checkpoint stores.

A cursor counts draws per source, so it is small, the same for every data-parallel size and worker count, and any place of a run is one
packing window away. JSON in, JSON out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

VERSION = 2

Draw = tuple[int, int]
"""(source of the modality, ordinal): the ordinal-th draw from that source, over all epochs."""


@dataclass(frozen=True)
class StreamCursor:
    """The place in one modality's stream of packs."""

    names: tuple[str, ...]
    """The modality's sources, in the order of data.sources."""
    drawn: tuple[int, ...]
    """Samples drawn from each source by all windows before this one."""
    credits: tuple[float, ...]
    """What each source is owed (`mixing.draw_sources`)."""
    started: tuple[tuple[Draw, ...], ...] = ()
    """Packs that the window before left open: this one goes on filling them."""
    window: int = 0
    """Number of the window."""
    offset: int = 0
    """Packs of this window already used."""
    returned: tuple[tuple[int, ...], ...] = ()
    """Per source, ordinals that were drawn and given back unused when settings changed: they come first when the source is drawn again."""

    @classmethod
    def fresh(cls, names: tuple[str, ...]) -> StreamCursor:
        return cls(names, drawn=(0,) * len(names), credits=(0.0,) * len(names))

    def as_json(self) -> dict[str, Any]:
        return {
            "sources": [list(entry) for entry in zip(self.names, self.drawn, self.credits, strict=True)],  # in order, unlike a JSON object
            "started": [[list(draw) for draw in pack] for pack in self.started],
            "window": self.window,
            "offset": self.offset,
            "returned": [list(ordinals) for ordinals in self.returned],
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> StreamCursor:
        sources = value["sources"]
        return cls(
            names=tuple(str(name) for name, _, _ in sources),
            drawn=tuple(int(drawn) for _, drawn, _ in sources),
            credits=tuple(float(credit) for _, _, credit in sources),
            started=tuple(tuple((int(source), int(ordinal)) for source, ordinal in pack) for pack in value["started"]),
            window=int(value["window"]),
            offset=int(value["offset"]),
            returned=tuple(tuple(map(int, ordinals)) for ordinals in value.get("returned", [])),
        )


@dataclass(frozen=True)
class Cursor:
    """The place after a step."""

    step: int = 0
    """Steps done."""
    text_steps: float = 0.0
    """Text steps among them; a step that mixes modalities counts as the share of its sequences that are text."""
    target_sum: float = 0.0
    """Sum of the wanted text shares of these steps."""
    streams: dict[str, StreamCursor] = field(default_factory=dict)
    """Per modality that has been drawn from."""

    def as_json(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "step": self.step,
            "text_steps": self.text_steps,
            "text_target_sum": self.target_sum,
            "streams": {modality: stream.as_json() for modality, stream in self.streams.items()},
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Cursor:
        """Raises ValueError when the state is not one of ours, or of another version."""
        if value.get("version") != VERSION:
            raise ValueError(f"data state of version {value.get('version')!r}; this code reads version {VERSION}: start with resume=none")
        return cls(
            step=int(value["step"]),
            text_steps=float(value["text_steps"]),
            target_sum=float(value["text_target_sum"]),
            streams={modality: StreamCursor.from_json(stream) for modality, stream in value["streams"].items()},
        )
