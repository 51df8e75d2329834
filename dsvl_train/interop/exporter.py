"""`dsvl export`: a checkpoint of ours becomes a model folder that others load, tensor by tensor."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch

from dsvl_train.checkpoints.folders import CONFIG_FILE, PROCESSOR_FOLDER, resolve
from dsvl_train.config.compose import load_run_config
from dsvl_train.config.schema import ModelConfig
from dsvl_train.interop import processors
from dsvl_train.interop.blocks import MappedSource, Shape, Table, TensorSource
from dsvl_train.interop.checks import check_tensors, some
from dsvl_train.interop.formats import deepseek_vl2, multi_modality, transformers_vl
from dsvl_train.interop.formats.json_file import JsonConfig
from dsvl_train.interop.native_source import open_native
from dsvl_train.interop.processors import TokenIds
from dsvl_train.interop.progress import bytes_bar
from dsvl_train.interop.shapes import logical_shapes
from dsvl_train.interop.writer import CastSource, ShardName, five_digits, six_digits, whole_folder, write_shards

log = logging.getLogger(__name__)

ExportFormat = Literal["deepseek_vl_v2", "multi_modality", "transformers"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DEFAULT_AUX_LOSS_ALPHA = 0.001
"""The released models' weight of the load-balancing loss, written where the checkpoint's stage has none."""

_HAS_NO_PLACE = ("*.high_layer_norm.*", "*.low_layer_norm.*")
"""Tensors that no model uses and that transformers' DeepSeek-VL cannot hold."""


@dataclass(frozen=True)
class _Checkpoint:
    """What is exported."""

    model: ModelConfig
    weights: TensorSource
    processor: Path
    aux_loss_alpha: float


@dataclass(frozen=True)
class _Target:
    """How a format is written."""

    relate: Callable[[ModelConfig, dict[str, Shape]], Table]
    config: Callable[[_Checkpoint, TokenIds, str], dict[str, Any]]
    processor: Callable[[Path, Path, ModelConfig], None]
    shard_name: ShardName
    may_drop: tuple[str, ...] = ()


def _vl2_config(checkpoint: _Checkpoint, ids: TokenIds, dtype: str) -> dict[str, Any]:
    settings = deepseek_vl2.read_processor(checkpoint.processor)
    _check_pixel_statistics(checkpoint, settings)
    return deepseek_vl2.write(
        checkpoint.model,
        bos_id=0 if ids.bos is None else ids.bos,
        eos_id=1 if ids.eos is None else ids.eos,
        dtype=dtype,
        aux_loss_alpha=checkpoint.aux_loss_alpha,
        candidates=settings.values.get("candidate_resolutions"),
    )


def _check_pixel_statistics(checkpoint: _Checkpoint, settings: JsonConfig) -> None:
    """The format keeps them with the processor, so both must agree.

    Raises:
        ValueError: they do not.
    """
    siglip = checkpoint.model.vision.siglip
    for key, trained in (("image_mean", siglip.pixel_mean), ("image_std", siglip.pixel_std)):
        stored = settings.numbers(key, deepseek_vl2.DEFAULT_PIXELS)
        if stored != trained:
            raise ValueError(
                f"{settings.path}: {key} is {stored}, the model was trained with {trained} (model.vision.siglip), and deepseek_vl_v2 keeps "
                "it in that file only; write the model's numbers there, and export again"
            )


def _transformers_config(checkpoint: _Checkpoint, ids: TokenIds, dtype: str) -> dict[str, Any]:
    return transformers_vl.write(
        checkpoint.model,
        bos_id=100000 if ids.bos is None else ids.bos,
        eos_id=100001 if ids.eos is None else ids.eos,
        image_token_id=processors.image_token_id(ids),
        dtype=dtype,
    )


