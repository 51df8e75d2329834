"""DeepSeek-VL as released (`multi_modality`): configuration and tensor names of the 1.3B and the 7B.

The released files name their encoders (`siglip_large_patch16_384`, `sam_b_downsample`) instead of describing them. Models of other sizes
have the description beside the name, in keys of the released registries; a name alone must be a known one.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from dsvl_train.config.schema import AdaptorConfig, ModelConfig, SamConfig, SiglipConfig, VisionConfig
from dsvl_train.interop.blocks import Shape, Table
from dsvl_train.interop.formats import language as lm
from dsvl_train.interop.formats import sam as sam_format
from dsvl_train.interop.formats import siglip as siglip_format
from dsvl_train.interop.formats.json_file import JsonConfig

MODEL_TYPE = "multi_modality"
CUSTOM = "custom"
"""model_name of an encoder that the released code has no name for."""

STORED_LAYER_NORMS = ("high_layer_norm", "low_layer_norm")


def read(config: JsonConfig, names: Collection[str]) -> ModelConfig:
    """The model that a released `config.json` describes."""
    language = lm.read_llama(config.section("language_config"))
    vision_config, aligner = config.section("vision_config"), config.section("aligner_config")
    aligner.require("cls", "MlpProjector", "MlpProjector")
    tower = vision_config.require("cls", None, "CLIPVisionTower", "HybridVisionTower")
    params, projector = vision_config.section("params"), aligner.section("params")
    pool = any(".attn_pool." in name for name in names)
    if tower == "CLIPVisionTower":
        vision = VisionConfig(_read_siglip(params, pool))
        kind = projector.require("projector_type", None, "mlp_gelu")
    else:
        params.require("concat_type", "tuple", "tuple")
        siglip, sam = _read_siglip(params.section("low_res_cfg"), pool), _read_sam(params.section("high_res_cfg"))
        vision = VisionConfig(siglip, sam, stored_layer_norms=any("high_layer_norm" in name for name in names))
        kind = projector.require("projector_type", None, "low_high_hybrid_split_mlp_gelu")
    projector.require("input_dim", None, vision.siglip.width)
    projector.require("n_embed", None, language.hidden_size)
    adaptor = AdaptorConfig("mlp" if kind == "mlp_gelu" else "hybrid", depth=projector.integer("depth", 1))
    return ModelConfig("deepseek_vl", "vl", vision, adaptor, language)


def _read_siglip(params: JsonConfig, pool: bool) -> SiglipConfig:
    geometry = _geometry(params, siglip_format.REGISTRY)
    params.require("select_layer", -2, -1)
    params.require("select_feature", "patch", "same")
    return SiglipConfig(
        image_size=params.integer("image_size"),
        patch_size=geometry["patch_size"],
        width=geometry["width"],
        layers=geometry["layers"],
        heads=geometry["heads"],
        mlp_ratio=geometry["mlp_ratio"],
        gelu="erf",
        pixel_mean=params.numbers("pixel_mean", [0.0] * 3),  # no mean: the released tower does not normalise
        pixel_std=params.numbers("pixel_std", [1.0] * 3),
        attention_pool=pool,
    )


_SAM_REGISTRY: dict[str, dict[str, Any]] = {
    "sam_b_downsample": {
        "patch_size": 16,
        "width": 768,
        "layers": 12,
        "heads": 12,
        "mlp_ratio": 4.0,
        "window_size": 14,
        "global_attn_indexes": [2, 5, 8, 11],
        "neck_width": 256,
        "interpolate_to": 96,
        "downsample_channels": [512, 1024],
    }
}


def _read_sam(params: JsonConfig) -> SamConfig:
    geometry = _geometry(params, _SAM_REGISTRY)
    params.require("select_layer", -1, -1)
    params.require("select_feature", "same", "same")
    return SamConfig(
        image_size=params.integer("image_size"),
        patch_size=geometry["patch_size"],
        width=geometry["width"],
        layers=geometry["layers"],
        heads=geometry["heads"],
        mlp_ratio=geometry["mlp_ratio"],
        window=geometry["window_size"],
        global_layers=list(geometry["global_attn_indexes"]),
        neck_width=geometry["neck_width"],
        interpolate_to=geometry["interpolate_to"],
        downsample_widths=list(geometry["downsample_channels"]),
        pixel_mean=params.numbers("pixel_mean", [0.0] * 3),
        pixel_std=params.numbers("pixel_std", [1.0] * 3),
    )


def _geometry(params: JsonConfig, registry: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The sizes of an encoder: those of its name in the registry, replaced by keys beside it."""
    name = params.text("model_name", next(iter(registry)))
    known = registry.get(name)
    if known is None and name != CUSTOM:
        raise params.error("model_name", f"unknown encoder; known are {', '.join(registry)}, or {CUSTOM} with its sizes beside it")
    keys = next(iter(registry.values()))
    sizes: dict[str, Any] = {}
    for key, example in keys.items():
        if key == "image_size":
            continue
        default = {} if known is None else {"default": known[key]}
        if isinstance(example, list):
            sizes[key] = params.integers(key, **default)
        elif isinstance(example, float):
            sizes[key] = params.number(key, **default)
        else:
            sizes[key] = params.integer(key, **default)
    return sizes


