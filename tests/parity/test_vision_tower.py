"""The vision tower with its adaptor: VL 7B's against transformers, VL2's against outputs of the released code."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, LlamaConfig, SamVisionConfig, SiglipVisionConfig
from transformers.models.deepseek_vl_hybrid import DeepseekVLHybridConfig, DeepseekVLHybridModel
from vision_reference import (
    Tensors,
    difference,
    gradients,
    random_pixels,
    randomise,
    sam_from_hf,
    siglip_from_hf,
    weights,
    worst_difference,
)

from dsvl_train.config.schema import AdaptorConfig, SamConfig, SiglipConfig, VisionConfig
from dsvl_train.models.adaptors import build_adaptor
from dsvl_train.models.siglip import siglip_flops
from dsvl_train.models.vision import VisionTower, resize, vision_flops

GOLDEN = Path(__file__).parents[1] / "golden" / "data" / "vl2"
GOLDEN_MODELS = ["mha_softmax", "mla_softmax", "mla_sigmoid_bias"]
GOLDEN_SAMPLES = range(11)

TINY_HYBRID = VisionConfig(
    siglip=SiglipConfig(image_size=24, patch_size=6, width=16, layers=2, heads=2, mlp_ratio=1.5, gelu="erf"),
    sam=SamConfig(
        image_size=40,
        patch_size=4,
        width=16,
        layers=3,
        heads=2,
        window=4,
        global_layers=[1],
        neck_width=8,
        interpolate_to=16,
        downsample_widths=[16, 32],
    ),
)
HIDDEN = 24


def build_tower(config: VisionConfig, seed: int = 0) -> VisionTower:
    tower = VisionTower(config)
    randomise(tower, seed)
    return tower


def no_tiles(images: int) -> Tensor:
    return torch.zeros(images, 2, dtype=torch.int64)


# ---------------------------------------------------------------------------------------------------------------------- VL hybrid


def build_hybrid_reference(config: VisionConfig) -> DeepseekVLHybridModel:
    """transformers' model with random weights. Its SigLIP takes the tanh GELU unless told, and its alpha is initialised to zero."""
    low, high = config.siglip, config.sam
    assert high is not None
    reference = DeepseekVLHybridModel(
        DeepseekVLHybridConfig(
            vision_config=SiglipVisionConfig(
                image_size=low.image_size,
                patch_size=low.patch_size,
                hidden_size=low.width,
                intermediate_size=low.mlp_width,
                num_hidden_layers=low.layers,
                num_attention_heads=low.heads,
                hidden_act="gelu",
                vision_use_head=False,
            ),
            high_res_vision_config=SamVisionConfig(
                image_size=high.image_size,
                patch_size=high.patch_size,
                hidden_size=high.width,
                num_hidden_layers=high.layers,
                num_attention_heads=high.heads,
                window_size=high.window,
                global_attn_indexes=high.global_layers,
                output_channels=high.neck_width,
            ),
            text_config=LlamaConfig(hidden_size=HIDDEN, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8),
        )
    ).eval()
    randomise(reference, seed=1)
    assert reference.high_res_vision_alpha.item() != 0
    return reference


def hybrid_from_hf(hf: Tensors) -> Tensors:
    """Tower and adaptor under our names, prefixed `vision.` and `adaptor.`."""
    names = {"vision_proj": "low_up_proj", "high_res_vision_proj": "high_up_proj", "proj": "layers.1"}
    siglip = siglip_from_hf({name.removeprefix("vision_model."): t for name, t in hf.items() if name.startswith("vision_model.")})
    ours = {f"vision.siglip.{name}": tensor for name, tensor in siglip.items()}
    ours |= {f"vision.sam.{name}": tensor for name, tensor in sam_from_hf(hf).items()}
    for name, tensor in hf.items():
        if name.startswith("aligner."):
            _, layer, kind = name.split(".")
            ours[f"adaptor.{names[layer]}.{kind}"] = tensor
    return ours


def test_hybrid_tower_and_adaptor_are_those_of_transformers() -> None:
    reference = build_hybrid_reference(TINY_HYBRID)
    model = nn.ModuleDict({"vision": VisionTower(TINY_HYBRID), "adaptor": build_adaptor(AdaptorConfig("hybrid"), TINY_HYBRID, HIDDEN)})
    model.load_state_dict(hybrid_from_hf(weights(reference)))
    pixels = random_pixels(2, 40, seed=2)
    mean, std = (torch.tensor(values)[:, None, None] for values in (TINY_HYBRID.sam.pixel_mean, TINY_HYBRID.sam.pixel_std))  # type: ignore[union-attr]

    embeddings = model["adaptor"](model["vision"](pixels), no_tiles(2))
    # transformers' processor hands both inputs over; the released tower makes the low one from the high one
    expected = reference.get_image_features((resize(pixels, 24) - 0.5) / 0.5, (pixels / 255 - mean) / std).pooler_output.flatten(0, 1)
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    (embeddings * cotangent).sum().backward()
    (expected * cotangent).sum().backward()
    of_reference = {name: p.grad for name, p in reference.named_parameters() if not name.startswith("language_model.")}

    # worst seen on CPU in fp32: 4e-7 (embeddings), 2.3e-6 (gradients)
    assert difference(embeddings, expected) < 3e-6
    assert worst_difference(gradients(model), hybrid_from_hf(of_reference)) < 1e-5


