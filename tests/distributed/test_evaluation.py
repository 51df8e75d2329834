"""Evaluation on several ranks: every layout gives one process's scores, and training goes on as if there had been none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsvl_train.data.processor import write_processor_folder
from dsvl_train.data.tokenizer import train_byte_level_bpe
from dsvl_train.failures import DONE, TERMINATED
from dsvl_train.interop.importer import import_model
from dsvl_train.reporting.metrics import read_metrics
from tests.distributed.harness import run_ranks
from tests.distributed.small_runs import REPOSITORY, losses, make_data, overrides, train
from tests.distributed.test_guards import run_faulty
from tests.made_benchmarks import png, write_hellaswag
from tests.made_models import write_multi_modality

FULL = pytest.mark.full
TOLERANCE = 1e-5


def write_tasks(folder: Path) -> dict[str, str]:
    """Options with images (one item without), held-out samples by group, answers to write; fewer or more items than ranks."""
    for seed in range(3):
        (folder / f"{seed}.png").write_bytes(png(seed, (40 + 60 * seed, 50)))
    user = {"role": "user", "content": "<image>\nwhat is this"}
    lines: dict[str, list[dict[str, Any]]] = {
        "choices": [
            {
                "messages": [user],
                "images": [f"{n % 3}.png"],
                "options": ["one", "two on the tile", "three"],
                "answer": n % 3,
                "group": "gh"[n % 2],
            }
            for n in range(4)
        ]
        + [{"messages": [{"role": "user", "content": "say one"}], "images": [], "options": ["one", "five"], "answer": "one"}],
        "sources": [
            {"messages": [user, {"role": "assistant", "content": "a window"}], "images": ["1.png"], "group": "captions"},
            {"messages": [{"role": "document", "content": "what is this word"}], "group": "text"},
            {"messages": [{"role": "document", "content": "on the tile and in the window"}], "group": "text"},
        ],
        "answers": [
            {"messages": [user], "images": ["0.png"], "answer": "one", "metric": "anls"},
            {"messages": [{"role": "user", "content": "two"}], "answer": ["two", "window"], "metric": "anls"},
            {"messages": [user], "images": ["2.png"], "answer": "six", "metric": "anls"},
        ],
        "one": [{"messages": [user], "images": ["1.png"], "options": ["a", "tile"], "answer": 1}],
    }
    for name, records in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    write_hellaswag(folder / "hellaswag.jsonl")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("what is this", "the tile " * 12, "a")))
    names = {name: f"{folder}/{name}.jsonl" for name in lines}
    return names | {"hellaswag": f"hellaswag:{folder}/hellaswag.jsonl"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    bpe = train_byte_level_bpe(["what is this word on the tile and in the window"] * 20, 300)
    write_processor_folder("vl2", folder / "processor_vl2", bpe, image_size=32, patch_size=8, downsample_ratio=2)
    write_processor_folder("vl", folder / "processor_vl", bpe, image_size=64, tokens_per_image=16)
    return folder


def evaluate_tiny(family: str, parallel: dict[str, Any], folder: Path, tasks: dict[str, str]) -> dict[str, Any]:
    """Scores of a tiny model of weights drawn by name, as the callback gives them, and what is left of the model's state afterwards."""
    import torch

    from dsvl_train.config.schema import EvalConfig
    from dsvl_train.parallel import startup
    from tests.tiny import tiny_run

    cfg = tiny_run(family, **parallel)
    cfg.model.language.vocab_size, cfg.model.language.init_std = 320, 0.3
    cfg.data.processor, cfg.data.seq_len = f"{folder}/processor_{family}", 16
    cfg.eval = EvalConfig(every=1, tasks=tasks, text=f"{folder}/text.jsonl", max_new_tokens=6, tokens_at_once=70)
    world = startup.start(cfg.engine, cfg.parallel, seed=0)
    from dsvl_train.models.build import build_model
    from dsvl_train.models.costs import choose_division
    from dsvl_train.training.callbacks.evaluation import Evaluation, undisturbed
    from dsvl_train.training.setup import build_trainable

    model = build_model(cfg.model, cfg.stage, cfg.parallel, world, seed=0, division=choose_division(cfg))
    chunks, _ = build_trainable(cfg, world, model)
    pulses: list[tuple[int, str]] = []
    evaluation = Evaluation(cfg, world, model, lambda step, phase: pulses.append((step, phase)), lambda: False)
    evaluator = evaluation._evaluator
    before = torch.get_rng_state()
    with undisturbed(model):
        results = {name: evaluator.run(name, task) for name, task in evaluation._tasks.items()}
        bits = evaluator.bits_per_byte(evaluation._texts).score
    assert torch.equal(before, torch.get_rng_state())
    assert all(module.training for chunk in chunks.values() for module in chunk.modules())
    assert all(not router.load_e.any() and not router.aux_loss for router in model.routers().values())
    assert pulses
    startup.stop()
    return {
        name: (result.score, result.groups, [(example.get("choice"), example["answer"]) for example in result.examples])
        for name, result in results.items()
    } | {"bits": (bits, {}, [])}


