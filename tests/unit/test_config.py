"""Composition, typing, round trip and rules of the configuration."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dsvl_train.config import ConfigError
from dsvl_train.config.compose import CONF_DIR, compose_run, from_plain, load_run_config, to_plain, to_yaml
from dsvl_train.config.names import known_keys, matching_key, nearest_key
from dsvl_train.config.overrides import options_of
from dsvl_train.config.schema import RunConfig
from dsvl_train.config.validate import validate

ROOT = Path(__file__).resolve().parents[2]
RECIPES = options_of(CONF_DIR / "recipe")
VL2, VL = "recipe=demo_vl2/pretrain", "recipe=demo_vl/sft"
FIXED = ["run.max_steps=400", "data.seq_len=512", "data.batch_size=16", "data.micro_batch_size=2", "optim.schedule.warmup_steps=20"]
"""Numbers that the rules below are tried against; the demo's own are tuned."""


def changed(config: RunConfig, **settings: Any) -> RunConfig:
    """A copy with settings changed; `model__language__heads=3` stands for model.language.heads."""
    config = copy.deepcopy(config)
    for name, value in settings.items():
        *path, last = name.split("__")
        target: Any = config
        for part in path:
            target = target[part] if isinstance(target, dict) else getattr(target, part)
        setattr(target, last, value)
    return config


@pytest.fixture(scope="module")
def vl2() -> RunConfig:
    return compose_run([VL2, *FIXED])


@pytest.fixture(scope="module")
def vl() -> RunConfig:
    return compose_run([VL, *FIXED])


# ------------------------------------------------------------------------------------------------------------------- composition


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe.startswith("demo_")])
def test_the_demos_recipes_compose_and_are_valid(recipe: str) -> None:
    """Those of the papers: test_recipes.py."""
    config = compose_run([f"recipe={recipe}"])
    for world_size in (1, 2):
        validate(config, world_size)


@pytest.mark.parametrize("model", options_of(CONF_DIR / "model"))
def test_every_model_composes_and_is_valid(model: str) -> None:
    family = "vl2" if "vl2" in model else "vl"
    config = compose_run([f"recipe=demo_{family}/align", f"model={model}", "data.seq_len=2048"])
    assert config.model.name == model
    validate(config, 1)


@pytest.mark.parametrize("stage", options_of(CONF_DIR / "stage"))
def test_every_stage_composes(stage: str) -> None:
    family = stage.split("/")[0]
    assert compose_run([f"recipe=demo_{family}/align", f"stage={stage}"]).stage.policy


def test_what_yaml_says_of_a_group_is_what_the_schema_defaults_to() -> None:
    """The groups spell their defaults out for the reader; the schema is where they are defined."""
    config = compose_run([VL2])
    for section in ("parallel", "engine", "checkpoint", "logging", "launch"):
        value = getattr(config, section)
        assert value == type(value)(), section
    base = yaml.safe_load((CONF_DIR / "data" / "base.yaml").read_text())
    optim = yaml.safe_load((CONF_DIR / "optim" / "adamw.yaml").read_text())
    for values, cls in ((base, type(config.data)), (optim, type(config.optim)), (optim["schedule"], type(config.optim.schedule))):
        for field in dataclasses.fields(cls):
            if field.default is not dataclasses.MISSING:
                assert values[field.name] == field.default, field.name
            elif field.default_factory is not dataclasses.MISSING:
                assert values[field.name] == field.default_factory(), field.name
    assert set(base) == {field.name for field in dataclasses.fields(config.data)}
    assert set(optim) == {field.name for field in dataclasses.fields(config.optim)}


def test_overrides_reach_settings_that_no_yaml_mentions() -> None:
    config = compose_run([VL2, "model.language.rope_theta=5e5", "model.language.init_std=0.01", "run.stop_after=7", "resume=none"])
    assert config.model.language.rope_theta == 5e5
    assert (config.model.language.init_std, config.run.stop_after, config.resume) == (0.01, 7, "none")


