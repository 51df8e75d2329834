"""`dsvl data index` and `dsvl data check`: measure shards before a run, and read them once to see what it would skip."""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsvl_train.config.schema import DataConfig

NO_LIMIT = 1 << 30
"""data.seq_len where nobody said one."""


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the subcommands."""
    parser = commands.add_parser("data", help="index and check data")
    actions = parser.add_subparsers(dest="action", required=True)
    index = actions.add_parser(
        "index",
        help="measure every sample of shards, so that batches can be planned before they are read",
        description="Measures every sample of shards. An interrupted command goes on where it was; a fresh index is left as it is.",
    )
    check = actions.add_parser(
        "check",
        help="read every sample once, images too, and say what a run would skip",
        description="Reads every sample once, as a run does. Exit code 0: everything can be used. 1: something would be skipped, and is "
        "listed. 2: the arguments or files are wrong.",
    )
    for action in (index, check):
        _add_what(action)
    check.add_argument("--seq-len", type=int, default=NO_LIMIT, help="samples of more tokens are skipped, as data.seq_len says")
    check.add_argument("--max-tiles-per-sequence", type=int, help="samples of more tiles are skipped, as data.max_tiles_per_sequence says")
    check.add_argument("--out", help="write a JSON line per sample that would be skipped: source, shard, key, kind, message")
    index.set_defaults(run=_index, seq_len=NO_LIMIT, max_tiles_per_sequence=None)
    check.set_defaults(run=_check)


def _add_what(parser: argparse.ArgumentParser) -> None:
    """What to measure, with the settings of a run: the index belongs to them."""
    parser.add_argument("shards", nargs="?", help="a folder of .tar files, a glob, or a brace pattern; a path or a URL (s3://, https://)")
    parser.add_argument("--processor", help="folder of tokenizer.json and processor_config.json")
    parser.add_argument(
        "--run", dest="overrides", nargs="+", metavar="KEY=VALUE", help="all data of the run `python train.py KEY=VALUE ...`, instead"
    )
    parser.add_argument("--workers", type=int, help="processes (default: one per core)")
    settings = parser.add_argument_group("settings of the run (data.*)")
    settings.add_argument("--index-dir", help="folder for the index (default: beside the shards)")
    settings.add_argument("--mask-prompt", choices=["true", "false"])
    settings.add_argument("--tile-selection", choices=["released", "paper"])
    settings.add_argument("--max-tiles", type=int)
    settings.add_argument("--tiling-image-limit", type=int)
    settings.add_argument("--max-image-pixels", type=int)


def data_config(arguments: argparse.Namespace) -> DataConfig:
    """The data settings that the arguments mean.

    Raises:
        ValueError: neither SHARDS nor --run, or both.
    """
    from dsvl_train.config.compose import compose_run
    from dsvl_train.config.schema import DataConfig, SourceConfig
    from dsvl_train.data.sources import INDEX_SETTINGS

    names = (*INDEX_SETTINGS, "index_dir", "max_tiles_per_sequence")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if arguments.overrides:
        if arguments.shards or arguments.processor or given or arguments.seq_len != NO_LIMIT:
            raise ValueError("--run says everything itself: give settings as data.KEY=VALUE after it, and no SHARDS and no --processor")
        return compose_run(arguments.overrides).data
    if not arguments.shards or not arguments.processor:
        raise ValueError("give SHARDS and --processor FOLDER, or --run recipe=FAMILY/STAGE ...")
    if "mask_prompt" in given:
        given["mask_prompt"] = given["mask_prompt"] == "true"
    assert set(given) <= {one.name for one in fields(DataConfig)}
    source = SourceConfig(kind="shards", path=arguments.shards, modality="multimodal")
    sources = {"shards": source}
    return DataConfig(arguments.processor, sources, seq_len=arguments.seq_len, packing=True, batch_size=1, **given)


def _index(arguments: argparse.Namespace) -> int:
    """Make the indexes; print what they hold."""
    from dsvl_train.data.index_build import open_index
    from dsvl_train.data.loader import open_processor
    from dsvl_train.data.processes import usable_cores
    from dsvl_train.data.sources import index_command
    from dsvl_train.data.storage import open_remote_files

    _log_to_stderr()
    cfg = data_config(arguments)
    processor = open_processor(cfg)
    for name, source in cfg.sources.items():
        if source.kind != "shards":
            continue
        index = open_index(
            source.path,
            processor,
            setting="SHARDS" if arguments.shards else f"data.sources.{name}.path",
            command=index_command(cfg, source.path),
            rebuild=True,
            workers=arguments.workers or usable_cores(),
            index_dir=cfg.index_dir,
            remote=open_remote_files(cfg.cache_dir, cfg.cache_gb, cfg.read_retries),
        )
        print(f"{source.path}: {len(index)} samples, {len(index.skipped)} skipped, {index.tokens} tokens, {index.tiles} tiles")
        for damaged in index.damaged:
            print(f"damaged {damaged.shard} at byte {damaged.offset}: {damaged.reason}")
        for skipped in index.skipped[:20]:
            print(f"skipped {skipped.shard} {skipped.key}: {skipped.kind}: {skipped.reason}")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    """Print a summary; 0 if nothing would be skipped."""
    from functools import partial

    from dsvl_train.data.check import check_data, write_report
    from dsvl_train.data.index_build import show_progress
    from dsvl_train.data.loader import open_processor
    from dsvl_train.data.processes import usable_cores

    _log_to_stderr()
    cfg = data_config(arguments)
    progress = partial(show_progress, "reading", 0, unit="sample")
    reports = check_data(cfg, open_processor(cfg), workers=arguments.workers or usable_cores(), progress=lambda total: progress(total))
    if arguments.out:
        write_report(Path(arguments.out), reports)
    for report in reports:
        read_bad = len(report.bad) - report.left_out
        print(f"{report.name}: {report.samples - read_bad} samples can be used, {len(report.bad)} cannot; {report.shards} shards")
        for kind, count in report.kinds().items():
            print(f"  {kind}: {count}")
        for damaged in report.damaged_shards:
            print(f"  {damaged}")
        for entry in [] if arguments.out else report.bad[:20]:
            print(f"  {entry.shard} {entry.key}: {entry.kind}: {entry.message}")
        if len(report.bad) > 20 and not arguments.out:
            print(f"  (and {len(report.bad) - 20} more; --out FILE lists all)")
    return int(any(report.bad or report.damaged_shards for report in reports))


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
