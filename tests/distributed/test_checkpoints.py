"""Checkpoints of several ranks: saved on one layout and loaded on another, written while training goes on, and disks that fail."""

from __future__ import annotations

import functools
import itertools
import os
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsvl_train.checkpoints.folders import find_latest, list_steps, step_folder
from dsvl_train.checkpoints.manifest import check
from dsvl_train.interop.native_source import open_everything
from tests.distributed.harness import run_ranks, small_disk
from tests.distributed.scenarios import TinyRun

FULL = pytest.mark.full
ZERO = {"distributed_optimizer": True}
BEFORE, AFTER = ["multimodal", "text", "multimodal"], ["text", "multimodal", "multimodal"]


# ------------------------------------------------------------------------------------------------------------------ layouts


def tie(cfg: Any) -> None:
    cfg.model.language.tie_embeddings = True


def save_and_go_on(family: str, parallel: dict[str, Any], run_dir: str, change: Any = None) -> list[float]:
    """Train, save behind the next steps. Returns their losses."""
    run = TinyRun(family, parallel, run_dir, change)
    run.train(BEFORE)
    run.save()
    losses = run.train(AFTER)
    run.saver.finish()
    return losses


def load_and_go_on(family: str, parallel: dict[str, Any], run_dirs: list[str], change: Any = None) -> list[list[float]]:
    """The next losses from each of several runs' checkpoints."""
    run = TinyRun(family, parallel, run_dirs[0], change)
    from dsvl_train.training.checkpoint import load, prepare_resume

    losses = []
    for seed, run_dir in enumerate(run_dirs, start=1):
        run.cfg.run.dir = run_dir
        run.build(seed)
        folder = prepare_resume(run.cfg)
        assert folder is not None
        run.done = load(folder, run.model, run.optimiser).step
        losses.append(run.train(AFTER))
    return losses


Layout = tuple[int, dict[str, Any]]
LAYOUTS: dict[str, list[Layout]] = {
    "vl": [
        (1, {}),
        (4, {}),
        (4, ZERO),
        (4, {"tp": 2, "pp": 2}),
        (4, {"tp": 2} | ZERO),
        (4, {"pp": 4}),
        (4, {"pp": 2, "vision_division": "first_stage"} | ZERO),
        (2, {"pp": 2, "vpp": 3}),
    ],
    "vl2": [
        (1, {}),
        (4, {}),
        (4, ZERO),
        (4, {"tp": 2, "pp": 2}),
        (4, {"ep": 2}),
        (4, {"ep": 2} | ZERO),
        (4, {"tp": 2, "ep": 2}),
        (4, {"tp": 2, "ep": 2, "vision_tp": "shard"} | ZERO),
        (4, {"pp": 2, "ep": 2, "vision_division": "first_stage"}),
        (2, {"pp": 2, "vpp": 3}),
        (8, {"tp": 2, "pp": 2, "ep": 2} | ZERO),
    ],
}


class Saved:
    """Runs of a family, one per layout, each left alone after it was saved."""

    def __init__(self, family: str, layouts: list[Layout], folder: Path) -> None:
        self.family, self.layouts = family, layouts
        self.run_dirs = [str(folder / str(place)) for place in range(len(layouts))]
        runs = zip(layouts, self.run_dirs, strict=True)
        self.losses = [run_ranks(save_and_go_on, ranks, family, layout, run_dir)[0] for (ranks, layout), run_dir in runs]

    def require_same_losses_on(self, ranks: int, layout: dict[str, Any]) -> None:
        went_on = run_ranks(load_and_go_on, ranks, self.family, layout, self.run_dirs, timeout_s=900)[0]
        for (_, origin), got, want in zip(self.layouts, went_on, self.losses, strict=True):
            assert got == pytest.approx(want, rel=1e-5), f"saved on {origin}, loaded on {layout}"


@pytest.mark.parametrize(
    ("family", "saved", "loaded"),
    [("vl", (4, {"tp": 2, "pp": 2}), (2, ZERO)), ("vl2", (4, {"ep": 2} | ZERO), (4, {"tp": 2, "ep": 2}))],
    ids=["vl", "vl2"],
)
def test_a_checkpoint_goes_on_with_another_layout(tmp_path: Path, family: str, saved: Layout, loaded: Layout) -> None:
    """With the optimiser: the next losses are those of the run that was left alone."""
    Saved(family, [saved], tmp_path).require_same_losses_on(*loaded)


def test_a_shared_out_optimiser_is_stored_once_and_cut_anywhere(tmp_path: Path) -> None:
    """Both ends of the pipeline hold the tied embedding, in buffers of their own; shares begin and end within rows of matrices."""
    layout = {"pp": 2, "vision_division": "first_stage"} | ZERO
    want = run_ranks(save_and_go_on, 6, "vl", layout, str(tmp_path), tie)[0]
    (saved,) = list_steps(tmp_path)
    assert any(path.stem.endswith("_2") for path in saved.glob("*.safetensors")), "no rank has two boxes of a tensor"
    stored = open_everything(saved).infos()  # refuses what is stored twice, or not as a whole
    embedding = "language.embedding.word_embeddings.weight"
    assert {info.shape for name, info in stored.items() if name.endswith(embedding)} == {stored[f"model.{embedding}"].shape}
    assert sum(name.endswith(embedding) for name in stored) == 3
    for ranks, other in ((1, {}), (4, layout)):
        assert run_ranks(load_and_go_on, ranks, "vl", other, [str(tmp_path)], tie)[0][0] == pytest.approx(want, rel=1e-5), other