def test_tasks_of_an_evaluation_are_named_in_overrides() -> None:
    config = compose_run(["recipe=demo_vl2/sft", "eval=demo", "eval.tasks.mmlu=mmlu:/data/mmlu/test", "~eval.tasks.words", "eval.limit=9"])
    assert config.eval.tasks == {"digits": "runs/demo/data/eval/digits.jsonl", "mmlu": "mmlu:/data/mmlu/test"}
    assert (config.eval.every, config.eval.limit, config.eval.options) == (100, 9, "text")
    validate(config, world_size=1)


def test_sources_can_be_added_and_removed() -> None:
    added = "data.sources.mine={kind: shards, path: /a, modality: multimodal}"
    config = compose_run([VL2, added, "~data.sources.pretrain", "+data.sources.text.weight=2"])
    assert list(config.data.sources) == ["text", "mine"]
    assert config.data.sources["mine"].weight == 1.0 and config.data.sources["text"].weight == 2.0


def test_run_folder_follows_the_name_and_init_from_is_renamed() -> None:
    config = compose_run([VL2, "run.name=mine", "run.dir='runs/${run.name}'", "init.from=runs/other"])
    assert (config.run.dir, config.init.source) == ("runs/mine", "runs/other")


# ------------------------------------------------------------------------------------------------------------ keys, types, values


