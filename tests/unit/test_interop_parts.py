"""A model from parts, and starting a run from a folder of others: what fits is loaded, what does not is named."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dsvl_train.config.compose import compose_run
from dsvl_train.config.schema import InitConfig, ModelConfig
from dsvl_train.interop.blocks import read_whole
from dsvl_train.interop.released import open_released
from dsvl_train.parallel import startup
from tests.made_models import GOLDEN, SAM, SIGLIP, llama_state, random_state, write_model, write_multi_modality
from tests.tiny import tiny_model, tiny_run

SAM_ADDED = ["vision.sam.neck_hd.*", "vision.sam.downsamples.*", "vision.sam.hd_alpha_downsamples"]
EVERYTHING = ["vision.*", "adaptor.*", "language.*"]


@pytest.fixture(scope="module")
def world() -> Iterator[startup.World]:
    cfg = tiny_run("vl")
    world = startup.start(cfg.engine, cfg.parallel, seed=0)
    yield world
    startup.stop()


def vl_model(**language: Any) -> ModelConfig:
    """The tiny hybrid that `tests.made_models` writes."""
    model = tiny_model("vl")
    model.vision.siglip, model.vision.sam = SIGLIP, SAM
    language = {"vocab_size": 600, "layers": 2, "kv_heads": 2} | language
    for key, value in language.items():
        setattr(model.language, key, value)
    return model


def build(model: ModelConfig, world: startup.World, seed: int = 3) -> Any:
    from dsvl_train.models.build import build_model

    run = tiny_run(model.family)
    return build_model(model, run.stage, run.parallel, world, seed)


def weights(built: Any) -> dict[str, torch.Tensor]:
    from dsvl_train.models.logical import logical_tensors

    return {tensor.name: tensor.of(local).detach().clone() for tensor, local in logical_tensors(built)}


def llama(folder: Path, **changes: Any) -> str:
    config = {"model_type": "llama", "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config |= {"num_key_value_heads": 2, "vocab_size": 600}
    return str(write_model(folder, config | changes, llama_state(**changes)))


def timm_siglip(folder: Path, prefix: str = "", siglip: Any = SIGLIP) -> str:
    from dsvl_train.models.siglip import SiglipEncoder

    return str(write_model(folder, {"architecture": "vit_siglip"}, random_state(SiglipEncoder(siglip), prefix)))


def original_sam(file: Path) -> str:
    """The original release: one `.pth` of tensors, the image encoder beside prompt encoder and mask decoder."""
    from dsvl_train.models.sam_vitdet import SamEncoder

    state = random_state(SamEncoder(SAM), "image_encoder.")
    added = ("neck_hd", "downsamples", "hd_alpha")
    state = {name: tensor for name, tensor in state.items() if not any(word in name for word in added)}
    torch.save(state | {"mask_decoder.iou_token.weight": torch.zeros(1, 4)}, file)
    return str(file)


def test_a_model_from_three_parts(world: startup.World, tmp_path: Path) -> None:
    from dsvl_train.interop.assemble import has_parts, load_parts

    model = vl_model()
    init = InitConfig(
        language=llama(tmp_path / "llm"),
        vision=timm_siglip(tmp_path / "siglip", "visual.trunk."),
        sam=original_sam(tmp_path / "sam.pth"),
        expect_random=["adaptor.*", *SAM_ADDED],
    )
    assert has_parts(init) and not has_parts(InitConfig())
    built = build(model, world)
    before = weights(built)
    random = load_parts(init, built, model)
    after = weights(built)
    assert all(torch.equal(before[name], after[name]) == (name in random) for name in after)
    assert {name.rsplit(".", 1)[0] for name in random if name.startswith("adaptor.")} == {
        "adaptor.high_up_proj",
        "adaptor.low_up_proj",
        "adaptor.layers.1",
    }
    state = load_file(Path(init.vision or "") / "model.safetensors")
    assert torch.equal(after["vision.siglip.attn_pool.latent"], state["visual.trunk.attn_pool.latent"])
    llm = load_file(Path(init.language or "") / "model.safetensors")
    embedding = after["language.embedding.word_embeddings.weight"]
    assert torch.equal(embedding[:600], llm["model.embed_tokens.weight"])
    assert not embedding[600:].any()
    qkv = after["language.decoder.layers.1.self_attention.linear_qkv.weight"]
    assert torch.equal(qkv[48 + 24 : 48 + 36], llm["model.layers.1.self_attn.k_proj.weight"][12:])


def test_parts_of_whole_models(world: startup.World, tmp_path: Path) -> None:
    from dsvl_train.interop.assemble import load_parts

    folder = str(write_multi_modality(tmp_path / "released", hybrid=True))
    model, source = open_released(folder)
    built = build(model, world)
    assert load_parts(InitConfig(language=folder, vision=folder, sam=folder, expect_random=["adaptor.*", "*_layer_norm.*"]), built, model)
    after = weights(built)
    for name in after:
        assert torch.equal(after[name], read_whole(source, name)) != name.startswith(("adaptor.", "vision.high", "vision.low")), name


@pytest.mark.parametrize(
    ("init", "words"),
    [
        (lambda tmp: InitConfig(language=llama(tmp / "llm")), r"no part fills \d+ tensor\(s\): vision\.siglip\.pos_embed.*expect_random"),
        (
            lambda tmp: InitConfig(language=llama(tmp / "llm"), vision=timm_siglip(tmp / "v"), sam=original_sam(tmp / "s.pth")),
            r"no part fills .*: vision\.sam\.hd_alpha_downsamples",
        ),
        (lambda tmp: InitConfig(source="x", language=llama(tmp / "llm")), r"init\.from=x gives all weights"),
        (
            lambda tmp: InitConfig(language=llama(tmp / "llm", num_attention_heads=2), expect_random=EVERYTHING),
            r"init\.language=.*model\.language\.heads is 4, there it is 2",
        ),
        (
            lambda tmp: InitConfig(language=llama(tmp / "llm", vocab_size=500), expect_random=EVERYTHING),
            r"model\.language\.vocab_size is 600, there it is 500",
        ),
        (
            lambda tmp: InitConfig(vision=timm_siglip(tmp / "v", siglip=_other(image_size=48)), expect_random=EVERYTHING),
            r"position embedding pos_embed has the shape \[1, 36, 32\].* ask for \[1, 16, 32\]; positions are not interpolated",
        ),
        (
            lambda tmp: InitConfig(vision=timm_siglip(tmp / "v", siglip=_other(layers=3)), expect_random=EVERYTHING),
            r"no place in the configured model: blocks\.2\.",
        ),
        (lambda tmp: InitConfig(vision=llama(tmp / "llm"), expect_random=EVERYTHING), r"init\.vision=.* is no SigLIP"),
        (lambda tmp: InitConfig(sam=llama(tmp / "llm"), expect_random=EVERYTHING), r"init\.sam=.* is no SAM"),
        (lambda tmp: InitConfig(language=timm_siglip(tmp / "v"), expect_random=EVERYTHING), r"config\.json: model_type = null"),
        (lambda tmp: InitConfig(language=str(tmp / "nowhere"), expect_random=EVERYTHING), r"nowhere/config\.json is missing"),
        (
            lambda tmp: InitConfig(sam=str(write_multi_modality(tmp / "one", hybrid=False)), expect_random=EVERYTHING),
            r"init\.sam=.* has no SAM",
        ),
    ],
    ids=range(12),
)
def test_parts_that_do_not_fit_are_refused(world: startup.World, tmp_path: Path, init: Callable[[Path], InitConfig], words: str) -> None:
    from dsvl_train.interop.assemble import load_parts

    model = vl_model()
    built = build(model, world)
    before = weights(built)
    with pytest.raises(ValueError, match=words):
        load_parts(init(tmp_path), built, model)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(built).items())


def _other(**changes: Any) -> Any:
    from dataclasses import replace

    return replace(SIGLIP, **changes)


def test_a_sam_for_a_model_without_one_is_refused(world: startup.World, tmp_path: Path) -> None:
    from dsvl_train.interop.assemble import open_parts

    model = tiny_model("vl2")
    with pytest.raises(ValueError, match=r"model\.vision\.sam is null"):
        open_parts(InitConfig(sam=original_sam(tmp_path / "sam.pth")), model)


def test_a_transformers_siglip_of_other_sizes_or_activation(world: startup.World, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import transformers

    from dsvl_train.interop.assemble import open_siglip

    options = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    options |= {"image_size": 32, "patch_size": 8}
    transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**options)).save_pretrained(tmp_path / "siglip")
    with pytest.raises(ValueError, match=r"model\.vision\.siglip\.heads is 2, there it is 4"):
        open_siglip(tmp_path / "siglip", SIGLIP)
    opened = open_siglip(tmp_path / "siglip", _other(heads=4))
    assert "trained with the tanh GELU" in caplog.text
    assert "vision.siglip.attn_pool.kv.weight" in opened.infos()
    assert "vision.siglip.attn_pool.latent" not in open_siglip(tmp_path / "siglip", _other(heads=4, attention_pool=False)).infos()


def test_starting_from_a_folder_of_others_or_from_a_checkpoint(world: startup.World, tmp_path: Path) -> None:
    from dsvl_train.interop.importer import import_model
    from dsvl_train.interop.loading import load_any_weights

    released = GOLDEN / "vl2" / "mla_sigmoid_bias"
    model, source = open_released(released)
    import_model(released, tmp_path / "ours")
    for folder in (released, tmp_path / "ours"):
        built = build(model, world)
        load_any_weights(folder, built, model)
        assert all(torch.equal(tensor, read_whole(source, name)) for name, tensor in weights(built).items())
        other, _ = open_released(released)
        other.language.layers = 5
        with pytest.raises(ValueError, match=r"another model than the run's: model\.language\.layers is 4 there and 5 here"):
            load_any_weights(folder, built, other)
    with pytest.raises(ValueError, match="neither a checkpoint"):
        load_any_weights(tmp_path, build(model, world), model)
    with pytest.raises(ValueError, match='model_type = "llama": a part, not a whole vision-language model'):
        load_any_weights(llama(tmp_path / "llm"), build(model, world), model)


def test_parts_are_given_on_the_command_line() -> None:
    config = compose_run(["recipe=demo_vl2/align", "init.from=null", "init.language=models/llm", "init.expect_random=[adaptor.*,vision.*]"])
    assert (config.init.source, config.init.language, config.init.expect_random) == (None, "models/llm", ["adaptor.*", "vision.*"])
    assert json.dumps(compose_run(["recipe=demo_vl2/align"]).init.expect_random) == '["adaptor.*"]'
