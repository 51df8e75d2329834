"""`dsvl plan`: what a run needs on each rank of a layout, and the nearest layout that fits where it does not."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsvl_train.config.schema import ParallelConfig

if TYPE_CHECKING:
    from dsvl_train.config.schema import LaunchConfig, RunConfig
    from dsvl_train.planning.memory import LayoutPlan
    from dsvl_train.planning.search import Change, Found

NAME = "plan"
DEVICE_GIB = 80.0
"""An A100's or H100's."""
USABLE = 0.9
"""What of a device's memory a run may plan with: CUDA's context, NCCL's buffers and fragmentation take the rest."""


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser(
        NAME,
        help="memory of every pipeline rank and idle time of a run, before it runs",
        description="Says what the run `python train.py KEY=VALUE ...` would hold on each rank. Exit code 0: it fits. 1: it does not; the "
        "nearest layout that does is named. 2: the arguments are wrong.",
    )
    parser.add_argument("overrides", nargs="+", metavar="KEY=VALUE", help="recipe and settings, as train.py takes them")
    parser.add_argument("--world", type=int, help="processes, one per device (default: launch.nproc, else the recipe's cluster, else one)")
    parser.add_argument("--nodes", type=int, help="machines, instead of --world")
    parser.add_argument("--gpus", type=int, help="devices of a machine (default: launch.gpus_per_node)")
    parser.add_argument("--device-memory", type=float, default=DEVICE_GIB, metavar="GIB", help=f"of a device (default {DEVICE_GIB:g})")
    parser.add_argument("--usable", type=float, default=USABLE, help=f"share of it that the run may take (default {USABLE:g})")
    parser.add_argument("--tiles", type=float, help="tiles of a micro-batch (default: as many as its tokens can hold)")
    parser.add_argument(
        "--measure", metavar="FILE", help="time each kind of layer on this device first, write the seconds to FILE, and plan by them"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, sizes in bytes")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; 0 if it fits.

    Raises:
        ValueError: the configuration is impossible, or an argument is out of range.
    """
    from dsvl_train.config.compose import compose_run
    from dsvl_train.config.errors import ConfigError
    from dsvl_train.config.validate import validate
    from dsvl_train.planning.memory import plan_layout
    from dsvl_train.planning.parameters import part_sizes
    from dsvl_train.planning.search import nearest_that_fits

    if arguments.device_memory <= 0 or not 0 < arguments.usable <= 1:
        raise ValueError("--device-memory must be above 0, and --usable above 0 and at most 1")
    if arguments.tiles is not None and arguments.tiles < 0:
        raise ValueError("--tiles must be at least 0")
    cfg = compose_run(arguments.overrides)
    if cfg.engine.name != "megatron":
        raise ConfigError("engine", "dsvl plan knows what Megatron's engine holds", value=cfg.engine.name, fix="engine=megatron")
    world_size = _world_size(arguments, cfg.launch)
    validate(cfg, world_size)
    if arguments.measure:
        _measure(cfg, Path(arguments.measure))
        cfg.parallel.layer_costs = arguments.measure
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

        print("\n".join([*describe(plan), "", *table(plan), bubbles(plan), _verdict(plan, limit, arguments, found)]))
    return int(plan.peak > limit)


def _measure(cfg: RunConfig, path: Path) -> None:
    from dsvl_train.models.costs import usual_tiles
    from dsvl_train.parallel.startup import start, stop

    if not path.absolute().parent.is_dir():
        raise ValueError(f"--measure {path}: its folder does not exist")
    world = start(cfg.engine, ParallelConfig(), seed=0)  # before anything that imports megatron-core
    from dsvl_train.models.measure import measure_layers

    tiles = max(round(usual_tiles(cfg.model, cfg.data.seq_len)), 2)
    measure_layers(cfg.model, cfg.stage, cfg.data.seq_len, tiles, world).write(path)
    stop()


def _world_size(arguments: argparse.Namespace, launch: LaunchConfig) -> int:
    if arguments.world is not None and (arguments.nodes, arguments.gpus) != (None, None):
        raise ValueError("give --world, or --nodes and --gpus, not both")
    if arguments.gpus is not None and arguments.nodes is None:
        raise ValueError("--gpus belongs to --nodes")
    size = launch.processes if arguments.world is None else arguments.world
    if arguments.nodes is not None:
        size = arguments.nodes * (launch.gpus_per_node if arguments.gpus is None else arguments.gpus)
    if size < 1:
        raise ValueError(f"{size} processes: there must be at least 1")
    return int(size)


def _verdict(plan: LayoutPlan, limit: float, arguments: argparse.Namespace, found: Found | None) -> str:
    from dsvl_train.planning.table import fullest, gib

    number, rank = fullest(plan)
    of = f"{gib(limit)} ({arguments.usable:.0%} of {arguments.device_memory:g})"
    if plan.peak <= limit:
        return f"fits: the fullest rank, {number}, needs {gib(rank.peak)} of {of}"
    name, size = max(rank.parts.items(), key=lambda item: item[1])
    refused = f"does not fit: rank {number} needs {gib(rank.peak)} of {of}; the most of it is {name}, {gib(size)}"
    if found is None:
        return f"{refused}\nno layout of {plan.world_size} processes near this one fits: start more, or shorten data.seq_len"
    nearest = f"nearest that fits ({gib(found.plan.peak)}, predicted time x {found.plan.times.average / plan.times.average:.2f}):"
    return f"{refused}\n{nearest}\n  {' '.join(with_changes(arguments.overrides, found.changes))}"


def with_changes(overrides: Sequence[str], changes: Sequence[Change]) -> list[str]:
    """The command line's overrides, with changed settings in place of what it said of them."""
    changed = {change.key for change in changes}
    return [*(one for one in overrides if one.partition("=")[0].lstrip("+") not in changed), *map(str, changes)]


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
        "tokens": plan.cfg.data.seq_len * plan.cfg.data.micro_batch_size,
        "tiles": plan.tiles,
        "micro_batches": plan.micro_batches,
        "bubble": plan.times.bubble,
        "ranks": ranks,
        "nearest": None if found is None else {"overrides": [str(change) for change in found.changes], "peak": found.plan.peak},
    }
