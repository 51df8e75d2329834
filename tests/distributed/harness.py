"""One way to run a function on several gloo ranks of this machine."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dsvl_train.launcher import reserved_port

_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["tests.distributed.preload"])


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 240.0) -> list[Any]:
    """Call a module-level function on `world_size` fresh processes and return what each rank returned, in order.

    The function runs with torchrun's environment set, and starts the process group itself (`parallel.startup.start`). The first rank
    that fails fails the call with its traceback; the others are ended.
    """
    results: Any = _PROCESSES.SimpleQueue()
    with reserved_ports(1) as (port,):
        environment = os.environ | {
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        }
        ranks = [
            _PROCESSES.Process(target=_rank_main, args=(rank, environment, function, args, results), daemon=True)
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            return _collect(ranks, results, timeout_s)
        finally:
            for process in ranks:
                process.kill()
                process.join()


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A file system of its own of so many bytes."""
    folder.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mounting is not permitted here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _collect(ranks: list[Any], results: Any, timeout_s: float) -> list[Any]:
    import time

    deadline = time.monotonic() + timeout_s
    answers: dict[int, Any] = {}
    while len(answers) < len(ranks):
        if not results.empty():
            rank, ok, answer = results.get()
            if not ok:
                raise AssertionError(f"rank {rank} failed:\n{answer}")
            answers[rank] = answer
            continue
        dead = [rank for rank, process in enumerate(ranks) if not process.is_alive() and rank not in answers]
        if dead and results.empty():
            raise AssertionError(f"rank {dead[0]} ended with exit code {ranks[dead[0]].exitcode} and no result")
        if time.monotonic() > deadline:
            raise AssertionError(f"no result after {timeout_s:g} s from rank(s) {sorted(set(range(len(ranks))) - set(answers))}")
        time.sleep(0.01)
    return [answers[rank] for rank in range(len(ranks))]


def _rank_main(rank: int, environment: dict[str, str], function: Callable[..., Any], args: tuple[Any, ...], results: Any) -> None:
    os.environ.clear()
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    try:
        import torch

        torch.set_num_threads(1)
        results.put((rank, True, function(*args)))
    except BaseException:
        results.put((rank, False, traceback.format_exc()))


@contextlib.contextmanager
def reserved_ports(count: int) -> Iterator[list[int]]:
    """Different ports of this machine that only a store of torch's can take while the context lasts."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(reserved_port()).getsockname()[1] for _ in range(count)]
