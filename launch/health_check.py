"""Looks at every rank's device and the way between them before a run: `srun launch/slurm_task.sh launch/health_check.py --folder RUNS`.

Each rank multiplies matrices on its device and checks the result, and writes to the shared folder; then all add up a number. Rank 0 names
the nodes that failed or did not come, so that they can be left out (`sbatch --exclude`). Exit code 1 if there are any. It knows nothing of
dsvl_train, so that it tells of the machines alone.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

MIN_FREE_GB = 20.0
"""Room that the shared folder must have; a checkpoint of the smallest model fits."""
_WELL = "well"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", required=True, help="a folder that all ranks share, where runs will be")
    parser.add_argument("--timeout", type=float, default=180.0, help="seconds to wait for every rank")
    parser.add_argument("--min-free-gb", type=float, default=MIN_FREE_GB)
    arguments = parser.parse_args(argv)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    timeout = timedelta(seconds=arguments.timeout)
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world, rank == 0, timeout, wait_for_workers=False)
    state = look_at_this_rank(arguments.folder, arguments.min_free_gb)
    store.set(f"state/{rank}", f"{socket.gethostname()}: {state}")
    if rank == 0:
        problems = collect(store, world, arguments.timeout)
        store.set("verdict", "\n".join(problems))
        for problem in problems:
            print(f"health check: {problem}", file=sys.stderr)
    store.wait(["verdict"], timeout * 2)
    if store.get("verdict"):
        return 1
    total = add_up(dist.PrefixStore("group", store), rank, world, timeout)
    if total != world * (world + 1) / 2:
        print(f"health check: rank {rank} on {socket.gethostname()}: all ranks' numbers add up to {total}", file=sys.stderr)
        return 1
    if rank == 0:
        print(f"health check: {world} ranks well", file=sys.stderr)
    return 0


def look_at_this_rank(folder: str, min_free_gb: float) -> str:
    """`well`, or what is wrong."""
    try:
        device = this_device()
        numbers = torch.arange(256 * 256, dtype=torch.float32, device=device).reshape(256, 256) % 7
        product = (numbers @ numbers.T).cpu()  # small whole numbers: exact in any precision that is left on
        if not torch.equal(product, numbers.cpu() @ numbers.cpu().T):
            return f"{device} multiplies wrongly"
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(b"dsvl")
            file.flush()
        free = shutil.disk_usage(folder).free / 1e9
        return _WELL if free >= min_free_gb else f"{folder} has {free:.1f} GB free, less than {min_free_gb:g}"
    except Exception as error:  # whatever it is, the node is to be named
        return f"{type(error).__name__}: {error}"


def this_device() -> torch.device:
    """This rank's GPU, or the CPU where there is none.

    Raises:
        RuntimeError: fewer GPUs than ranks on this node.
    """
    count, local = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
    if count == 0 and os.environ.get("SLURM_GPUS_PER_NODE", "0") == "0":
        return torch.device("cpu")
    if local >= count:
        raise RuntimeError(f"{count} GPUs, and a rank {local} on this node")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def collect(store: dist.Store, world: int, timeout_s: float) -> list[str]:
    """What is wrong, a line per rank that is not well or did not come in time."""
    deadline = time.monotonic() + timeout_s
    missing = set(range(world))
    problems = []
    while missing and time.monotonic() < deadline:
        for rank in [rank for rank in missing if store.check([f"state/{rank}"])]:
            missing.remove(rank)
            state = store.get(f"state/{rank}").decode()
            if not state.endswith(f": {_WELL}"):
                problems.append(f"rank {rank} on {state}")
        time.sleep(0.05)
    return problems + [f"rank {rank} did not come within {timeout_s:g} s (task {rank} of the job)" for rank in sorted(missing)]


def add_up(store: dist.Store, rank: int, world: int, timeout: timedelta) -> float:
    """The sum of all ranks + 1, over the network that a run uses."""
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=world, timeout=timeout)
    number = torch.tensor([rank + 1.0], device=this_device())
    dist.all_reduce(number)
    dist.destroy_process_group()
    return number.item()


if __name__ == "__main__":
    sys.exit(main())
