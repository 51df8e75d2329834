"""SiglipEncoder against transformers' SiglipVisionModel, and the released parameter counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import SiglipVisionConfig, SiglipVisionModel
from vision_reference import difference, gradients, random_pixels, randomise, siglip_from_hf, weights, worst_difference

from dsvl_train.config.schema import SiglipConfig
from dsvl_train.models.siglip import SiglipEncoder, siglip_flops

# 30 px in patches of 7: two pixels are dropped at the right and bottom, as 384 px in patches of 14 drop six.
TINY = SiglipConfig(image_size=30, patch_size=7, width=24, layers=3, heads=4, mlp_ratio=3.7362)
SIGLIP_L = SiglipConfig(image_size=384, patch_size=16, width=1024, layers=24, heads=16, gelu="erf", attention_pool=True)
SO400M = SiglipConfig(image_size=384, patch_size=14, width=1152, layers=27, heads=16, mlp_ratio=3.7362, attention_pool=True)


def build(config: SiglipConfig, seed: int = 0) -> SiglipEncoder:
    encoder = SiglipEncoder(config)
    randomise(encoder, seed)
    return encoder


def build_reference(config: SiglipConfig, seed: int) -> SiglipVisionModel:
    reference = SiglipVisionModel(
        SiglipVisionConfig(
            image_size=config.image_size,
            patch_size=config.patch_size,
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=config.mlp_width,
            hidden_act="gelu" if config.gelu == "erf" else "gelu_pytorch_tanh",
            layer_norm_eps=config.layer_norm_eps,
            vision_use_head=False,
        )
    ).eval()
    randomise(reference, seed)
    return reference


@pytest.mark.parametrize("gelu", ["erf", "tanh"])
def test_features_and_gradients_are_those_of_transformers(gelu: Literal["erf", "tanh"]) -> None:
    config = replace(TINY, gelu=gelu)
    reference = build_reference(config, seed=1)
    encoder = SiglipEncoder(config)
    encoder.load_state_dict(siglip_from_hf(weights(reference)))
    pixels = random_pixels(3, config.image_size, seed=2)
    cotangent = torch.randn(3, config.tokens, config.width, generator=torch.Generator().manual_seed(3))

    features = encoder(pixels)
    expected = reference((pixels / 255 - 0.5) / 0.5).last_hidden_state
    (features * cotangent).sum().backward()
    (expected * cotangent).sum().backward()

    # worst seen on CPU in fp32: 0 (features), 1.1e-6 (gradients)
    assert difference(features, expected) < 3e-6
    assert worst_difference(gradients(encoder), siglip_from_hf(gradients(reference))) < 5e-6


def test_the_two_gelus_differ() -> None:
    pixels = random_pixels(1, TINY.image_size, seed=2)
    assert difference(build(replace(TINY, gelu="erf"))(pixels), build(replace(TINY, gelu="tanh"))(pixels)) > 1e-4


@pytest.mark.parametrize(("config", "released"), [(SIGLIP_L, 316_283_904), (SO400M, 428_225_600)], ids=["siglip_l", "so400m"])
def test_released_sizes_have_the_released_parameter_counts(config: SiglipConfig, released: int) -> None:
    with torch.device("meta"):
        encoder = SiglipEncoder(config)
        without_pool = SiglipEncoder(replace(config, attention_pool=False))
    assert sum(p.numel() for p in encoder.parameters()) == released
    pool = sum(p.numel() for name, p in encoder.named_parameters() if name.startswith("attn_pool."))
    assert sum(p.numel() for p in without_pool.parameters()) == released - pool


def test_float_pixels_in_the_unit_interval_are_the_same_image() -> None:
    encoder, pixels = build(TINY), random_pixels(2, TINY.image_size, seed=4)
    assert torch.equal(encoder(pixels), encoder(pixels / 255))


def test_pixel_statistics_are_used() -> None:
    config = replace(TINY, pixel_mean=[0.1, 0.2, 0.3], pixel_std=[0.4, 0.5, 0.6])
    pixels = random_pixels(2, TINY.image_size, seed=4)
    mean, std = torch.tensor(config.pixel_mean)[:, None, None], torch.tensor(config.pixel_std)[:, None, None]
    same_input = ((pixels / 255 - mean) / std) * 0.5 + 0.5
    assert difference(build(config)(pixels), build(TINY)(same_input)) < 5e-6  # worst seen 4e-7


def test_features_have_the_dtype_of_the_parameters() -> None:
    encoder, pixels = build(TINY), random_pixels(2, TINY.image_size, seed=4)
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


def test_pieces_make_the_whole_and_keep_its_names() -> None:
    whole, pixels = build(replace(TINY, attention_pool=True)), random_pixels(2, TINY.image_size, seed=6)
    first, last = build(whole.config), build(whole.config)
    first.keep(range(0, 1), embed=True, finish=False)
    last.keep(range(1, 3), embed=False, finish=True)
    assert not first.state_dict().keys() & last.state_dict().keys()
    assert first.state_dict().keys() | last.state_dict().keys() == whole.state_dict().keys()
    assert torch.equal(last.finish(last.run(first.run(first.embed(pixels), range(0, 1)), range(1, 3))), whole(pixels))


def test_no_tile_gives_no_features_and_zero_gradients() -> None:
    encoder = build(TINY)
    features = encoder(random_pixels(0, TINY.image_size, seed=0))
    assert features.shape == (0, TINY.tokens, TINY.width)
    features.sum().backward()
    assert all(not gradient.any() for gradient in gradients(encoder).values())


def test_flops_are_those_that_torch_counts() -> None:
    encoder, pixels = build(TINY), random_pixels(2, TINY.image_size, seed=7)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(pixels)
    assert counter.get_total_flops() == 2 * siglip_flops(TINY)


def test_wrong_settings_name_what_to_change() -> None:
    with pytest.raises(ValueError, match=r"siglip\.heads 5 does not divide siglip\.width 24"):
        SiglipEncoder(replace(TINY, heads=5))
    with pytest.raises(ValueError, match=r"siglip\.image_size 30 is smaller than siglip\.patch_size 31"):
        SiglipEncoder(replace(TINY, patch_size=31))
    with pytest.raises(ValueError, match=r"\[2, 3, 32, 32\].*\[n, 3, 30, 30\].*siglip\.image_size"):
        build(TINY)(random_pixels(2, 32, seed=0))