ALONE: dict[str, dict[str, Any]] = {}


@pytest.mark.parametrize(
    ("family", "parallel", "ranks"),
    [
        ("vl2", {"tp": 2}, 2),
        ("vl2", {"ep": 2}, 2),
        ("vl2", {"pp": 2, "tp": 2}, 4),
        ("vl", {"pp": 2, "vision_division": "first_stage"}, 2),
        pytest.param("vl2", {}, 2, marks=FULL),
        pytest.param("vl2", {"tp": 2, "ep": 4}, 4, marks=FULL),
        pytest.param("vl", {"tp": 2}, 4, marks=FULL),
        pytest.param("vl2", {"pp": 2, "ep": 2}, 4, marks=FULL),
        pytest.param("vl2", {"pp": 2, "vpp": 2, "vision_division": "first_stage"}, 4, marks=FULL),
        pytest.param("vl", {"pp": 2, "vpp": 2}, 2, marks=FULL),
    ],
)
def test_every_layout_gives_the_scores_of_one_process(family: str, parallel: dict[str, Any], ranks: int, folder: Path) -> None:
    tasks = write_tasks(folder)
    if family not in ALONE:
        (ALONE[family],) = run_ranks(evaluate_tiny, 1, family, {}, folder, tasks)
    if parallel.get("pp", 1) > 1:
        del tasks["answers"]
    everyone = run_ranks(evaluate_tiny, ranks, family, parallel, folder, tasks)
    assert all(one == everyone[0] for one in everyone)
    for name, (score, groups, examples) in everyone[0].items():
        want_score, want_groups, want_examples = ALONE[family][name]
        assert examples == want_examples, name
        assert score == pytest.approx(want_score, rel=TOLERANCE)
        assert groups == {group: (pytest.approx(value, rel=TOLERANCE), n) for group, (value, n) in want_groups.items()}
    assert len({answer for _, answer in ALONE[family]["answers"][2]}) == 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(
    "engine", [[], ["engine=deepspeed", "engine.zero_stage=3", "engine.zero_keep_whole=1000"]], ids=["megatron", "deepspeed"]
)
def test_training_goes_on_as_if_there_had_been_no_evaluation(data: Path, folder: Path, tmp_path: Path, engine: list[str]) -> None:
    """Bit for bit, on two ranks, through a stop and a resumption."""
    tasks = write_tasks(folder)
    evaluate = ["eval.every=3", f"eval.text={folder}/text.jsonl", "eval.max_new_tokens=4"]
    evaluate += [f"eval.tasks.{name}={tasks[name]}" for name in ("choices", "sources", "answers")]
    for name, parts in (("plain", [[]]), ("evaluated", [[*evaluate, "run.stop_after=4"], evaluate])):
        for part in parts:
            done = train(overrides(data, tmp_path / name, *engine, *part), ranks=2)
            assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "plain") == losses(tmp_path / "evaluated")
    records = read_metrics(tmp_path / "evaluated" / "metrics.jsonl")
    keys = {"eval/choices", "eval/choices/g", "eval/sources/captions", "eval/answers", "eval/bits_per_byte", "eval/seconds"}
    assert [record["step"] for record in records if keys <= record.keys()] == [3, 6, 8]
    assert not any(key.startswith("eval/") for record in records if record["step"] not in (3, 6, 8) for key in record)
    evaluations = read_metrics(tmp_path / "evaluated" / "evaluation.jsonl")
    assert [evaluation["step"] for evaluation in evaluations] == [3, 6, 8]
    assert evaluations[0]["tasks"]["choices"]["score"] == records[2]["eval/choices"]
    assert evaluations[0]["tasks"]["answers"]["examples"][1]["truth"] == "two | window"


