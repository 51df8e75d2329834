"""`dsvl encode` against the released processors' output."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dsvl_train.cli import main
from dsvl_train.interop import processors
from dsvl_train.interop.formats import transformers_vl
from dsvl_train.interop.released import read_model

DATA = Path(__file__).parent / "data"
VARIANTS = ["mha_softmax", "mla_softmax", "mla_sigmoid_bias"]
FILES = ["config.json", "processor_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
FIELDS = ("input_ids", "labels", "image_mask", "tiles_wh", "pixels")


def without_weights(variant: str, folder: Path) -> Path:
    folder.mkdir()
    for name in FILES:
        (folder / name).write_bytes((DATA / "vl2" / variant / name).read_bytes())
    return folder


def encode(model: Path, samples: Path, out: Path, *options: str) -> dict[str, np.ndarray]:
    assert main(["encode", "--model", str(model), "--samples", str(samples), "--out", str(out), *options]) == 0
    with np.load(out) as archive:
        return dict(archive)


@pytest.mark.parametrize("variant", VARIANTS)
def test_vl2_equals_the_released_output_without_weights(variant: str, tmp_path: Path) -> None:
    model = without_weights(variant, tmp_path / "model")
    actual = encode(model, DATA / "vl2" / "samples.json", tmp_path / "x.npz")
    with np.load(DATA / "vl2" / "processed.npz") as golden:
        assert set(actual) == set(golden.files)
        for name in golden.files:
            assert actual[name].dtype == golden[name].dtype, name
            np.testing.assert_array_equal(actual[name], golden[name], err_msg=name)
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["x.npz"]


def test_vl_equals_the_released_ids(tmp_path: Path) -> None:
    actual = encode(DATA / "vl", DATA / "vl" / "samples.json", tmp_path / "x.npz")
    with np.load(DATA / "vl" / "processed.npz") as golden:
        numbers = sorted({name.split(".")[0] for name in golden.files})
        assert {name.split(".")[0] for name in actual} == set(numbers)
        for number in numbers:
            np.testing.assert_array_equal(actual[f"{number}.input_ids"], golden[f"{number}.input_ids"])


def test_a_folder_in_the_layout_of_transformers_is_read_alike(tmp_path: Path) -> None:
    model = read_model(DATA / "vl")
    ids = processors.read_token_ids(DATA / "vl")
    config = transformers_vl.write(model, bos_id=0, eos_id=1, image_token_id=processors.image_token_id(ids), dtype="float32")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    processors.to_transformers(DATA / "vl", tmp_path / "model", model)
    expected = encode(DATA / "vl", DATA / "vl" / "samples.json", tmp_path / "x.npz")
    actual = encode(tmp_path / "model", DATA / "vl" / "samples.json", tmp_path / "y.npz")
    assert actual.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)


SPELLINGS = [("user", "assistant", "system"), ("User", "Assistant", "system"), ("<|User|>", "<|Assistant|>", "system")]


@pytest.mark.parametrize("spelling", SPELLINGS, ids=["ours", "vl", "vl2"])
def test_json_lines_and_every_spelling_of_the_roles_give_the_same(spelling: tuple[str, str, str], tmp_path: Path) -> None:
    """Images of JSON lines lie relative to the file, or are named by absolute paths."""
    roles = dict(zip(("<|User|>", "<|Assistant|>", "system"), spelling, strict=True))
    lines = []
    for sample in json.loads((DATA / "vl2" / "samples.json").read_text()):
        messages = [{"role": roles[message["role"]], "content": message["content"]} for message in sample["messages"]]
        lines.append(json.dumps({"messages": messages, "images": [str((DATA / "vl2" / name).resolve()) for name in sample["images"]]}))
    (tmp_path / "samples.jsonl").write_text("\n".join(lines) + "\n\n")
    actual = encode(DATA / "vl2" / "mla_softmax", tmp_path / "samples.jsonl", tmp_path / "x.npz")
    with np.load(DATA / "vl2" / "processed.npz") as golden:
        for name in golden.files:
            np.testing.assert_array_equal(actual[name], golden[name], err_msg=name)


def test_an_empty_last_answer_is_a_prompt(tmp_path: Path) -> None:
    """Its ids are those of the answered conversation up to where the answer begins."""
    question = {"role": "user", "content": "What is 2 + 3?"}
    samples = [{"messages": [question, {"role": "assistant", "content": text}]} for text in ("", "5")]
    (tmp_path / "samples.json").write_text(json.dumps(samples))
    for model in (DATA / "vl2" / "mla_softmax", DATA / "vl"):
        actual = encode(model, tmp_path / "samples.json", tmp_path / "x.npz")
        prompt, whole = actual["0.input_ids"], actual["1.input_ids"]
        np.testing.assert_array_equal(prompt, whole[: len(prompt)])
        assert len(prompt) < len(whole)
        assert (actual["0.labels"][1:] == -100).all()
        assert (actual["1.labels"][len(prompt) :] == whole[len(prompt) :]).all()


def test_mask_prompt_is_ours_to_choose(tmp_path: Path) -> None:
    samples = DATA / "vl2" / "samples.json"
    model = without_weights("mla_softmax", tmp_path / "model")
    config = json.loads((model / "processor_config.json").read_text())
    for in_folder in (False, True):
        (model / "processor_config.json").write_text(json.dumps({**config, "mask_prompt": in_folder}))
        masked = encode(model, samples, tmp_path / "x.npz")
        open_ = encode(model, samples, tmp_path / "y.npz", "--mask-prompt", "false")
        assert (masked["10.labels"] != -100).sum() == 3
        assert (open_["10.labels"] == open_["10.input_ids"]).all()
        assert (open_["0.labels"][open_["0.image_mask"]] == -100).all()


GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"messages": []}, "`messages`"),
        ({"messages": [{"role": "nobody", "content": "hi"}]}, "nobody"),
        ({"messages": [{"role": "user", "content": 3}]}, "message 0"),
        ({"messages": [{"role": "user", "content": "<image> hi"}]}, "<image>"),
        ({"messages": [{"role": "user", "content": "<image> hi"}], "images": ["gone.png"]}, "gone.png"),
        ({"messages": [{"role": "user", "content": "<image> hi"}], "images": ["broken.png"]}, "image"),
        ({"messages": [{"role": "user", "content": "<image> hi"}], "images": ["x" * 300]}, "xxx"),
        ({"messages": [{"role": "user", "content": "hi"}], "images": "broken.png"}, "`images`"),
        ({"messages": [{"role": "user", "content": "hi", "images": 5}]}, "`images`"),
        (["hi"], "list"),
    ],
)
def test_a_bad_sample_is_named(bad: Any, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nonsense")
    samples, out = tmp_path / "samples.json", tmp_path / "x.npz"
    samples.write_text(json.dumps([GOOD, bad]))
    assert main(["encode", "--model", str(DATA / "vl2" / "mla_softmax"), "--samples", str(samples), "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert f"{samples}: sample 1" in message and reason in message and "Traceback" not in message
    assert sorted(file.name for file in tmp_path.iterdir()) == ["broken.png", "samples.json"]


def test_a_line_that_is_not_json_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = tmp_path / "samples.jsonl"
    samples.write_text(json.dumps(GOOD) + "\n\n{nonsense\n")
    assert main(["encode", "--model", str(DATA / "vl2" / "mla_softmax"), "--samples", str(samples), "--out", str(tmp_path / "x.npz")]) == 2
    assert f"{samples}: sample 1 (line 3) is not JSON" in capsys.readouterr().err


def test_images_may_stand_in_the_messages(tmp_path: Path) -> None:
    """As in the released families' examples."""
    samples = json.loads((DATA / "vl2" / "samples.json").read_text())
    for sample in samples:
        images = [str((DATA / "vl2" / name).resolve()) for name in sample.pop("images")]
        for message in sample["messages"]:
            count = message["content"].count("<image>")
            message["images"], images = images[:count], images[count:]
    (tmp_path / "samples.json").write_text(json.dumps(samples))
    actual = encode(DATA / "vl2" / "mla_softmax", tmp_path / "samples.json", tmp_path / "x.npz")
    with np.load(DATA / "vl2" / "processed.npz") as golden:
        for name in golden.files:
            np.testing.assert_array_equal(actual[name], golden[name], err_msg=name)


