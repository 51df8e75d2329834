"""What the placing and sharing of the encoder is worth: step times of tiny models side by side, and bubbles of the papers' shapes.

python benchmarks/parallel.py [--steps 8]

Measured over gloo on this machine's cores, one thread per rank; each row pairs two settings of the same batches, in turn.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dsvl_train.config.compose import compose_run
from dsvl_train.models.costs import layer_costs, usual_tiles
from dsvl_train.parallel.division import plan_division
from dsvl_train.parallel.pipeline_simulation import simulate
from tests.distributed.harness import run_ranks

SKEWED = [[10, 1, 1, 1], [9, 2, 1, 1], [10, 1, 2, 1], [1, 10, 1, 2]]
"""[micro-batch][data-parallel rank] -> tiles: images of 1 to 10 tiles, the big ones mostly on one rank."""
ROWS: list[tuple[str, int, dict[str, Any], dict[str, Any]]] = [
    ("tile balancing off / on, DP 4", 4, {"tile_balance": False}, {"tile_balance": True}),
    (
        "exchange at once / ahead, DP 4",
        4,
        {"tile_balance": True, "overlap_tile_exchange": False},
        {"tile_balance": True, "overlap_tile_exchange": True},
    ),
    ("vision_tp recompute / shard, TP 2", 2, {"tp": 2, "vision_tp": "recompute"}, {"tp": 2, "vision_tp": "shard"}),
    ("first_stage / spread, PP 4", 4, {"pp": 4, "vision_division": "first_stage"}, {"pp": 4, "vision_division": "spread"}),
]


def measure(parallel: dict[str, Any], steps: int) -> list[float]:
    """Seconds of each image step of a small VL2 whose encoder weighs as much as its language model. Runs on each rank."""
    from dsvl_train.parallel import startup
    from tests.tiny import SOURCES, image_batch, tiny_run

    cfg = tiny_run("vl2", **parallel)
    siglip = cfg.model.vision.siglip
    siglip.width, siglip.heads, siglip.layers, siglip.image_size = 192, 4, 8, 112
    cfg.model.language.hidden_size, cfg.model.language.ffn_width, cfg.model.language.layers = 192, 512, 8
    cfg.data.text_ratio = 0.0
    world = startup.start(cfg.engine, cfg.parallel, seed=0)
    from dsvl_train.models.build import build_model
    from dsvl_train.models.costs import choose_division
    from dsvl_train.training.setup import build_trainable
    from dsvl_train.training.step import TrainStep

    model = build_model(cfg.model, cfg.stage, cfg.parallel, world, seed=0, division=choose_division(cfg))
    chunks, optimiser = build_trainable(cfg, world, model)
    step = TrainStep(cfg, world, model, chunks, optimiser, SOURCES)
    micro_batches = SKEWED if world.dp_size > 1 else [[sum(micro) // 2] for micro in SKEWED * 2]
    batch = image_batch(cfg.model, [micro[world.dp_rank] for micro in micro_batches], seed=world.dp_rank)
    seconds = []
    for _ in range(steps + 2):
        started = time.perf_counter()
        step(batch, 1e-4, stop_requested=False)
        seconds.append(time.perf_counter() - started)
    startup.stop()
    return seconds[2:]


def simulated_bubbles() -> None:
    """Image steps of the released models on four pipeline ranks, 16 micro-batches of 4,096 tokens, half of them visual."""
    print(f"\n{'simulated bubble, PP 4':<32}{'first_stage':>12}{'spread':>12}{'spread, group = pp':>20}")
    for name in ("deepseek_vl_1b", "deepseek_vl_7b", "deepseek_vl2_tiny", "deepseek_vl2_small", "deepseek_vl2"):
        family = "vl2" if "vl2" in name else "vl"
        model = compose_run([f"recipe=demo_{family}/align", f"model={name}", "data.seq_len=2048"]).model
        costs, text_share = layer_costs(model, 4096, usual_tiles(model, 4096)), 0.3 if family == "vl2" else 0.7
        bubbles = []
        for kind, group in (("first_stage", None), ("spread", None), ("spread", 4)):
            division = plan_division(costs, 4, 1, kind, text_share=text_share, micro_batches=16, group=group)
            bubbles.append(simulate(division.chunk_costs(costs, images=True), 16, wanted_group=group).bubble)
        print(f"{name:<32}{bubbles[0]:>12.3f}{bubbles[1]:>12.3f}{bubbles[2]:>20.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=8, help="measured steps of each setting")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each pair")
    arguments = parser.parse_args()
    print(f"{'image step, seconds (median)':<40}{'first':>9}{'second':>9}{'ratio':>8}")
    for name, ranks, first, second in ROWS:
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(arguments.rounds):
            for parallel, seconds in zip((first, second), times, strict=True):
                seconds += run_ranks(measure, ranks, parallel, arguments.steps)[0]
        before, after = median(times[0]), median(times[1])
        print(f"{name:<40}{before:>9.3f}{after:>9.3f}{before / after:>7.2f}x", flush=True)
    simulated_bubbles()


if __name__ == "__main__":
    main()
