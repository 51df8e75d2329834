"""Whole DeepSeek-VL models against transformers': logits, the gradient of every parameter, greedy tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from language_reference import build, copy_weights, packed, worst_gradient
from torch import Tensor, nn
from transformers import DeepseekVLConfig, DeepseekVLForConditionalGeneration, LlamaConfig, SamVisionConfig, SiglipVisionConfig
from transformers.models.deepseek_vl_hybrid import DeepseekVLHybridConfig, DeepseekVLHybridForConditionalGeneration
from vision_reference import random_pixels, randomise

from dsvl_train.config.schema import AdaptorConfig, LanguageConfig, ModelConfig, SamConfig, SiglipConfig, VisionConfig
from dsvl_train.data.batch import IGNORE_INDEX
from dsvl_train.data.processor import Encoded
from dsvl_train.interop.blocks import Table
from dsvl_train.interop.formats import transformers_vl
from dsvl_train.interop.shapes import logical_shapes
from dsvl_train.models.vision import resize
from dsvl_train.parallel import startup
from tests.tiny import tiny_run

VOCAB, IMAGE_ID = 200, 199
SIGLIP = SiglipConfig(image_size=24, patch_size=6, width=16, layers=2, heads=2, mlp_ratio=1.5, gelu="erf")
SAM = SamConfig(
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
)
LANGUAGE = LanguageConfig(vocab_size=VOCAB, hidden_size=24, ffn_width=40, layers=2, heads=3)
MODELS = {
    "deepseek_vl": ModelConfig("tiny", "vl", VisionConfig(SIGLIP), AdaptorConfig("mlp"), LANGUAGE),
    "deepseek_vl_hybrid": ModelConfig("tiny", "vl", VisionConfig(SIGLIP, SAM), AdaptorConfig("hybrid"), LANGUAGE),
}


@pytest.fixture(scope="module")
def world() -> Iterator[startup.World]:
    world = startup.start(tiny_run("vl").engine, tiny_run("vl").parallel, seed=0)
    yield world
    startup.stop()


def transformers_model(config: ModelConfig) -> nn.Module:
    """Random weights. transformers ties the embeddings and takes the tanh GELU unless told otherwise."""
    language, siglip, sam = config.language, config.vision.siglip, config.vision.sam
    shared: dict[str, Any] = {
        "text_config": LlamaConfig(
            vocab_size=language.vocab_size,
            hidden_size=language.hidden_size,
            intermediate_size=language.ffn_width,
            num_hidden_layers=language.layers,
            num_attention_heads=language.heads,
            num_key_value_heads=language.heads,
        ),
        "vision_config": SiglipVisionConfig(
            image_size=siglip.image_size,
            patch_size=siglip.patch_size,
            hidden_size=siglip.width,
            intermediate_size=siglip.mlp_width,
            num_hidden_layers=siglip.layers,
            num_attention_heads=siglip.heads,
            hidden_act="gelu",
            vision_use_head=False,
        ),
        "image_token_id": IMAGE_ID,
        "tie_word_embeddings": False,
    }
    if sam is None:
        reference: nn.Module = DeepseekVLForConditionalGeneration(DeepseekVLConfig(**shared))
    else:
        high = SamVisionConfig(
            image_size=sam.image_size,
            patch_size=sam.patch_size,
            hidden_size=sam.width,
            num_hidden_layers=sam.layers,
            num_attention_heads=sam.heads,
            window_size=sam.window,
            global_attn_indexes=sam.global_layers,
            output_channels=sam.neck_width,
        )
        reference = DeepseekVLHybridForConditionalGeneration(DeepseekVLHybridConfig(**shared, high_res_vision_config=high))
    randomise(reference, seed=1)
    return reference.eval()


def pair(config: ModelConfig, world: startup.World) -> tuple[Any, nn.Module, Table]:
    reference = transformers_model(config)
    table = transformers_vl.relate(config, logical_shapes(config))
    model = build(config, world)
    copy_weights(reference, model, table)
    return model, reference, table


def samples(config: ModelConfig) -> list[Encoded]:
    """One image, none, two images; images at different places, prompts of different lengths."""
    generator = torch.Generator().manual_seed(3)
    side = SAM.image_size if config.vision.sam else SIGLIP.image_size
    made = []
    for number, starts in enumerate(([3], [], [0, 20])):
        ids = torch.randint(0, IMAGE_ID, (24 + 9 * number,), generator=generator)
        mask = torch.zeros(len(ids), dtype=torch.bool)
        for start in starts:
            mask[start : start + SIGLIP.tokens] = True
        ids[mask] = IMAGE_ID
        labels = torch.where(mask | (torch.rand(len(ids), generator=generator) < 0.3), IGNORE_INDEX, ids)
        pixels = random_pixels(len(starts), side, seed=number)
        made.append(Encoded(ids, labels, mask, torch.zeros(len(starts), 2, dtype=torch.int64), pixels, len(starts)))
    return made


def their_inputs(config: ModelConfig, sample: Encoded) -> dict[str, Tensor]:
    """transformers' processor hands both sizes over; the released tower makes the low one from the high one."""
    inputs = {"input_ids": sample.input_ids[None]}
    if not sample.image_count:
        return inputs
    inputs["pixel_values"] = (resize(sample.pixels, SIGLIP.image_size) - 0.5) / 0.5
    if config.vision.sam is not None:
        mean, std = (torch.tensor(values)[:, None, None] for values in (SAM.pixel_mean, SAM.pixel_std))
        inputs["high_res_pixel_values"] = (sample.pixels / 255 - mean) / std
    return inputs


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_every_gradient_are_those_of_transformers(name: str, world: startup.World) -> None:
    """A pack of ours against samples one by one. Worst seen: 5e-6 (logits), 1e-5 (gradients)."""
    config = MODELS[name]
    model, reference, table = pair(config, world)
    pack = samples(config)
    targets = [F.pad(sample.labels[1:], (0, 1), value=IGNORE_INDEX) for sample in pack]
    inputs = packed([(sample.input_ids, target) for sample, target in zip(pack, targets, strict=True)])
    inputs["image_mask_t"] = torch.cat([sample.image_mask for sample in pack])
    inputs["visual_vh"] = model.vision(torch.cat([sample.pixels for sample in pack]), torch.cat([sample.tiles_wh for sample in pack]))
    with torch.no_grad():
        logits = model.language(**inputs)[:, :VOCAB]
    targets_t = torch.cat(targets)
    supervised = (targets_t != IGNORE_INDEX).sum()
    loss_t = model.language(**inputs, labels_t=targets_t)
    (torch.where(targets_t != IGNORE_INDEX, loss_t, 0.0).sum() / supervised).backward()

    expected = torch.cat([reference(**their_inputs(config, sample)).logits[0] for sample in pack])
    (F.cross_entropy(expected, targets_t, ignore_index=IGNORE_INDEX, reduction="sum") / supervised).backward()

    worst, where = worst_gradient(model, table, reference)
    assert (logits - expected).abs().max() < 2e-5
    assert worst < 4e-5, where


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_those_of_transformers(name: str, world: startup.World) -> None:
    from dsvl_train.evaluation.generation import generate
    from dsvl_train.evaluation.loading import LoadedModel

    config = MODELS[name]
    model, reference, _ = pair(config, world)
    loaded = LoadedModel(replace(tiny_run("vl"), model=config), world, model, SimpleNamespace(stop_ids=[]))  # type: ignore[arg-type]
    prompts = samples(config)
    options: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = []
    for prompt in prompts:
        ids = reference.generate(**their_inputs(config, prompt), **options)[0]  # type: ignore[operator]
        expected.append(ids[len(prompt.input_ids) :].tolist())
    assert generate(loaded, prompts, 16) == expected
    assert len({tuple(answer) for answer in expected}) == len(prompts)
