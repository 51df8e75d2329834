"""DeepSeek-VL2 as released (`deepseek_vl_v2`): configuration and tensor names."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from dsvl_train.config.geometry import candidate_resolutions
from dsvl_train.config.schema import AdaptorConfig, ModelConfig, SiglipConfig, VisionConfig
from dsvl_train.interop.blocks import Shape, Table
from dsvl_train.interop.formats import language as lm
from dsvl_train.interop.formats import siglip as siglip_format
from dsvl_train.interop.formats.json_file import JsonConfig

MODEL_TYPE = "deepseek_vl_v2"
DEFAULT_PIXELS = [0.5, 0.5, 0.5]
"""Mean and standard deviation of the pixels where no processor_config.json says them."""


def read(config: JsonConfig, names: Collection[str]) -> ModelConfig:
    """The model that a released `config.json` describes, absent keys taking the released classes' defaults.

    Pixel statistics come from the processor's file beside it.
    """
    config.require("tile_tag", "2D", "2D")
    config.require("global_view_pos", "head", "head")
    language = lm.read_deepseek_moe(config.section("language_config"))
    siglip = _read_vision(config.section("vision_config"), any(name.startswith("vision.attn_pool.") for name in names))
    pixels = read_processor(config.path.parent)
    siglip.pixel_mean, siglip.pixel_std = (pixels.numbers(key, DEFAULT_PIXELS) for key in ("image_mean", "image_std"))
    adaptor = _read_projector(config.section("projector_config"), siglip.width, language.hidden_size)
    return ModelConfig("deepseek_vl2", "vl2", VisionConfig(siglip), adaptor, language)


def read_processor(folder: Path) -> JsonConfig:
    """processor_config.json, the only file of this format that has the pixel statistics; nothing where it is absent."""
    file = folder / "processor_config.json"
    return JsonConfig.read(file) if file.is_file() else JsonConfig(file, {})


def _read_vision(config: JsonConfig, attention_pool: bool) -> SiglipConfig:
    for key, value in (("class_token", False), ("num_classes", 0), ("global_pool", "map"), ("ignore_head", True)):
        config.require(key, value, value)
    return SiglipConfig(
        image_size=config.integer("image_size", 384),
        patch_size=config.integer("patch_size", 16),
        width=config.integer("width", 1024),
        layers=config.integer("layers", 24),
        heads=config.integer("heads", 16),
        mlp_ratio=config.number("mlp_ratio", 4.0),
        gelu="tanh",
        attention_pool=attention_pool,
    )


def _read_projector(config: JsonConfig, width: int, hidden: int) -> AdaptorConfig:
    config.require("projector_type", "downsample_mlp_gelu", "downsample_mlp_gelu")
    config.require("input_dim", 1152, width)
    config.require("n_embed", 2048, hidden)
    config.require("mlp_ratio", 1, 1)
    config.require("token_pooling", False, False)
    return AdaptorConfig(
        kind="pixel_shuffle", depth=config.integer("depth", 2, least=2), downsample_ratio=config.integer("downsample_ratio", 2)
    )


def write(
    model: ModelConfig, *, bos_id: int, eos_id: int, dtype: str, aux_loss_alpha: float, candidates: list[Any] | None
) -> dict[str, Any]:
    """`config.json` of a model.

    Args:
        candidates: tile canvases (width, height) in order of preference; None = all of up to nine tiles.

    Raises:
        ValueError: the model is not of this family.
    """
    siglip = model.vision.siglip
    if model.family != "vl2" or model.adaptor.kind != "pixel_shuffle" or model.vision.sam is not None:
        raise ValueError(f"model {model.name!r} is of the {model.family} family; deepseek_vl_v2 holds models of the vl2 family")
    if siglip.gelu != "tanh" or siglip.layer_norm_eps != 1e-6:
        raise ValueError("the released DeepSeek-VL2 code has model.vision.siglip.gelu=tanh and layer_norm_eps=1e-6; this model has others")
    names = {(known["width"], known["patch_size"], known["image_size"]): name for name, known in siglip_format.REGISTRY.items()}
    return {
        "architectures": ["DeepseekVLV2ForCausalLM"],
        "model_type": MODEL_TYPE,
        "torch_dtype": dtype,
        "tile_tag": "2D",
        "global_view_pos": "head",
        "candidate_resolutions": candidates or [list(pair) for pair in candidate_resolutions(siglip.image_size, 9)],
        "vision_config": {
            "model_type": "vision",
            "model_name": names.get((siglip.width, siglip.patch_size, siglip.image_size), "siglip_custom"),
            "image_size": siglip.image_size,
            "patch_size": siglip.patch_size,
            "width": siglip.width,
            "layers": siglip.layers,
            "heads": siglip.heads,
            "mlp_ratio": siglip.mlp_ratio,
        },
        "projector_config": {
            "model_type": "mlp_projector",
            "projector_type": "downsample_mlp_gelu",
            "input_dim": siglip.width,
            "n_embed": model.language.hidden_size,
            "depth": model.adaptor.depth,
            "mlp_ratio": 1,
            "downsample_ratio": model.adaptor.downsample_ratio,
        },
        "language_config": lm.write_deepseek_moe(model.language, bos_id, eos_id, aux_loss_alpha) | {"torch_dtype": dtype},
    }


def relate(model: ModelConfig, ours: dict[str, Shape], names: Collection[str] = ()) -> Table:
    """The released names of a model; `names` are those of a checkpoint, where there is one."""
    table = Table(ours)
    siglip_format.add_timm(table, "vision.")
    for name in ours:
        if name.startswith("adaptor.layers."):
            table.same("projector." + name.removeprefix("adaptor."), name)
    for name in ("image_newline", "view_seperator"):  # the released spelling
        table.same(name, f"adaptor.{name}")
    lm.add_language(table, model.language, "language.model.", "language.", lm.stacks_experts(names))
    return table
