"""`dsvl eval`: scores of a model on tasks, benchmarks and held-out text."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from dsvl_train.commands.encode import add_max_tiles


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser(
        "eval",
        help="score a model on tasks, benchmarks and held-out text",
        description="Scores a model. Under torchrun the items are divided over the processes.",
    )
    parser.add_argument("--model", required=True, help="checkpoint, run folder (its latest checkpoint), or folder in a released format")
    parser.add_argument(
        "--task",
        action="append",
        default=[],
        metavar="[NAME=][LAYOUT:]FILE",
        help="a task file (JSON lines; see dsvl_train/evaluation/tasks.py), or a benchmark's own file or folder after mmlu:, hellaswag:, "
        "mmbench:, mmmu: or gsm8k:, or held-out shards after shards:, for their perplexity; repeat for several",
    )
    parser.add_argument("--text", help="held-out documents (JSON lines of text), for bits per byte")
    parser.add_argument("--plain", action="store_true", help="put a benchmark's questions as plain text, without the model's template")
    parser.add_argument(
        "--options",
        choices=["text", "letter"],
        default="text",
        help="text: each option's text is scored as the answer (VL §3.2.2; the default); letter: options are listed, their letters scored",
    )
    parser.add_argument("--shots", type=int, default=0, help="worked examples before each question of the benchmark")
    parser.add_argument("--shots-from", metavar="FILE", help="file or folder of the same layout that they come from")
    parser.add_argument("--limit", type=int, help="items of each task and texts at most, spread evenly over the file")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    add_max_tiles(parser)
    parser.add_argument("--out", help="write the results with every answer to this JSON file")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print one line of JSON; the answers go to --out."""
    from dsvl_train.parallel.startup import start_alone, stop

    _check(arguments)
    world = start_alone(arguments.device)  # before anything that imports megatron-core
    from dsvl_train.evaluation.evaluator import Evaluator
    from dsvl_train.evaluation.language_modelling import read_texts
    from dsvl_train.evaluation.layouts import open_task
    from dsvl_train.evaluation.loading import load_model
    from dsvl_train.evaluation.prompts import Style
    from dsvl_train.evaluation.ranks import Ranks
    from dsvl_train.evaluation.tasks import Task, spread

    style = Style(arguments.plain, arguments.options)
    tasks = {}
    for name, source in _named(arguments.task).items():
        task = open_task(source, style, shots=arguments.shots, shots_from=arguments.shots_from)
        tasks[name] = Task(task.metric, spread(task.items, arguments.limit))
    texts = spread(read_texts(arguments.text), arguments.limit) if arguments.text else None
    loaded = load_model(arguments.model, world, max_tiles=arguments.max_tiles)
    evaluator = Evaluator(loaded, Ranks(world, loaded.cfg.parallel), arguments.max_new_tokens, progress=True)
    results = {name: evaluator.run(name, task) for name, task in tasks.items()}
    summary: dict[str, object] = {
        "model": str(arguments.model),
        "tasks": {name: result.summary() for name, result in results.items()},
    }
    if texts is not None:
        summary["bits_per_byte"] = evaluator.bits_per_byte(texts).score
    if world.is_main:
        print(json.dumps(summary))
        if arguments.out:
            examples = [{"task": name, **example} for name, result in results.items() for example in result.examples]
            Path(arguments.out).write_text(json.dumps(summary | {"examples": examples}, indent=1), encoding="utf-8")
    if world.size > 1:
        stop()
    return 0


def _named(tasks: list[str]) -> dict[str, str]:
    """Name -> where the task is; a file's own name, a folder's layout, unless NAME= says otherwise."""
    named: dict[str, str] = {}
    for task in tasks:
        match = re.fullmatch(r"(\w[\w.-]*)=(.+)", task)
        source = match[2] if match else task
        layout, _, path = source.rpartition(":")
        name = match[1] if match else layout if layout and not Path(path).suffix else Path(path).stem
        if name in named:
            raise ValueError(f"--task {task}: another task is called {name} already; give one a name, --task NAME=FILE")
        named[name] = source
    return named


def _check(arguments: argparse.Namespace) -> None:
    if not arguments.task and not arguments.text:
        raise ValueError("nothing to evaluate: give --task FILE, --text FILE, or both")
    for option, value, least in (("--limit", arguments.limit, 1), ("--shots", arguments.shots, 0)):
        if value is not None and value < least:
            raise ValueError(f"{option} {value} must be at least {least}")
    if arguments.shots and (arguments.shots_from is None or len(arguments.task) != 1):
        raise ValueError("--shots wants --shots-from FILE, and one --task of the same layout")
    if arguments.text and not Path(arguments.text).is_file():
        raise FileNotFoundError(f"--text {arguments.text} is not a file")
