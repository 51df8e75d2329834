"""Work in processes: all results, the first error, and a clear one where a process is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from dsvl_train.data.processes import WorkerDied, map_tasks


def prepare(offset: int) -> Callable[[int], tuple[int, int]]:
    process = os.getpid()

    def work(task: int) -> tuple[int, int]:
        if task == 13:
            raise ValueError("task 13")
        if task == 99:
            os.kill(os.getpid(), signal.SIGKILL)
        assert os.getpid() == process, "prepared elsewhere"
        return task + offset, process

    return work


def test_here_in_order() -> None:
    results = map_tasks(partial(prepare, 5), range(13), workers=1)
    assert next(results) == (5, os.getpid())
    assert [value for value, _ in results] == list(range(6, 18))


def test_in_processes_every_task_once() -> None:
    handed_out: list[int] = []

    def tasks() -> Iterator[int]:
        for task in range(100, 160):
            handed_out.append(task)
            yield task

    results = map_tasks(partial(prepare, 0), tasks(), workers=2)
    first = next(results)
    assert len(handed_out) <= 2 * 4, "tasks are handed out as they are needed"
    done = [first, *results]
    assert sorted(value for value, _ in done) == list(range(100, 160))
    assert os.getpid() not in {process for _, process in done}


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_ends_the_work(workers: int) -> None:
    with pytest.raises(ValueError, match="task 13"):
        list(map_tasks(partial(prepare, 0), range(10, 50), workers))


def test_a_killed_process_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(WorkerDied, match="fewer workers"):
        list(map_tasks(partial(prepare, 0), range(95, 130), workers=2))