_TARGETS: dict[str, _Target] = {
    "deepseek_vl_v2": _Target(
        deepseek_vl2.relate, _vl2_config, lambda source, target, model: processors.copy_released(source, target), six_digits
    ),
    "multi_modality": _Target(
        multi_modality.relate,
        lambda checkpoint, ids, dtype: multi_modality.write(checkpoint.model, dtype=dtype),
        lambda source, target, model: processors.copy_released(source, target),
        five_digits,
    ),
    "transformers": _Target(transformers_vl.relate, _transformers_config, processors.to_transformers, five_digits, may_drop=_HAS_NO_PLACE),
}


def export_model(
    checkpoint: str | Path,
    out: str | Path,
    target: ExportFormat,
    *,
    dtype: Literal["bf16", "fp16", "fp32"] | None = None,
    max_shard_bytes: int = 5 * 10**9,
    show_progress: bool = True,
) -> list[str]:
    """Write a model folder. Returns the tensors that the format has no place for (stored, never used).

    Args:
        checkpoint: a checkpoint folder, or a run folder (its latest).
        dtype: of the weights, None = as stored. The routers' selection bias keeps its own. fp32 takes the optimiser's main weights where
            the run trained in bf16.

    Raises:
        ValueError: the format cannot hold the model, the checkpoint is broken, or `out` exists.
    """
    out, to = Path(out), _TARGETS[target]
    opened = _open(checkpoint, main_weights=dtype == "fp32")
    ours = logical_shapes(opened.model)
    config_of = to.config(opened, ids := processors.read_token_ids(opened.processor), "float32")  # refuses what it cannot hold
    table = to.relate(opened.model, ours)
    dropped = _dropped(table, ours, to, target)
    check_tensors(opened.weights, ours)
    if not (opened.processor / "tokenizer.json").is_file():
        log.warning("%s has no tokenizer.json: the exported folder will lack tokenizer and processor", opened.processor)
    tensors: TensorSource = MappedSource(opened.weights, table.to_foreign(), table.foreign)
    if dtype is not None:
        tensors = CastSource(tensors, DTYPES[dtype], keep=lambda name: name.endswith("e_score_correction_bias"))
    config_of = to.config(opened, ids, _dtype_name(tensors))
    total = sum(info.bytes for info in tensors.infos().values())
    with whole_folder(out) as folder, bytes_bar(f"export {target}", total, show_progress) as advance:
        write_shards(folder, tensors, max_bytes=max_shard_bytes, shard_name=to.shard_name, progress=advance)
        _write_json(folder / "config.json", config_of)
        if target == "transformers":
            text = config_of["text_config"]
            generation = {"_from_model_config": True, "bos_token_id": text["bos_token_id"], "eos_token_id": text["eos_token_id"]}
            _write_json(folder / "generation_config.json", generation)
        to.processor(opened.processor, folder, opened.model)
    return dropped


def _open(path: str | Path, *, main_weights: bool) -> _Checkpoint:
    folder = resolve(path)
    run = load_run_config(folder / CONFIG_FILE)
    alpha = run.stage.aux_loss_weight or DEFAULT_AUX_LOSS_ALPHA
    return _Checkpoint(run.model, open_native(folder, main_weights=main_weights), folder / PROCESSOR_FOLDER, alpha)


def _dropped(table: Table, ours: dict[str, Shape], to: _Target, target: str) -> list[str]:
    placed = {block.ours for block in table.blocks}
    homeless = [name for name in ours if name not in placed]
    lost = [name for name in homeless if not any(fnmatchcase(name, pattern) for pattern in to.may_drop)]
    if lost:
        raise ValueError(f"format {target} has no place for {some(lost)}")
    if homeless:
        log.warning("format %s has no place for these stored and never used tensors: %s", target, some(homeless))
    return homeless


def _dtype_name(tensors: TensorSource) -> str:
    """The type of most weights, as a config.json says it."""
    amounts: dict[torch.dtype, int] = {}
    for info in tensors.infos().values():
        amounts[info.dtype] = amounts.get(info.dtype, 0) + info.bytes
    return str(max(amounts, key=lambda dtype: amounts[dtype])).removeprefix("torch.")


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
