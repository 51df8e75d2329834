"""Import and export of model folders: every bit comes back, nothing half is left behind, and what is wrong is named."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from dsvl_train.cli import main
from dsvl_train.commands.convert import parse_size
from dsvl_train.config.compose import CONF_DIR, from_plain_model, load_run_config
from dsvl_train.interop.blocks import MappedSource, Table, read_whole
from dsvl_train.interop.exporter import export_model
from dsvl_train.interop.importer import import_model
from dsvl_train.interop.released import known_name, open_released
from dsvl_train.interop.shapes import logical_shapes
from dsvl_train.interop.sources import open_weights
from dsvl_train.interop.writer import plan_shards
from dsvl_train.parallel import startup
from tests.made_models import GOLDEN, multi_modality, same_tensors, transformers_model, write_model, write_multi_modality
from tests.tiny import tiny_model, tiny_run

GOLDEN_VL2 = ["mha_softmax", "mla_softmax", "mla_sigmoid_bias"]
RELEASED_PARAMETERS = {
    "deepseek_vl_1b": 1_975_235_584,
    "deepseek_vl_7b": 7_343_990_017,
    "deepseek_vl2_tiny": 3_370_501_440,
    "deepseek_vl2_small": 16_148_349_504,
    "deepseek_vl2": 27_480_134_248,
}
"""From the sizes of the published files; an unused pooling head and (7B) two unused norms are stored and counted."""


@pytest.fixture(scope="module")
def world() -> Iterator[startup.World]:
    cfg = tiny_run("vl")
    world = startup.start(cfg.engine, cfg.parallel, seed=0)
    yield world
    startup.stop()


def configured(name: str) -> Any:
    return from_plain_model(yaml.safe_load((CONF_DIR / "model" / f"{name}.yaml").read_text()))


def differing_keys(wanted: Any, got: Any, path: str = "") -> list[str]:
    """Keys of `wanted` that `got` lacks or has with another value."""
    if isinstance(wanted, dict) and isinstance(got, dict):
        return [wrong for key in wanted for wrong in differing_keys(wanted[key], got.get(key, "absent"), f"{path}.{key}")]
    return [] if wanted == got else [f"{path}: {wanted} became {got}"]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


# ------------------------------------------------------------------------------------------------------------------- the models


@pytest.mark.parametrize("name", RELEASED_PARAMETERS)
def test_released_configurations_have_the_published_number_of_parameters(world: startup.World, name: str) -> None:
    """Built on the meta device: parameters and the selection bias, a buffer here."""
    from dsvl_train.models.language import transformer_config
    from dsvl_train.models.logical import logical_tensors
    from dsvl_train.models.vlm import VisionLanguageModel

    model, run = configured(name), tiny_run("vl")
    with torch.device("meta"):
        built = VisionLanguageModel(model, transformer_config(model.language, run.stage, run.parallel, torch.bfloat16, on_cpu=True))
    shapes = {tensor.name: tensor.shape for tensor, _ in logical_tensors(built)}
    padding = 2 * (shapes["language.output_layer.weight"][0] - model.language.vocab_size) * model.language.hidden_size
    assert sum(map(math.prod, shapes.values())) - padding == RELEASED_PARAMETERS[name]
    assert shapes == logical_shapes(model)
    assert known_name(model) == name


@pytest.mark.parametrize(("family", "mla"), [("vl", True), ("vl2", True), ("vl2", False)])
def test_shapes_from_the_configuration_are_those_of_the_built_model(world: startup.World, family: str, mla: bool) -> None:
    from dsvl_train.models.build import build_model
    from dsvl_train.models.logical import logical_tensors

    model, run = tiny_model(family, mla=mla), tiny_run(family)
    model.vision.siglip.attention_pool = True
    model.vision.stored_layer_norms = family == "vl"
    model.language.kv_heads = 2 if not mla or family == "vl" else None
    built = build_model(model, run.stage, run.parallel, world, seed=None)
    assert {tensor.name: tensor.shape for tensor, _ in logical_tensors(built)} == logical_shapes(model)


# ------------------------------------------------------------------------------------------------------------ there and back


@pytest.mark.parametrize("variant", GOLDEN_VL2)
def test_a_released_vl2_comes_back_bit_for_bit(variant: str, tmp_path: Path) -> None:
    source = GOLDEN / "vl2" / variant
    assert main(["import", str(source), "--out", str(tmp_path / "ours")]) == 0
    options = ["--format", "deepseek_vl_v2", "--out", str(tmp_path / "back"), "--max-shard-size", "0.5MB"]
    assert main(["export", str(tmp_path / "ours"), *options]) == 0
    assert same_tensors(source, tmp_path / "back") == []
    wanted = read_json(source / "config.json")
    wanted["vision_config"]["model_name"] = "siglip_custom"  # the name of a size that has none
    assert differing_keys(wanted, read_json(tmp_path / "back" / "config.json")) == []
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "processor_config.json"):
        assert (source / name).read_bytes() == (tmp_path / "back" / name).read_bytes()
    shards = sorted(path.name for path in (tmp_path / "back").glob("*.safetensors"))
    assert shards[0] == f"model-00001-of-{len(shards):06d}.safetensors"
    index = read_json(tmp_path / "back" / "model.safetensors.index.json")
    assert set(index["weight_map"].values()) == set(shards)
    assert index["metadata"]["total_size"] == sum(info.bytes for info in open_weights(source).infos().values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("hybrid", [False, True], ids=["1b", "7b"])
def test_a_released_vl_comes_back_bit_for_bit(hybrid: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    """With the pooling head and the 7B's two norms that nothing uses."""
    source = write_multi_modality(tmp_path / "source", hybrid, dtype)
    import_model(source, tmp_path / "ours")
    assert export_model(tmp_path / "ours", tmp_path / "back", "multi_modality") == []
    assert same_tensors(source, tmp_path / "back") == []
    wanted = read_json(source / "config.json") | {"torch_dtype": str(dtype).removeprefix("torch.")}
    assert differing_keys(wanted, read_json(tmp_path / "back" / "config.json")) == []
    assert (tmp_path / "back" / "tokenizer.json").is_file()


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("hybrid", [False, True], ids=["deepseek_vl", "deepseek_vl_hybrid"])
def test_a_transformers_vl_comes_back_bit_for_bit(hybrid: bool, head: bool, tmp_path: Path) -> None:
    transformers_model(hybrid, use_head=head).save_pretrained(tmp_path / "source")
    import_model(tmp_path / "source", tmp_path / "ours")
    assert export_model(tmp_path / "ours", tmp_path / "back", "transformers") == []
    assert same_tensors(tmp_path / "source", tmp_path / "back") == []
    language = load_run_config(tmp_path / "ours" / "config.yaml").model.language
    assert (language.tie_embeddings, language.rope_theta, language.kv_heads) == (False, 5000.0, 2)


