"""What planning gives on long-tailed data, before a byte is read: fill of the sequences, balance over ranks, time per step.

python benchmarks/planning.py [--ranks 8] [--packs-per-rank 4] [--steps 200]

Samples as the released VL2 geometry makes them: images of 100 to 4,000 pixels a side, 1 to 8 per sample, texts of 5 to 4,000 tokens; once
long-tailed (most samples have one image of some hundred pixels and a short text), once even over these ranges, where most samples are
longer than half a sequence and no packing fills much (`tests.unit.made_data.long_tailed` says how both are drawn). Three ways to give packs
to ranks: as they come, by falling cost alone (greedy), and `data.plan.assign`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from dsvl_train.data.cursor import Cursor
from dsvl_train.data.plan import GlobalBatchPlan, Pack, Planner, RankShare, assign, assign_greedily, attention_cost
from tests.unit.made_data import MadeSource, config, long_tailed, shards_source


def imbalance(shares: Sequence[RankShare], of: Callable[[Pack], float]) -> float:
    loads = [sum(of(pack) for packs in share for pack in packs) for share in shares]
    return max(loads) / (sum(loads) / len(loads))


def as_they_come(packs: Sequence[Pack], ranks: int, micro_batch_size: int) -> list[RankShare]:
    each = len(packs) // ranks
    return [tuple((pack,) for pack in packs[rank * each : (rank + 1) * each]) for rank in range(ranks)]


def most_fill(lengths: Sequence[int], capacity: int) -> float:
    """What no packing can exceed: Martello and Toth's bound L2 on the number of packs."""
    n = np.asarray(lengths)
    packs = int(np.ceil(n.sum() / capacity))
    for small in range(0, capacity // 2 + 1, 16):  # no two above half fit together; what is under `small` is left out
        alone, large = int((n > capacity - small).sum()), n[(n > capacity / 2) & (n <= capacity - small)]
        beside = n[(n >= small) & (n <= capacity / 2)].sum() - (len(large) * capacity - large.sum())
        packs = max(packs, alone + len(large) + max(0, int(np.ceil(beside / capacity))))
    return float(n.sum() / (packs * capacity))


def measure(name: str, tokens: Sequence[int], tiles: Sequence[int], arguments: argparse.Namespace) -> None:
    """Print a table."""
    batch_size = arguments.ranks * arguments.packs_per_rank
    cfg = config({"made": shards_source("made")}, seq_len=arguments.seq_len, batch_size=batch_size, window=arguments.window)
    planner, cursor = Planner([MadeSource("made", "multimodal", tokens, tiles)], cfg, 0), Cursor()
    plans: list[GlobalBatchPlan] = []
    started = time.perf_counter()
    for _ in range(arguments.steps):
        plan, cursor = planner.plan(cursor)
        plans.append(plan)
    seconds = (time.perf_counter() - started) / arguments.steps
    fills = [plan.fill for plan in plans]
    print(f"{name}: {batch_size} packs of {cfg.seq_len} tokens for {arguments.ranks} ranks, {arguments.steps} steps, window {cfg.window}")
    most = most_fill(tokens, cfg.seq_len)
    print(f"fill: mean {np.mean(fills):.4f}, least {min(fills):.4f}, possible {most:.4f}; {1000 * seconds:.1f} ms per step")
    print(f"{'max/mean over ranks, mean (worst)':<34}{'tiles':>16}{'tokens':>16}{'attention':>16}{'ms':>8}")
    for way, share_out in (("as they come", as_they_come), ("greedy", assign_greedily), ("assign", assign)):
        started = time.perf_counter()
        shares = [share_out(plan.packs, arguments.ranks, 1) for plan in plans]
        milliseconds = 1000 * (time.perf_counter() - started) / arguments.steps
        columns = []
        for of in (lambda pack: pack.tiles, lambda pack: pack.tokens, attention_cost):
            ratios = [imbalance(share, of) for share in shares]
            columns.append(f"{np.mean(ratios):.3f} ({max(ratios):.3f})")
        print(f"{way:<34}" + "".join(f"{column:>16}" for column in columns) + f"{milliseconds:>8.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--packs-per-rank", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--samples", type=int, default=100_000)
    arguments = parser.parse_args()
    for name, even in (("long-tailed", False), ("even", True)):
        measure(name, *long_tailed(arguments.samples, 0, arguments.seq_len, even=even), arguments)


if __name__ == "__main__":
    main()
