"""What is imported computes what it computed, and what is exported loads and computes the same: against transformers' own classes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dsvl_train.config.schema import InitConfig, LanguageConfig, MlaConfig, ModelConfig, MoeConfig
from dsvl_train.interop.exporter import export_model
from dsvl_train.interop.importer import import_model
from dsvl_train.parallel import startup
from tests.made_models import LLAMA, transformers_model, write_multi_modality, write_vl_processor
from tests.tiny import tiny_model, tiny_run

TOLERANCE = 2e-5
"""Worst seen: 5e-6, of logits around 3."""


@pytest.fixture(scope="module")
def world() -> Iterator[startup.World]:
    cfg = tiny_run("vl")
    world = startup.start(cfg.engine, cfg.parallel, seed=0)
    yield world
    startup.stop()


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))


def our_logits(folder: Path, world: startup.World) -> tuple[Any, torch.Tensor, Any]:
    """(the encoded sample, our logits, the vision configuration) of a question about a picture."""
    from dsvl_train.evaluation.forward import embed_images, forward_packed
    from dsvl_train.evaluation.loading import load_model

    loaded = load_model(folder, world)
    encoded = loaded.processor.encode(loaded.processor.prompt_messages("What is it?", 1), [picture()], inference=True)
    (logits,) = forward_packed(loaded, [encoded.input_ids], [encoded.image_mask], embed_images(loaded, [encoded]))
    return encoded, logits[:, : loaded.cfg.model.language.vocab_size], loaded.cfg.model.vision


def their_logits(model: Any, encoded: Any, vision: Any) -> torch.Tensor:
    """transformers' logits of the same ids and pixels."""
    from dsvl_train.models.siglip import normalise_pixels
    from dsvl_train.models.vision import resize

    inputs = {}
    low = encoded.pixels
    if vision.sam is not None:
        inputs["high_res_pixel_values"] = normalise_pixels(encoded.pixels, vision.sam.pixel_mean, vision.sam.pixel_std)
        low = resize(encoded.pixels, vision.siglip.image_size)
    inputs["pixel_values"] = normalise_pixels(low, vision.siglip.pixel_mean, vision.siglip.pixel_std)
    with torch.no_grad():
        return model(input_ids=encoded.input_ids[None], **inputs).logits[0]


@pytest.mark.parametrize("hybrid", [False, True], ids=["1b", "7b"])
def test_a_released_vl_exported_to_transformers_loads_and_computes_the_same(hybrid: bool, world: startup.World, tmp_path: Path) -> None:
    import transformers

    import_model(write_multi_modality(tmp_path / "released", hybrid), tmp_path / "ours")
    export_model(tmp_path / "ours", tmp_path / "theirs", "transformers", max_shard_bytes=200_000)
    kind = transformers.DeepseekVLHybridForConditionalGeneration if hybrid else transformers.DeepseekVLForConditionalGeneration
    model, report = kind.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not any(report.values()), report
    encoded, ours, vision = our_logits(tmp_path / "ours", world)
    torch.testing.assert_close(their_logits(model.eval(), encoded, vision), ours, rtol=0, atol=TOLERANCE)

    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "theirs")
    assert model.config.image_token_id == processor.tokenizer.convert_tokens_to_ids("<image_placeholder>")
    content = [{"type": "image"}, {"type": "text", "text": "\nWhat is it?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=text, images=[picture()], return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == encoded.input_ids.tolist()
    assert inputs["pixel_values"].shape[-1] == vision.siglip.image_size


@pytest.mark.parametrize("hybrid", [False, True], ids=["deepseek_vl", "deepseek_vl_hybrid"])
def test_a_transformers_vl_computes_the_same_here(hybrid: bool, world: startup.World, tmp_path: Path) -> None:
    model = transformers_model(hybrid)
    model.save_pretrained(tmp_path / "theirs")
    write_vl_processor(tmp_path / "theirs", hybrid)
    (tmp_path / "theirs" / "processor_config.json").unlink()
    images = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.6, 0.7]}
    images |= {"high_res_image_mean": [0.2] * 3, "high_res_image_std": [0.3] * 3}
    (tmp_path / "theirs" / "preprocessor_config.json").write_text(json.dumps(images | {"image_processor_type": "unread", "min_size": 14}))
    import_model(tmp_path / "theirs", tmp_path / "ours")
    encoded, ours, vision = our_logits(tmp_path / "ours", world)
    assert vision.siglip.pixel_mean == [0.5, 0.4, 0.3]
    assert vision.sam is None or vision.sam.pixel_std == [0.3] * 3
    model.config.image_token_id = model.model.config.image_token_id = int(encoded.input_ids[encoded.image_mask][0])
    torch.testing.assert_close(their_logits(model, encoded, vision), ours, rtol=0, atol=TOLERANCE)


# ----------------------------------------------------------------------------------------------------------------------- parts


