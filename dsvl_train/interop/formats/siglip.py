"""SigLIP of others: timm's names (which the released DeepSeek checkpoints and we use) and transformers'."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dsvl_train.config.schema import SiglipConfig
from dsvl_train.interop.blocks import Table
from dsvl_train.interop.formats.json_file import JsonConfig

OURS = "vision.siglip."

REGISTRY = {
    "siglip_large_patch16_384": {"image_size": 384, "patch_size": 16, "width": 1024, "layers": 24, "heads": 16, "mlp_ratio": 4.0},
    "siglip_so400m_patch14_384": {"image_size": 384, "patch_size": 14, "width": 1152, "layers": 27, "heads": 16, "mlp_ratio": 3.7362},
    "siglip_so400m_patch14_224": {"image_size": 224, "patch_size": 14, "width": 1152, "layers": 27, "heads": 16, "mlp_ratio": 3.7362},
}
"""What the released code knows by name (model_name of a vision configuration)."""

_BLOCK = {"layer_norm1": "norm1", "layer_norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
_HEAD = {"attention.out_proj": "proj", "layernorm": "norm", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
"""transformers' name -> timm's, of what is stored alike in a block and in the pooling head."""

_GELUS = {"gelu": "erf", "gelu_pytorch_tanh": "tanh"}


def read_transformers(config: JsonConfig, names: Iterable[str] = ()) -> SiglipConfig:
    """A `siglip_vision_model` configuration; absent keys have SiglipVisionConfig's defaults. `names` tell whether a head is stored."""
    act = config.require("hidden_act", "gelu_pytorch_tanh", *_GELUS)
    width = config.integer("hidden_size", 768)
    hidden = config.integer("intermediate_size", 3072)
    config.require("num_channels", 3, 3)
    return SiglipConfig(
        image_size=config.integer("image_size", 224),
        patch_size=config.integer("patch_size", 16),
        width=width,
        layers=config.integer("num_hidden_layers", 12),
        heads=config.integer("num_attention_heads", 12),
        mlp_ratio=_ratio(width, hidden),
        gelu=_GELUS[act],  # type: ignore[arg-type]
        layer_norm_eps=config.number("layer_norm_eps", 1e-6),
        attention_pool=any(name.endswith("head.probe") for name in names),
    )


def _ratio(width: int, hidden: int) -> float:
    """The ratio that int(width * ratio) turns into `hidden` again; the released one where it is 4304 / 1152."""
    if (width, hidden) == (1152, 4304):
        return 3.7362
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def write_transformers(siglip: SiglipConfig) -> dict[str, Any]:
    """A `siglip_vision_model` configuration, every value spelled out."""
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": siglip.width,
        "intermediate_size": siglip.mlp_width,
        "num_hidden_layers": siglip.layers,
        "num_attention_heads": siglip.heads,
        "num_channels": 3,
        "image_size": siglip.image_size,
        "patch_size": siglip.patch_size,
        "hidden_act": "gelu" if siglip.gelu == "erf" else "gelu_pytorch_tanh",
        "layer_norm_eps": siglip.layer_norm_eps,
        "attention_dropout": 0.0,
        "vision_use_head": siglip.attention_pool,
    }


def add_timm(table: Table, prefix: str) -> None:
    """Relate timm's names, which are ours behind a prefix."""
    for name in table.ours:
        if name.startswith(OURS):
            table.same(prefix + name.removeprefix(OURS), name)


def add_transformers(table: Table, siglip: SiglipConfig, prefix: str, head: bool) -> None:
    """Relate transformers' names: q, k, v apart, positions as an embedding table, and the head's q, k, v as one where it is stored."""
    width = siglip.width
    table.same(f"{prefix}embeddings.position_embedding.weight", f"{OURS}pos_embed", (siglip.tokens, width))
    for leaf in ("weight", "bias"):
        table.same(f"{prefix}embeddings.patch_embedding.{leaf}", f"{OURS}patch_embed.proj.{leaf}")
        for layer in range(siglip.layers):
            theirs, ours = f"{prefix}encoder.layers.{layer}.", f"{OURS}blocks.{layer}."
            _split(table, [f"{theirs}self_attn.{part}_proj.{leaf}" for part in "qkv"], f"{ours}attn.qkv.{leaf}", width)
            table.same(f"{theirs}self_attn.out_proj.{leaf}", f"{ours}attn.proj.{leaf}")
            for theirs_part, ours_part in _BLOCK.items():
                table.same(f"{theirs}{theirs_part}.{leaf}", f"{ours}{ours_part}.{leaf}")
        table.same(f"{prefix}post_layernorm.{leaf}", f"{OURS}norm.{leaf}")
    if head and siglip.attention_pool:
        _add_head(table, width, f"{prefix}head.", f"{OURS}attn_pool.")


def _add_head(table: Table, width: int, theirs: str, ours: str) -> None:
    table.same(f"{theirs}probe", f"{ours}latent")
    for leaf in ("weight", "bias"):
        tail = (width,) if leaf == "weight" else ()
        pieces = [
            (f"{ours}q.{leaf}", _at(0, tail), _at(0, tail), (width, *tail)),
            (f"{ours}kv.{leaf}", _at(0, tail), _at(width, tail), (2 * width, *tail)),
        ]
        table.rows(f"{theirs}attention.in_proj_{leaf}", (3 * width, *tail), pieces)
        for theirs_part, ours_part in _HEAD.items():
            table.same(f"{theirs}{theirs_part}.{leaf}", f"{ours}{ours_part}.{leaf}")


def _split(table: Table, theirs: list[str], ours: str, rows: int) -> None:
    """Several foreign tensors of `rows` rows each, stacked in ours."""
    tail = table.ours[ours][1:]
    for index, name in enumerate(theirs):
        table.rows(name, (rows, *tail), [(ours, _at(index * rows, tail), _at(0, tail), (rows, *tail))])


def _at(row: int, tail: tuple[int, ...]) -> tuple[int, ...]:
    return (row, *(0 for _ in tail))
