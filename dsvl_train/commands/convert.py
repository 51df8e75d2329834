"""`dsvl import` and `dsvl export`: model folders of others to our checkpoints, and back."""

from __future__ import annotations

import argparse
import logging
import re
import sys

FORMATS = ("deepseek_vl_v2", "multi_modality", "transformers")


def add(commands: argparse._SubParsersAction) -> None:
    """Declare both subcommands."""
    _add_import(commands)
    _add_export(commands)


def _add_import(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("import", help="make a checkpoint of a released model folder")
    parser.add_argument("source", metavar="SRC", help="folder of DeepSeek-VL or DeepSeek-VL2, as released or in transformers' layout")
    parser.add_argument("--out", required=True, help="the checkpoint folder to make")
    parser.set_defaults(run=_import)


def _import(arguments: argparse.Namespace) -> int:
    from dsvl_train.interop.importer import import_model

    model = import_model(arguments.source, arguments.out)
    print(f"{arguments.out}: {model.name} ({model.family}); start a run from it with init.from={arguments.out}")
    return 0


def _add_export(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("export", help="make a model folder that transformers, vLLM or the released code load")
    parser.add_argument("checkpoint", metavar="CKPT", help="checkpoint folder, or a run folder (its latest checkpoint)")
    parser.add_argument("--format", required=True, choices=FORMATS, help="transformers: DeepSeek-VL only (there is no VL2 class)")
    parser.add_argument("--out", required=True, help="the model folder to make")
    size = {"type": parse_size, "default": parse_size("5GB"), "metavar": "SIZE"}
    parser.add_argument("--max-shard-size", **size, help="of a weight file, e.g. 5GB or 500MB (default 5GB)")
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], help="of the weights (default: as stored)")
    parser.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> int:
    from dsvl_train.interop.exporter import export_model

    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    export_model(
        arguments.checkpoint,
        arguments.out,
        arguments.format,
        dtype=arguments.dtype,
        max_shard_bytes=arguments.max_shard_size,
    )
    print(arguments.out)
    return 0


def parse_size(text: str) -> int:
    """`5GB`, `500MB`, `2GiB` or a number of bytes."""
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text.strip())
    if match is None or match[2].upper() not in units or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB")
    return max(1, int(float(match[1]) * units[match[2].upper()]))
