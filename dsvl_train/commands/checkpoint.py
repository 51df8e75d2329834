"""`dsvl checkpoint list|verify|diff`: what a run has saved, whether it is whole, and how two checkpoints differ."""

from __future__ import annotations

import argparse
from pathlib import Path

from dsvl_train.checkpoints.folders import list_steps, looks_like_checkpoint, named_latest, resolve
from dsvl_train.checkpoints.manifest import DamagedCheckpointError, check

_TENSORS_SHOWN = 20


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the subcommands."""
    parser = commands.add_parser("checkpoint", help="list, verify and compare checkpoints")
    actions = parser.add_subparsers(dest="action", required=True)
    listing = actions.add_parser("list", help="steps, times, sizes, layouts, and whether all files are there")
    listing.add_argument("path", metavar="RUN", help="run folder")
    listing.set_defaults(run=_list)
    verify = actions.add_parser(
        "verify",
        help="compare every file with the manifest",
        description="Reads every file. Exit code 0: all whole. 1: something is damaged, and is named. 2: there is no checkpoint.",
    )
    verify.add_argument("path", metavar="PATH", help="checkpoint folder, or a run folder (all its checkpoints)")
    verify.add_argument("--size", action="store_true", help="compare sizes only")
    verify.set_defaults(run=_verify)
    diff = actions.add_parser(
        "diff",
        help="settings, counters and tensors that differ between two checkpoints, of whatever layouts",
        description="Exit code 0: the same bit for bit. 1: something differs.",
    )
    diff.add_argument("first", metavar="PATH", help="checkpoint folder, or a run folder (its latest checkpoint)")
    diff.add_argument("second", metavar="PATH2", help="the other one")
    diff.add_argument("--all", action="store_true", help=f"list every tensor that differs, not the {_TENSORS_SHOWN} that differ most")
    diff.set_defaults(run=_diff)


def _list(arguments: argparse.Namespace) -> int:
    run_dir = Path(arguments.path)
    steps, latest = _steps(run_dir), named_latest(run_dir)
    for path in steps:
        marker = "latest" if path == latest else ""
        try:
            manifest = check(path, full=False)
        except DamagedCheckpointError as error:
            print(f"{path.name}  damaged: {'; '.join(error.problems)}  {marker}".rstrip())
            continue
        layout = " ".join(f"{key}={value}" for key, value in manifest.layout.items() if key in ("ranks", "tp", "pp", "ep", "dp"))
        when = manifest.saved_at[:19].replace("T", " ")
        print(f"{path.name}  {when} UTC  {_size(manifest.bytes):>9}  {len(manifest.files)} files  {layout}  {marker}".rstrip())
    if latest is not None and latest not in steps:
        print(f"latest names {latest.name}, which is missing")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    path, code = Path(arguments.path), 0
    for folder in [path] if looks_like_checkpoint(path) else _steps(path):
        try:
            manifest = check(folder, full=not arguments.size)
            print(f"{folder}: whole, {len(manifest.files)} files, {_size(manifest.bytes)}")
        except DamagedCheckpointError as error:
            code = 1
            for problem in error.problems:
                print(f"{folder}: {problem}")
    return code


def _diff(arguments: argparse.Namespace) -> int:
    from dsvl_train.interop.compare import compare

    found = compare(resolve(arguments.first), resolve(arguments.second))
    for line in [*found.values, *found.presence]:
        print(line)
    most = sorted(found.tensors, key=lambda one: -one.relative)
    for one in most if arguments.all else most[:_TENSORS_SHOWN]:
        share = f"{one.differing} of {one.elements} elements"
        print(f"{one.name}: {share} differ, by {one.largest:.3g} at most; {one.relative:.3g} of its norm")
    if len(most) > _TENSORS_SHOWN and not arguments.all:
        print(f"(and {len(most) - _TENSORS_SHOWN} more tensors that differ less; --all lists them)")
    print(f"{found.same_tensors} tensors are the same, {len(found.tensors)} differ")
    return int(not found.same)


def _steps(run_dir: Path) -> list[Path]:
    steps = list_steps(run_dir)
    if not steps:
        raise ValueError(f"{run_dir} has no checkpoints (no checkpoints/step_… in it)")
    return steps


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
