"""Weights of any format into a model that is built: each rank reads the boxes that it holds."""

from __future__ import annotations

from pathlib import Path

import torch

from dsvl_train.config.compose import load_run_config
from dsvl_train.config.schema import ModelConfig
from dsvl_train.interop import native
from dsvl_train.interop.blocks import TensorSource
from dsvl_train.interop.checks import require_same_model
from dsvl_train.interop.released import looks_foreign, open_released
from dsvl_train.models.logical import logical_tensors
from dsvl_train.models.vlm import VisionLanguageModel


def load_any_weights(path: str | Path, model: VisionLanguageModel, config: ModelConfig) -> None:
    """Set the model's weights from a checkpoint or run folder of ours, or from a model folder in a released format; every rank calls.

    Raises:
        ValueError: neither is there, it holds another model than `config`, or a tensor is missing or has another shape; names it.
    """
    if looks_foreign(path):
        stored, source = open_released(path)
        require_same_model(config, stored, str(path))
        load_source(source, model)
        return
    folder = native.resolve(path)
    require_same_model(config, load_run_config(folder / native.CONFIG_FILE).model, str(folder))
    native.load_weights(folder, model)


@torch.no_grad()
def load_source(source: TensorSource, model: VisionLanguageModel) -> None:
    """Copy into this rank's boxes what the source has of them; tensors that it has not stay as they are.

    Raises:
        ValueError: a tensor has another shape in the source.
    """
    stored = source.infos()
    for tensor, local in logical_tensors(model):
        if tensor.name not in stored:
            continue
        if stored[tensor.name].shape != tensor.shape:
            raise ValueError(
                f"{source.where}: {tensor.name} has the shape {list(stored[tensor.name].shape)}, the model asks for {list(tensor.shape)}"
            )
        box = tensor.of(local)
        box.copy_(source.read(tensor.name, tensor.offset, tuple(box.shape)))