@pytest.fixture(scope="module")
def saved_on_every_layout(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    @functools.cache
    def of(family: str) -> Saved:
        return Saved(family, LAYOUTS[family], tmp_path_factory.mktemp(family))

    return of


@FULL
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("family", "loaded"), [(family, layout) for family, layouts in LAYOUTS.items() for layout in layouts], ids=str)
def test_a_checkpoint_of_any_layout_goes_on_with_any_other(
    saved_on_every_layout: Callable[[str], Saved], family: str, loaded: Layout
) -> None:
    saved_on_every_layout(family).require_same_losses_on(*loaded)


# --------------------------------------------------------------------------------------------------------- behind the training


def save_every_step(run_dir: str, asynchronous: bool) -> list[str]:
    """Returns the names of the checkpoints in the order of publication, as this rank saw it."""
    run = TinyRun("vl2", ZERO, run_dir, asynchronous=asynchronous, keep_last=0)
    published = []
    for modality in ["text", "multimodal", "text"]:
        run.train([modality])
        published += run.saver.poll()
        published += run.save()
    published += run.saver.finish()
    assert run.saver.take_stall_s() > 0.0
    return [folder.name for folder in published]


def test_what_is_written_behind_the_training_is_what_is_written_on_the_spot(tmp_path: Path) -> None:
    for name in ("spot", "behind"):
        answers = run_ranks(save_every_step, 2, str(tmp_path / name), name == "behind")
        assert answers == [["step_00000001", "step_00000002", "step_00000003"]] * 2
    for spot in list_steps(tmp_path / "spot"):
        files, same = (check(step_folder(tmp_path / name, int(spot.name[5:])), full=True).files for name in ("spot", "behind"))
        shards = {name: entry for name, entry in files.items() if name.endswith(".safetensors")}
        assert len(shards) == 2
        assert shards == {name: entry for name, entry in same.items() if name.endswith(".safetensors")}, spot.name
        sizes = [entry.bytes for entry in shards.values()]
        assert max(sizes) < 1.1 * min(sizes), "data-parallel ranks divide what they both hold"


# -------------------------------------------------------------------------------------------------------------------- disks


def remount(folder: str, options: str) -> None:
    import torch.distributed as dist

    dist.barrier()
    if dist.get_rank() == 0:
        subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)
    dist.barrier()


def meet_a_full_and_a_read_only_disk(run_dir: str) -> list[str]:
    """Save on a disk with room for one checkpoint, with on_error=continue, then stop. Returns what happened."""
    run = TinyRun("vl2", {}, run_dir, on_error="continue", retries=1, retry_s=0.01, keep_last=1)
    from dsvl_train.training.checkpoint import CheckpointError

    disk = f"{run_dir}/checkpoints"
    happened = []

    def save(what: str, **how: bool) -> None:
        run.train(["multimodal"])
        try:
            published = run.save(**how) + run.saver.finish()
            happened.append(f"{what}: saved {published[0].name if published else 'nothing'}, failures {run.saver.failures}")
        except CheckpointError as error:
            happened.append(f"{what}: {error}")

    save("room")
    save("full")
    remount(disk, "size=64m")
    save("room again")
    remount(disk, "ro")
    save("read-only")
    save("last", last=True)
    run.cfg.checkpoint.on_error = "stop"
    save("stop")
    remount(disk, "rw")
    save("writable")
    return happened


def test_a_full_or_read_only_disk_costs_no_checkpoint(tmp_path: Path) -> None:
    with small_disk(tmp_path / "checkpoints", "5m"):
        answers = run_ranks(meet_a_full_and_a_read_only_disk, 2, str(tmp_path))
        assert answers[0] == answers[1], "all ranks are told the same"
        told = dict(line.split(": ", 1) for line in answers[0])
        assert told["room"] == "saved step_00000001, failures 0"
        assert told["full"] == "saved nothing, failures 1"
        assert told["room again"] == "saved step_00000003, failures 1"
        assert told["read-only"] == "saved nothing, failures 2"
        assert "the last checkpoint of this run could not be written" in told["last"]
        assert "Read-only file system" in told["stop"] and "checkpoint.on_error=continue" in told["stop"]
        assert told["writable"].startswith("saved step_00000007")
        assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name != "latest"] == ["step_00000007"]
        latest = find_latest(tmp_path)
        assert latest is not None
        check(latest, full=True)


def fail_on_one_rank(run_dir: str) -> list[str]:
    """Rank 1 alone may write no large file. Returns the checkpoints that were published, then the error."""
    run = TinyRun("vl", {"tp": 2}, run_dir, retries=1, retry_s=0.01)
    from dsvl_train.training.checkpoint import CheckpointError

    run.train(["text"])
    published = [folder.name for folder in run.save() + run.saver.finish()]
    if run.world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    run.train(["text"])
    run.save()
    try:
        for _ in itertools.count():
            run.train(["text"])
            run.saver.poll()
    except CheckpointError as error:
        return [*published, f"after step {run.done}: {error}"]


def test_an_error_of_one_rank_is_every_ranks_error_at_the_same_step(tmp_path: Path) -> None:
    first, second = run_ranks(fail_on_one_rank, 2, str(tmp_path))
    assert first == second
    assert first[0] == "step_00000001"
    assert "rank 1: " in first[1] and os.strerror(27) in first[1] and "rank 0" not in first[1]
    assert [path.name for path in list_steps(tmp_path)] == ["step_00000001"]
    assert not list((tmp_path / "checkpoints").glob(".*")), "no half-written folder is left"
    check(step_folder(tmp_path, 1), full=True)
