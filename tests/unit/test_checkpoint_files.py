"""Checkpoints as folders of files: damage is found and named, publication survives kills, clean-up keeps what is needed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsvl_train.checkpoints.durable import FileEntry, write_file
from dsvl_train.checkpoints.folders import candidates, find_latest, list_steps, named_latest, resolve, step_folder
from dsvl_train.checkpoints.manifest import DamagedCheckpointError, Manifest, check, manifest_of, read_manifest, write_manifest
from dsvl_train.checkpoints.publication import clear_leftovers, publish, saving_folder
from dsvl_train.checkpoints.retention import Kept, names_to_remove, remove_old

FILES = {"shard_00001_of_00001.safetensors": b"numbers" * 40, "state.json": b'{"step": 1}', "processor/tokenizer.json": b"{}"}


def write_checkpoint(run_dir: Path, step: int, files: dict[str, bytes] | None = None) -> Path:
    """Publish a checkpoint of made-up files, as a run does."""
    final = step_folder(run_dir, step)
    saving = saving_folder(final)
    entries = {}
    for name, data in (files or FILES).items():
        (saving / name).parent.mkdir(parents=True, exist_ok=True)
        entries[name] = write_file(saving / name, data)
    publish(saving, final, Manifest(step, entries))
    return final


def flip_a_bit(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 1 << (at % 7)
    path.write_bytes(data)


# ------------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_truncation_a_flipped_bit_and_deletion_are_found_and_named_in_every_file(tmp_path: Path, name: str) -> None:
    whole = write_checkpoint(tmp_path, 1)
    size = (whole / name).stat().st_size
    check(whole, full=True)
    changes = {
        "empty": lambda path: path.write_bytes(b""),
        "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
        "longer": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
        "gone": lambda path: path.unlink(),
        **{f"bit {at}": lambda path, at=at: flip_a_bit(path, at) for at in range(0, size, max(size // 40, 1))},
    }
    for change, apply in changes.items():
        copy = tmp_path / change
        shutil.copytree(whole, copy)
        apply(copy / name)
        with pytest.raises(DamagedCheckpointError, match=rf"{change} is damaged: {name} "):
            check(copy, full=True)
        if not change.startswith("bit") or name == "manifest.json":
            with pytest.raises(DamagedCheckpointError, match=name):
                check(copy, full=False)


def test_a_file_of_tensors_that_does_not_belong_there_is_damage(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 1)
    (folder / "notes.txt").write_text("mine")
    check(folder, full=True)
    (folder / "shard_00003_of_00004.safetensors").write_bytes(b"of another run")
    with pytest.raises(DamagedCheckpointError, match=r"shard_00003_of_00004\.safetensors is not a part of it"):
        check(folder, full=False)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "./a"])
def test_a_manifest_names_no_file_outside_its_folder(tmp_path: Path, name: str) -> None:
    write_manifest(tmp_path, Manifest(1, {name: FileEntry(1, "0")}))
    with pytest.raises(DamagedCheckpointError, match="not the name of a file in the folder"):
        read_manifest(tmp_path)


def test_ranks_that_do_not_see_one_folder_publish_nothing(tmp_path: Path) -> None:
    final = step_folder(tmp_path, 1)
    saving = saving_folder(final)
    saving.mkdir(parents=True)
    elsewhere = write_file(tmp_path / "shard_00002_of_00002.safetensors", b"written on another machine")
    with pytest.raises(DamagedCheckpointError, match=r"shard_00002_of_00002\.safetensors is missing.*same file system"):
        publish(saving, final, Manifest(1, {"shard_00002_of_00002.safetensors": elsewhere}))
    assert not final.exists() and named_latest(tmp_path) is None


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads from /proc which file is synced")
def test_nothing_gets_a_name_before_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill cannot show what a power failure would; the order of the system calls can."""
    write_checkpoint(tmp_path, 1)
    calls: list[str] = []
    sync, rename, replace = os.fsync, os.rename, os.replace

    def short(path: object) -> str:
        return os.path.relpath(str(path), tmp_path / "checkpoints")

    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(f"sync {short(os.readlink(f'/proc/self/fd/{fd}'))}"), sync(fd)))
    monkeypatch.setattr(os, "rename", lambda a, b: (calls.append(f"rename {short(a)} {short(b)}"), rename(a, b)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(f"rename {short(a)} {short(b)}"), replace(a, b)))
    write_checkpoint(tmp_path, 2)
    named = calls.index("rename .saving_step_00000002 step_00000002")
    latest = calls.index("rename .latest.new latest")
    contents = {f"sync .saving_step_00000002/{name}" for name in (*FILES, "manifest.json", "processor")} | {"sync .saving_step_00000002"}
    assert contents | {"sync .latest.new"} <= set(calls[:named])
    assert calls.index("sync .saving_step_00000002") > calls.index("sync .saving_step_00000002/manifest.json")
    assert "sync ." in calls[named:latest], "the new name is durable before `latest` says it"
    assert "sync ." in calls[latest:]


# ------------------------------------------------------------------------------------------------------------ which is latest


def test_what_a_run_may_go_on_from(tmp_path: Path) -> None:
    assert candidates(tmp_path) == [] and find_latest(tmp_path) is None
    one, two, three = (write_checkpoint(tmp_path, step) for step in (1, 2, 3))
    assert candidates(tmp_path) == [three, two, one]
    latest = tmp_path / "checkpoints" / "latest"
    latest.write_text("step_00000002\n")  # a run that was killed before `latest` was moved to 3
    assert candidates(tmp_path) == [two, one]
    latest.unlink()
    assert candidates(tmp_path) == [three, two, one]
    for garbage in (b"", b"step_0000000\x83\n", b"../../etc", b"step_3"):
        latest.write_bytes(garbage)
        with pytest.raises(DamagedCheckpointError, match="latest is damaged"):
            candidates(tmp_path)