@pytest.mark.parametrize(
    ("override", "key", "nearest"),
    [
        ("data.text_rato=0.5", "data.text_rato", "data.text_ratio"),
        ("init.form=x", "init.form", "init.from"),
        ("optim.schedule.warm_steps=3", "optim.schedule.warm_steps", "optim.schedule.warmup_steps"),
        ("data.sources.mine.pth=3", "data.sources.mine.pth", "data.sources.mine.path"),
        ("model.language.moe.topk=2", "model.language.moe.topk", "model.language.moe.top_k"),
        ("model.vision.siglip.hedas=2", "model.vision.siglip.hedas", "model.vision.siglip.heads"),
        ("tp=2", "tp", "parallel.tp"),
        ("max_steps=2", "max_steps", "run.max_steps"),
        ("recip=demo_vl2/lm", "recip", "recipe"),
        ("resum=none", "resum", "resume"),
        ("~data.text_rato", "data.text_rato", "data.text_ratio"),
        ("+data.text_rato=1", "data.text_rato", "data.text_ratio"),
        ("++data.text_rato=1", "data.text_rato", "data.text_ratio"),
    ],
)
def test_unknown_key_names_the_nearest_valid_one(override: str, key: str, nearest: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_run([VL2, override])
    assert caught.value.key == key
    assert f"nearest valid key: {nearest}" in str(caught.value)
    value = override.partition("=")[2]
    assert value in str(caught.value)


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("optim.lr=abc", "must be a number, not text"),
        ("optim.lr=true", "must be a number, not a truth value"),
        ("optim.lr=null", "must be a number, not null"),
        ("run.max_steps=1e3", "must be a whole number, not a number with a fraction\n  change: run.max_steps=1000"),
        ("run.max_steps=2.5", "must be a whole number"),
        ("run.max_steps=true", "must be a whole number, not a truth value"),
        ("run.stop_after=soon", "must be a whole number or null, not text"),
        ("run.name=12", "must be text, not a whole number"),
        ("data.packing=1", "must be true or false, not a whole number"),
        ("data.sources=null", "must be a mapping of names, not null"),
        ("data.sources.text=3", "must be a section with settings"),
        ("data.sources.text.kind=tar", "must be one of shards, text"),
        ("optim.betas=0.9", "must be a list"),
        ("optim.betas=[0.9,x]", "must be a number, not text"),
        ("parallel=null", "conf/parallel/ has no such file"),
        ("model=3", "there are deepseek_vl2, "),
        ("logging.wandb=onlin", "must be one of offline, online, disabled\n  change: logging.wandb=online"),
        ("engine.device=gpu", "must be one of auto, cpu, cuda"),
        ("recipe=demo_vl2/pretrai", "change: recipe=demo_vl2/pretrain"),
        ("model=demo_vl3", "there are deepseek_vl2, "),
        ("engine=megatrn", "change: engine=megatron"),
        ("stages/x=y", "no config group has this name"),
        ("optim.lr", "KEY=VALUE"),
        ("optim.betas=[1", "KEY=VALUE"),
        ("run.dir='${run.nam}'", "'run.nam' not found"),
        ("~run.name", "must be given"),
        ("optim.lr=???", "must be given"),
    ],
)
def test_wrong_values_are_one_clear_error(override: str, rule: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(compose_run([VL2, override]), 1)
    assert rule in str(caught.value)
    assert caught.value.key


def test_a_wrong_list_item_is_named_by_its_place() -> None:
    with pytest.raises(ConfigError, match=r"stage\.policy\[1\]\.lr_multiplier = fast"):
        compose_run([VL2, "stage.policy=[{pattern: a, lr_multiplier: null},{pattern: b, lr_multiplier: fast}]"])


def test_no_recipe_lists_the_recipes() -> None:
    with pytest.raises(ConfigError, match=r"a recipe must be given; there are deepseek_vl2/align, .*demo_vl2/sft"):
        compose_run([])


@given(st.sampled_from([key for key in known_keys() if "." in key and "*" not in key]), st.data())
def test_one_lost_letter_finds_the_key_again(key: str, data: st.DataObject) -> None:
    name = key.rsplit(".", 1)[-1]
    place = data.draw(st.integers(0, len(name) - 1))
    mistyped = key[: len(key) - len(name)] + name[:place] + name[place + 1 :]
    if len(name) > 4 and matching_key(mistyped) is None:
        found = nearest_key(mistyped)
        assert found == key or any(found[:i] + found[i + 1 :] == mistyped for i in range(len(found)))  # as near: qk_ope_dim is two keys'


# --------------------------------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("recipe", RECIPES)
def test_config_yaml_reads_back_equal(recipe: str, tmp_path: Path) -> None:
    config = compose_run([f"recipe={recipe}", "optim.lr=1.2345678901234567e-7", "run.name='Ünïcode: #1'", "run.stop_after=3"])
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_run_config(path) == config


def test_config_yaml_has_every_setting_and_is_plain() -> None:
    plain = yaml.safe_load(to_yaml(compose_run([VL2])))
    assert plain["init"]["from"] == "runs/demo/vl2/align"
    assert plain["model"]["language"]["init_std"] == 0.02


def test_config_yaml_that_does_not_fit_is_refused(tmp_path: Path, vl2: RunConfig) -> None:
    path = tmp_path / "config.yaml"
    with pytest.raises(ConfigError, match=r"must be a configuration in YAML"):
        load_run_config(path)
    path.write_text("run: [")
    with pytest.raises(ConfigError, match=r"must be a configuration in YAML"):
        load_run_config(path)
    path.write_text("- 1")
    with pytest.raises(ConfigError, match=r"must be a section with settings"):
        load_run_config(path)
    plain = to_plain(vl2)
    plain["data"]["seqlen"] = 3
    path.write_text(yaml.safe_dump(plain))
    with pytest.raises(ConfigError, match=r"data\.seqlen = 3\n.*\n  nearest valid key: data\.seq_len"):
        load_run_config(path)
    del plain["data"]["seqlen"], plain["optim"]["lr"]
    with pytest.raises(ConfigError, match=r"optim\.lr\n  rule: this setting has no default"):
        from_plain(plain)


# -------------------------------------------------------------------------------------------------------------------------- rules


@pytest.mark.parametrize(
    ("settings", "key", "words"),
    [
        ({"parallel__cp": 2}, "parallel.cp", "not available in this version"),
        ({"run__max_steps": 0}, "run.max_steps", "at least 1"),
        ({"run__stop_after": 401}, "run.stop_after, run.max_steps", "401, 400"),
        ({"run__seed": -1}, "run.seed", "at least 0"),
        ({"run__dir": ""}, "run.dir", "not be empty"),
        ({"logging__every": 0}, "logging.every", "at least 1"),
        ({"logging__samples_every": 0}, "logging.samples_every", "at least 1"),
        ({"logging__samples": -1}, "logging.samples", "at least 0"),
        ({"checkpoint__every": -1}, "checkpoint.every", "at least 0"),
        ({"launch__nproc": -2}, "launch.nproc", "at least 0"),
        ({"model__vision__siglip__heads": 5}, "model.vision.siglip.heads, model.vision.siglip.width", "5, 96"),
        ({"model__vision__siglip__patch_size": 64}, "model.vision.siglip.patch_size", "at most"),
        ({"model__vision__siglip__layers": 0}, "model.vision.siglip.layers", "at least 1"),
        ({"model__vision__siglip__pixel_std": [0.5, 0.5]}, "model.vision.siglip.pixel_std", "three numbers"),
        ({"model__adaptor__kind": "hybrid"}, "model.adaptor.kind", "one of pixel_shuffle"),
        ({"model__adaptor__concat": "sequence_width"}, "model.adaptor.concat", "one encoder only"),
        ({"model__adaptor__depth": 0}, "model.adaptor.depth", "at least 1"),
        ({"model__family": "vl"}, "model.adaptor.kind", "one of mlp"),
        ({"model__language__mla": None, "model__language__heads": 5}, "model.language.heads, model.language.hidden_size", "5, 128"),
        ({"model__language__mla": None, "model__language__heads": 128}, "model.language.heads", "even head width"),
        ({"model__language__kv_heads": 2}, "model.language.kv_heads", "latent attention"),
        ({"model__language__mla__qk_rope_dim": 15}, "model.language.mla.qk_rope_dim", "even"),
        ({"model__language__mla__kv_rank": 0}, "model.language.mla.kv_rank", "at least 1"),
        ({"model__language__moe__top_k": 9}, "model.language.moe.top_k", "at most model.language.moe.routed_experts (8)"),
        ({"model__language__moe__dense_layers": 4}, "model.language.moe.dense_layers", "at least one MoE layer"),
        ({"model__language__moe__router": "softmax"}, "model.language.moe.expert_bias", "router=sigmoid"),
        ({"model__language__moe__expert_bias": False}, "stage.expert_bias_rate", "expert_bias"),
        ({"model__language__moe": None}, "stage.aux_loss_weight", "no experts"),
        ({"stage__policy": []}, "stage.policy", "at least one rule"),
        ({"stage__aux_loss_weight": -1.0}, "stage.aux_loss_weight", "at least 0"),
        ({"data__text_ratio": 1.5}, "data.text_ratio", "between 0 and 1"),
        ({"data__text_ratio_start": -0.5}, "data.text_ratio_start", "between 0 and 1"),
        ({"data__max_bad_fraction": 2.0}, "data.max_bad_fraction", "between 0 and 1"),
        ({"data__seq_len": 8192}, "data.seq_len", "max_positions (4096)"),
        ({"data__seq_len": 25}, "data.seq_len", "25 tokens of the smallest image"),
        ({"data__max_tiles_per_sequence": 1}, "data.max_tiles_per_sequence", "a thumbnail and a tile"),
        ({"data__batch_size": 0}, "data.batch_size", "at least 1"),
        ({"data__batch_size": 15}, "data.batch_size, data.micro_batch_size", "16 or 14"),
        ({"data__sources": {}}, "data.sources, data.text_ratio", "needs a source of modality text"),
        ({"data__sources__text__weight": 0.0}, "data.sources.text.weight", "above 0"),
        ({"data__sources__text__modality": "multimodal"}, "data.sources.text.modality", "no images"),
        ({"data__sources__pretrain__modality": "text"}, "data.sources, data.text_ratio", "needs a source of modality multimodal"),
        ({"optim__lr": 0.0}, "optim.lr", "above 0"),
        ({"optim__betas": [0.9]}, "optim.betas", "two numbers"),
        ({"optim__eps": 0.0}, "optim.eps", "above 0"),
        ({"optim__moments_dtype": "bf16", "optim__betas": [0.9, 0.999]}, "optim.betas, optim.moments_dtype", "0.996094"),
        ({"optim__weight_decay": -0.1}, "optim.weight_decay", "at least 0"),
        ({"optim__schedule__min_ratio": 2.0}, "optim.schedule.min_ratio", "between 0 and 1"),
        ({"optim__schedule__factors": [0.1]}, "optim.schedule.milestones, optim.schedule.factors", "as many factors"),
        ({"optim__schedule__milestones": [0.75, 0.5]}, "optim.schedule.milestones", "rising fractions"),
        ({"optim__schedule__milestones": [0.5, 1.5]}, "optim.schedule.milestones", "rising fractions"),
        ({"optim__schedule__factors": [0.5, -0.1]}, "optim.schedule.factors", "not be negative"),
        ({"eval__every": -1}, "eval.every", "at least 0"),
        ({"eval__every": 5}, "eval.every, eval.tasks, eval.text", "nothing to evaluate"),
        ({"eval__tasks": {"a/b": "c.jsonl"}}, "eval.tasks", "without slashes"),
        ({"engine__timeout_s": 0}, "engine.timeout_s", "at least 1"),
        ({"engine__zero_stage": 0}, "engine.zero_stage", "1, 2 or 3"),
        ({"engine__zero_keep_whole": -1}, "engine.zero_keep_whole", "at least 0"),
        ({"engine__offload": "optimizer"}, "engine.offload", "setting of engine=deepspeed"),
        ({"engine__name": "deepspeed", "engine__offload": "all"}, "engine.offload", "need engine.zero_stage=3, and it is 1"),
        ({"engine__name": "deepspeed", "parallel__tp": 2}, "parallel.tp", "data parallel alone"),
        ({"engine__name": "deepspeed", "parallel__ep": 2}, "parallel.ep", "data parallel alone"),
        ({"engine__name": "deepspeed", "parallel__distributed_optimizer": True}, "parallel.distributed_optimizer", "every ZeRO stage"),
        ({"engine__name": "deepspeed", "optim__update_idle": True}, "optim.update_idle", "cannot step parameters"),
        ({"engine__device": "cpu", "engine__precision": "bf16"}, "engine.precision", "bf16 needs CUDA"),
    ],
)
def test_rules_of_a_vl2_run(vl2: RunConfig, settings: dict[str, Any], key: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(changed(vl2, **settings), 1)
    assert caught.value.key == key
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "key", "words"),
    [
        ({"model__family": "vl2"}, "model.vision.sam", "no SAM encoder"),
        ({"model__vision__sam": None}, "model.adaptor.kind", "one of mlp"),
        ({"model__adaptor__kind": "mlp"}, "model.adaptor.kind", "one of hybrid, shared, separate"),
        ({"model__vision__sam__interpolate_to": 32}, "model.vision.sam.interpolate_to, model.vision.siglip", "interpolate_to=24"),
        ({"model__vision__sam__global_layers": [1, 4]}, "model.vision.sam.global_layers", "from 0 to 3"),
        ({"model__vision__sam__downsample_widths": [64]}, "model.vision.sam.downsample_widths", "two convolutions"),
        ({"model__vision__sam__image_size": 130}, "model.vision.sam.patch_size, model.vision.sam.image_size", "16, 130"),
        ({"model__vision__sam__heads": 7}, "model.vision.sam.heads, model.vision.sam.width", "must divide"),
        ({"model__language__kv_heads": 3}, "model.language.kv_heads, model.language.heads", "must divide"),
        ({"model__adaptor__kind": "shared", "model__vision__siglip__width": 192}, "model.adaptor.kind", "SigLIP's is 192, SAM's 96"),
        (
            {
                "model__adaptor__concat": "sequence_height",
                "model__vision__siglip__image_size": 40,
                "model__vision__sam__interpolate_to": 20,
            },
            "model.adaptor.concat",
            "even grid",
        ),
        ({"data__seq_len": 36}, "data.seq_len", "36 tokens"),
    ],
)
def test_rules_of_a_vl_run(vl: RunConfig, settings: dict[str, Any], key: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(changed(vl, **settings), 1)
    assert caught.value.key == key
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "world_size", "key"),
    [
        ({"parallel__tp": 2}, 1, "parallel.tp * pp * cp, processes"),
        ({"parallel__tp": 3}, 3, "parallel.tp, model.language.heads"),
        ({"parallel__tp": 4, "model__language__ffn_width": 342}, 4, "parallel.tp, model.language.ffn_width"),
        ({"parallel__ep": 3}, 3, "parallel.ep, model.language.moe.routed_experts"),
        ({"parallel__ep": 4}, 2, "parallel.ep, processes / parallel.pp"),
        ({"parallel__vpp": 2}, 1, "parallel.vpp"),
        ({"parallel__pp": 5}, 5, "parallel.pp, parallel.vpp"),
        ({"parallel__pp": 2, "parallel__vpp": 3}, 2, "parallel.pp, parallel.vpp"),
        ({"parallel__pp": 2, "data__batch_size": 2, "data__micro_batch_size": 2}, 2, "data.batch_size, parallel.pp"),
        (
            {"parallel__ep": 2, "model__language__moe": None, "stage__aux_loss_weight": 0.0, "stage__expert_bias_rate": 0.0},
            2,
            "parallel.ep",
        ),
        ({"data__micro_batch_size": 3}, 4, "data.batch_size, data.micro_batch_size"),
        ({"parallel__recompute_modules": ["mlp"]}, 1, "parallel.recompute_modules"),
        ({"parallel__recompute": "selective", "parallel__recompute_modules": []}, 1, "parallel.recompute_modules"),
        ({"parallel__recompute": "selective", "parallel__recompute_modules": ["moe", "shared_experts"]}, 1, "parallel.recompute_modules"),
        (
            {"parallel__recompute": "selective", "parallel__recompute_modules": ["mlp", "mla_up_proj"], "model__language__mla": None},
            1,
            "parallel.recompute_modules",
        ),
    ],
)
def test_rules_of_the_layout(vl2: RunConfig, settings: dict[str, Any], world_size: int, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(changed(vl2, **settings), world_size)
    assert caught.value.key == key
    assert caught.value.fix


def test_layouts_that_fit(vl2: RunConfig) -> None:
    for tp, ep, world in itertools.product((1, 2, 4), (1, 2, 4), (4, 8)):
        validate(changed(vl2, parallel__tp=tp, parallel__ep=ep, data__micro_batch_size=1), world)


def test_frozen_everything_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing would train"):
        validate(compose_run([VL2, "stage.policy=[{pattern: '*', lr_multiplier: null}]"]), 1)


def test_text_warm_up_needs_both_modalities(vl2: RunConfig) -> None:
    text_only = changed(vl2, data__text_ratio=1.0, data__text_ratio_start=0.5, data__text_warmup_steps=10)
    del text_only.data.sources["pretrain"]
    with pytest.raises(ConfigError, match="modality multimodal"):
        validate(text_only, 1)
    validate(changed(text_only, data__text_warmup_steps=0), 1)


def test_device_is_checked_when_it_is_known(vl2: RunConfig) -> None:
    config = changed(vl2, engine__precision="bf16")
    validate(config, 1)
    validate(config, 1, device="cuda")
    with pytest.raises(ConfigError, match="bf16 needs CUDA"):
        validate(config, 1, device="cpu")


# -------------------------------------------------------------------------------------------------------------------------- entry


def train_py(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=60, check=False)


def test_cfg_job_shows_a_run() -> None:
    shown = train_py("--cfg", "job", VL2, "optim.lr=1e-4")
    assert shown.returncode == 0, shown.stderr
    plain = yaml.safe_load(shown.stdout)
    assert plain["optim"]["lr"] == 1e-4
    assert plain["data"]["text_ratio"] == 0.3


@pytest.mark.parametrize("wrong", [["data.text_rato=0.5"], ["optim.lr=abc"], ["launch.nproc=3", "parallel.tp=3"], ["run.dir='${x}'"]])
def test_a_wrong_run_is_one_error_without_traceback(wrong: list[str]) -> None:
    refused = train_py(VL2, *wrong)
    assert refused.returncode == 2
    assert refused.stderr.startswith("config error: ")
    assert "Traceback" not in refused.stderr and len(refused.stderr.splitlines()) <= 3
    assert refused.stdout == ""


def test_only_rank_0_speaks() -> None:
    first, second = (train_py(VL2, "data.text_rato=1", RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2") for rank in "01")
    assert (first.returncode, second.returncode) == (2, 2)
    assert "data.text_ratio" in first.stderr
    assert second.stderr == ""


def test_entry_imports_no_torch() -> None:
    code = "import sys, train; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
