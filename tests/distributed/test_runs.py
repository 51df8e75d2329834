"""Runs as a user types them: train.py with its own ranks and under torchrun, Ctrl-C, resume, and one clear error for what is wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from made_data import picture

from dsvl_train.checkpoints.durable import FileEntry
from dsvl_train.checkpoints.folders import find_latest, list_steps
from dsvl_train.checkpoints.manifest import check
from dsvl_train.data.shards import ShardWriter
from dsvl_train.reporting.metrics import read_metrics
from dsvl_train.reporting.samples_file import read_samples
from tests.distributed.harness import small_disk
from tests.distributed.small_runs import ANSWERS, REPOSITORY, losses, make_data, overrides, start, train

FULL = pytest.mark.full
PIPELINE = ["parallel.tp=2", "parallel.pp=2"]
EXPERTS = ["parallel.ep=2", "parallel.tile_balance=true"]
SHARED_STATE = "parallel.distributed_optimizer=true"
ZERO1, ZERO2, ZERO3 = (["engine=deepspeed", f"engine.zero_stage={stage}", "engine.zero_keep_whole=1000"] for stage in (1, 2, 3))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("uninterrupted")
    done = train(overrides(data, run_dir), ranks=2)
    assert done.returncode == 0, done.stderr
    return run_dir


def test_a_run_writes_what_scripts_rely_on(uninterrupted: Path) -> None:
    records = read_metrics(uninterrupted / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 9))
    keys = (
        "modality loss grad_norm lr tokens supervised_tokens tiles text_share text_share_target step_s data_wait_s tokens_per_s "
        "tile_imbalance pack_fill bad_samples expert_load"
    )
    for record in records:
        assert set(keys.split()) <= record.keys()
        assert (record["tiles"] > 0) == (record["modality"] == "multimodal")
    assert {record["modality"] for record in records} == {"text", "multimodal"}
    assert (uninterrupted / "config.yaml").is_file()
    assert (uninterrupted / "checkpoints" / "latest").read_text().strip() == "step_00000008"
    assert (uninterrupted / "checkpoints" / "step_00000008" / "state.json").is_file()


def test_the_realised_text_share_is_within_one_step_of_its_schedule(uninterrupted: Path) -> None:
    text = target = 0.0
    for record in read_metrics(uninterrupted / "metrics.jsonl"):
        text += record["modality"] == "text"
        target += record["text_ratio"]
        assert abs(text - target) <= 1.0
        assert record["text_share"] == pytest.approx(text / record["step"])
        assert record["text_share_target"] == pytest.approx(target / record["step"])


def test_one_process_gives_the_losses_of_two(data: Path, uninterrupted: Path, tmp_path: Path) -> None:
    done = train(overrides(data, tmp_path / "run", "data.workers=0"))
    assert done.returncode == 0, done.stderr
    for got, want in zip(losses(tmp_path / "run"), losses(uninterrupted), strict=True):
        assert got[:2] == want[:2]
        assert got[2] == pytest.approx(want[2], rel=1e-5)


def test_stop_after_and_resume_continue_the_same_loss_curve(data: Path, uninterrupted: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    done = train(overrides(data, run_dir, "run.stop_after=5"), ranks=2)
    assert done.returncode == 0, done.stderr
    assert [step for step, _, _ in losses(run_dir)] == [1, 2, 3, 4, 5]
    done = train(overrides(data, run_dir), ranks=2)
    assert done.returncode == 0, done.stderr
    assert losses(run_dir) == losses(uninterrupted)
    assert samples_of(run_dir) == samples_of(uninterrupted)


def samples_of(run_dir: Path) -> tuple[bytes, list[tuple[str, bytes]]]:
    """The list of samples, and the pictures; of the first steps of both modalities."""
    folder = run_dir / "samples"
    records = read_samples(run_dir)
    assert {record["modality"] for record in records} == {"text", "multimodal"} and len({record["step"] for record in records}) == 2
    return (folder / "samples.jsonl").read_bytes(), sorted((path.name, path.read_bytes()) for path in folder.glob("*.png"))


@pytest.mark.parametrize(
    "shared",
    [
        [SHARED_STATE, "optim.moments_dtype=bf16"],
        ZERO3,
        pytest.param(ZERO1, marks=FULL),
        pytest.param([*ZERO2, "engine.offload=optimizer"], marks=FULL),
    ],
    ids=["Megatron's", "ZeRO-3", "ZeRO-1", "ZeRO-2 offloaded"],
)
def test_a_shared_optimiser_in_bf16_resumes_bit_for_bit(data: Path, tmp_path: Path, shared: list[str]) -> None:
    """The fp32 weights and the moments that only one rank each holds come back to it."""
    half = ["engine.precision=bf16", *shared]
    for name, parts in (("straight", [[]]), ("stopped", [["run.stop_after=5"], []])):
        for part in parts:
            done = train(overrides(data, tmp_path / name, *half, *part), ranks=2)
            assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "stopped") == losses(tmp_path / "straight")


def test_ctrl_c_under_torchrun_saves_and_the_run_goes_on(data: Path, uninterrupted: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    long = ["run.max_steps=8", "checkpoint.every=100"]
    process = start(overrides(data, run_dir, *long), ranks=2, torchrun=True)
    wait_for_steps(process, run_dir, 2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    done = len(losses(run_dir))
    if done == 8:
        pytest.skip("the run was over before the signal came")
    assert process.returncode != 0
    assert f"stopped after step {done} (SIGINT) and saved" in err
    finished = train(overrides(data, run_dir, *long), ranks=2, torchrun=True)
    assert finished.returncode == 0, finished.stderr
    assert losses(run_dir) == losses(uninterrupted)


@pytest.mark.parametrize(
    ("family", "stage", "layout", "ranks"),
    [
        ("vl", "sft", [], 2),
        ("vl2", "align", [], 2),
        ("vl", "align", PIPELINE, 4),
        ("vl2", "pretrain", PIPELINE, 4),
        ("vl2", "sft", EXPERTS, 4),
        ("vl2", "align", ZERO3, 2),
        pytest.param("vl", "align", ZERO1, 2, marks=FULL),
        pytest.param("vl", "pretrain", ZERO2, 2, marks=FULL),
        pytest.param("vl", "sft", ZERO3, 2, marks=FULL),
        pytest.param("vl2", "lm", ZERO3, 2, marks=FULL),
        pytest.param("vl", "pretrain", PIPELINE, 4, marks=FULL),
        pytest.param("vl", "sft", PIPELINE, 4, marks=FULL),
        pytest.param("vl2", "align", PIPELINE, 4, marks=FULL),
        pytest.param("vl2", "sft", PIPELINE, 4, marks=FULL),
        pytest.param("vl2", "align", EXPERTS, 4, marks=FULL),
        pytest.param("vl2", "pretrain", EXPERTS, 4, marks=FULL),
    ],
)
def test_stages_of_both_families_run(data: Path, tmp_path: Path, family: str, stage: str, layout: list[str], ranks: int) -> None:
    done = train(overrides(data, tmp_path / "run", "run.max_steps=2", *layout, family=family, stage=stage), ranks)
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "run")) == 2
    multimodal = [record for record in read_samples(tmp_path / "run") if record["modality"] == "multimodal"]
    assert all((tmp_path / "run" / "samples" / image["file"]).is_file() for record in multimodal for image in record["images"])
    assert bool(multimodal) == any(modality == "multimodal" for _, modality, _ in losses(tmp_path / "run"))
    assert all(record["images"] and record["supervised_tokens"] for record in multimodal)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ([], [*PIPELINE, "parallel.vision_division=first_stage"]),
        ([*EXPERTS, SHARED_STATE], PIPELINE),
        (ZERO3, []),
        pytest.param(PIPELINE, [], marks=FULL),
        pytest.param(PIPELINE, [*EXPERTS, SHARED_STATE], marks=FULL),
        pytest.param([], ZERO3, marks=FULL),
        pytest.param(ZERO3, ZERO1, marks=FULL),
        pytest.param(PIPELINE, ZERO2, marks=FULL),
        pytest.param(ZERO2, EXPERTS, marks=FULL),
    ],
    ids=[
        *("to a pipeline", "from a shared optimiser", "from ZeRO-3", "from a pipeline", "to a shared optimiser", "to ZeRO-3"),
        *("from ZeRO-3 to ZeRO-1", "from a pipeline to ZeRO-2", "from ZeRO-2 to experts apart"),
    ],
)
def test_a_run_goes_on_with_another_layout(data: Path, uninterrupted: Path, tmp_path: Path, first: list[str], then: list[str]) -> None:
    """Or with another engine; the next global batches and losses are those of the run left alone."""
    run_dir = tmp_path / "run"
    done = train(overrides(data, run_dir, "run.stop_after=5", *first), ranks=4 if first else 1)
    assert done.returncode == 0, done.stderr
    done = train(overrides(data, run_dir, *then), ranks=4 if then else 1)
    assert done.returncode == 0, done.stderr
    for got, want in zip(losses(run_dir), losses(uninterrupted), strict=True):
        assert got[:2] == want[:2]
        assert got[2] == pytest.approx(want[2], rel=1e-5)


def test_a_run_that_mixes_modalities_has_one_loss_curve_on_every_layout(data: Path, tmp_path: Path) -> None:
    """Text and image sequences in each step, over data-parallel ranks; the same over a pipeline, gone on with alone."""
    mixed = ["data.modality_grouping=false", "data.batch_size=8"]
    done = train(overrides(data, tmp_path / "straight", *mixed), ranks=2)
    assert done.returncode == 0, done.stderr
    for layout, ranks in (([*PIPELINE, "run.stop_after=5"], 4), ([], 1)):
        done = train(overrides(data, tmp_path / "stopped", *mixed, *layout), ranks)
        assert done.returncode == 0, done.stderr
    for got, want in zip(losses(tmp_path / "stopped"), losses(tmp_path / "straight"), strict=True):
        assert got[:2] == want[:2]
        assert got[2] == pytest.approx(want[2], rel=1e-5)
    records = read_metrics(tmp_path / "straight" / "metrics.jsonl")
    assert [record["modality"] for record in records] == ["text"] + ["multimodal"] * 7, "the warm-up begins with text alone"
    assert all(set(record["loss_by_source"]) == {"pretrain", "text"} for record in records[1:])
    text = target = 0.0
    for record in records:
        before, text = text, record["text_share"] * record["step"]
        assert round((text - before) * 8, 6) in range(9)
        target += record["text_ratio"]
        assert abs(text - target) <= 1 / 8


# ------------------------------------------------------------------------------------------------------------------- errors


def broken_shard(data: Path, tmp_path: Path) -> list[str]:
    shutil.copytree(data / "shards", tmp_path / "broken")
    shard = sorted((tmp_path / "broken").glob("*.tar"))[0]
    shard.write_bytes(shard.read_bytes()[:3000])
    for index in (tmp_path / "broken").glob("index-*"):
        index.unlink()
    return [f"data.sources.pretrain.path={tmp_path}/broken"]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("case", "code", "words"),
    [
        ("wrong key", 2, ["data.text_rato", "data.text_ratio"]),
        ("wrong type", 2, ["optim.lr", "fast"]),
        ("missing folder", 1, ["data.sources.pretrain.path", "nowhere"]),
        ("broken shard", 1, ["data.sources.pretrain.path", "damaged", ".tar"]),
        ("impossible layout", 2, ["parallel.tp", "3", "heads"]),
    ],
)
def test_a_mistake_gives_one_clear_error(data: Path, tmp_path: Path, case: str, code: int, words: list[str], ranks: int) -> None:
    extra = {
        "wrong key": lambda: ["data.text_rato=0.5"],
        "wrong type": lambda: ["optim.lr=fast"],
        "missing folder": lambda: [f"data.sources.pretrain.path={tmp_path}/nowhere"],
        "broken shard": lambda: broken_shard(data, tmp_path),
        "impossible layout": lambda: ["parallel.tp=3"],
    }[case]()
    done = train(overrides(data, tmp_path / "run", *extra), ranks=ranks)
    assert done.returncode == code, done.stderr
    for word in words:
        assert word in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count(words[0]) <= 2


def test_killing_one_rank_of_a_pipeline_ends_the_others_within_seconds(data: Path, tmp_path: Path) -> None:
    """The others wait for it in a receive; the job ends and says which rank was killed."""
    run_dir = tmp_path / "run"
    process = start(overrides(data, run_dir, "run.max_steps=500", *PIPELINE), ranks=4)
    wait_for_steps(process, run_dir, 2)
    ranks = [int(pid) for pid in subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True).split()]
    assert len(ranks) == 4
    os.kill(ranks[2], signal.SIGKILL)
    killed = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - killed < 15
    assert process.returncode not in (0, None)
    assert "was ended by SIGKILL" in err
    assert not [pid for pid in ranks if Path(f"/proc/{pid}").exists()]


def test_a_killed_run_and_a_damaged_checkpoint_cost_steps_and_nothing_else(data: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """Killed while it saves every step; then the newest checkpoint loses a bit. The end is bit for bit that of the run left alone."""
    run_dir = tmp_path / "run"
    settings = overrides(data, run_dir, "checkpoint.every=1")
    process = start(settings, ranks=2)
    wait_for_steps(process, run_dir, 4)
    ranks = [int(pid) for pid in subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True).split()]
    for pid in [process.pid, *ranks]:
        os.kill(pid, signal.SIGKILL)
    process.communicate()

    latest = find_latest(run_dir)
    assert latest is not None and len(list_steps(run_dir)) >= 2
    shard = sorted(latest.glob("*.safetensors"))[1]
    data_bytes = bytearray(shard.read_bytes())
    data_bytes[len(data_bytes) // 2] ^= 16
    shard.write_bytes(data_bytes)
    refused = train(settings, ranks=2)
    assert refused.returncode == 1
    assert f"{latest.name} is damaged: {shard.name} has changed" in refused.stderr
    assert "checkpoint.fallback=true" in refused.stderr and "Traceback" not in refused.stderr

    done = train([*settings, "checkpoint.fallback=true"], ranks=2)
    assert done.returncode == 0, done.stderr
    assert f"{latest.name} is damaged" in done.stderr and "going on from step_" in done.stderr
    assert losses(run_dir) == losses(uninterrupted)
    assert stored_tensors(run_dir) == stored_tensors(uninterrupted)
    assert [path.name for path in list_steps(run_dir)] == ["step_00000007", "step_00000008"]
    assert not list((run_dir / "checkpoints").glob(".*"))
    assert max(record["checkpoint_stall_s"] for record in read_metrics(run_dir / "metrics.jsonl")) > 0


def test_a_disk_that_is_full_leaves_the_run_alive_or_stops_it_cleanly(data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with small_disk(run_dir, "48m"):  # room for one checkpoint and a half; keep_last would keep two
        settings = overrides(data, run_dir, "checkpoint.every=2", "checkpoint.retries=0")
        done = train(settings, ranks=2)
        assert done.returncode == 1
        assert "step_00000004 could not be written: rank " in done.stderr and "No space left on device" in done.stderr
        assert "Traceback" not in done.stderr
        assert [path.name for path in (run_dir / "checkpoints").iterdir() if path.name != "latest"] == ["step_00000002"]
        check(run_dir / "checkpoints" / "step_00000002", full=True)
        done = train([*settings, "checkpoint.on_error=continue"], ranks=2)
        assert done.returncode == 1, "the run's last state is nowhere"
        assert "the last checkpoint of this run could not be written" in done.stderr
        assert read_metrics(run_dir / "metrics.jsonl")[-1]["step"] == 8
        assert find_latest(run_dir) == run_dir / "checkpoints" / "step_00000002"


def stored_tensors(run_dir: Path) -> dict[str, FileEntry]:
    """The files of tensors of the latest checkpoint, verified."""
    latest = find_latest(run_dir)
    assert latest is not None
    return {name: entry for name, entry in check(latest, full=True).files.items() if name.endswith(".safetensors")}


def wait_for_steps(process: subprocess.Popen[str], run_dir: Path, steps: int) -> None:
    deadline = time.monotonic() + 120
    while not (run_dir / "metrics.jsonl").is_file() or len(read_metrics(run_dir / "metrics.jsonl")) < steps:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_generate_answers_from_a_checkpoint(uninterrupted: Path, tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(picture(60, 50))
    command = [sys.executable, "-m", "dsvl_train.cli", "generate", "--model", str(uninterrupted), "--image", str(tmp_path / "image.png")]
    command += ["--prompt", "what is this", "--max-new-tokens", "4"]
    first, second = (subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    missing = subprocess.run([*command, "--image", "no.png"], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert missing.returncode == 2
    assert "no.png is not a file" in missing.stderr


def test_state_is_small_json(uninterrupted: Path) -> None:
    state = json.loads((uninterrupted / "checkpoints" / "step_00000008" / "state.json").read_text())
    assert state["step"] == 8
    assert len(json.dumps(state)) < 4096


# -------------------------------------------------------------------------------------------------------------- bad samples


@pytest.fixture(scope="module")
def spoiled(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides for shards of which every fourth image breaks off in the middle, which only decoding shows."""
    folder = tmp_path_factory.mktemp("spoiled")
    with ShardWriter(folder, max_samples=20) as writer:
        for number in range(60):
            image = picture(40 + 30 * (number % 4), 50, seed=number % 6)
            user = {"role": "user", "content": "<image>\nwhat is this"}
            cut = image[: len(image) // 2] if number % 4 == 0 else image
            writer.write([user, {"role": "assistant", "content": ANSWERS[number % 6]}], [("png", cut)])
    return [f"data.sources.pretrain.path={folder}", "data.text_ratio=0", "data.text_ratio_start=0", "data.window=20", "run.max_steps=14"]


def bad_lines(run_dir: Path) -> list[tuple[int, str, str]]:
    lines = [json.loads(line) for line in (run_dir / "bad_samples.jsonl").read_text().splitlines()]
    assert {(line["source"], line["kind"], line["message"] != "") for line in lines} == {("pretrain", "image_broken", True)}
    return sorted((line["step"], line["shard"], line["key"]) for line in lines)


def test_bad_samples_are_counted_once_over_all_ranks_and_restarts(data: Path, spoiled: list[str], tmp_path: Path) -> None:
    spoiled = [*spoiled, "data.max_bad_fraction=1"]
    done = train(overrides(data, tmp_path / "two", *spoiled), ranks=2)
    assert done.returncode == 0, done.stderr
    for stop in ("run.stop_after=7", "checkpoint.every=3"):
        done = train(overrides(data, tmp_path / "one", *spoiled, stop))
        assert done.returncode == 0, done.stderr
    lines = bad_lines(tmp_path / "two")
    assert lines == bad_lines(tmp_path / "one")
    assert {int(key) % 4 for _, _, key in lines} == {0}
    assert len({key for _, _, key in lines}) == len(lines) == 15, "every one was met, most of them in more than one epoch"
    for run in ("one", "two"):
        for record in read_metrics(tmp_path / run / "metrics.jsonl"):
            count = sum(step <= record["step"] for step, _, _ in lines)
            assert record["bad_samples"] == count
            assert record["bad_samples_by_source"] == ({"pretrain": {"image_broken": count}} if count else {})


def test_too_many_bad_samples_stop_all_ranks_with_one_error(data: Path, spoiled: list[str], tmp_path: Path) -> None:
    messages = []
    for ranks in (1, 2):
        run_dir = tmp_path / str(ranks)
        done = train(overrides(data, run_dir, *spoiled, "data.max_bad_fraction=0.2"), ranks=ranks)
        assert done.returncode == 1, done.stderr
        assert done.stderr.count("above data.max_bad_fraction=0.2") == 1
        assert "pretrain image_broken 1" in done.stderr
        assert "Traceback" not in done.stderr
        messages.append(re.search(r"(\d+ of \d+ samples were bad by step \d+)", done.stderr)[1])  # type: ignore[index]
        assert read_metrics(run_dir / "metrics.jsonl")[-1]["bad_samples"] == len(bad_lines(run_dir)) > 10
    assert messages[0] == messages[1]
