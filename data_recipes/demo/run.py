"""The demo: `python -m data_recipes.demo.run --model vl2|vl [--seed 0] [--nproc 2] [--root runs/demo] [--fresh]`.

Runs the papers' whole path small, through the commands that a user types: prepare data, train the language model and the three stages,
evaluate after each on held-out data, write the report. Fails if digits are read less than 90 % right or if the language suffered more than
10 %. A stage that is finished is not run again; an interrupted one goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
STAGES = {"lm": "language model", "align": "stage 1, alignment", "pretrain": "stage 2, pretraining", "sft": "stage 3, fine-tuning"}
"""Recipe -> what people call it, in order."""
TASKS = ("digits", "words", "charts", "pages")
MIN_DIGIT_ACCURACY = 0.90
MAX_BITS_PER_BYTE_RATIO = 1.10
"""Held-out bits per byte after stage 3 over the language model's: text mixing keeps the language (VL §3.2.2)."""


@dataclass
class StageResult:
    stage: str
    minutes: float
    losses: dict[str, float] = field(default_factory=dict)
    """Modality -> mean loss of its last steps."""
    evaluation: dict[str, Any] = field(default_factory=dict)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=["vl", "vl2"], default="vl2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--nproc", type=int, default=4, help="training processes")
    parser.add_argument("--root", default="runs/demo", help="where data, runs and report go")
    parser.add_argument("--fresh", action="store_true", help="remove this model's earlier runs first")
    parser.add_argument("--set", action="append", default=[], metavar="STAGE:KEY=VALUE", help="an override for one stage, to experiment")
    arguments = parser.parse_args(argv)
    os.chdir(REPOSITORY)
    try:
        return demo(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"error: this step failed (exit code {error.returncode}): {' '.join(map(str, error.cmd))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def demo(arguments: argparse.Namespace) -> int:
    """Run every stage that is not done; the exit code says whether both thresholds hold."""
    root = Path(arguments.root)
    runs = root / arguments.model
    if arguments.fresh:
        shutil.rmtree(runs, ignore_errors=True)
    _require_same_seed(runs, arguments.seed)
    started = time.perf_counter()
    _call([sys.executable, "-m", "data_recipes.demo.prepare", "--out", str(root / "data")])
    results = []
    previous: Path | None = None
    for stage, title in STAGES.items():
        print(f"\n== {title} ==", flush=True)
        results.append(_run_stage(arguments, stage, root / "data", runs / stage, previous))
        previous = runs / stage
    report = _write_report(root, runs)
    print(f"\n{_table(results)}\n")
    print(f"{(time.perf_counter() - started) / 60:.1f} minutes in all; report: {report}")
    return _judge(results)


def _require_same_seed(runs: Path, seed: int) -> None:
    """A stage that is there would be taken for one of this seed.

    Raises:
        ValueError: a stage in `runs` was trained with another seed.
    """
    for stage in STAGES:
        config = runs / stage / "config.yaml"
        if config.is_file() and (other := yaml.safe_load(config.read_text(encoding="utf-8"))["run"]["seed"]) != seed:
            raise ValueError(
                f"{runs / stage} was trained with seed {other}, not {seed}: remove earlier runs with --fresh, or use another --root"
            )


def _run_stage(arguments: argparse.Namespace, stage: str, data: Path, run_dir: Path, previous: Path | None) -> StageResult:
    started = time.perf_counter()
    overrides = [item.partition(":")[2] for item in arguments.set if item.partition(":")[0] == stage]
    _call(
        [
            sys.executable,
            "train.py",
            f"recipe=demo_{arguments.model}/{stage}",
            f"run.seed={arguments.seed}",
            f"run.dir={run_dir}",
            f"launch.nproc={arguments.nproc}",
            f"data.processor={data}/processor_{arguments.model}",
            *([f"init.from={previous}"] if previous else []),
            *_source_paths(stage, data),
            *overrides,
        ]
    )
    minutes = (time.perf_counter() - started) / 60
    return StageResult(stage, minutes, _last_losses(run_dir), _evaluate(stage, data, run_dir))


def _source_paths(stage: str, data: Path) -> list[str]:
    folders = {"lm": ["text"], "align": ["align"], "pretrain": ["pretrain", "text"], "sft": ["sft", "sft_text", "text"]}[stage]
    return [f"data.sources.{name}.path={data}/{'text/train' if name == 'text' else name}" for name in folders]


def _evaluate(stage: str, data: Path, run_dir: Path) -> dict[str, Any]:
    """`dsvl eval` on held-out data: text after every stage, the questions after fine-tuning."""
    out = run_dir / "evaluation.json"
    checkpoint = (run_dir / "checkpoints" / "latest").read_text()
    if out.is_file() and out.stat().st_mtime > (run_dir / "checkpoints" / "latest").stat().st_mtime:
        return json.loads(out.read_text())
    print(f"evaluating {checkpoint.strip()} on held-out data", flush=True)
    command = [sys.executable, "-m", "dsvl_train.cli", "eval", "--model", str(run_dir), "--text", f"{data}/text/heldout.jsonl"]
    if stage == "sft":
        for task in TASKS:
            command += ["--task", f"{data}/eval/{task}.jsonl"]
    _call([*command, "--out", str(out)])
    return json.loads(out.read_text())


def _last_losses(run_dir: Path, steps: int = 20) -> dict[str, float]:
    from dsvl_train.reporting.metrics import read_metrics

    losses: dict[str, list[float]] = {}
    for record in read_metrics(run_dir / "metrics.jsonl"):
        losses.setdefault(record["modality"], []).append(record["loss"])
    return {modality: sum(values[-steps:]) / len(values[-steps:]) for modality, values in losses.items()}


def _write_report(root: Path, runs: Path) -> Path:
    report = root / "report.html"
    evaluations = [argument for stage in STAGES for argument in ("--eval", f"{stage}={runs}/{stage}/evaluation.json")]
    _call([sys.executable, "-m", "dsvl_train.cli", "report", *(str(runs / stage) for stage in STAGES), "--out", str(report), *evaluations])
    return report


def _table(results: list[StageResult]) -> str:
    lines = [f"{'stage':<24}{'minutes':>8}{'text loss':>11}{'image loss':>12}{'bits per byte':>15}"]
    for result in results:
        text, image = (f"{result.losses[m]:.3f}" if m in result.losses else "-" for m in ("text", "multimodal"))
        bits = result.evaluation["bits_per_byte"]
        lines.append(f"{STAGES[result.stage]:<24}{result.minutes:>8.1f}{text:>11}{image:>12}{bits:>15.3f}")
    lines.append("")
    for task, scores in results[-1].evaluation["tasks"].items():
        lines.append(f"held-out {task:<8}{scores['metric'].replace('_', ' '):<20}{scores['score']:>8.1%}  of {scores['n']}")
    return "\n".join(lines)


def _judge(results: list[StageResult]) -> int:
    digits = results[-1].evaluation["tasks"]["digits"]["score"]
    before, after = results[0].evaluation["bits_per_byte"], results[-1].evaluation["bits_per_byte"]
    failures = []
    if digits < MIN_DIGIT_ACCURACY:
        failures.append(f"held-out digits are read {digits:.1%} right, under {MIN_DIGIT_ACCURACY:.0%}")
    if after > MAX_BITS_PER_BYTE_RATIO * before:
        failures.append(f"held-out text went from {before:.3f} to {after:.3f} bits per byte, more than 10 % worse")
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    if not failures:
        print(
            f"digits {digits:.1%} (at least 90 %), bits per byte {after / before - 1:+.1%} against the language model (at most +10 %): met"
        )
    return 1 if failures else 0


def _call(command: list[str]) -> None:
    """Run a command as a user would; Ctrl-C reaches it too, and it is waited for."""
    process = subprocess.Popen(command, cwd=REPOSITORY)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise subprocess.CalledProcessError(code, command)


if __name__ == "__main__":
    sys.exit(main())
