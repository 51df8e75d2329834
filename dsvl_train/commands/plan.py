"""`dsvl plan`: what a run needs on each rank of a layout, and the nearest layout that fits where it does not."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsvl_train.planning.memory import LayoutPlan
    from dsvl_train.planning.search import Found

DEVICE_GIB = 80.0
"""An A100's or H100's."""
USABLE = 0.9
"""What of a device's memory a run may plan with: CUDA's context, NCCL's buffers and fragmentation take the rest."""


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser(
        "plan",
        help="memory of every pipeline rank and idle time of a run, before it runs",
        description="Says what the run `python train.py KEY=VALUE ...` would hold on each rank. Exit code 0: it fits. 1: it does not; the "
        "nearest layout that does is named. 2: the arguments are wrong.",
    )
    parser.add_argument("overrides", nargs="+", metavar="KEY=VALUE", help="recipe and settings, as train.py takes them")
    parser.add_argument("--world", type=int, help="processes, one per device (default: launch.nproc, or one)")
    parser.add_argument("--nodes", type=int, help="machines, with --gpus")
    parser.add_argument("--gpus", type=int, help="devices of a machine")
    parser.add_argument("--device-memory", type=float, default=DEVICE_GIB, metavar="GIB", help=f"of a device (default {DEVICE_GIB:g})")
    parser.add_argument("--usable", type=float, default=USABLE, help=f"share of it that the run may take (default {USABLE:g})")
    parser.add_argument("--tiles", type=float, help="tiles of a micro-batch (default: as many as its tokens can hold)")
    parser.add_argument("--json", action="store_true", help="print one JSON object, sizes in bytes")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; 0 if it fits.

    Raises:
        ValueError: the configuration is impossible, or an argument is out of range.
    """
    from dsvl_train.config.compose import compose_run
    from dsvl_train.config.validate import validate
    from dsvl_train.planning.memory import plan_layout
    from dsvl_train.planning.parameters import part_sizes
    from dsvl_train.planning.search import nearest_that_fits

    if arguments.device_memory <= 0 or not 0 < arguments.usable <= 1:
        raise ValueError("--device-memory must be above 0, and --usable above 0 and at most 1")
    cfg = compose_run(arguments.overrides)
    world_size = _world_size(arguments) or max(cfg.launch.nproc, 1)
    validate(cfg, world_size)
    sizes = part_sizes(cfg.model, cfg.stage)
    plan = plan_layout(cfg, world_size, arguments.tiles, sizes)
    limit = arguments.device_memory * arguments.usable * 1024**3
    found = None
    if plan.peak > limit:
        found = nearest_that_fits(cfg, world_size, limit, sizes, arguments.tiles)
    if arguments.json:
        print(json.dumps(_as_json(plan, limit, found)))
    else:
        from dsvl_train.planning.table import bubbles, describe, table

        print("\n".join([*describe(cfg, plan), "", *table(plan), bubbles(plan), _verdict(plan, limit, arguments, found)]))
    return int(plan.peak > limit)


def _world_size(arguments: argparse.Namespace) -> int | None:
    given = (arguments.nodes, arguments.gpus)
    if arguments.world is not None and given != (None, None):
        raise ValueError("give --world, or --nodes and --gpus, not both")
    if (arguments.nodes is None) != (arguments.gpus is None):
        raise ValueError("--nodes and --gpus belong together")
    size = arguments.nodes * arguments.gpus if arguments.nodes is not None else arguments.world
    if size is not None and size < 1:
        raise ValueError(f"{size} processes: there must be at least 1")
    return size


def _verdict(plan: LayoutPlan, limit: float, arguments: argparse.Namespace, found: Found | None) -> str:
    from dsvl_train.planning.table import fullest, gib

    number, rank = fullest(plan)
    of = f"{gib(limit)} GiB ({arguments.usable:.0%} of {arguments.device_memory:g})"
    if plan.peak <= limit:
        return f"fits: the fullest rank, {number}, needs {gib(rank.peak)} of {of}"
    name, size = max(rank.parts.items(), key=lambda item: item[1])
    lines = [f"does not fit: rank {number} needs {gib(rank.peak)} of {of}; the most of it is {name}, {gib(size)}"]
    if found is None:
        lines.append(f"no layout of {plan.world_size} processes that is near this one fits: start more, or shorten data.seq_len")
    else:
        slower = found.plan.time * found.plan.division.pp / (plan.time * plan.division.pp)
        lines.append(
            f"nearest that fits: {' '.join(map(str, found.changes))}   ({gib(found.plan.peak)} GiB, predicted time x {slower:.2f})"
        )
    return "\n".join(lines)


def _as_json(plan: LayoutPlan, limit: float, found: Found | None) -> dict[str, Any]:
    ranks = [
        {
            "chunks": [
                asdict(chunk) | {kind: list(getattr(chunk, kind)) for kind in ("siglip", "sam", "language")} for chunk in rank.chunks
            ],
            **rank.parts,
            "peak": rank.peak,
        }
        for rank in plan.ranks
    ]
    return {
        "fits": plan.peak <= limit,
        "limit": limit,
        "peak": plan.peak,
        "world_size": plan.world_size,
        "dp": plan.dp,
        "expert_dp": plan.expert_dp,
        "tokens": plan.tokens,
        "tiles": plan.tiles,
        "micro_batches": plan.micro_batches,
        "bubble": plan.bubble,
        "ranks": ranks,
        "nearest": None if found is None else {"overrides": [str(change) for change in found.changes], "peak": found.plan.peak},
    }
