"""Work on many independent tasks in processes of its own, for what Python threads would take turns at (parsing, tokenising, decoding)."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import connection
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")

_TASKS_AHEAD = 4
"""Tasks handed out per process at most, so that neither millions of tasks nor their results wait in memory."""

_work: Callable[[Any], Any]


class WorkerDied(ChildProcessError):
    """A worker process was ended from outside; what it was doing is lost."""


def usable_cores() -> int:
    """Cores that this process may run on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(cores, 1)


def map_tasks(prepare: Callable[[], Callable[[T], R]], tasks: Iterable[T], workers: int) -> Iterator[R]:
    """Results of tasks as they finish, in no particular order. The first error of a task ends everything.

    Args:
        prepare: called once per process, returns what does a task. It travels to fresh processes: a module's function, or a partial of one.
        workers: processes; with 1 or fewer the tasks run here, in order.

    Raises:
        WorkerDied: a process was killed, mostly for want of memory.
    """
    if workers <= 1:
        yield from map(prepare(), tasks)
        return
    left = iter(tasks)
    running: set[Future[R]] = set()
    # spawn: a fork of a process with threads (torch, tokenizers, CUDA) may deadlock
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_initialise, initargs=(prepare,)) as pool:
        try:
            while True:
                running |= {pool.submit(_do, task) for task in islice(left, workers * _TASKS_AHEAD - len(running))}
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BrokenProcessPool as error:
            raise WorkerDied(
                "a worker process was ended from outside, for want of memory perhaps: use fewer workers; what is done already is kept"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _initialise(prepare: Callable[[], Callable[[Any], Any]]) -> None:
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the others in order
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _work = prepare()


def _do(task: Any) -> Any:
    return _work(task)


def _end_with_parent() -> None:
    """A killed parent cannot tell its workers, which would wait for tasks for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
