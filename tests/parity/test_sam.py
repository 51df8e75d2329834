"""SamEncoder against the high-resolution branch of transformers' DeepseekVLHybridModel: encoder, necks, convolutions, weighted sum."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, SamVisionConfig, SiglipVisionConfig
from transformers.models.deepseek_vl_hybrid import DeepseekVLHybridConfig, DeepseekVLHybridModel
from vision_reference import difference, gradients, random_pixels, randomise, sam_from_hf, weights, worst_difference

from dsvl_train.config.schema import SamConfig
from dsvl_train.models.sam_vitdet import SamEncoder, sam_flops

TINY = SamConfig(
    image_size=40,
    patch_size=4,
    width=16,
    layers=4,
    heads=2,
    window=4,  # 10 patches a side: the last window of a row holds two patches and two columns of filling
    global_layers=[1, 3],
    neck_width=8,
    interpolate_to=12,
    downsample_widths=[16, 32],
)
WINDOWS = {
    "filled_up": TINY,
    "exact": replace(TINY, window=5),
    "larger_than_the_grid": replace(TINY, window=14),
    "first_layer_global": replace(TINY, global_layers=[0]),
    "last_layer_global": replace(TINY, global_layers=[3]),
    "interpolated_down": replace(TINY, interpolate_to=8),
}


def build(config: SamConfig, seed: int = 0) -> SamEncoder:
    encoder = SamEncoder(config)
    randomise(encoder, seed)
    return encoder


def build_reference(config: SamConfig, seed: int) -> DeepseekVLHybridModel:
    high = SamVisionConfig(
        hidden_size=config.width,
        output_channels=config.neck_width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
        window_size=config.window,
        global_attn_indexes=config.global_layers,
        layer_norm_eps=config.layer_norm_eps,
        mlp_ratio=config.mlp_ratio,
    )
    low = SiglipVisionConfig(  # only its grid matters here: transformers interpolates to four times its side
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=config.output_grid * 4, patch_size=4
    )
    text = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
    reference = DeepseekVLHybridModel(DeepseekVLHybridConfig(text_config=text, vision_config=low, high_res_vision_config=high)).eval()
    randomise(reference, seed)
    return reference


def reference_features(reference: DeepseekVLHybridModel, config: SamConfig, pixels: torch.Tensor) -> torch.Tensor:
    mean, std = torch.tensor(config.pixel_mean)[:, None, None], torch.tensor(config.pixel_std)[:, None, None]
    return reference.get_high_res_image_features((pixels / 255 - mean) / std).last_hidden_state


@pytest.mark.parametrize("config", WINDOWS.values(), ids=WINDOWS.keys())
def test_features_and_gradients_are_those_of_transformers(config: SamConfig) -> None:
    reference = build_reference(config, seed=1)
    assert reference.high_res_vision_alpha.item() != 0
    encoder = SamEncoder(config)
    encoder.load_state_dict(sam_from_hf(weights(reference)))
    pixels = random_pixels(2, config.image_size, seed=2)

    features = encoder(pixels)
    expected = reference_features(reference, config, pixels)
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    (features * cotangent).sum().backward()
    (expected * cotangent).sum().backward()
    of_reference = {name: p.grad for name, p in reference.named_parameters() if name.startswith("high_res_vision_")}

    # worst seen on CPU in fp32: 5e-7 (features), 2e-6 (gradients)
    assert difference(features, expected) < 3e-6
    assert worst_difference(gradients(encoder), sam_from_hf(of_reference)) < 1e-5


def test_released_size_gives_siglips_tokens_and_the_released_parameters() -> None:
    with torch.device("meta"):
        encoder = SamEncoder(SamConfig())
    shapes = {name: list(parameter.shape) for name, parameter in encoder.named_parameters()}
    assert shapes["pos_embed"] == [1, 64, 64, 768]
    assert shapes["blocks.0.attn.rel_pos_h"] == [27, 64]
    assert shapes["blocks.2.attn.rel_pos_w"] == [127, 64]
    assert shapes["neck_hd.2.weight"] == [256, 256, 3, 3]
    assert shapes["downsamples.1.weight"] == [1024, 512, 3, 3]
    assert shapes["hd_alpha_downsamples"] == [1]
    # 89,670,912 parameters of SAM-B's image encoder (segment-anything), the second neck, two convolutions, one scalar
    neck = 768 * 256 + 2 * 256 + 9 * 256 * 256 + 2 * 256
    assert sum(p.numel() for p in encoder.parameters()) == 89_670_912 + neck + 9 * (256 * 512 + 512 * 1024) + 1
    assert SamConfig().output_grid ** 2 == 576


def test_alpha_weighs_the_branch_of_the_first_global_layer() -> None:
    encoder, pixels = build(TINY), random_pixels(1, TINY.image_size, seed=4)
    state = encoder.run(encoder.embed(pixels), range(TINY.layers))
    assert state.hd_nggd is not None
    assert encoder.hd_alpha_downsamples is not None and encoder.neck_hd is not None and encoder.downsamples is not None
    branch = F.interpolate(encoder.neck_hd(state.hd_nggd.permute(0, 3, 1, 2)), size=(12, 12), mode="bilinear", align_corners=False)
    with torch.no_grad():
        encoder.hd_alpha_downsamples.fill_(0.0)
        without = encoder(pixels)
        encoder.hd_alpha_downsamples.fill_(0.5)
        added = (encoder(pixels) - without).transpose(1, 2).unflatten(2, (3, 3))
        assert difference(added, 0.5 * encoder.downsamples(branch)) < 2e-6  # worst seen 3e-7


def test_features_have_the_dtype_of_the_parameters() -> None:
    encoder, pixels = build(TINY), random_pixels(1, TINY.image_size, seed=4)
    expected = encoder(pixels)
    features = encoder.to(torch.bfloat16)(pixels)
    assert features.dtype == torch.bfloat16
    assert difference(features.float(), expected) < 0.1


def test_recomputation_gives_the_same_gradients() -> None:
    encoder, pixels = build(TINY), random_pixels(2, TINY.image_size, seed=5)
    encoder(pixels).square().sum().backward()
    kept = {name: gradient.clone() for name, gradient in gradients(encoder).items()}
    encoder.zero_grad()
    encoder.recompute = True
    encoder(pixels).square().sum().backward()
    assert worst_difference(gradients(encoder), kept) == 0.0


@pytest.mark.parametrize("cut", [0, 1, 2, 4], ids="before_block_{}".format)
def test_pieces_make_the_whole_and_keep_its_names(cut: int) -> None:
    whole, pixels = build(TINY), random_pixels(2, TINY.image_size, seed=6)
    first, last = build(TINY), build(TINY)
    first.keep(range(cut), embed=True, finish=False)
    last.keep(range(cut, 4), embed=False, finish=True)
    assert not first.state_dict().keys() & last.state_dict().keys()
    assert first.state_dict().keys() | last.state_dict().keys() == whole.state_dict().keys()
    assert torch.equal(last.finish(last.run(first.run(first.embed(pixels), range(cut)), range(cut, 4))), whole(pixels))


def test_no_tile_gives_no_features_and_zero_gradients() -> None:
    encoder = build(TINY)
    features = encoder(random_pixels(0, TINY.image_size, seed=0))
    assert features.shape == (0, 9, 32)
    features.sum().backward()
    assert all(not gradient.any() for gradient in gradients(encoder).values())


@pytest.mark.parametrize("config", WINDOWS.values(), ids=WINDOWS.keys())
def test_flops_are_those_that_torch_counts(config: SamConfig) -> None:
    encoder, pixels = build(config), random_pixels(1, config.image_size, seed=7)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(pixels)
    assert counter.get_total_flops() == sam_flops(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, r"sam\.heads 3 does not divide sam\.width 16"),
        ({"patch_size": 7}, r"sam\.patch_size 7 does not divide sam\.image_size 40"),
        ({"global_layers": []}, r"sam\.global_layers \[\] must name at least one layer of 0 \.\. 3"),
        ({"global_layers": [4]}, r"sam\.global_layers \[4\]"),
        ({"window": 0}, r"sam\.window is 0"),
        ({"downsample_widths": [8]}, r"sam\.downsample_widths \[8\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_settings_name_what_to_change(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamEncoder(replace(TINY, **change))  # type: ignore[arg-type]


def test_wrong_image_size_names_what_to_change() -> None:
    with pytest.raises(ValueError, match=r"\[1, 3, 44, 44\].*sam\.image_size"):
        build(TINY)(random_pixels(1, 44, seed=0))