def test_features_come_high_before_low() -> None:
    tower, pixels = build_tower(TINY_HYBRID), random_pixels(2, 40, seed=4)
    high, low = tower(pixels)
    assert tower.sam is not None
    assert high.shape == (2, 16, 32) and low.shape == (2, 16, 16)
    assert torch.equal(high, tower.sam(pixels))
    assert torch.equal(low, tower.siglip(resize(pixels, 24)))


@pytest.mark.parametrize(("size", "to"), [(40, 24), (64, 24), (24, 24)])
def test_low_resolution_input_is_resized_as_pillow_does(size: int, to: int) -> None:
    """Pillow's float resize is bilinear with antialiasing, as torchvision's Resize(antialias=True) of the released tower."""
    image = random_pixels(1, size, seed=5)[0] / 255
    expected = np.stack([np.asarray(Image.fromarray(plane.numpy()).resize((to, to), Image.Resampling.BILINEAR)) for plane in image])
    assert difference(resize(image[None], to)[0], torch.from_numpy(expected)) < 5e-6  # worst seen 1.3e-6


def test_released_7b_has_the_released_parameter_count() -> None:
    config = VisionConfig(
        SiglipConfig(image_size=384, patch_size=16, width=1024, layers=24, heads=16, gelu="erf", attention_pool=True), SamConfig()
    )
    with torch.device("meta"):
        parts = (VisionTower(config), build_adaptor(AdaptorConfig("hybrid"), config, 4096))
    visual = sum(p.numel() for part in parts for p in part.parameters())
    language = 2 * 102_400 * 4096 + 30 * (4 * 4096**2 + 3 * 4096 * 11_008 + 2 * 4096) + 4096
    never_applied_norms = 2 * 2 * 1024
    assert visual + language + never_applied_norms == 7_343_990_017


def test_unequal_numbers_of_tokens_name_the_setting_to_change() -> None:
    assert TINY_HYBRID.sam is not None
    config = replace(TINY_HYBRID, sam=replace(TINY_HYBRID.sam, interpolate_to=12))
    with pytest.raises(ValueError, match=r"3\^2 = 9 tokens and SigLIP 4\^2 = 16.*sam\.interpolate_to to 16"):
        VisionTower(config)


def test_image_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[1, 3, 24, 24\].*\[n, 3, 40, 40\].*sam\.image_size"):
        build_tower(TINY_HYBRID)(random_pixels(1, 24, seed=0))


# --------------------------------------------------------------------------------------------------------------------- both towers

TOWERS = {"siglip": VisionConfig(TINY_HYBRID.siglip), "hybrid": TINY_HYBRID}


