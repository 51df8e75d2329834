"""A new model from parts: somebody's language model, somebody's SigLIP, somebody's SAM.

What no part fills stays as it was drawn at random, and only tensors that the recipe expects to be random may.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from torch import Tensor

from dsvl_train.config.schema import InitConfig, LanguageConfig, ModelConfig, SamConfig, SiglipConfig
from dsvl_train.interop.blocks import MappedSource, Shape, Table, TensorInfo, TensorSource
from dsvl_train.interop.checks import NOT_WEIGHTS, check_tensors, some
from dsvl_train.interop.formats import language as lm
from dsvl_train.interop.formats import sam as sam_format
from dsvl_train.interop.formats import siglip as siglip_format
from dsvl_train.interop.formats.json_file import JsonConfig
from dsvl_train.interop.loading import load_source
from dsvl_train.interop.released import is_released, open_released
from dsvl_train.interop.shapes import language_shapes, logical_shapes
from dsvl_train.interop.sources import open_weights
from dsvl_train.models.vlm import VisionLanguageModel

log = logging.getLogger(__name__)


def has_parts(init: InitConfig) -> bool:
    """Whether a run starts from parts."""
    return any((init.language, init.vision, init.sam))


def load_parts(init: InitConfig, model: VisionLanguageModel, config: ModelConfig) -> list[str]:
    """Load the given parts into a model that was initialised at random; every rank calls and reads its own boxes.

    Returns the logical tensors (of the whole model) that stay random.

    Raises:
        ValueError: a part is unknown or broken, does not fit the model (names the setting or the tensor), or a tensor stays random that
            `init.expect_random` does not name. Nothing is loaded then.
    """
    if init.source is not None:
        raise ValueError(f"init.from={init.source} gives all weights, so init.language, init.vision and init.sam must be null")
    parts = open_parts(init, config)
    filled = {name for part in parts for name in part.infos()}
    random = [name for name in logical_shapes(config) if name not in filled]
    unexpected = [name for name in random if not any(fnmatchcase(name, pattern) for pattern in init.expect_random)]
    if unexpected:
        raise ValueError(
            f"no part fills {len(unexpected)} tensor(s): {some(unexpected)}. Give the part that has them (init.language, init.vision, "
            f"init.sam), or add a glob to init.expect_random (now {init.expect_random}) to leave them at random"
        )
    for part in parts:
        load_source(part, model)
    return random


def open_parts(init: InitConfig, config: ModelConfig) -> list[TensorSource]:
    """The given parts as our logical tensors, checked against the model and not yet read."""
    parts: list[TensorSource] = []
    if init.language is not None:
        parts.append(open_language(Path(init.language), config.language))
    if init.vision is not None:
        parts.append(open_siglip(Path(init.vision), config.vision.siglip))
    if init.sam is not None:
        if config.vision.sam is None:
            raise ValueError(f"init.sam={init.sam}, but model.vision.sam is null: this model has no SAM")
        parts.append(open_sam(Path(init.sam), config.vision.sam))
    return parts


class PartOf:
    """Some tensors of a source."""

    def __init__(self, source: TensorSource, keep: Callable[[str], bool]) -> None:
        self.where = source.where
        self._source = source
        self._infos = {name: info for name, info in source.infos().items() if keep(name)}

    def infos(self) -> Mapping[str, TensorInfo]:
        """The tensors kept."""
        return self._infos

    def read(self, name: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        """The region of `size` that begins at `start`."""
        return self._source.read(name, start, size)


# -------------------------------------------------------------------------------------------------------------- language model


def open_language(folder: Path, language: LanguageConfig) -> TensorSource:
    """A `llama`, `deepseek_v2` or `deepseek_v3` folder, or the language model of a whole DeepSeek-VL or VL2.

    Raises:
        ValueError: it is of another kind or other sizes than `language`.
    """
    if is_released(folder):
        stored, source = open_released(folder)
        _require_same_language(language, stored.language, folder)
        return PartOf(source, lambda name: name.startswith("language."))
    config = JsonConfig.read(folder / "config.json")
    kind = config.require("model_type", None, "llama", "deepseek_v2", "deepseek_v3")
    defaults = {"deepseek_v2": lm.V2, "deepseek_v3": lm.V3}
    found = lm.read_deepseek_moe(config, defaults[kind]) if kind in defaults else lm.read_llama(config)
    _require_same_language(language, found, folder)
    opened = open_weights(folder)
    # layers beyond the last are deepseek_v3's heads for predicting several tokens, which no model here has
    beyond = [f"model.layers.{language.layers + extra}." for extra in range(int(config.values.get("num_nextn_predict_layers", 0) or 0))]
    weights = PartOf(opened, lambda name: not name.startswith(tuple(beyond)))
    table = Table(language_shapes(language))
    body = "model." if "model.embed_tokens.weight" in weights.infos() else ""
    lm.add_language(table, language, body, "", lm.stacks_experts(weights.infos()))
    check_tensors(weights, table.foreign)
    return MappedSource(weights, table.to_ours(), table.ours)


def _require_same_language(wanted: LanguageConfig, found: LanguageConfig, folder: Path) -> None:
    ours, theirs = (_essence(language) for language in (wanted, found))
    differing = [f"model.language.{key} is {ours[key]!r}, there it is {theirs[key]!r}" for key in ours if ours[key] != theirs[key]]
    if differing:
        raise ValueError(f"init.language={folder} is another language model than the run's: {'; '.join(differing)}")


def _essence(language: LanguageConfig) -> dict[str, object]:
    values = dataclasses.asdict(language)
    values["kv_heads"] = None if language.mla is not None else language.kv_heads or language.heads
    if language.moe is not None and language.moe.dense_layers == 0:
        del values["ffn_width"]  # no layer is dense
    return {key: value for key, value in values.items() if key not in ("max_positions", "init_std")}


# ------------------------------------------------------------------------------------------------------------- vision encoders


def open_siglip(path: Path, siglip: SiglipConfig) -> TensorSource:
    """A SigLIP in transformers' or timm's names, or that of a whole DeepSeek-VL or VL2; a text tower beside it is left out.

    Raises:
        ValueError: no SigLIP, or of other sizes than `siglip`.
    """
    if path.is_dir() and is_released(path):
        stored, source = open_released(path)
        _require_same_encoder(siglip, stored.vision.siglip, path, "vision", ("heads", "gelu", "layer_norm_eps"))
        return _fitting(PartOf(source, lambda name: name.startswith(siglip_format.OURS)), _shapes(siglip), path, "siglip")
    weights = open_weights(path)
    ours = _shapes(siglip)
    table = Table(ours)
    prefix = _prefix(weights, "embeddings.patch_embedding.weight", not_under="text_model.")
    if prefix is not None:
        _check_transformers_siglip(path, siglip, weights)
        head = f"{prefix}head.probe" in weights.infos()
        siglip_format.add_transformers(table, siglip, prefix, head=head)
    else:
        prefix = _prefix(weights, "patch_embed.proj.weight")
        if prefix is None:
            rule = "it has neither …embeddings.patch_embedding.weight nor …patch_embed.proj.weight"
            raise ValueError(f"init.vision={path} is no SigLIP: {rule}")
        head = f"{prefix}attn_pool.latent" in weights.infos()
        siglip_format.add_timm(table, prefix)
    if not head:
        _forget(table, ".attn_pool.")
    _check_part(weights, table, prefix, optional=("head.", "attn_pool.") if not siglip.attention_pool else ())
    return MappedSource(weights, table.to_ours(), table.ours)


def _check_transformers_siglip(path: Path, siglip: SiglipConfig, weights: TensorSource) -> None:
    folder = path if path.is_dir() else path.parent
    config = JsonConfig.read(folder / "config.json")
    kind = config.require("model_type", None, "siglip", "siglip_vision_model")
    found = siglip_format.read_transformers(config.section("vision_config") if kind == "siglip" else config, weights.infos())
    _require_same_encoder(siglip, found, path, "vision", ("image_size", "patch_size", "width", "layers", "heads", "layer_norm_eps"))
    if found.gelu != siglip.gelu:
        log.warning("init.vision=%s was trained with the %s GELU, model.vision.siglip.gelu is %s", path, found.gelu, siglip.gelu)


def open_sam(path: Path, sam: SamConfig) -> TensorSource:
    """A SAM in transformers' or the original names, or that of a whole DeepSeek-VL 7B; prompt encoder and mask decoder are left out.

    Raises:
        ValueError: no SAM, or of other sizes than `sam`.
    """
    if path.is_dir() and is_released(path):
        stored, source = open_released(path)
        if stored.vision.sam is None:
            raise ValueError(f"init.sam={path} has no SAM")
        _require_same_encoder(sam, stored.vision.sam, path, "sam", ("heads", "window", "global_layers", "layer_norm_eps", "interpolate_to"))
        return _fitting(PartOf(source, lambda name: name.startswith(sam_format.OURS)), _sam_shapes(sam), path, "sam")
    weights = open_weights(path)
    table = Table(_sam_shapes(sam))
    prefix = _prefix(weights, "patch_embed.projection.weight")
    if prefix is not None:
        folder = path if path.is_dir() else path.parent
        config = JsonConfig.read(folder / "config.json")
        kind = config.require("model_type", None, "sam", "sam_vision_model")
        found = sam_format.read_transformers(config.section("vision_config") if kind == "sam" else config, sam.interpolate_to)
        sizes = ("image_size", "patch_size", "width", "layers", "heads", "window", "global_layers", "neck_width", "layer_norm_eps")
        _require_same_encoder(sam, found, path, "sam", sizes)
        sam_format.add_transformers(table, sam, prefix)
    else:
        prefix = _prefix(weights, "patch_embed.proj.weight")
        if prefix is None:
            raise ValueError(f"init.sam={path} is no SAM: it has neither …patch_embed.projection.weight nor …patch_embed.proj.weight")
        sam_format.add_original(table, prefix, only_sam=True)
    _check_part(weights, table, prefix, optional=())
    return MappedSource(weights, table.to_ours(), table.ours)


def _shapes(siglip: SiglipConfig) -> dict[str, Shape]:
    import torch

    from dsvl_train.models.siglip import SiglipEncoder

    with torch.device("meta"):
        return {f"{siglip_format.OURS}{name}": tuple(t.shape) for name, t in SiglipEncoder(siglip).state_dict().items()}


def _sam_shapes(sam: SamConfig) -> dict[str, Shape]:
    import torch

    from dsvl_train.models.sam_vitdet import SamEncoder

    with torch.device("meta"):
        return {f"{sam_format.OURS}{name}": tuple(t.shape) for name, t in SamEncoder(sam).state_dict().items()}


def _prefix(weights: TensorSource, ending: str, not_under: str | None = None) -> str | None:
    """What stands before `ending` in the only tensor name that ends so."""
    found = [name.removesuffix(ending) for name in weights.infos() if name == ending or name.endswith(f".{ending}")]
    return next((prefix for prefix in found if not (not_under and not_under in prefix)), None)


def _forget(table: Table, infix: str) -> None:
    """Take tensors that the source does not store out of a table."""
    gone = {block.foreign for block in table.blocks if infix in block.ours}
    table.blocks = [block for block in table.blocks if block.foreign not in gone]
    for name in gone:
        del table.foreign[name]


def _check_part(weights: TensorSource, table: Table, prefix: str, optional: tuple[str, ...]) -> None:
    """Everything under the prefix fits the table; what lies elsewhere, or is optional, is another model's."""
    others = tuple(prefix + name for name in (*optional, "text_model.", "logit_scale", "logit_bias"))

    def mine(name: str) -> bool:
        if name in table.foreign:
            return True
        under = name.startswith(prefix) and not name.startswith(others)
        return under and not any(fnmatchcase(name, pattern) for pattern in NOT_WEIGHTS)

    for name, shape in table.foreign.items():
        stored = weights.infos().get(name)
        if stored is not None and stored.shape != shape and "pos" in name:
            raise ValueError(
                f"{weights.where}: the position embedding {name} has the shape {list(stored.shape)}, the model's image_size and patch_size "
                f"ask for {list(shape)}; positions are not interpolated, so make them agree"
            )
    check_tensors(PartOf(weights, mine), table.foreign)


def _require_same_encoder(wanted: object, found: object, path: Path, part: str, keys: tuple[str, ...]) -> None:
    setting = "siglip" if part == "vision" else "sam"
    differing = [
        f"model.vision.{setting}.{key} is {getattr(wanted, key)!r}, there it is {getattr(found, key)!r}"
        for key in keys
        if getattr(wanted, key) != getattr(found, key)
    ]
    if differing:
        raise ValueError(f"init.{part}={path} is another encoder than the run's: {'; '.join(differing)}")


def _fitting(part: TensorSource, shapes: Mapping[str, Shape], path: Path, setting: str) -> TensorSource:
    """The tensors of a part that the model has, all of the model's shapes."""
    fitting = PartOf(part, lambda name: name in shapes)
    for name, info in fitting.infos().items():
        if info.shape != shapes[name]:
            raise ValueError(f"{path}: {name} has the shape {list(info.shape)}, model.vision.{setting} asks for {list(shapes[name])}")
    return fitting