def language_only(language: LanguageConfig) -> ModelConfig:
    model = tiny_model("vl2", mla=False)
    model.language = language
    return model


MOE: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 48,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "max_position_embeddings": 512,
}


def part(kind: str) -> tuple[Any, LanguageConfig]:
    """A random language model of transformers, and what it is here."""
    import transformers

    torch.manual_seed(1)
    shared = LanguageConfig(vocab_size=200, hidden_size=48, ffn_width=64, layers=2, heads=4)
    if kind == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(LLAMA | {"vocab_size": 200})))
        shared.kv_heads = 2
    else:
        v3 = kind == "deepseek_v3"
        config = (transformers.DeepseekV3Config if v3 else transformers.DeepseekV2Config)(**MOE)
        model = (transformers.DeepseekV3ForCausalLM if v3 else transformers.DeepseekV2ForCausalLM)(config)
        router = "sigmoid" if v3 else "softmax"
        shared.moe = MoeConfig(4, 1, 2, 32, 1, router, normalise_top_k=v3, routed_scaling=2.5 if v3 else 1.0, expert_bias=v3)  # type: ignore[arg-type]
        shared.mla = MlaConfig(kv_rank=16, qk_nope_dim=8, qk_rope_dim=8, v_dim=12)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" not in name:
                tensor.copy_(torch.randn(tensor.shape) * 0.1 + (1.0 if "norm" in name else 0.0))
    return model.eval(), shared


def assembled(init: InitConfig, model: ModelConfig, world: startup.World) -> tuple[Any, list[str]]:
    from dsvl_train.interop.assemble import load_parts
    from dsvl_train.models.build import build_model

    run = tiny_run(model.family)
    built = build_model(model, run.stage, run.parallel, world, seed=3)
    return built, load_parts(init, built, model)


@pytest.mark.parametrize("kind", ["llama", "deepseek_v2", "deepseek_v3"])
def test_a_language_model_as_a_part_computes_the_same_here(kind: str, world: startup.World, tmp_path: Path) -> None:
    theirs, language = part(kind)
    theirs.save_pretrained(tmp_path / "llm")
    init = InitConfig(language=str(tmp_path / "llm"), expect_random=["adaptor.*", "vision.*"])
    built, random = assembled(init, language_only(language), world)
    assert {name.split(".")[0] for name in random} == {"adaptor", "vision"}
    ids = torch.randint(0, 200, (17,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = built.language(ids, torch.tensor([0, 17], dtype=torch.int32), torch.zeros(17, dtype=torch.bool))[:, :200]
        wanted = theirs(input_ids=ids[None]).logits[0]
    torch.testing.assert_close(ours, wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("whole", [False, True], ids=["SiglipVisionModel", "SiglipModel"])
def test_a_siglip_and_a_sam_as_parts_compute_the_same_here(whole: bool, world: startup.World, tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(2)
    model = tiny_model("vl")
    assert model.vision.sam is not None
    model.vision.siglip.layers, model.vision.sam.layers, model.vision.sam.global_layers = 2, 2, [1]  # as transformers_model has them
    vision = transformers_model(hybrid=True).config.vision_config.to_dict() | {"vision_use_head": True}
    if whole:
        text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
        siglip = transformers.SiglipModel(transformers.SiglipConfig(vision_config=vision, text_config=text)).eval()
        siglip_vision = siglip.vision_model
    else:
        siglip = siglip_vision = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**vision)).eval()
    siglip.save_pretrained(tmp_path / "siglip")
    sam = transformers_model(hybrid=True).config.high_res_vision_config
    sam_model = transformers.SamVisionModel(sam).eval()
    with torch.no_grad():
        for parameter in sam_model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.1)
    sam_model.save_pretrained(tmp_path / "sam")
    added = ["vision.sam.neck_hd.*", "vision.sam.downsamples.*", "vision.sam.hd_alpha_downsamples"]
    init = InitConfig(vision=str(tmp_path / "siglip"), sam=str(tmp_path / "sam"), expect_random=["adaptor.*", "language.*", *added])
    built, random = assembled(init, model, world)
    assert "vision.sam.hd_alpha_downsamples" in random
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    from dsvl_train.models.siglip import normalise_pixels
    from dsvl_train.models.vision import resize

    tower = built.vision.vision
    with torch.no_grad():
        low = normalise_pixels(resize(pixels, 32), [0.5] * 3, [0.5] * 3)
        torch.testing.assert_close(siglip_vision(low).last_hidden_state, tower(pixels)[1], rtol=0, atol=TOLERANCE)
        state = tower.sam.run(tower.sam.embed(pixels), range(2))
        high = normalise_pixels(pixels, model.vision.sam.pixel_mean, model.vision.sam.pixel_std)
        neck = tower.sam.neck(state.x_nggd.permute(0, 3, 1, 2))
        torch.testing.assert_close(sam_model(high).last_hidden_state, neck, rtol=0, atol=1e-4)
