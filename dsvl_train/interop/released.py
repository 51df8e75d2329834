"""Opening model folders of others: which format is it, what model, where are its tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from dsvl_train.checkpoints.folders import STATE_FILE
from dsvl_train.config.compose import CONF_DIR, from_plain_model
from dsvl_train.config.schema import ModelConfig
from dsvl_train.interop.blocks import MappedSource, Shape, Table, TensorSource
from dsvl_train.interop.checks import check_tensors, differences
from dsvl_train.interop.formats import deepseek_vl2, multi_modality, transformers_vl
from dsvl_train.interop.formats.json_file import JsonConfig
from dsvl_train.interop.shapes import logical_shapes
from dsvl_train.interop.sources import open_weights


@dataclass(frozen=True)
class Format:
    """A way to store a whole model."""

    read: Callable[[JsonConfig, Collection[str]], ModelConfig]
    """config.json and the names of the stored tensors -> the model."""
    relate: Callable[[ModelConfig, dict[str, Shape], Collection[str]], Table]
    """The model, the shapes of our tensors, the names of the stored ones -> how both belong together."""


FORMATS: dict[str, Format] = {
    multi_modality.MODEL_TYPE: Format(multi_modality.read, multi_modality.relate),
    deepseek_vl2.MODEL_TYPE: Format(deepseek_vl2.read, deepseek_vl2.relate),
    transformers_vl.SINGLE: Format(transformers_vl.read, transformers_vl.relate),
    transformers_vl.HYBRID: Format(transformers_vl.read, transformers_vl.relate),
}
"""`model_type` of a config.json -> its format."""


_PARTS = {
    **dict.fromkeys(("llama", "deepseek_v2", "deepseek_v3"), "init.language"),
    **dict.fromkeys(("siglip", "siglip_vision_model"), "init.vision"),
    **dict.fromkeys(("sam", "sam_vision_model"), "init.sam"),
}
"""`model_type` of a part of a model -> the setting that takes it."""


def is_released(folder: str | Path) -> bool:
    """Whether a folder holds a whole model in a format of others."""
    path = Path(folder) / "config.json"
    return path.is_file() and JsonConfig.read(path).values.get("model_type") in list(FORMATS)


def looks_foreign(folder: str | Path) -> bool:
    """Whether a folder is meant to be a model of others, known or not: it has a config.json and is no checkpoint of ours."""
    return (Path(folder) / "config.json").is_file() and not (Path(folder) / STATE_FILE).is_file()


def open_released(folder: str | Path) -> tuple[ModelConfig, TensorSource]:
    """The model of a folder and its weights as our logical tensors, checked and not yet read.

    Raises:
        ValueError: the format is unknown, the configuration says something that is not implemented, a file is broken, or a tensor is
            missing, unexpected or of a wrong shape; names it.
    """
    folder = Path(folder)
    config, fmt = _recognise(folder)
    source = open_weights(folder)
    model = fmt.read(config, source.infos().keys())
    model.name = known_name(model) or model.name
    table = fmt.relate(model, logical_shapes(model), source.infos().keys())
    check_tensors(source, table.foreign)
    return model, MappedSource(source, table.to_ours(), table.ours)


def read_model(folder: str | Path) -> ModelConfig:
    """The model of a folder, without its weights (parts that are stored and never used are not told)."""
    config, fmt = _recognise(Path(folder))
    model = fmt.read(config, ())
    model.name = known_name(model) or model.name
    return model


def _recognise(folder: Path) -> tuple[JsonConfig, Format]:
    config = JsonConfig.read(folder / "config.json")
    model_type = config.values.get("model_type")
    if model_type in list(_PARTS):
        setting = _PARTS[model_type]
        raise config.error("model_type", f"a part, not a whole vision-language model; start a run from it with {setting}={folder}")
    if not isinstance(model_type, str) or model_type not in FORMATS:
        raise config.error("model_type", f"not a whole vision-language model that is known; known are {', '.join(FORMATS)}")
    return config, FORMATS[model_type]


def known_name(model: ModelConfig) -> str | None:
    """The name under which `conf/model` has this very model."""
    for candidate in _configured_models():
        if not differences(candidate, model):
            return candidate.name
    return None


@cache
def _configured_models() -> list[ModelConfig]:
    return [from_plain_model(yaml.safe_load(path.read_text(encoding="utf-8"))) for path in sorted((CONF_DIR / "model").glob("*.yaml"))]