def test_a_wish_to_stop_ends_an_evaluation(data: Path, folder: Path, tmp_path: Path) -> None:
    """SIGTERM to one rank as it begins: its scores are left out, and the run saves and goes on later with the same losses."""
    tasks = write_tasks(folder)
    evaluate = ["eval.every=3", f"eval.tasks.choices={tasks['choices']}", "eval.tokens_at_once=64"]
    run_dir = tmp_path / "run"
    assert run_faulty(data, run_dir, *evaluate, fault="signal evaluating choices", step=3) == TERMINATED
    records = read_metrics(run_dir / "metrics.jsonl")
    assert 3 <= len(records) <= 4 and not any("eval/choices" in record for record in records)
    assert (run_dir / "checkpoints" / "latest").read_text().strip() == f"step_{len(records):08d}"
    assert run_faulty(data, run_dir, *evaluate) == DONE
    assert [record["step"] for record in read_metrics(run_dir / "metrics.jsonl") if "eval/choices" in record] == [6]


def test_dsvl_eval_divides_the_items_over_processes(folder: Path, tmp_path: Path) -> None:
    """Two processes print one line, the same that one prints."""
    import_model(write_multi_modality(tmp_path / "released", hybrid=False), tmp_path / "ckpt")
    arguments = ["eval", "--model", f"{tmp_path}/ckpt", "--text", f"{folder}/text.jsonl", "--limit", "3", "--max-new-tokens", "4"]
    for task in write_tasks(folder).values():
        arguments += ["--task", task]
    lines = []
    for number, start in enumerate((["-m"], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"])):
        command = [sys.executable, *start, "dsvl_train.cli", *arguments, "--out", f"{tmp_path}/{number}.json"]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        lines.append(json.loads(done.stdout))
    assert lines[0].keys() == {"model", "tasks", "bits_per_byte"} and lines[0]["tasks"].keys() == set(write_tasks(folder))
    assert lines[0]["tasks"]["choices"]["n"] == 3 and lines[0]["tasks"]["hellaswag"] == lines[1]["tasks"]["hellaswag"]
    assert lines[0]["bits_per_byte"] == pytest.approx(lines[1]["bits_per_byte"], rel=TOLERANCE)
    first, second = (json.loads((tmp_path / f"{number}.json").read_text())["examples"] for number in (0, 1))
    assert [(one["task"], one["answer"]) for one in first] == [(one["task"], one["answer"]) for one in second]


def test_what_cannot_be_evaluated_is_told_before_the_first_step(data: Path, folder: Path, tmp_path: Path) -> None:
    tasks = write_tasks(folder)
    pipeline = ["parallel.pp=2", "eval.every=3", f"eval.tasks.answers={tasks['answers']}"]
    done = train(overrides(data, tmp_path / "run", *pipeline), ranks=2)
    assert done.returncode == 2, done.stderr
    assert "eval.tasks.answers" in done.stderr and "parallel.pp=2" in done.stderr and "Traceback" not in done.stderr
    broken = png(0)[:300]
    (folder / "2.png").write_bytes(broken)
    done = train(overrides(data, tmp_path / "run", "eval.every=3", f"eval.tasks.choices={tasks['choices']}"), ranks=2)
    assert done.returncode == 2, done.stderr
    assert "choices.jsonl: sample 2" in done.stderr and "does not decode" in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