def test_bin_files_are_read_without_running_code(tmp_path: Path) -> None:
    source = write_multi_modality(tmp_path / "source", hybrid=False)
    shutil.copytree(source, tmp_path / "bin")
    torch.save(load_file(source / "model.safetensors"), tmp_path / "bin" / "pytorch_model.bin")
    (tmp_path / "bin" / "model.safetensors").unlink()
    assert same_tensors(source, tmp_path / "bin") == []
    import_model(tmp_path / "bin", tmp_path / "ours")
    export_model(tmp_path / "ours", tmp_path / "back", "multi_modality")
    assert same_tensors(source, tmp_path / "back") == []


def test_a_stack_of_experts_is_taken_apart(tmp_path: Path) -> None:
    """transformers 5 keeps a layer's experts in two tensors."""
    source = GOLDEN / "vl2" / "mla_sigmoid_bias"
    state = load_file(source / "model.safetensors")
    for layer in (1, 2, 3):
        prefix = f"language.model.layers.{layer}.mlp.experts."
        parts = {leaf: [state.pop(f"{prefix}{expert}.{leaf}_proj.weight") for expert in range(8)] for leaf in ("gate", "up", "down")}
        state[f"{prefix}gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(parts["gate"], parts["up"], strict=True)])
        state[f"{prefix}down_proj"] = torch.stack(parts["down"])
    write_model(tmp_path / "stacked", read_json(source / "config.json"), state)
    import_model(tmp_path / "stacked", tmp_path / "ours")
    export_model(tmp_path / "ours", tmp_path / "back", "deepseek_vl_v2")
    assert same_tensors(source, tmp_path / "back") == []


def test_export_converts_types_but_not_the_selection_bias(tmp_path: Path) -> None:
    import_model(GOLDEN / "vl2" / "mla_sigmoid_bias", tmp_path / "ours")
    export_model(tmp_path / "ours", tmp_path / "back", "deepseek_vl_v2", dtype="bf16")
    types = {name: info.dtype for name, info in open_weights(tmp_path / "back").infos().items()}
    kept = {name for name, dtype in types.items() if dtype == torch.float32}
    assert kept == {f"language.model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in (1, 2, 3)}
    assert set(types.values()) == {torch.float32, torch.bfloat16}
    assert read_json(tmp_path / "back" / "config.json")["torch_dtype"] == "bfloat16"


def test_a_bf16_run_exports_its_main_weights_as_fp32(world: startup.World, tmp_path: Path) -> None:
    from dataclasses import replace

    from dsvl_train.models.build import build_model
    from dsvl_train.training import checkpoint
    from dsvl_train.training.setup import build_trainable
    from dsvl_train.training.step import TrainStep
    from tests.tiny import SOURCES, tiny_batch

    cfg, half = tiny_run("vl2"), replace(world, params_dtype=torch.bfloat16)
    cfg.data.processor = str(tmp_path)
    model = build_model(cfg.model, cfg.stage, cfg.parallel, half, seed=0)
    chunks, optimiser = build_trainable(cfg, half, model)
    TrainStep(cfg, half, model, chunks, optimiser, SOURCES)(tiny_batch(cfg.model, 1, "multimodal"), 1e-3, stop_requested=False)
    cfg.run.dir = str(tmp_path / "run")
    state = checkpoint.TrainState(1, {}, optimiser.steps_taken(), 0)
    checkpoint.Saver(cfg, half, model, optimiser).save(state, last=True)
    export_model(tmp_path / "run", tmp_path / "stored", "deepseek_vl_v2")
    export_model(tmp_path / "run", tmp_path / "main", "deepseek_vl_v2", dtype="fp32")
    stored, main_weights = (load_file(tmp_path / name / "model.safetensors") for name in ("stored", "main"))
    weight = model.language.language.output_layer.weight
    assert torch.equal(main_weights["language.lm_head.weight"], optimiser.state_of(weight).tensors["main"][:200])
    assert torch.equal(stored["language.lm_head.weight"], weight[:200])
    assert not torch.equal(main_weights["language.lm_head.weight"], weight[:200].float())
    assert {tensor.dtype for tensor in main_weights.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        ("vl2", "transformers", "no DeepSeek-VL2 class"),
        ("vl2", "multi_modality", "no place in multi_modality"),
        ("vl", "deepseek_vl_v2", "vl2 family"),
    ],
)
def test_a_format_that_cannot_hold_the_model_is_refused(source: str, target: Any, words: str, tmp_path: Path) -> None:
    folder = GOLDEN / "vl2" / "mla_softmax" if source == "vl2" else write_multi_modality(tmp_path / "source", hybrid=False)
    import_model(folder, tmp_path / "ours")
    with pytest.raises(ValueError, match=words):
        export_model(tmp_path / "ours", tmp_path / "back", target)
    assert not (tmp_path / "back").exists()


# ---------------------------------------------------------------------------------------------------------------------- memory


MEASURE = """
import torch
torch.set_num_threads(1)
from pathlib import Path
from dsvl_train.interop.importer import import_model
from dsvl_train.interop.exporter import export_model

def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

def convert(source, name):
    import_model(source, f"{out}/{{name}}", show_progress=False)
    export_model(f"{out}/{{name}}", f"{out}/{{name}}_back", "deepseek_vl_v2", show_progress=False, max_shard_bytes=10**8)

convert("{warm}", "warm")  # what imports and first calls need is not the model's
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = memory("VmRSS")
convert("{source}", "big")
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_a_model_passes_through_in_the_memory_of_a_few_of_its_tensors(tmp_path: Path) -> None:
    """About 300 MB of weights, the largest tensor 8 MB: the peak may grow by what is read between two fresh memory maps (64 MB), not by
    the model."""
    config = read_json(GOLDEN / "vl2" / "mha_softmax" / "config.json")
    language = config["language_config"]
    language |= {"hidden_size": 512, "intermediate_size": 4096, "moe_intermediate_size": 1024, "num_hidden_layers": 7}
    config["projector_config"]["n_embed"] = 512
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    from dsvl_train.interop.formats import deepseek_vl2
    from dsvl_train.interop.formats.json_file import JsonConfig

    model = deepseek_vl2.read(JsonConfig.read(tmp_path / "source" / "config.json"), ())
    shapes = deepseek_vl2.relate(model, logical_shapes(model)).foreign
    state = {name: torch.empty(shape).uniform_() for name, shape in shapes.items()}
    size, largest = (f(t.numel() * 4 for t in state.values()) for f in (sum, max))
    assert size > 280e6 and largest < 10e6
    save_file(state, tmp_path / "source" / "model.safetensors")
    code = MEASURE.format(warm=GOLDEN / "vl2" / "mla_softmax", source=tmp_path / "source", out=tmp_path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 110e6
    assert same_tensors(tmp_path / "source", tmp_path / "big_back") == []


# ---------------------------------------------------------------------------------------------------------------------- errors


def edit_state(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors")

    return apply


def edit_config(*path: str, value: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = read_json(folder / "config.json")
        section = config
        for key in path[:-1]:
            section = section[key]
        section[path[-1]] = value
        (folder / "config.json").write_text(json.dumps(config))

    return apply


def truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def pickle_in_disguise(folder: Path) -> None:
    torch.save({"language.lm_head.weight": torch.zeros(2)}, folder / "model.safetensors")


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch was_run",)


def malicious_bin(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"language.lm_head.weight": Malicious()}, protocol=2))


NORM = "language.model.norm.weight"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (edit_state(lambda s: s.update({NORM: torch.zeros(65)})), rf"tensor {NORM} has the shape \[65\]; .* \[64\]"),
        (edit_state(lambda s: s.pop(NORM)), rf"1 tensor.* missing: {NORM}"),
        (edit_state(lambda s: s.update({"language.model.surprise": torch.zeros(1)})), r"no place .*: language\.model\.surprise"),
        (truncate, r"model\.safetensors: not a whole safetensors file"),
        (pickle_in_disguise, r"model\.safetensors: not a whole safetensors file"),
        (malicious_bin, r"pytorch_model\.bin: refused"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json: not JSON"),
        (lambda folder: (folder / "config.json").unlink(), r"config\.json is missing"),
        (edit_config("model_type", value="qwen"), r'config\.json: model_type = "qwen"'),
        (edit_config("tile_tag", value="1D"), r'config\.json: tile_tag = "1D": only "2D" is supported'),
        (edit_config("tile_tag", value="tile_tag"), 'tile_tag = "tile_tag"'),
        (edit_config("global_view_pos", value="tail"), 'global_view_pos = "tail"'),
        (edit_config("language_config", "topk_method", value="random"), r'language_config\.topk_method = "random"'),
        (edit_config("language_config", "scoring_func", value="relu"), r'language_config\.scoring_func = "relu"'),
        (edit_config("language_config", "q_lora_rank", value=8), r"language_config\.q_lora_rank = 8: only null"),
        (edit_config("language_config", "moe_layer_freq", value=2), r"language_config\.moe_layer_freq = 2"),
        (edit_config("language_config", "n_group", value=4), r"language_config\.n_group = 4"),
        (edit_config("language_config", "hidden_act", value="gelu"), r'language_config\.hidden_act = "gelu"'),
        (edit_config("language_config", "hidden_size", value="64"), r'hidden_size = "64": expected a whole number'),
        (edit_config("language_config", "rope_scaling", value={"type": "yarn", "factor": 4}), r"rope_scaling .*scaled rotary"),
        (edit_config("projector_config", "projector_type", value="linear"), r'projector_config\.projector_type = "linear"'),
        (edit_config("projector_config", "n_embed", value=32), r"projector_config\.n_embed = 32: only 64"),
        (edit_config("vision_config", "class_token", value=True), r"vision_config\.class_token = true: only false"),
        (edit_config("vision_config", "layers", value=4), r"missing: vision\.blocks\.3\."),
    ],
    ids=lambda value: None if callable(value) else value[:40],
)
def test_what_is_wrong_is_named_and_nothing_is_written(
    spoil: Callable[[Path], None], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "vl2" / "mla_softmax", source)
    for file in source.iterdir():
        file.chmod(0o644)
    spoil(source)
    with pytest.raises(ValueError, match=words):
        import_model(source, tmp_path / "ours")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    import_model(GOLDEN / "vl2" / "mha_softmax", tmp_path / "ours")
    export_model(tmp_path / "ours", tmp_path / "back", "deepseek_vl_v2", max_shard_bytes=10**6)
    shard = sorted((tmp_path / "back").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=rf"{shard.name} is missing"):
        open_released(tmp_path / "back")


def test_an_interrupted_export_leaves_nothing_that_looks_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_model(GOLDEN / "vl2" / "mha_softmax", tmp_path / "ours")

    def interrupt(*_: Any, **__: Any) -> None:
        assert [path.name for path in tmp_path.iterdir() if path.name != "ours"] == [".unfinished_back"]
        raise KeyboardInterrupt

    monkeypatch.setattr("dsvl_train.interop.processors.copy_released", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_model(tmp_path / "ours", tmp_path / "back", "deepseek_vl_v2")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_what_is_there_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "precious").write_text("x")
    assert main(["import", str(GOLDEN / "vl2" / "mha_softmax"), "--out", str(tmp_path / "ours")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["ours", "precious"]


# ------------------------------------------------------------------------------------------------------------------- small parts


def test_blocks_read_any_region() -> None:
    """A fused tensor read in boxes that cut across its parts equals the same boxes of the whole."""
    table = Table({"ours": (6, 4), "stacked": (2, 4)})
    table.rows("a", (2, 4), [("ours", (0, 0), (0, 0), (1, 4)), ("ours", (3, 0), (1, 0), (1, 4))])
    table.rows("b", (2, 2, 4), [("ours", (1, 0), (0, 0, 0), (2, 4)), ("stacked", (0, 0), (1, 0, 0), (2, 4))])

    tensors = {"a": torch.arange(8.0).view(2, 4), "b": 100 + torch.arange(16.0).view(2, 2, 4)}

    class Foreign:
        where = "here"

        def infos(self) -> Any:
            from dsvl_train.interop.blocks import TensorInfo

            return {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in tensors.items()}

        def read(self, name: str, start: Any, size: Any) -> torch.Tensor:
            return tensors[name][tuple(slice(at, at + n) for at, n in zip(start, size, strict=True))]

    mapped = MappedSource(Foreign(), table.to_ours(), table.ours)
    whole = read_whole(mapped, "ours")
    assert whole[[0, 3]].tolist() == tensors["a"].tolist()
    assert whole[1:3].tolist() == tensors["b"][0].tolist()
    assert not whole[4:].any()
    for first in range(6):
        for last in range(first + 1, 7):
            assert torch.equal(mapped.read("ours", (first, 1), (last - first, 2)), whole[first:last, 1:3])
    assert torch.equal(read_whole(mapped, "stacked"), tensors["b"][1])


def test_shards_are_cut_by_size_and_a_large_tensor_has_its_own() -> None:
    from dsvl_train.interop.blocks import TensorInfo

    infos = {name: TensorInfo((size,), torch.uint8) for name, size in (("a", 4), ("b", 5), ("c", 20), ("d", 1), ("e", 9))}
    assert plan_shards(infos, 10) == [["a", "b"], ["c"], ["d", "e"]]


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("500mb", 5 * 10**8), ("1.5GiB", 3 * 2**29), ("123", 123)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_a_bad_size_is_refused() -> None:
    import argparse

    for text in ("big", "-1GB", "0", "5XB"):
        with pytest.raises(argparse.ArgumentTypeError):
            parse_size(text)


def test_an_unknown_encoder_name_is_refused(tmp_path: Path) -> None:
    config, state = multi_modality(hybrid=False)
    config["vision_config"]["params"]["model_name"] = "siglip_giant"
    with pytest.raises(ValueError, match=r'vision_config\.params\.model_name = "siglip_giant": unknown encoder; known are siglip_large'):
        open_released(write_model(tmp_path / "source", config, state))
