"""Our own checkpoint format, the part that everybody reads: which folder, which configuration, the model's weights.

Safetensors and JSON, no pickle. Tensors are stored as boxes under layout-independent names (`models.logical`), so a rank of any layout
reads what it needs, through torch's distributed checkpointing:

    model.<name>    optim.exp_avg.<name>    optim.exp_avg_sq.<name>    optim.main.<name>

`training.checkpoint` writes these folders and reads the optimiser's part; `checkpoints` knows them as folders of files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

from dsvl_train.checkpoints.durable import FileEntry, HashedFile
from dsvl_train.checkpoints.folders import CONFIG_FILE, LATEST_FILE, PROCESSOR_FOLDER, STATE_FILE, find_latest, resolve
from dsvl_train.interop.blocks import TensorInfo
from dsvl_train.interop.native_source import SHARDING_INFO
from dsvl_train.interop.writer import write_safetensors
from dsvl_train.models.logical import LogicalTensor, logical_tensors
from dsvl_train.models.vlm import VisionLanguageModel

__all__ = [
    "CONFIG_FILE",
    "LATEST_FILE",
    "PROCESSOR_FOLDER",
    "STATE_FILE",
    "Box",
    "box",
    "find_latest",
    "load_weights",
    "model_boxes",
    "read_boxes",
    "resolve",
    "write_boxes",
]


@dataclass
class Box:
    """A rank's share of a stored tensor, in the terms of torch's distributed checkpointing."""

    whole: tuple[int, ...]
    offset: tuple[int, ...]
    local: Tensor

    def size(self) -> torch.Size:
        """Shape of the whole tensor; the reader compares it with what is stored."""
        return torch.Size(self.whole)

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets=torch.Size(self.offset), sizes=self.local.shape)]


class _ReadBoxes(DefaultLoadPlanner):
    def set_up_planner(self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        # the default one also walks the values to give meta tensors storage, and knows tensors only
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator
        self.original_state_dict, self.mappings = state_dict, {}

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].local


def box(tensor: LogicalTensor, local: Tensor) -> Box:
    """The box of a logical tensor inside the local tensor that stores it, or inside another of its shape."""
    return Box(tensor.shape, tensor.offset, tensor.of(local.detach()))


def model_boxes(model: VisionLanguageModel) -> dict[str, Box]:
    """Every weight and persistent buffer of this rank, by its stored name."""
    return {f"model.{tensor.name}": box(tensor, local) for tensor, local in logical_tensors(model)}


def load_weights(folder: Path, model: VisionLanguageModel) -> None:
    """Read the model's weights; every rank calls.

    Raises:
        ValueError: a tensor is missing or has another shape; names it.
    """
    read_boxes(folder, model_boxes(model))


def write_boxes(path: Path, boxes: Mapping[str, Box]) -> FileEntry:
    """Write boxes, which lie in host memory, into a durable file; torch's distributed checkpointing reads all files of a folder as one."""
    offsets = {name: {"saved_offsets": list(box.offset)} for name, box in boxes.items()}
    infos = {name: TensorInfo(tuple(box.local.shape), box.local.dtype) for name, box in boxes.items()}
    with HashedFile(path) as file:
        write_safetensors(file, infos, lambda name: boxes[name].local, metadata={SHARDING_INFO: json.dumps(offsets)})
    return file.entry


def read_boxes(folder: Path, boxes: Mapping[str, Box]) -> None:
    """Read stored boxes into local tensors; every rank calls, each with its own.

    Raises:
        ValueError: a tensor is missing or has another shape; names it.
    """
    try:
        dcp.load(dict(boxes), storage_reader=HuggingFaceStorageReader(str(folder)), planner=_ReadBoxes())
    except (dcp.api.CheckpointException, ValueError, RuntimeError) as error:
        raise ValueError(f"cannot read {folder}: {_first_reason(error)}") from error


def _first_reason(error: BaseException) -> str:
    if isinstance(error, dcp.api.CheckpointException) and error.failures:
        return str(next(iter(error.failures.values()))[0])
    return str(error)
