"""Adaptors against transformers' aligners, and against slow references written from the papers (VL Table 10, VL2 §2)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, SamVisionConfig, SiglipVisionConfig
from transformers.models.deepseek_vl import DeepseekVLConfig
from transformers.models.deepseek_vl.modeling_deepseek_vl import DeepseekVLAligner
from transformers.models.deepseek_vl_hybrid import DeepseekVLHybridConfig
from transformers.models.deepseek_vl_hybrid.modeling_deepseek_vl_hybrid import DeepseekVLHybridAligner
from vision_reference import difference, gradients, randomise, worst_difference

from dsvl_train.config.schema import AdaptorConfig, SamConfig, SiglipConfig, VisionConfig
from dsvl_train.models.adaptors import adaptor_flops, build_adaptor

HIDDEN = 12
TWO_ENCODER_KINDS = ["hybrid", "shared", "separate"]
CONCATS = ["embedding", "sequence_width", "sequence_height"]
TILES_WH = [(1, 1), (3, 2), (1, 3), (2, 1)]


def siglip(grid: int, width: int = 8) -> SiglipConfig:
    return SiglipConfig(image_size=4 * grid, patch_size=4, width=width, layers=1, heads=1)


def sam(grid: int, width: int = 8) -> SamConfig:
    return SamConfig(
        image_size=16, patch_size=4, width=8, layers=1, heads=1, global_layers=[0], interpolate_to=4 * grid, downsample_widths=[4, width]
    )


def one_encoder(grid: int, width: int = 8) -> VisionConfig:
    return VisionConfig(siglip(grid, width))


def two_encoders(grid: int, high: int = 8, low: int = 8) -> VisionConfig:
    return VisionConfig(siglip(grid, low), sam(grid, high))


def build(adaptor: AdaptorConfig, vision: VisionConfig, hidden: int = HIDDEN) -> nn.Module:
    module = build_adaptor(adaptor, vision, hidden)
    randomise(module, seed=1)
    return module


def normal(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def no_tiles(images: int) -> Tensor:
    return torch.zeros(images, 2, dtype=torch.int64)


def backward_both(actual: Tensor, expected: Tensor) -> None:
    cotangent = normal(*expected.shape, seed=9)
    (actual * cotangent).sum().backward()
    (expected * cotangent).sum().backward()


# ------------------------------------------------------------------------------------------------------------------ VL, released


def test_mlp_is_transformers_aligner() -> None:
    config = DeepseekVLConfig(
        vision_config=SiglipVisionConfig(hidden_size=8, num_attention_heads=1),
        text_config=LlamaConfig(hidden_size=HIDDEN, num_attention_heads=1),
    )
    reference = DeepseekVLAligner(config)
    randomise(reference, seed=3)
    names = {"linear1": "layers.0", "linear2": "layers.2"}
    adaptor = build(AdaptorConfig("mlp"), one_encoder(4))
    adaptor.load_state_dict({f"{names[name.split('.')[0]]}.{name.split('.')[1]}": t for name, t in reference.state_dict().items()})

    features = normal(3, 16, 8)
    actual, expected = adaptor(features, no_tiles(3)), reference(features).flatten(0, 1)
    assert torch.equal(actual, expected)
    backward_both(actual, expected)
    of_reference = {f"{names[name.split('.')[0]]}.{name.split('.')[1]}": g for name, g in gradients(reference).items()}
    assert worst_difference(gradients(adaptor), of_reference) == 0.0


def test_hybrid_is_transformers_aligner() -> None:
    config = DeepseekVLHybridConfig(
        vision_config=SiglipVisionConfig(hidden_size=6, num_attention_heads=1),
        high_res_vision_config=SamVisionConfig(output_channels=4),
        text_config=LlamaConfig(hidden_size=HIDDEN, num_attention_heads=1),
    )
    reference = DeepseekVLHybridAligner(config)
    randomise(reference, seed=3)
    names = {"vision_proj": "low_up_proj", "high_res_vision_proj": "high_up_proj", "proj": "layers.1"}
    adaptor = build(AdaptorConfig("hybrid"), two_encoders(4, high=16, low=6))
    adaptor.load_state_dict({f"{names[name.split('.')[0]]}.{name.split('.')[1]}": t for name, t in reference.state_dict().items()})

    high, low = normal(3, 16, 16), normal(3, 16, 6, seed=4)
    actual, expected = adaptor((high, low), no_tiles(3)), reference(low, high).flatten(0, 1)
    assert torch.equal(actual, expected)
    backward_both(actual, expected)
    of_reference = {f"{names[name.split('.')[0]]}.{name.split('.')[1]}": g for name, g in gradients(reference).items()}
    assert worst_difference(gradients(adaptor), of_reference) == 0.0


# ------------------------------------------------------------------------------------------------------------------- VL Table 10


def slow_pool(features: Tensor, grid: int, concat: str) -> list[Tensor]:
    """Feature vectors of one image after token pooling: each pair of neighbours end to end."""
    at = features.unflatten(0, (grid, grid))
    if concat == "sequence_width":
        return [torch.cat([at[y, x], at[y, x + 1]]) for y in range(grid) for x in range(0, grid, 2)]
    if concat == "sequence_height":
        return [torch.cat([at[y, x], at[y + 1, x]]) for y in range(0, grid, 2) for x in range(grid)]
    return list(features)


def slow_two_encoders(module: Any, config: AdaptorConfig, high: Tensor, low: Tensor, grid: int) -> Tensor:
    """Token by token, image by image, from Table 10 and the decisions in the adaptors' docstring."""

    def mlp(linear: list[nn.Module], x: Tensor) -> Tensor:
        for layer in linear[:-1]:
            x = F.gelu(layer(x))
        return linear[-1](x)

    def linear_layers(name: str) -> list[nn.Module]:
        return [layer for layer in getattr(module, name) if isinstance(layer, nn.Linear)]

    embeddings = []
    for image in range(high.shape[0]):
        highs, lows = slow_pool(high[image], grid, config.concat), slow_pool(low[image], grid, config.concat)
        if config.kind == "hybrid":
            highs, lows = [module.high_up_proj(x) for x in highs], [module.low_up_proj(x) for x in lows]
        elif config.kind == "separate":
            highs, lows = [mlp(linear_layers("high_layers"), x) for x in highs], [mlp(linear_layers("low_layers"), x) for x in lows]
        else:
            highs, lows = [mlp(linear_layers("layers"), x) for x in highs], [mlp(linear_layers("layers"), x) for x in lows]
        joined = [torch.cat(pair) for pair in zip(highs, lows, strict=True)] if config.concat == "embedding" else highs + lows
        if config.kind == "hybrid":
            for layer in linear_layers("layers"):
                joined = [layer(F.gelu(x)) for x in joined]
        embeddings += joined
    return torch.stack(embeddings)


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("concat", CONCATS)
@pytest.mark.parametrize("kind", TWO_ENCODER_KINDS)
def test_table_10_variants(kind: str, concat: str, depth: int) -> None:
    config = AdaptorConfig(kind, concat=concat, depth=depth)  # type: ignore[arg-type]
    low_width = 8 if kind == "shared" else 6
    module = build(config, two_encoders(4, low=low_width))
    high, low = normal(2, 16, 8), normal(2, 16, low_width, seed=4)
    embeddings = module((high, low), no_tiles(2))
    assert embeddings.shape == (2 * 16, HIDDEN)  # the token budget is the same for every variant
    assert difference(embeddings, slow_two_encoders(module, config, high, low, grid=4)) < 2e-6  # worst seen 3e-7
    embeddings.square().sum().backward()
    gradients(module)


