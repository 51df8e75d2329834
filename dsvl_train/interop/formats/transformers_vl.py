"""DeepSeek-VL in transformers (`deepseek_vl`: 1.3B, `deepseek_vl_hybrid`: 7B): configuration and tensor names."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from dsvl_train.config.schema import AdaptorConfig, ModelConfig, VisionConfig
from dsvl_train.interop.blocks import Shape, Table
from dsvl_train.interop.formats import language as lm
from dsvl_train.interop.formats import sam as sam_format
from dsvl_train.interop.formats import siglip as siglip_format
from dsvl_train.interop.formats.json_file import JsonConfig

SINGLE, HYBRID = "deepseek_vl", "deepseek_vl_hybrid"
DEFAULT_IMAGE_TOKEN_ID = 100015
_HALF = [0.5, 0.5, 0.5]


def read(config: JsonConfig, names: Collection[str]) -> ModelConfig:
    """The model that a `config.json` of transformers describes; pixel statistics come from the image processor's file beside it."""
    model_type = config.require("model_type", None, SINGLE, HYBRID)
    text = config.section("text_config")
    tied = config.boolean("tie_word_embeddings", True)
    language = lm.read_llama(text)
    language.tie_embeddings = tied and "lm_head.weight" not in names  # a head that is stored is used
    vision = config.section("vision_config")
    vision.require("model_type", "siglip_vision_model", "siglip_vision_model")
    siglip = siglip_format.read_transformers(vision, names)
    pixels = read_image_processor(config.path.parent)
    siglip.pixel_mean, siglip.pixel_std = pixels.numbers("image_mean", _HALF), pixels.numbers("image_std", _HALF)
    if model_type == SINGLE:
        return ModelConfig("deepseek_vl", "vl", VisionConfig(siglip), AdaptorConfig("mlp"), language)
    high = config.section("high_res_vision_config")
    high.require("model_type", "sam_vision_model", "sam_vision_model")
    sam = sam_format.read_transformers(high, interpolate_to=4 * siglip.grid)
    sam.pixel_mean = pixels.numbers("high_res_image_mean", sam.pixel_mean)
    sam.pixel_std = pixels.numbers("high_res_image_std", sam.pixel_std)
    return ModelConfig("deepseek_vl", "vl", VisionConfig(siglip, sam), AdaptorConfig("hybrid"), language)


def read_image_processor(folder: Path) -> JsonConfig:
    """The image processor's settings: preprocessor_config.json, or transformers 5's section of processor_config.json; else nothing."""
    preprocessor = folder / "preprocessor_config.json"
    if preprocessor.is_file():
        return JsonConfig.read(preprocessor)
    processor = folder / "processor_config.json"
    return JsonConfig.read(processor).section("image_processor") if processor.is_file() else JsonConfig(preprocessor, {})


def write(model: ModelConfig, *, bos_id: int, eos_id: int, image_token_id: int, dtype: str) -> dict[str, Any]:
    """`config.json` of a model.

    Raises:
        ValueError: transformers has no class for it.
    """
    check(model)
    siglip, sam = model.vision.siglip, model.vision.sam
    text = lm.write_llama(model.language)
    text |= {
        "head_dim": model.language.hidden_size // model.language.heads,
        "rope_parameters": {"rope_theta": model.language.rope_theta, "rope_type": "default"},
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "torch_dtype": dtype,
    }
    values = {
        "architectures": ["DeepseekVLForConditionalGeneration" if sam is None else "DeepseekVLHybridForConditionalGeneration"],
        "model_type": SINGLE if sam is None else HYBRID,
        "torch_dtype": dtype,
        "image_token_id": image_token_id,
        "tie_word_embeddings": model.language.tie_embeddings,
        "text_config": text,
        "vision_config": siglip_format.write_transformers(siglip) | {"torch_dtype": dtype},
    }
    if sam is not None:
        values["high_res_vision_config"] = sam_format.write_transformers(sam) | {"torch_dtype": dtype}
    return values


def check(model: ModelConfig) -> None:
    """Raise ValueError where transformers has no class for a model."""
    if model.family == "vl2":
        raise ValueError("transformers has no DeepSeek-VL2 class; use --format deepseek_vl_v2")
    adaptor, siglip, sam = model.adaptor, model.vision.siglip, model.vision.sam
    if adaptor.kind not in ("mlp", "hybrid") or adaptor.concat != "embedding" or adaptor.depth != 2:
        raise ValueError(
            f"transformers' DeepSeek-VL has two-layer adaptors (mlp, or hybrid along the embedding); this model has {adaptor.kind}, "
            f"{adaptor.concat}, depth {adaptor.depth}"
        )
    if sam is None:
        return
    wanted = ([2 * sam.neck_width, 4 * sam.neck_width], 4 * siglip.grid)
    if (sam.downsample_widths, sam.interpolate_to) != wanted:
        raise ValueError(
            f"transformers' DeepSeek-VL takes sam.downsample_widths {wanted[0]} (2 and 4 times neck_width) and sam.interpolate_to "
            f"{wanted[1]} (4 times SigLIP's grid); this model has {sam.downsample_widths} and {sam.interpolate_to}"
        )


def relate(model: ModelConfig, ours: dict[str, Shape], names: Collection[str] = ()) -> Table:
    """The names of transformers; earlier versions had `vision_model` twice."""
    table = Table(ours)
    twice = any(name.startswith("model.vision_model.vision_model.") for name in names)
    siglip_format.add_transformers(table, model.vision.siglip, "model.vision_model." + "vision_model." * twice, head=True)
    if model.vision.sam is None:
        adaptor = {"linear1": "layers.0", "linear2": "layers.2"}
    else:
        sam_format.add_transformers(table, model.vision.sam, "model.high_res_vision_model.vision_encoder.")
        sam_format.add_neck(table, "model.high_res_vision_neck.", f"{sam_format.OURS}neck_hd.")
        for index in (0, 1):
            table.same(f"model.high_res_vision_proj.conv{index + 1}.weight", f"{sam_format.OURS}downsamples.{index}.weight")
        table.same("model.high_res_vision_alpha", f"{sam_format.OURS}hd_alpha_downsamples")
        adaptor = {"vision_proj": "low_up_proj", "high_res_vision_proj": "high_up_proj", "proj": "layers.1"}
    for theirs, our in adaptor.items():
        for leaf in ("weight", "bias"):
            table.same(f"model.aligner.{theirs}.{leaf}", f"adaptor.{our}.{leaf}")
    lm.add_language(table, model.language, "model.language_model.", "")
    return table
