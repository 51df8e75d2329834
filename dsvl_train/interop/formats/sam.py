"""SAM-B of others: the original names (which the released DeepSeek checkpoint and we use) and transformers'."""

from __future__ import annotations

from typing import Any

from dsvl_train.config.schema import SamConfig
from dsvl_train.interop.blocks import Table
from dsvl_train.interop.formats.json_file import JsonConfig

OURS = "vision.sam."

PART_RANDOM = ("neck_hd.", "downsamples.", "hd_alpha_downsamples")
"""What DeepSeek-VL adds to SAM-B: no released SAM has it."""


def read_transformers(config: JsonConfig, interpolate_to: int) -> SamConfig:
    """A `sam_vision_model` configuration; absent keys have SamVisionConfig's defaults.

    transformers' DeepSeek-VL fixes the widths of the two convolutions at two and four times the neck's.
    """
    width = config.integer("hidden_size", 768)
    neck = config.integer("output_channels", 256)
    for key, value in (("hidden_act", "gelu"), ("qkv_bias", True), ("use_abs_pos", True), ("use_rel_pos", True), ("num_channels", 3)):
        config.require(key, value, value)
    ratio = config.number("mlp_ratio", 4.0)
    if config.values.get("mlp_dim") is not None:
        ratio = config.integer("mlp_dim") / width
    return SamConfig(
        image_size=config.integer("image_size", 1024),
        patch_size=config.integer("patch_size", 16),
        width=width,
        layers=config.integer("num_hidden_layers", 12),
        heads=config.integer("num_attention_heads", 12),
        mlp_ratio=ratio,
        window=config.integer("window_size", 14),
        global_layers=config.integers("global_attn_indexes", [2, 5, 8, 11]),
        neck_width=neck,
        interpolate_to=interpolate_to,
        downsample_widths=[2 * neck, 4 * neck],
        layer_norm_eps=config.number("layer_norm_eps", 1e-6),
    )


def write_transformers(sam: SamConfig) -> dict[str, Any]:
    """A `sam_vision_model` configuration, every value spelled out."""
    return {
        "model_type": "sam_vision_model",
        "hidden_size": sam.width,
        "output_channels": sam.neck_width,
        "num_hidden_layers": sam.layers,
        "num_attention_heads": sam.heads,
        "num_channels": 3,
        "image_size": sam.image_size,
        "patch_size": sam.patch_size,
        "hidden_act": "gelu",
        "layer_norm_eps": sam.layer_norm_eps,
        "attention_dropout": 0.0,
        "qkv_bias": True,
        "mlp_ratio": sam.mlp_ratio,
        "mlp_dim": int(sam.width * sam.mlp_ratio),
        "use_abs_pos": True,
        "use_rel_pos": True,
        "window_size": sam.window,
        "global_attn_indexes": list(sam.global_layers),
        "num_pos_feats": sam.neck_width // 2,
    }


def add_original(table: Table, prefix: str, *, only_sam: bool = False) -> None:
    """Relate the original names, which are ours behind a prefix; `only_sam` leaves out what DeepSeek-VL added."""
    for name in table.ours:
        if name.startswith(OURS) and not (only_sam and name.removeprefix(OURS).startswith(PART_RANDOM)):
            table.same(prefix + name.removeprefix(OURS), name)


def add_transformers(table: Table, sam: SamConfig, encoder: str) -> None:
    """Relate transformers' names of the vision encoder; q, k, v stay fused."""
    table.same(f"{encoder}pos_embed", f"{OURS}pos_embed")
    for leaf in ("weight", "bias"):
        table.same(f"{encoder}patch_embed.projection.{leaf}", f"{OURS}patch_embed.proj.{leaf}")
        for layer in range(sam.layers):
            theirs, ours = f"{encoder}layers.{layer}.", f"{OURS}blocks.{layer}."
            for theirs_part, ours_part in (("layer_norm1", "norm1"), ("layer_norm2", "norm2")):
                table.same(f"{theirs}{theirs_part}.{leaf}", f"{ours}{ours_part}.{leaf}")
            for part in ("attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2"):
                table.same(f"{theirs}{part}.{leaf}", f"{ours}{part}.{leaf}")
    for layer in range(sam.layers):
        for axis in "hw":
            name = f"attn.rel_pos_{axis}"
            table.same(f"{encoder}layers.{layer}.{name}", f"{OURS}blocks.{layer}.{name}")
    add_neck(table, f"{encoder}neck.", f"{OURS}neck.")


def add_neck(table: Table, theirs: str, ours: str) -> None:
    """Relate one neck: convolutions `0` and `2`, norms `1` and `3`."""
    table.same(f"{theirs}conv1.weight", f"{ours}0.weight")
    table.same(f"{theirs}conv2.weight", f"{ours}2.weight")
    for leaf in ("weight", "bias"):
        table.same(f"{theirs}layer_norm1.{leaf}", f"{ours}1.{leaf}")
        table.same(f"{theirs}layer_norm2.{leaf}", f"{ours}3.{leaf}")