# ----------------------------------------------------------------------------------------------------------------------- VL2, §2


def slow_pixel_shuffle(module: Any, features: Tensor, tiles_wh: list[tuple[int, int]], grid: int, ratio: int) -> Tensor:
    """One embedding after another: projected 2x2 squares, newlines and separators as in VL2 §2."""
    side = (grid + ratio - 1) // ratio
    width = features.shape[-1]

    def embedding(tile: int, row: int, column: int) -> Tensor:
        square = torch.zeros(width * ratio * ratio)
        for channel in range(width):
            for dy in range(ratio):
                for dx in range(ratio):
                    y, x = row * ratio + dy, column * ratio + dx
                    if y < grid and x < grid:
                        square[channel * ratio * ratio + dy * ratio + dx] = features[tile, y * grid + x, channel]
        return module.layers(square)

    embeddings: list[Tensor] = []
    tile = 0
    for wide, high in tiles_wh:
        for row in range(side):
            embeddings += [embedding(tile, row, column) for column in range(side)] + [module.image_newline]
        embeddings.append(module.view_seperator)
        for row in range(high * side):
            for column in range(wide * side):
                local = tile + 1 + (row // side) * wide + column // side
                embeddings.append(embedding(local, row % side, column % side))
            embeddings.append(module.image_newline)
        tile += 1 + wide * high
    return torch.stack(embeddings)


@pytest.mark.parametrize(("grid", "ratio"), [(3, 2), (4, 2), (5, 3), (3, 1)])
def test_pixel_shuffle_lays_tiles_out_as_the_paper_says(grid: int, ratio: int) -> None:
    module = build(AdaptorConfig("pixel_shuffle", downsample_ratio=ratio), one_encoder(grid, width=3))
    tiles = sum(1 + wide * high for wide, high in TILES_WH)
    features = normal(tiles, grid * grid, 3)
    embeddings = module(features, torch.tensor(TILES_WH))
    expected = slow_pixel_shuffle(module, features, TILES_WH, grid, ratio)
    assert difference(embeddings, expected) < 2e-6  # worst seen 3.2e-7; positions and channels are exact
    embeddings.square().sum().backward()
    gradients(module)


def test_pixel_shuffle_orders_features_as_unfold_does() -> None:
    module: Any = build(AdaptorConfig("pixel_shuffle"), one_encoder(27, width=5))
    features = normal(2, 27 * 27, 5)
    image = F.pad(features.transpose(1, 2).unflatten(2, (27, 27)), (0, 1, 0, 1))
    unfolded = F.unfold(image, kernel_size=2, stride=2).transpose(1, 2)
    projected = module.layers(unfolded).unflatten(1, (14, 14))
    embeddings = module(features, torch.tensor([(1, 1)]))
    assert embeddings.shape == (421, HIDDEN)
    assert difference(embeddings[:210].unflatten(0, (14, 15))[:, :14], projected[0]) < 1e-6
    assert difference(embeddings[211:].unflatten(0, (14, 15))[:, :14], projected[1]) < 1e-6


@pytest.mark.parametrize(
    ("tiles_wh", "embeddings"), [((1, 1), 421), ((2, 1), 617), ((3, 3), 2017), ((1, 9), 2101), ((9, 1), 1989)], ids=str
)
def test_released_grid_gives_the_released_number_of_embeddings(tiles_wh: tuple[int, int], embeddings: int) -> None:
    module = build(AdaptorConfig("pixel_shuffle"), one_encoder(27, width=1), hidden=2)
    tiles = 1 + tiles_wh[0] * tiles_wh[1]
    assert module(normal(tiles, 729, 1), torch.tensor([tiles_wh])).shape == (embeddings, 2)


def test_blank_tile_of_a_sample_without_image_becomes_nothing() -> None:
    module = build(AdaptorConfig("pixel_shuffle"), one_encoder(3))
    features = normal(5, 9, 8)
    both = module(features, torch.tensor([(0, 0), (1, 1), (1, 0), (0, 0)]))
    assert torch.equal(both, module(features[1:3], torch.tensor([(1, 1)])))
    assert module(features[:1], no_tiles(1)).shape == (0, HIDDEN)


# -------------------------------------------------------------------------------------------------------------------- edge cases


@pytest.mark.parametrize("kind", ["mlp", "pixel_shuffle", *TWO_ENCODER_KINDS])
def test_no_image_gives_no_embeddings_and_zero_gradients(kind: str) -> None:
    two = kind in TWO_ENCODER_KINDS
    module = build(AdaptorConfig(kind), two_encoders(4) if two else one_encoder(4))  # type: ignore[arg-type]
    nothing = torch.zeros(0, 16, 8, requires_grad=True)
    embeddings = module((nothing, nothing) if two else nothing, no_tiles(0))
    assert embeddings.shape == (0, HIDDEN)
    embeddings.sum().backward()
    assert nothing.grad is not None
    assert all(not gradient.any() for gradient in gradients(module).values())


@pytest.mark.parametrize(
    ("kind", "concat"),
    [("mlp", "embedding"), ("pixel_shuffle", "embedding"), *((kind, concat) for kind in TWO_ENCODER_KINDS for concat in CONCATS)],
)
def test_flops_are_those_that_torch_counts(kind: str, concat: str) -> None:
    two = kind in TWO_ENCODER_KINDS
    config = AdaptorConfig(kind, concat=concat, depth=3)  # type: ignore[arg-type]
    vision = two_encoders(6, high=8, low=8 if kind == "shared" else 4) if two else one_encoder(5)
    module = build(config, vision)
    features = normal(2, vision.siglip.tokens, vision.siglip.width)
    with FlopCounterMode(display=False) as counter:
        module((normal(2, 36, 8), features) if two else features, torch.tensor([(1, 1)]) if kind == "pixel_shuffle" else no_tiles(2))
    assert counter.get_total_flops() == 2 * adaptor_flops(config, vision, HIDDEN)


@pytest.mark.parametrize(
    ("adaptor", "vision", "hidden", "message"),
    [
        (AdaptorConfig("hybrid"), one_encoder(4), 12, r"adaptor\.kind hybrid takes the features of two encoders.*sam is null"),
        (AdaptorConfig("mlp"), two_encoders(4), 12, r"adaptor\.kind mlp takes the features of one encoder.*sam is set"),
        (AdaptorConfig("pixel_shuffle"), two_encoders(4), 12, r"adaptor\.kind pixel_shuffle"),
        (AdaptorConfig("mlp", concat="sequence_width"), one_encoder(4), 12, r"adaptor\.concat sequence_width joins two encoders"),
        (AdaptorConfig("mlp", depth=0), one_encoder(4), 12, r"adaptor\.depth is 0"),
        (AdaptorConfig("pixel_shuffle", downsample_ratio=0), one_encoder(4), 12, r"adaptor\.downsample_ratio is 0"),
        (AdaptorConfig("hybrid"), two_encoders(4), 13, r"hidden_size 13 is odd"),
        (AdaptorConfig("hybrid", concat="sequence_width"), two_encoders(3), 12, r"pools the 3 x 3 grid in pairs"),
        (AdaptorConfig("hybrid", concat="sequence_height"), two_encoders(3), 12, r"pools the 3 x 3 grid in pairs"),
        (AdaptorConfig("shared"), two_encoders(4, low=6), 12, r"widths are 8 .* and 6 "),
    ],
    ids=lambda value: "" if not isinstance(value, AdaptorConfig) else f"{value.kind}-{value.concat}-{value.depth}-{value.downsample_ratio}",
)
def test_wrong_settings_name_what_to_change(adaptor: AdaptorConfig, vision: VisionConfig, hidden: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_adaptor(adaptor, vision, hidden)


def test_tiles_that_do_not_add_up_are_named() -> None:
    with pytest.raises(ValueError, match=r"\[\[2, 1\]\] local tiles .* have 3 tiles with thumbnails; got 4"):
        build(AdaptorConfig("pixel_shuffle"), one_encoder(4))(normal(4, 16, 8), torch.tensor([(2, 1)]))
    with pytest.raises(ValueError, match=r"4 tiles for 1 images"):
        build(AdaptorConfig("mlp"), one_encoder(4))(normal(4, 16, 8), torch.tensor([(2, 1)]))
