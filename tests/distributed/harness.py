"""One way to run a function on several gloo ranks of this machine."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.multiprocessing as mp


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 240.0) -> list[Any]:
    """Call a module-level function on `world_size` fresh processes and return what each rank returned, in order.

    The function runs with torchrun's environment set, and starts the process group itself (`parallel.startup.start`). The first rank
    that fails fails the call with its traceback; the others are ended.
    """
    context = mp.get_context("spawn")
    results: Any = context.SimpleQueue()
    (port,) = free_ports(1)
    ranks = [
        context.Process(target=_rank_main, args=(rank, world_size, port, function, args, results), daemon=True)
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


def _rank_main(rank: int, world_size: int, port: int, function: Callable[..., Any], args: tuple[Any, ...], results: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
        OMP_NUM_THREADS="1",
    )
    try:
        import torch

        torch.set_num_threads(1)
        results.put((rank, True, function(*args)))
    except BaseException:
        results.put((rank, False, traceback.format_exc()))


def free_ports(count: int) -> list[int]:
    """Different ports of this machine that nobody listens on."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