def write(model: ModelConfig, *, dtype: str) -> dict[str, Any]:
    """`config.json` of a model.

    Raises:
        ValueError: the released code has no such model (family, adaptor, activation).
    """
    vision, adaptor, hidden = model.vision, model.adaptor, model.language.hidden_size
    if model.family != "vl" or adaptor.kind not in ("mlp", "hybrid") or adaptor.concat != "embedding":
        raise ValueError(
            f"model {model.name!r} (family {model.family}, adaptor {adaptor.kind}/{adaptor.concat}) has no place in multi_modality, which "
            "holds vl models with the adaptors mlp and hybrid, concatenated along the embedding"
        )
    if vision.siglip.gelu != "erf" or vision.siglip.layer_norm_eps != 1e-6 or (vision.sam and vision.sam.layer_norm_eps != 1e-6):
        raise ValueError("the released DeepSeek-VL code has model.vision.siglip.gelu=erf and layer_norm_eps=1e-6; this model has others")
    siglip = _write_siglip(vision.siglip)
    params = siglip
    if vision.sam is not None:
        low = siglip | {"ckpt_path": "", "output_dim": vision.siglip.width}
        params = {
            "concat_type": "tuple",
            "freeze_high": True,
            "freeze_low": True,
            "high_res_cfg": _write_sam(vision.sam),
            "low_res_cfg": low,
        }
    return {
        "architectures": ["MultiModalityCausalLM"],
        "model_type": MODEL_TYPE,
        "torch_dtype": dtype,
        "aligner_config": {
            "cls": "MlpProjector",
            "model_type": "aligner",
            "params": {
                "depth": adaptor.depth,
                "input_dim": vision.siglip.width,
                "n_embed": hidden,
                "projector_type": "mlp_gelu" if adaptor.kind == "mlp" else "low_high_hybrid_split_mlp_gelu",
            },
        },
        "language_config": lm.write_llama(model.language) | {"torch_dtype": dtype},
        "vision_config": {
            "cls": "CLIPVisionTower" if vision.sam is None else "HybridVisionTower",
            "model_type": "vision",
            "params": params,
        },
    }


def _write_siglip(siglip: SiglipConfig) -> dict[str, Any]:
    sizes = {key: getattr(siglip, key) for key in ("patch_size", "width", "layers", "heads", "mlp_ratio")}
    return {
        **_named(sizes, siglip_format.REGISTRY),
        "image_size": siglip.image_size,
        "pixel_mean": siglip.pixel_mean,
        "pixel_std": siglip.pixel_std,
        "select_feature": "same",
        "select_layer": -1,
    }


def _write_sam(sam: SamConfig) -> dict[str, Any]:
    sizes = {key: getattr(sam, key) for key in ("patch_size", "width", "layers", "heads", "mlp_ratio", "neck_width", "interpolate_to")}
    sizes |= {"window_size": sam.window, "global_attn_indexes": sam.global_layers, "downsample_channels": sam.downsample_widths}
    return {
        **_named(sizes, _SAM_REGISTRY),
        "ckpt_path": "",
        "image_size": sam.image_size,
        "output_dim": sam.downsample_widths[-1],
        "pixel_mean": sam.pixel_mean,
        "pixel_std": sam.pixel_std,
        "select_feature": "same",
        "select_layer": -1,
    }


def _named(sizes: dict[str, Any], registry: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Sizes by their released name, or spelled out."""
    for name, known in registry.items():
        if all(known[key] == value for key, value in sizes.items()):
            return {"model_name": name}
    return {"model_name": CUSTOM} | sizes


def relate(model: ModelConfig, ours: dict[str, Shape], names: Collection[str] = ()) -> Table:
    """The released names of a model."""
    table = Table(ours)
    if model.vision.sam is None:
        siglip_format.add_timm(table, "vision_model.vision_tower.")
    else:
        siglip_format.add_timm(table, "vision_model.vision_tower_low.vision_tower.")
        sam_format.add_original(table, "vision_model.vision_tower_high.vision_tower.")
        if model.vision.stored_layer_norms:
            for norm in STORED_LAYER_NORMS:
                for leaf in ("weight", "bias"):
                    table.same(f"vision_model.{norm}.{leaf}", f"vision.{norm}.{leaf}")
    for name in ours:
        if name.startswith("adaptor."):
            table.same("aligner." + name.removeprefix("adaptor."), name)
    lm.add_language(table, model.language, "language_model.model.", "language_model.")
    return table
