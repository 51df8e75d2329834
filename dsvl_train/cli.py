"""The `dsvl` command: everything that is not training."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dsvl_train.commands import convert, data, encode, generate, plan, score


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand. Exit code 0, or 2 after one clear line about what is wrong with the input."""
    parser = argparse.ArgumentParser(prog="dsvl", description="Use, check and report on models trained with dsvl_train.")
    commands = parser.add_subparsers(dest="command", required=True)
    encode.add(commands)
    score.add(commands)
    generate.add(commands)
    convert.add(commands)
    _add_eval(commands)
    _add_report(commands)
    data.add(commands)
    plan.add(commands)
    arguments, others = parser.parse_known_args(argv)
    if arguments.command == plan.NAME and not any(one.startswith("-") for one in others):
        arguments.overrides += others  # argparse takes positional arguments in one stretch only
    elif others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    # torch's threads would spin between operations, which on a busy machine makes small models ten times slower
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        return arguments.run(arguments)
    except (ValueError, OSError) as error:
        if os.environ.get("DSVL_TRACEBACK") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


# ---------------------------------------------------------------------------------------------------------------------- eval


def _add_eval(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("eval", help="score a checkpoint on tasks and on held-out text")
    parser.add_argument("--model", required=True, help="checkpoint folder, or a run folder (its latest checkpoint)")
    parser.add_argument(
        "--task", action="append", default=[], help="a task file (JSON lines of messages, images, answer); repeat for several"
    )
    parser.add_argument("--text", help="held-out documents (JSON lines of text), for bits per byte")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    encode.add_max_tiles(parser)
    parser.add_argument("--out", help="write the results with every answer to this JSON file")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.set_defaults(run=_eval)


def _eval(arguments: argparse.Namespace) -> int:
    from dsvl_train.parallel.startup import start_alone

    if not arguments.task and not arguments.text:
        raise ValueError("nothing to evaluate: give --task FILE, --text FILE, or both")
    _require_files("--task", arguments.task)
    _require_files("--text", [arguments.text] if arguments.text else [])
    world = start_alone(arguments.device)  # before anything that imports megatron-core
    from dsvl_train.evaluation.language_modelling import evaluate_bits_per_byte, read_texts
    from dsvl_train.evaluation.loading import load_model
    from dsvl_train.evaluation.tasks import evaluate_task, read_task

    tasks = {Path(file).stem: read_task(Path(file)) for file in arguments.task}
    texts = read_texts(Path(arguments.text)) if arguments.text else None
    loaded = load_model(arguments.model, world, max_tiles=arguments.max_tiles)
    results = {name: evaluate_task(loaded, metric, items, arguments.max_new_tokens) for name, (metric, items) in tasks.items()}
    summary: dict[str, object] = {
        "model": str(arguments.model),
        "tasks": {name: {"metric": result.metric, "score": result.score, "n": result.n} for name, result in results.items()},
    }
    if texts is not None:
        summary["bits_per_byte"] = evaluate_bits_per_byte(loaded, texts, loaded.cfg.data.seq_len - 1)
    print(json.dumps(summary))
    if arguments.out:
        examples = [{"task": name, **example} for name, result in results.items() for example in result.examples]
        Path(arguments.out).write_text(json.dumps(summary | {"examples": examples}, indent=1), encoding="utf-8")
    return 0


# -------------------------------------------------------------------------------------------------------------------- report


def _add_report(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("report", help="draw runs as one self-contained HTML page")
    parser.add_argument("runs", nargs="+", help="run folders, in the order in which they were trained")
    parser.add_argument("--out", default="report.html", help="the page to write")
    parser.add_argument("--eval", action="append", default=[], metavar="STAGE=FILE", help="results of `dsvl eval --out`; repeat per stage")
    parser.set_defaults(run=_report)


def _report(arguments: argparse.Namespace) -> int:
    from dsvl_train.reporting import parse_evaluations, report

    page = report([Path(run) for run in arguments.runs], Path(arguments.out), parse_evaluations(arguments.eval))
    print(page)
    return 0


# ------------------------------------------------------------------------------------------------------------------- helpers


def _require_files(option: str, files: Sequence[str]) -> None:
    for file in files:
        if not Path(file).is_file():
            raise FileNotFoundError(f"{option} {file} is not a file")


if __name__ == "__main__":
    sys.exit(main())
