"""What data_recipes/README.md says is so, and the makers of tiny data keep to the recipes."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from data_recipes.make_tiny import main, shard_folder
from dsvl_train.data.loader import build_data
from tests.unit.made_data import VL2_FOLDER, config, picture, shards_source, text_source

README = (Path(__file__).parents[2] / "data_recipes" / "README.md").read_text(encoding="utf-8")
DATA_SETS = """
    MMC4 | Wikipedia | WikiHow | CapsFusion | TaiSu | Detailed Caption | Chart2text | Geo170K | UReader | UniChart | M-Paper | ScienceQA |
    ScreenQA | SciGraphQA-295K | Paper2Figure100k | Widget Captioning | Screen2Words | RefExp | WebSight | ArT | MLT-17 | LSVT | UberText |
    COCO-Text | RCTW-17 | ReCTS | TextOCR | OpenVINO | HierText | arXiv | ShareGPT4V | LAION-GPTV | LVIS-Instruct4V | textOCR-GPT4V |
    LLaVA1.6-GPT4V | IconQA | Screen-to-code | WIT | OBELICS | Wanjuan | LaTeX OCR | 12M RenderedText | PubTabNet | FinTabNet | Docmatix
"""
"""Named in VL Tables 1 and 2 and VL2 §3.1 and §3.2."""


def test_every_data_set_of_the_papers_is_explained() -> None:
    assert [name for name in " ".join(DATA_SETS.split()).split(" | ") if name not in README] == []


def test_the_conversion_shown_writes_what_a_run_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cat.jpg").write_bytes(picture(90, 60, kind="JPEG"))
    shutil.copytree(VL2_FOLDER, tmp_path / "data" / "processor" / "deepseek_vl2")
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    sources = {
        "caption": shards_source("data/vl2/pretrain/caption/*/*.tar"),
        "sft": shards_source("data/vl2/sft/general_vqa/*/*.tar"),
        "text": text_source("data/text/129280/corpus"),
    }
    cfg = config(sources, text_ratio=0.5, packing=False, max_bad_fraction=0.0)
    with build_data(cfg, seed=0, max_steps=4, dp_rank=0, dp_size=1) as data:
        assert list(data.left_out()) == []
        steps = [next(data) for _ in range(4)]
    assert {step.modality for step in steps} == {"multimodal", "text"}


def test_a_folder_that_the_path_of_a_source_finds() -> None:
    assert shard_folder("data/vl/pretrain/caption/*/*.tar") == Path("data/vl/pretrain/caption/tiny")
    assert shard_folder("data/vl/align/sharegpt4v") == Path("data/vl/align/sharegpt4v")


def test_data_are_made_only_where_the_recipe_looks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--recipe", "demo_vl2/pretrain", "--out", str(tmp_path)]) == 2
    assert "data.sources.pretrain.path=runs/demo/data/pretrain does not lie under data.root" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
