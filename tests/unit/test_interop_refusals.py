"""Sources that are well formed and still make no model: refused with the key or the tensor, nothing written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsvl_train.config.compose import load_run_config
from dsvl_train.interop.exporter import export_model
from dsvl_train.interop.importer import import_model
from tests.made_models import GOLDEN

NORM = "language.model.norm.weight"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A writable copy of a released folder."""
    folder = tmp_path / "source"
    shutil.copytree(GOLDEN / "vl2" / "mha_softmax", folder)
    for file in folder.iterdir():
        file.chmod(0o644)
    return folder


def refused(source: Path, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        import_model(source, source.parent / "ours", show_progress=False)
    assert [path.name for path in source.parent.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("model_type", ["deepseek_vl_v2"], r"config\.json: model_type = \["),
        ("model_type", "llama", r"a part, not a whole .* init\.language="),
        ("language_config.num_experts_per_tok", 99, r"num_experts_per_tok = 99: more than the n_routed_experts = 8"),
        ("language_config.rms_norm_eps", float("nan"), r"rms_norm_eps = NaN: expected a finite number"),
        ("language_config.rope_theta", float("inf"), r"rope_theta = Infinity: expected a finite number"),
        ("vision_config.mlp_ratio", -1.0, r"vision_config\.mlp_ratio = -1\.0: expected a finite number above 0"),
    ],
)
def test_a_value_that_makes_no_model(source: Path, key: str, value: Any, words: str) -> None:
    config = json.loads((source / "config.json").read_text())
    *sections, leaf = key.split(".")
    section = config
    for name in sections:
        section = section[name]
    section[leaf] = value
    (source / "config.json").write_text(json.dumps(config))
    refused(source, words)


def test_a_weight_of_whole_numbers(source: Path) -> None:
    state = load_file(source / "model.safetensors")
    state[NORM] = state[NORM].long()
    save_file(state, source / "model.safetensors")
    refused(source, rf"tensor {NORM} holds torch\.int64")


def test_a_sparse_tensor_in_a_bin_file(source: Path) -> None:
    state = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    torch.save(state | {NORM: state[NORM].to_sparse()}, source / "pytorch_model.bin")
    refused(source, rf"pytorch_model\.bin: tensor {NORM} is sparse")


def test_vl2s_pixel_statistics_are_the_processors(source: Path, tmp_path: Path) -> None:
    """config.json of that format has none: they are read from the processor's file, and an export whose file disagrees is refused."""
    file = source / "processor_config.json"
    settings = json.loads(file.read_text()) | {"image_mean": [0.9, 0.8, 0.7], "image_std": [0.3, 0.3, 0.2]}
    file.write_text(json.dumps(settings))
    siglip = import_model(source, tmp_path / "ours", show_progress=False).vision.siglip
    assert (siglip.pixel_mean, siglip.pixel_std) == ([0.9, 0.8, 0.7], [0.3, 0.3, 0.2])
    assert load_run_config(tmp_path / "ours" / "config.yaml").model.vision.siglip == siglip
    export_model(tmp_path / "ours", tmp_path / "back", "deepseek_vl_v2", show_progress=False)
    assert json.loads((tmp_path / "back" / "processor_config.json").read_text()) == settings
    stored = tmp_path / "ours" / "processor" / "processor_config.json"
    stored.write_text(json.dumps(settings | {"image_std": [0.5, 0.5, 0.5]}))
    with pytest.raises(ValueError, match=r"image_std is \[0\.5, 0\.5, 0\.5\], the model was trained with \[0\.3"):
        export_model(tmp_path / "ours", tmp_path / "other", "deepseek_vl_v2", show_progress=False)
    assert not (tmp_path / "other").exists()
