"""Losses and logits of model folders as released against the released code's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsvl_train.cli import main
from dsvl_train.evaluation.samples import encode_sample, load_processor, read_samples
from dsvl_train.parallel import startup

DATA = Path(__file__).parent / "data" / "vl2"
VARIANTS = ["mha_softmax", "mla_softmax", "mla_sigmoid_bias"]


@pytest.fixture(autouse=True)
def stopped() -> Iterator[None]:
    yield
    startup.stop()


def score(capsys: pytest.CaptureFixture[str], model: Path, samples: Path, *options: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(["score", "--model", str(model), "--samples", str(samples), "--device", "cpu", *options]) == 0
    startup.stop()
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_logits_equal_the_released_ones(variant: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The released loss counts answers only. Measured: 4e-7 relative, 3e-5 absolute."""
    scores = score(capsys, DATA / variant, DATA / "samples.json")
    world = startup.start_alone("cpu")
    from dsvl_train.evaluation.loading import load_model
    from dsvl_train.evaluation.scoring import logits

    loaded = load_model(DATA / variant, world)
    with np.load(DATA / variant / "expected.npz") as expected:
        for index, sample in enumerate(read_samples(DATA / "samples.json")):
            assert scores[index]["tokens"] == expected[f"{index}.loss_tokens"]
            np.testing.assert_allclose(scores[index]["loss_sum"], expected[f"{index}.loss_sum"], rtol=1e-5)
            actual = logits(loaded, encode_sample(loaded.processor, sample))[-8:].numpy()
            np.testing.assert_allclose(actual, expected[f"{index}.logits_last8"], rtol=0, atol=1e-4)
    assert len(scores) == index + 1


def test_a_score_depends_on_its_sample_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = json.loads((DATA / "samples.json").read_text())
    for sample in samples:
        sample["images"] = [str((DATA / name).resolve()) for name in sample["images"]]
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, samples)))
    (tmp_path / "some.json").write_text(json.dumps([samples[7], samples[2]]))
    whole = score(capsys, DATA / "mla_softmax", tmp_path / "all.jsonl")
    assert score(capsys, DATA / "mla_softmax", tmp_path / "some.json") == [whole[7], whole[2]]


def test_prompts_count_where_asked(capsys: pytest.CaptureFixture[str]) -> None:
    processor = load_processor(DATA / "mla_softmax", mask_prompt=False)
    scores = score(capsys, DATA / "mla_softmax", DATA / "samples.json", "--mask-prompt", "false")
    for sample, scored in zip(read_samples(DATA / "samples.json"), scores, strict=True):
        assert scored["tokens"] == encode_sample(processor, sample).measured().supervised_tokens
        assert scored["loss_sum"] > scored["tokens"]


def test_precision_is_single_unless_half_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    single, half = (score(capsys, DATA / "mla_softmax", DATA / "samples.json", *o) for o in ((), ("--precision", "bf16")))
    for exact, rough in zip(single, half, strict=True):
        assert exact["tokens"] == rough["tokens"] and exact["loss_sum"] != rough["loss_sum"]
        np.testing.assert_allclose(rough["loss_sum"], exact["loss_sum"], rtol=0.03)


def test_a_bad_sample_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = tmp_path / "samples.json"
    samples.write_text(json.dumps([{"messages": [{"role": "user", "content": "<image>"}], "images": ["gone.png"]}]))
    assert main(["score", "--model", str(DATA / "mla_softmax"), "--samples", str(samples)]) == 2
    captured = capsys.readouterr()
    assert f"{samples}: sample 0: image 'gone.png'" in captured.err and captured.out == ""
