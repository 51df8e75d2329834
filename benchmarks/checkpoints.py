"""What a checkpoint costs: training time lost per save, on the spot and behind the training, and the time to verify one.

python benchmarks/checkpoints.py [--width 512] [--steps 24] [--every 6] [--folder FOLDER]

Two data-parallel ranks of this machine over gloo, one thread each. Lost is what the same steps take longer than without saving, divided by
the saves: it has in it the copy that training waits for (the stall) and what the writers take from the processor and the disk meanwhile.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.distributed.harness import run_ranks
from tests.distributed.scenarios import TinyRun

MODES = ("without", "on the spot", "behind")


def measure(mode: str, folder: str, width: int, steps: int, every: int) -> dict[str, Any]:
    """Seconds of `steps` steps of a VL with saves between them. Runs on each rank."""

    def widen(cfg: Any) -> None:
        cfg.model.language.hidden_size, cfg.model.language.ffn_width, cfg.model.language.heads = width, 3 * width, 8

    run = TinyRun("vl", {}, folder, widen, asynchronous=mode == "behind", keep_last=1)
    from dsvl_train.checkpoints.folders import find_latest
    from dsvl_train.checkpoints.manifest import check
    from dsvl_train.training.checkpoint.resume import verify_together

    run.train(["multimodal", "multimodal"])
    if mode != "without":
        run.save(last=True)  # makes the buffers
        run.saver.take_stall_s()
    started, stalls = time.perf_counter(), []
    for step in range(1, steps + 1):
        run.train(["multimodal"])
        if mode != "without":
            run.saver.poll()
            if step % every == 0 and step < steps:
                run.save()
                stalls.append(run.saver.take_stall_s())
    seconds = time.perf_counter() - started
    run.saver.finish()
    latest = find_latest(Path(folder))
    if latest is None:
        return {"seconds": seconds, "stalls": [0.0]}
    started = time.perf_counter()
    verify_together(latest, full=True)
    return {"seconds": seconds, "stalls": stalls, "verify": time.perf_counter() - started, "bytes": check(latest, full=False).bytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--width", type=int, default=512, help="of the language model; the state grows with its square")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--every", type=int, default=6, help="steps between saves; a save has to be over before the next")
    parser.add_argument("--rounds", type=int, default=3, help="of all modes in turn; the least of each counts")
    parser.add_argument("--folder", help="where to save (default: a temporary folder)")
    arguments = parser.parse_args()
    saves = (arguments.steps - 1) // arguments.every
    found: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for _ in range(arguments.rounds):
            for mode in MODES:
                at = f"{folder}/{mode.replace(' ', '_')}"
                found[mode].append(run_ranks(measure, 2, mode, at, arguments.width, arguments.steps, arguments.every)[0])
    best = {mode: min(records, key=lambda record: record["seconds"]) for mode, records in found.items()}
    step_s = best["without"]["seconds"] / arguments.steps
    print(f"{best['behind']['bytes'] / 1e6:.0f} MB of state, steps of {step_s:.2f} s, {saves} saves")
    print(f"{'':<14}{'lost per save, s':>18}{'stall per save, s':>18}")
    for mode in MODES[1:]:
        lost = (best[mode]["seconds"] - best["without"]["seconds"]) / saves
        print(f"{mode:<14}{lost:>18.3f}{sum(best[mode]['stalls']) / saves:>18.3f}")
    print(f"verify, every byte, by both ranks: {best['behind']['verify']:.2f} s")


if __name__ == "__main__":
    main()
