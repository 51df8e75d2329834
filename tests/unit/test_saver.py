"""Saving and going on again, in one process."""

from __future__ import annotations

import math
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsvl_train.checkpoints.folders import step_folder
from dsvl_train.checkpoints.manifest import check, manifest_of, write_manifest
from dsvl_train.cli import main
from dsvl_train.parallel import startup
from tests.bench import Bench, save
from tests.tiny import tiny_run


@pytest.fixture(autouse=True)
def world() -> Iterator[startup.World]:
    world = startup.start(tiny_run("vl").engine, tiny_run("vl").parallel, seed=0)
    yield world
    startup.stop()


def test_a_copy_stays_as_it_was_while_training_goes_on(world: startup.World, tmp_path: Path) -> None:
    """What a background thread writes late is bit for bit what was saved on the spot."""
    from dsvl_train.interop.native import write_boxes
    from dsvl_train.training.checkpoint.snapshot import HostCopy

    bench = Bench(world, "vl2")
    bench.run("multimodal", "text")
    on_the_spot = save(world, bench, tmp_path) / "shard_00001_of_00001.safetensors"
    copy = HostCopy(bench.model, bench.optimiser)
    boxes = copy.take()
    bench.run("multimodal", "text")
    assert list(write_boxes(tmp_path / "late.safetensors", boxes)) == ["late.safetensors"]
    assert (tmp_path / "late.safetensors").read_bytes() == on_the_spot.read_bytes()
    write_boxes(tmp_path / "next.safetensors", copy.take())
    assert (tmp_path / "next.safetensors").read_bytes() != on_the_spot.read_bytes()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=st.lists(st.integers(1, 4), min_size=1, max_size=4), data=st.data())
def test_a_share_of_a_flattened_tensor_is_boxes_in_its_order(shape: list[int], data: st.DataObject) -> None:
    from dsvl_train.models.logical import LogicalTensor, boxes_of_range

    whole = torch.arange(math.prod(shape)).view(shape)
    start, stop = sorted(data.draw(st.tuples(*2 * [st.integers(0, whole.numel())])))
    cut = [whole[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))].flatten() for box in boxes_of_range(shape, start, stop)]
    assert torch.equal(torch.cat([torch.empty(0, dtype=torch.int64), *cut]), torch.arange(start, stop))
    assert len(cut) <= 2 * len(shape) - 1 and all(len(part) for part in cut)
    rows = sorted(data.draw(st.tuples(*2 * [st.integers(0, shape[0])])))  # such as the gate's, of gate and up in one
    moved = (5,) * len(shape)
    part = LogicalTensor("gate", tuple(shape), moved, "fc1", (rows[0], rows[1]))
    found = []
    for offset, size, first in part.boxes_in(shape, start, stop):
        box = whole[rows[0] : rows[1]][tuple(slice(o - 5, o - 5 + n) for o, n in zip(offset, size, strict=True))].flatten()
        assert box.tolist() == list(range(first, first + math.prod(size)))
        found += box.tolist()
    row = math.prod(shape[1:])
    assert found == list(range(max(start, rows[0] * row), min(stop, rows[1] * row)))


def test_ranks_divide_what_they_hold_in_common() -> None:
    from dsvl_train.training.checkpoint.snapshot import divide

    replicas = [{bytes([n]): 10 * n for n in range(1, 9)} for _ in range(4)]
    sharded = [replicas[rank] | {b"own %d" % rank: 100} for rank in range(4)]
    for sizes_r in (replicas, sharded, sharded[:1], [{}, {b"a": 1}]):
        writes_r = divide(sizes_r)
        together = [key for writes in writes_r for key in writes]
        assert sorted(together) == sorted({key for sizes in sizes_r for key in sizes}), "every box once"
        assert all(writes <= sizes.keys() for writes, sizes in zip(writes_r, sizes_r, strict=True))
    loads = [sum(replicas[0][key] for key in writes) for writes in divide(replicas)]
    assert max(loads) - min(loads) <= 10


# ------------------------------------------------------------------------------------------------------------------- resume


def three_checkpoints(world: startup.World, run_dir: Path) -> Bench:
    bench = Bench(world, "vl")
    for _ in range(3):
        bench.run("text")
        save(world, bench, run_dir)
    return bench


def test_a_run_goes_on_only_from_what_is_whole(world: startup.World, tmp_path: Path) -> None:
    from dsvl_train.training.checkpoint import prepare_resume

    cfg = three_checkpoints(world, tmp_path).cfg
    two, three = (step_folder(tmp_path, step) for step in (2, 3))
    assert prepare_resume(cfg) == three
    shard = three / "shard_00001_of_00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:5000] + bytes([whole[5000] ^ 4]) + whole[5001:])
    with pytest.raises(ValueError, match=r"step_00000003 is damaged: shard_.*has changed.*checkpoint\.fallback=true.*resume=none"):
        prepare_resume(cfg)
    cfg.checkpoint.verify = "size"
    assert prepare_resume(cfg) == three, "a flipped bit does not show in a size"
    cfg.checkpoint.verify = "full"
    cfg.resume = str(three)
    cfg.checkpoint.fallback = True
    with pytest.raises(ValueError, match=r"resume=.*step_00000003 is damaged"):
        prepare_resume(cfg)
    cfg.resume = "auto"
    assert prepare_resume(cfg) == two
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000002\n", "it names a good one again"
    assert three.is_dir(), "what is damaged is left for people to look at"


