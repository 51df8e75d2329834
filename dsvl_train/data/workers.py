"""Daemon threads that run tasks in the order they were given; errors travel back with their traceback.

concurrent.futures has such a pool, but its threads are joined at interpreter exit: after Ctrl-C a run would first finish reading ahead.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class WorkerPool:
    """`threads` daemon threads; with 0, `submit` runs the task at once in the caller's thread."""

    def __init__(self, threads: int, name: str) -> None:
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True) for number in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, task: Callable[[], T]) -> Future[T]:
        """Queue a task; its result or exception comes through the future."""
        future: Future[T] = Future()
        if self._threads:
            self._tasks.put((future, task))
        else:
            future.set_result(task())
        return future

    def close(self, timeout: float = 5.0) -> None:
        """Stop the threads. Tasks that nobody began are cancelled; those in progress are waited for, `timeout` seconds at most."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                entry = self._tasks.get_nowait()
            except queue.Empty:
                break
            if entry is not None:
                entry[0].cancel()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0.0))
        self._threads = []

    def _work(self) -> None:
        while (entry := self._tasks.get()) is not None:
            future, task = entry
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(task())
            except BaseException as error:  # not swallowed: raised again where the result is awaited
                future.set_exception(error)