def test_using_a_checkpoint_that_lacks_a_file_names_the_file(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 1)
    (folder / "processor" / "tokenizer.json").unlink()
    for path in (folder, tmp_path):
        with pytest.raises(ValueError, match=r"processor/tokenizer\.json is missing"):
            resolve(path)
    with pytest.raises(ValueError, match="neither a checkpoint"):
        resolve(tmp_path / "nowhere")


# ---------------------------------------------------------------------------------------------------------------- retention


def kept(steps: list[int], **settings: int) -> list[int]:
    """Steps that stay of checkpoints saved in this order, the last of them being the latest."""
    checkpoints = [Kept(str(step), step, f"{place:04d}", place == len(steps) - 1) for place, step in enumerate(steps)]
    gone = names_to_remove(checkpoints, **settings)
    return [step for step in steps if str(step) not in gone]


def test_retention_keeps_the_last_and_every_nth() -> None:
    steps = [5, 10, 15, 20, 25, 30]
    assert kept(steps, keep_last=2, keep_every=0) == [25, 30]
    assert kept(steps, keep_last=1, keep_every=10) == [10, 20, 30]
    assert kept(steps, keep_last=0, keep_every=10) == steps
    assert kept([30, 35, 5], keep_last=2, keep_every=0) == [35, 5], "started anew in an old folder, 5 was saved last"


@given(
    st.lists(st.tuples(st.integers(1, 40), st.booleans()), unique_by=lambda one: one[0], max_size=12),
    st.integers(0, 4),
    st.integers(0, 7),
    st.integers(0, 11),
)
def test_retention_never_removes_the_latest_nor_the_last_good_one(
    saved: list[tuple[int, bool]], keep_last: int, keep_every: int, latest: int
) -> None:
    checkpoints = [
        Kept(str(step), step, f"{place:04d}" if good else "", place == latest % len(saved)) for place, (step, good) in enumerate(saved)
    ]
    gone = set(names_to_remove(checkpoints, keep_last=keep_last, keep_every=keep_every))
    stays = [one for one in checkpoints if one.name not in gone]
    assert not any(one.name in gone for one in checkpoints if one.is_latest)
    good = [one for one in checkpoints if one.good]
    assert sum(one.good for one in stays) >= min(len(good), max(keep_last, 1))
    assert not good or max(good, key=lambda one: one.saved_at).name not in gone or any(one.good and one.is_latest for one in stays)
    assert all(one.name not in gone for one in good if keep_every and one.step % keep_every == 0)


def test_a_damaged_checkpoint_does_not_count_as_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, step)
    (step_folder(tmp_path, 2) / "state.json").unlink()
    write_checkpoint(tmp_path, 4)
    assert remove_old(tmp_path, keep_last=2, keep_every=0) == ["step_00000002", "step_00000001"]
    assert [path.name for path in list_steps(tmp_path)] == ["step_00000003", "step_00000004"]


# -------------------------------------------------------------------------------------------------------------------- kills

SAVES_UNTIL_KILLED = """
import sys
from pathlib import Path
from tests.unit.test_checkpoint_files import write_checkpoint
from dsvl_train.checkpoints.publication import clear_leftovers
from dsvl_train.checkpoints.retention import remove_old
run_dir, step = Path(sys.argv[1]), int(sys.argv[2])
clear_leftovers(run_dir)
print("go", flush=True)
while True:
    files = {f"shard_0000{n}_of_00003.safetensors": bytes([step % 256]) * 300_000 for n in (1, 2, 3)}
    write_checkpoint(run_dir, step, files | {"state.json": str(step).encode()})
    remove_old(run_dir, keep_last=2, keep_every=10)
    step += 1
"""


def test_kills_at_any_moment_leave_every_visible_checkpoint_whole_and_latest_on_one(tmp_path: Path) -> None:
    """A process that does nothing but publish and remove, killed at random; now and then it saves steps again that are there."""
    chance = random.Random(7)
    step, published, leftovers = 1, 0, 0
    for _ in range(15):
        command = [sys.executable, "-c", SAVES_UNTIL_KILLED, str(tmp_path), str(step)]
        process = subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"go\n"
        time.sleep(chance.uniform(0.0, 0.08))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        for path in list_steps(tmp_path):
            check(path, full=True)
        named = named_latest(tmp_path)
        assert named is None or named.exists() or named.with_name(f".removing_{named.name}").exists()
        leftovers += len(clear_leftovers(tmp_path))
        assert not [path.name for path in (tmp_path / "checkpoints").glob(".*")]
        latest = find_latest(tmp_path)
        if latest is not None:
            published = json.loads((latest / "state.json").read_text())
            assert latest == step_folder(tmp_path, published)
        step = max(1, published + chance.choice([1, 1, 0, -1]))
    assert published > 1 and leftovers > 3


def test_a_kill_between_hiding_the_old_and_naming_the_new_is_made_good(tmp_path: Path) -> None:
    """The one moment in which `latest` names nothing: a step is saved again whose checkpoint it names."""
    old = write_checkpoint(tmp_path, 1)
    old.rename(old.with_name(".removing_step_00000001"))
    new = saving_folder(old)
    new.mkdir()
    (new / "state.json").write_text("new")
    assert clear_leftovers(tmp_path / "elsewhere") == []
    write_manifest(new, manifest_of(new, 1))
    assert clear_leftovers(tmp_path) == [".removing_step_00000001"]
    assert find_latest(tmp_path) == old and (old / "state.json").read_text() == "new"