def test_encoding_needs_no_megatron(tmp_path: Path) -> None:
    arguments = ["encode", "--model", str(DATA / "vl"), "--samples", str(DATA / "vl" / "samples.json"), "--out", str(tmp_path / "x.npz")]
    code = (
        f"import sys; from dsvl_train.cli import main; assert main({arguments!r}) == 0; print([n for n in sys.modules if 'megatron' in n])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_more_tiles_than_in_training_for_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """VL2, footnote 2: up to 18 tiles where images have extreme aspect ratios."""
    Image.new("RGB", (6000, 400), "red").save(tmp_path / "wide.png")
    samples = tmp_path / "samples.json"
    messages = [{"role": "user", "content": "<image>\nread"}, {"role": "assistant", "content": ""}]
    samples.write_text(json.dumps([{"messages": messages, "images": ["wide.png"]}]))
    model = DATA / "vl2" / "mla_softmax"
    assert encode(model, samples, tmp_path / "x.npz")["0.tiles_wh"].tolist() == [[9, 1]]
    wide = encode(model, samples, tmp_path / "y.npz", "--max-tiles", "18")
    assert wide["0.tiles_wh"].tolist() == [[15, 1]]
    assert len(wide["0.pixels"]) == 16
    assert (
        main(["encode", "--model", str(DATA / "vl"), "--samples", str(samples), "--out", str(tmp_path / "z.npz"), "--max-tiles", "18"]) == 2
    )
    assert "--max-tiles 18" in capsys.readouterr().err
