"""`dsvl generate` on a model folder as released, and folders of ours made from it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsvl_train.cli import main
from dsvl_train.parallel import startup

DATA = Path(__file__).parent / "data" / "vl2"
MODEL = DATA / "mla_sigmoid_bias"


@pytest.fixture(autouse=True)
def stopped() -> Iterator[None]:
    yield
    startup.stop()


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main([*arguments, "--device", "cpu"]) == 0, capsys.readouterr().err
    startup.stop()
    return capsys.readouterr().out


def test_a_prompt_and_a_file_of_conversations_give_the_same_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Several images of different sizes, answers one by one and together; what is streamed is the answer."""
    images = [str((DATA / "images" / f"{number}.png").resolve()) for number in (0, 8, 9)]
    asked = [("Describe this image.", images[:1]), ("What is 2 + 3?", []), ("Compare.", images[1:])]
    options = ("--max-new-tokens", "12")
    streamed = []
    for question, files in asked:
        given = [argument for file in files for argument in ("--image", file)]
        streamed.append(run(capsys, "generate", "--model", str(MODEL), "--prompt", question, *given, *options))
    samples = []
    for number, (question, files) in enumerate(asked):
        messages = [{"role": "<|User|>", "content": "<image>\n" * len(files) + question}]
        samples.append({"messages": messages + [{"role": "<|Assistant|>", "content": ""}] * (number % 2), "images": files})
    (tmp_path / "samples.json").write_text(json.dumps(samples))
    lines = run(capsys, "generate", "--model", str(MODEL), "--samples", str(tmp_path / "samples.json"), "--batch", "2", *options)
    answers = [json.loads(line) for line in lines.splitlines()]
    assert [answer["answer"] + "\n" for answer in answers] == streamed
    assert all(0 < answer["tokens"] <= 12 for answer in answers)
    assert len(set(streamed)) == 3
    drawn = [run(capsys, "generate", "--model", str(MODEL), "--prompt", "hi", "--temperature", "2", "--seed", s, *options) for s in "112"]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_checkpoint_and_its_run_folder_are_read_as_the_released_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = startup.start_alone("cpu")
    from dsvl_train.checkpoints.manifest import manifest_of, write_manifest
    from dsvl_train.config.compose import to_yaml
    from dsvl_train.evaluation.loading import load_model
    from dsvl_train.interop import native

    loaded = load_model(MODEL, world)
    folder = tmp_path / "checkpoints" / "step_00000001"
    folder.mkdir(parents=True)
    native.write_boxes(folder / "shard.safetensors", native.model_boxes(loaded.model).items())
    (folder / native.CONFIG_FILE).write_text(to_yaml(loaded.cfg))
    (folder / native.PROCESSOR_FOLDER).mkdir()
    for name in ("processor_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, folder / native.PROCESSOR_FOLDER)
    (folder / native.STATE_FILE).write_text("{}")
    write_manifest(folder, manifest_of(folder, step=1))
    (folder.parent / native.LATEST_FILE).write_text(folder.name)
    startup.stop()

    whole = run(capsys, "score", "--model", str(MODEL), "--samples", str(DATA / "samples.json"))
    for ours in (folder, tmp_path):
        assert run(capsys, "score", "--model", str(ours), "--samples", str(DATA / "samples.json")) == whole
        assert main(["encode", "--model", str(ours), "--samples", str(DATA / "samples.json"), "--out", str(tmp_path / "x.npz")]) == 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--prompt", "hi", "--image", "gone.png"], "gone.png"),
        (["--prompt", "<image> hi"], "1 <image> tags for 0 images"),
        (["--prompt", "hi", "--top-p", "0"], "top_p=0"),
        (["--prompt", "hi", "--max-new-tokens", "0"], "max_new_tokens=0"),
        (["--samples", "answered.json"], "sample 0: nothing to answer"),
    ],
)
def test_a_wrong_request_is_one_clear_line(
    arguments: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    answered = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    Path("answered.json").write_text(json.dumps([{"messages": answered}]))
    assert main(["generate", "--model", str(MODEL), *arguments, "--device", "cpu"]) == 2
    captured = capsys.readouterr()
    assert reason in captured.err and captured.err.startswith("error: ") and captured.out == ""
