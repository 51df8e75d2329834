"""How runs are started: stage after stage by one command, and by torchrun on several machines."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import safe_open

from data_recipes.make_tiny import main as make_tiny
from dsvl_train.reporting.metrics import read_metrics
from tests.distributed.harness import reserved_ports

REPOSITORY = Path(__file__).parents[2]
FAMILY = "deepseek_vl2"
STAGES = ("align", "pretrain", "sft")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    assert make_tiny([*(f"--recipe={FAMILY}/{stage}" for stage in STAGES), "--out", str(folder), "--samples", "12"]) == 0
    return folder


def start(command: list[str], **environment: str) -> subprocess.Popen[str]:
    settings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "LOCAL_ADDR": "127.0.0.1"} | environment
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=settings, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, _ = process.communicate(timeout=240)
    return process.returncode, out


def wait_for_steps(process: subprocess.Popen[str], run_dir: Path, steps: int) -> None:
    deadline = time.monotonic() + 200
    while not (run_dir / "metrics.jsonl").is_file() or len(read_metrics(run_dir / "metrics.jsonl")) < steps:
        assert process.poll() is None, finish(process)[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def weights(run_dir: Path) -> dict[tuple[str, str], bytes]:
    """(file, tensor) -> bytes of a run's last weights; runs of one layout store alike."""
    folder = run_dir / "checkpoints" / (run_dir / "checkpoints" / "latest").read_text().strip()
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "np") as tensors:
            found |= {(file.name, key): tensors.get_tensor(key).tobytes() for key in tensors.keys() if key.startswith("model.")}  # noqa: SIM118
    return found


def losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run_dir / "metrics.jsonl")]


@pytest.mark.timeout(900)
def test_a_chain_stopped_in_stage_2_goes_on_with_the_same_command(data: Path, tmp_path: Path) -> None:
    """Four ranks, TP 2 x PP 2. Stage 3 learns at a rate of nearly nothing, so that its weights must be those of stage 2."""
    chain = [sys.executable, "-m", "dsvl_train.cli", "chain", FAMILY, "shrink=tiny", f"data.root={data}", "launch.nproc=4"]
    chain += ["parallel.tp=2", "parallel.pp=2", f"--root={tmp_path}", "--set=pretrain:run.max_steps=8", "--set=sft:run.max_steps=1"]
    chain += ["--set=align:run.max_steps=1", "--set=sft:optim.lr=1e-30"]
    process = start(chain)
    wait_for_steps(process, tmp_path / "pretrain", 1)
    process.send_signal(signal.SIGTERM)
    code, out = finish(process)
    assert code == 128 + signal.SIGTERM, out
    assert len(losses(tmp_path / "pretrain")) < 8 and not (tmp_path / "sft").exists()

    code, out = finish(start(chain))
    assert code == 0, out
    assert f"{FAMILY}_align: finished before" in out
    assert [len(losses(tmp_path / stage)) for stage in STAGES] == [1, 8, 1]
    aligned, pretrained, tuned = (weights(tmp_path / stage) for stage in STAGES)
    assert tuned == pretrained
    frozen = {key for key in aligned if key[1].startswith("model.language.embedding")}
    assert frozen and all(aligned[key] != pretrained[key] for key in frozen)


def test_two_machines_meet_and_train_as_one(data: Path, tmp_path: Path) -> None:
    recipe = [f"recipe={FAMILY}/sft", "shrink=tiny", f"data.root={data}"]
    with reserved_ports(1) as (port,):
        meeting = {"NNODES": "2", "NPROC_PER_NODE": "1", "HEAD": "127.0.0.1", "PORT": str(port)}
        machines = [start(["launch/torchrun.sh", *recipe, f"run.dir={tmp_path}/two"], **meeting) for _ in range(2)]
        for process in machines:
            code, out = finish(process)
            assert code == 0, out
    code, out = finish(start([sys.executable, "train.py", *recipe, f"run.dir={tmp_path}/one", "launch.nproc=2"]))
    assert code == 0, out
    assert losses(tmp_path / "two") == losses(tmp_path / "one")


def test_a_signal_to_every_process_of_torchrun_stops_the_ranks_alone(data: Path, tmp_path: Path) -> None:
    """As a job manager sends it: torchrun lives on until its ranks have saved."""
    settings = [f"recipe={FAMILY}/sft", "shrink=tiny", f"data.root={data}", f"run.dir={tmp_path}", "run.max_steps=500"]
    process = start(["launch/torchrun.sh", *settings], NPROC_PER_NODE="2")
    wait_for_steps(process, tmp_path, 1)
    ranks = [int(pid) for pid in subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True).split()]
    for pid in (process.pid, *ranks):
        os.kill(pid, signal.SIGUSR1)
    code, out = finish(process)
    assert code != 0
    assert "(SIGUSR1) and saved" in out
    assert (tmp_path / "checkpoints" / "latest").is_file()


def test_several_machines_need_a_place_to_meet() -> None:
    code, out = finish(start(["launch/torchrun.sh", "recipe=demo_vl2/lm"], NNODES="2"))
    assert code != 0
    assert "NNODES=2 machines meet at HEAD: set it to the name of one of them" in out
