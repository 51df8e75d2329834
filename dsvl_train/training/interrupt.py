"""SIGINT, SIGTERM, SIGUSR1 and SIGUSR2: finish the step, save, leave."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

from dsvl_train.failures import SECOND_SIGNAL_AFTER_S, STOP_SIGNALS


class StopRequest:
    """Remembers that this process was asked to stop. A second signal, clearly later than the first, ends it at once."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._first_at = 0.0

    def install(self) -> None:
        """Take over the signals."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._first_at = signal.Signals(number), now
        elif now - self._first_at > SECOND_SIGNAL_AFTER_S:
            os._exit(128 + number)

    @property
    def requested(self) -> bool:
        return self.signal is not None
