"""What every rank tells of itself in each step: how long it computed, and how much memory it holds.

It travels in the all-reduce of the metrics: every rank adds its own row to a table of zeros.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GIB = 2**30
_COLUMNS = 4


class RankTable:
    """Rows of seconds from the step's start to its gradients' exchange, resident GiB, GiB of the device at most, free share of the machine.

    The seconds hold waits for tensor- and pipeline-parallel peers, so what they tell apart are data-parallel replicas: all ranks of a
    replica are slow when one of them is.
    """

    def __init__(self, ranks: int, rank: int, device: torch.device) -> None:
        self._ranks, self._rank, self._device = ranks, rank, device
        self._started = self._stopped = 0.0
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []

    def start(self) -> None:
        """This rank's own work begins."""
        self._started = self._stopped = time.perf_counter()
        if self._events:
            self._events[0].record()

    def stop(self) -> None:
        """It is done; what follows waits for other replicas."""
        self._stopped = time.perf_counter()
        if self._events:
            self._events[1].record()

    def own_row(self) -> Tensor:
        """The table with this rank's row alone, flattened, float64."""
        seconds, device_memory = self._stopped - self._started, 0.0
        if self._events:
            self._events[1].synchronize()
            seconds = self._events[0].elapsed_time(self._events[1]) / 1000
            device_memory = torch.cuda.max_memory_allocated(self._device) / GIB
        table = torch.zeros(self._ranks, _COLUMNS, dtype=torch.float64)
        table[self._rank] = torch.tensor([seconds, resident_bytes() / GIB, device_memory, free_share()], dtype=torch.float64)
        return table.flatten().to(self._device)

    def metrics(self, summed: Tensor) -> dict[str, Any]:
        """`rank_s` and `rank_free_memory` for callbacks, and the largest memory of any rank."""
        seconds_r, resident_r, device_r, free_r = summed.view(self._ranks, _COLUMNS).T.tolist()
        memory = {"host_memory_gib": max(resident_r)} | ({"device_memory_gib": max(device_r)} if self._events else {})
        return {"rank_s": seconds_r, "rank_free_memory": free_r} | memory


def resident_bytes() -> int:
    """Memory that this process holds; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * 4096


def free_share() -> float:
    """The share of this machine's memory that is free, or of what a container may use; 1 where the system does not tell."""
    shares = [share for share in (_free_in_machine(), _free_in_container()) if share is not None]
    return min(shares, default=1.0)


def _free_in_machine() -> float | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kilobytes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
        return kilobytes["MemAvailable"] / kilobytes["MemTotal"]
    except (OSError, KeyError, ValueError, IndexError):
        return None


def _free_in_container(folder: Path = Path("/sys/fs/cgroup")) -> float | None:
    try:
        limit, used = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))
        cache = next(int(line.split()[1]) for line in (folder / "memory.stat").read_text().splitlines() if line.startswith("file "))
    except (OSError, ValueError, StopIteration):
        return None
    return 1 - max(used - cache, 0) / limit