def test_nothing_good_left_never_means_from_scratch(world: startup.World, tmp_path: Path) -> None:
    from dsvl_train.training.checkpoint import prepare_resume

    cfg = three_checkpoints(world, tmp_path).cfg
    cfg.checkpoint.fallback = True
    latest = tmp_path / "checkpoints" / "latest"
    latest.write_text("st\0p")
    assert prepare_resume(cfg) == step_folder(tmp_path, 3)
    for step in (2, 3):
        (step_folder(tmp_path, step) / "state.json").unlink()
    with pytest.raises(ValueError, match=r"no good checkpoint in .*step_00000003 .*state\.json is missing.*step_00000002 .*resume=none"):
        prepare_resume(cfg)
    latest.unlink()
    with pytest.raises(ValueError, match="no good checkpoint"):
        prepare_resume(cfg)
    cfg.resume = "none"
    assert prepare_resume(cfg) is None


# ----------------------------------------------------------------------------------------------------------------- security


class Explosive:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


def test_nothing_that_is_loaded_executes(world: startup.World, tmp_path: Path) -> None:
    """An attacker who can write a checkpoint can write a manifest that fits it."""
    from dsvl_train.evaluation.loading import load_model
    from dsvl_train.training.checkpoint import load, prepare_resume

    bench = Bench(world, "vl")
    bench.run("text")
    folder = save(world, bench, tmp_path)
    fired = tmp_path / "fired"
    bomb = pickle.dumps(Explosive(fired))
    pickle.loads(bomb)
    assert fired.exists(), "the bomb works"
    fired.unlink()
    yaml_bomb = f"!!python/object/apply:builtins.exec [\"open({str(fired)!r}, 'w').close()\"]".encode()
    whole = tmp_path / "whole"
    shutil.copytree(folder, whole)
    names = [path.relative_to(whole) for path in whole.rglob("*") if path.is_file()]
    for name in [*names, Path(".metadata"), Path("common.pt"), Path("__0_0.distcp")]:
        shutil.rmtree(folder)
        shutil.copytree(whole, folder)
        (folder / name).write_bytes(yaml_bomb if name.suffix == ".yaml" else bomb)
        if name.name != "manifest.json":
            write_manifest(folder, manifest_of(folder, 1))
        for use in (
            lambda: load(prepare_resume(bench.cfg) or folder, bench.model, bench.optimiser),
            lambda: load_model(folder, world),
            lambda: main(["checkpoint", "diff", str(folder), str(folder)]),
            lambda: main(["checkpoint", "verify", str(folder)]),
        ):
            try:
                use()
            except ValueError:  # refused; a file that nobody reads is no reason to refuse
                continue
        assert not fired.exists(), f"{name} was executed"


# ------------------------------------------------------------------------------------------------------------------ command


def test_list_verify_and_diff_say_what_they_see(world: startup.World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = three_checkpoints(world, tmp_path)

    def dsvl(*arguments: object) -> tuple[int, list[str]]:
        code = main(["checkpoint", *map(str, arguments)])
        return code, capsys.readouterr().out.splitlines()

    code, lines = dsvl("list", tmp_path)
    assert code == 0 and [line.split()[0] for line in lines] == ["step_00000002", "step_00000003"]
    assert lines[1].endswith("latest") and not lines[0].endswith("latest") and "ranks=1" in lines[0]
    assert dsvl("verify", tmp_path)[0] == 0

    two, three = step_folder(tmp_path, 2), step_folder(tmp_path, 3)
    assert dsvl("diff", three, tmp_path) == (0, [f"{len(stored_names(three))} tensors are the same, 0 differ"])
    code, lines = dsvl("diff", two, three, "--all")
    assert code == 1
    assert "step: 2 -> 3" in lines and "updates.language: 2 -> 3" in lines
    differing = {line.split(":")[0] for line in lines if "elements differ" in line}
    assert "optim.exp_avg.language.output_layer.weight" in differing
    assert not [name for name in differing if "vision" in name or "adaptor" in name], "text steps leave them as they are"
    assert len(dsvl("diff", two, three)[1]) < len(lines)
    assert bench.done == 3

    (two / "state.json").unlink()
    code, lines = dsvl("verify", tmp_path)
    assert code == 1 and f"{two}: state.json is missing" in lines
    assert "damaged: state.json is missing" in dsvl("list", tmp_path)[1][0]
    assert main(["checkpoint", "verify", str(tmp_path / "nowhere")]) == 2
    assert "has no checkpoints" in capsys.readouterr().err


def stored_names(folder: Path) -> set[str]:
    from safetensors import safe_open

    check(folder, full=True)
    with safe_open(folder / "shard_00001_of_00001.safetensors", "pt") as file:
        return set(file.keys())
