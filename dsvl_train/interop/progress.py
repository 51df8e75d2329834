"""A bar over bytes, where there is a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm


@contextmanager
def bytes_bar(title: str, total: int, show: bool) -> Iterator[Callable[[int], Any]]:
    """A function to call with the bytes of each tensor done."""
    with tqdm(total=total, desc=title, unit="B", unit_scale=True, disable=None if show else True) as bar:
        yield bar.update
