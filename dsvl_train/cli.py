"""The `dsvl` command: everything that is not training."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dsvl_train.commands import chain, checkpoint, convert, data, encode, eval, generate, plan, score


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand. Exit code 0, or 2 after one clear line about what is wrong with the input."""
    parser = argparse.ArgumentParser(prog="dsvl", description="Use, check and report on models trained with dsvl_train.")
    commands = parser.add_subparsers(dest="command", required=True)
    encode.add(commands)
    score.add(commands)
    generate.add(commands)
    convert.add(commands)
    eval.add(commands)
    _add_report(commands)
    data.add(commands)
    checkpoint.add(commands)
    plan.add(commands)
    chain.add(commands)
    arguments, others = parser.parse_known_args(argv)
    if arguments.command in (plan.NAME, chain.NAME) and not any(one.startswith("-") for one in others):
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


# -------------------------------------------------------------------------------------------------------------------- report


def _add_report(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("report", help="draw runs, or a sweep, as one self-contained HTML page")
    parser.add_argument("runs", nargs="+", help="run folders, in the order in which they were trained; or the folder of a sweep")
    parser.add_argument("--out", default="report.html", help="the page to write")
    parser.add_argument("--eval", action="append", default=[], metavar="STAGE=FILE", help="results of `dsvl eval --out`; repeat per stage")
    parser.set_defaults(run=_report)


def _report(arguments: argparse.Namespace) -> int:
    from dsvl_train.reporting import is_sweep, parse_evaluations, report, report_sweep

    if len(arguments.runs) == 1 and not arguments.eval and is_sweep(Path(arguments.runs[0])):
        print(report_sweep(Path(arguments.runs[0]), Path(arguments.out)))
        print(arguments.out)
        return 0
    page = report([Path(run) for run in arguments.runs], Path(arguments.out), parse_evaluations(arguments.eval))
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