def as_tuple(features: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    return (features,) if isinstance(features, Tensor) else features


@pytest.mark.parametrize("config", TOWERS.values(), ids=TOWERS.keys())
@pytest.mark.parametrize("sam_cut", [0, 1, 2, 3])
def test_pieces_that_exchange_packed_states_make_the_whole(config: VisionConfig, sam_cut: int) -> None:
    whole, first, last = (build_tower(config) for _ in range(3))
    first.keep(range(1), range(sam_cut), embed=True, finish=False)
    last.keep(range(1, 2), range(sam_cut, 3), embed=False, finish=True)
    assert not first.state_dict().keys() & last.state_dict().keys()
    assert first.state_dict().keys() | last.state_dict().keys() == whole.state_dict().keys()

    pixels = random_pixels(2, whole.image_size, seed=6)
    sent = first.pack(first.run(first.embed(pixels), range(1), range(sam_cut)))
    received = sent.detach().requires_grad_()
    features = as_tuple(last.finish(last.run(last.unpack(received), range(1, 2), range(sam_cut, 3))))
    expected = as_tuple(whole(pixels))
    assert all(torch.equal(actual, wanted) for actual, wanted in zip(features, expected, strict=True))

    torch.stack([actual.square().sum() for actual in features]).sum().backward()
    sent.backward(received.grad)
    torch.stack([wanted.square().sum() for wanted in expected]).sum().backward()
    # worst seen 3e-7: where both branches leave one tensor, the cut adds their gradients in another order
    assert worst_difference({**gradients(first), **gradients(last)}, gradients(whole)) < 2e-6


@pytest.mark.parametrize("config", TOWERS.values(), ids=TOWERS.keys())
def test_recompute_reaches_every_encoder(config: VisionConfig) -> None:
    tower = build_tower(config)
    tower.recompute = True
    assert tower.recompute and tower.siglip.recompute and (tower.sam is None or tower.sam.recompute)
    for features in as_tuple(tower(random_pixels(1, tower.image_size, seed=7))):
        features.square().sum().backward(retain_graph=True)
    gradients(tower)


@pytest.mark.parametrize("config", TOWERS.values(), ids=TOWERS.keys())
def test_no_tile_gives_zero_gradients_everywhere(config: VisionConfig) -> None:
    tower = build_tower(config)
    torch.stack([features.sum() for features in as_tuple(tower(random_pixels(0, tower.image_size, seed=0)))]).sum().backward()
    assert all(not gradient.any() for gradient in gradients(tower).values())


def test_flops_of_the_released_towers() -> None:
    siglip_l = SiglipConfig(image_size=384, patch_size=16, width=1024, layers=24, heads=16)
    assert siglip_flops(siglip_l) == pytest.approx(2 * 576 * 302e6 + 24 * 4 * 576**2 * 1024, rel=0.01)  # 2 per weight and token
    assert vision_flops(VisionConfig(siglip_l, SamConfig())) > 2 * vision_flops(VisionConfig(siglip_l))


# ------------------------------------------------------------------------------------------------------------- VL2, released code


def load_golden(name: str) -> tuple[VisionTower, nn.Module, Tensors]:
    """Tower and adaptor of a golden model, and the whole of its weights."""
    tensors = load_file(GOLDEN / name / "model.safetensors")
    released = json.loads((GOLDEN / name / "config.json").read_text())
    settings = {key: released["vision_config"][key] for key in ("image_size", "patch_size", "width", "layers", "heads", "mlp_ratio")}
    config = VisionConfig(SiglipConfig(**settings, gelu="tanh", attention_pool=True))
    tower = VisionTower(config)
    adaptor = build_adaptor(AdaptorConfig("pixel_shuffle"), config, released["projector_config"]["n_embed"])
    tower.siglip.load_state_dict({k.removeprefix("vision."): t for k, t in tensors.items() if k.startswith("vision.")})
    of_adaptor = ("projector.", "image_newline", "view_seperator")
    adaptor.load_state_dict({k.removeprefix("projector."): t for k, t in tensors.items() if k.startswith(of_adaptor)})
    return tower, adaptor, tensors


def input_embeddings(tower: VisionTower, adaptor: nn.Module, tensors: Tensors, sample: int) -> Tensor:
    """Token embeddings with the visual embeddings at the image positions, [t, h]."""
    with np.load(GOLDEN / "processed.npz") as processed:
        ids, mask, pixels, tiles_wh = (
            torch.from_numpy(processed[f"{sample}.{key}"]) for key in ("input_ids", "image_mask", "pixels", "tiles_wh")
        )
    embeddings = tensors["language.model.embed_tokens.weight"][ids]
    embeddings[mask] = adaptor(tower(pixels), tiles_wh)
    return embeddings


@pytest.mark.parametrize("name", GOLDEN_MODELS)
@torch.no_grad()
def test_input_embeddings_have_the_norm_of_the_released_code(name: str) -> None:
    tower, adaptor, tensors = load_golden(name)
    with np.load(GOLDEN / name / "expected.npz") as expected:
        for sample in GOLDEN_SAMPLES:
            norm = input_embeddings(tower, adaptor, tensors, sample).double().norm().item()
            assert math.isclose(norm, expected[f"{sample}.embeds_norm"], rel_tol=2e-7)  # worst seen 4e-8


def stack_experts(language: Tensors, layers: int, experts: int) -> Tensors:
    """One matrix per expert -> transformers' stacked experts, gate over up."""
    stacked = {name: tensor for name, tensor in language.items() if ".mlp.experts." not in name}
    for layer in range(layers):
        prefix = f"model.layers.{layer}.mlp.experts"
        if f"{prefix}.0.up_proj.weight" in language:
            gate, up, down = (
                torch.stack([language[f"{prefix}.{expert}.{part}_proj.weight"] for expert in range(experts)])
                for part in ("gate", "up", "down")
            )
            stacked[f"{prefix}.gate_up_proj"], stacked[f"{prefix}.down_proj"] = torch.cat([gate, up], dim=1), down
    return stacked


@torch.no_grad()
def test_logits_over_our_visual_embeddings_are_those_of_the_released_code() -> None:
    """The norm is blind to the order of the embeddings; a language model (transformers' own DeepSeek-V2) is not."""
    tower, adaptor, tensors = load_golden("mla_softmax")
    released = json.loads((GOLDEN / "mla_softmax" / "config.json").read_text())["language_config"]
    settings = {key: value for key, value in released.items() if key not in ("use_mla", "scoring_func")}
    language = DeepseekV2ForCausalLM(DeepseekV2Config(**settings, attn_implementation="eager")).eval()
    own = {name.removeprefix("language."): tensor for name, tensor in tensors.items() if name.startswith("language.")}
    language.load_state_dict(stack_experts(own, released["num_hidden_layers"], released["n_routed_experts"]))
    with np.load(GOLDEN / "mla_softmax" / "expected.npz") as expected:
        for sample in GOLDEN_SAMPLES:
            logits = language(inputs_embeds=input_embeddings(tower, adaptor, tensors, sample)[None]).logits[0, -8:]
            # worst seen 3e-6; a transposed grid of tiles, or newlines before the rows, give 0.4
            assert difference(logits, torch.from_numpy(expected[f"{sample}.logits_last8"])) < 2e-5
