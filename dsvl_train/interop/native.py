"""Our own checkpoint format, the part that everybody reads: which folder, which configuration, the model's weights.

Safetensors and JSON, no pickle. Tensors are stored as boxes under layout-independent names (`models.logical`), so a rank of any layout
reads what it needs, through torch's distributed checkpointing:

    model.<name>    optim.exp_avg.<name>    optim.exp_avg_sq.<name>    optim.main.<name>

`training.checkpoint` writes these folders and reads the optimiser's part; `checkpoints` knows them as folders of files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
    "share_boxes",
    "write_boxes",
]


@dataclass
class Box:
    """A rectangular part of a stored tensor. A rank may have several of one."""

    whole: tuple[int, ...]
    offset: tuple[int, ...]
    local: Tensor


@dataclass
class _Wanted:
    """The boxes of a stored tensor that a rank reads, in the terms of torch's distributed checkpointing."""

    whole: tuple[int, ...]
    local: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    """By offset."""

    def size(self) -> torch.Size:
        """Shape of the whole tensor; the reader compares it with what is stored."""
        return torch.Size(self.whole)

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets=torch.Size(offset), sizes=local.shape) for offset, local in self.local.items()]


class _ReadBoxes(DefaultLoadPlanner):
    def set_up_planner(self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        # the default one also walks the values to give meta tensors storage, and knows tensors only
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator
        self.original_state_dict, self.mappings = state_dict, {}

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self.state_dict[index.fqn].local[tuple(index.offset)]


def box(tensor: LogicalTensor, local: Tensor) -> Box:
    """The box of a logical tensor inside the local tensor that stores it, or inside another of its shape."""
    return Box(tensor.shape, tensor.offset, tensor.of(local.detach()))


def model_boxes(model: VisionLanguageModel) -> dict[str, Box]:
    """Every weight and persistent buffer of this rank, by its stored name."""
    return {f"model.{tensor.name}": box(tensor, local) for tensor, local in logical_tensors(model)}


def share_boxes(tensor: LogicalTensor, local_shape: Sequence[int], start: int, share: Tensor) -> Iterator[Box]:
    """The boxes of a logical tensor inside a share of the local tensor that stores it: views of `share`, which is flat and begins with the
    local tensor's element `start`."""
    for offset, size, first in tensor.boxes_in(local_shape, start, start + share.numel()):
        yield Box(tensor.shape, offset, share[first - start : first - start + math.prod(size)].view(size))


def load_weights(folder: Path, model: VisionLanguageModel) -> None:
    """Read the model's weights; every rank calls.

    Raises:
        ValueError: a tensor is missing or has another shape; names it.
    """
    read_boxes(folder, model_boxes(model).items())


def write_boxes(path: Path, boxes: Iterable[tuple[str, Box]]) -> dict[str, FileEntry]:
    """Write boxes, which lie in host memory, into a durable file; torch's distributed checkpointing reads all files of a folder as one.

    A file holds one box of a tensor; the second and later ones go to files beside it, `…_2.safetensors`. Returns the files by name.
    """
    files: list[dict[str, Box]] = []
    for name, box in boxes:
        free = next((file for file in files if name not in file), None)
        if free is None:
            files.append(free := {})
        free[name] = box
    paths = [path if number == 1 else path.with_name(f"{path.stem}_{number}{path.suffix}") for number in range(1, len(files) + 1)]
    return {path.name: _write_file(path, file) for path, file in zip(paths, files, strict=True)}


def _write_file(path: Path, boxes: Mapping[str, Box]) -> FileEntry:
    offsets = {name: {"saved_offsets": list(box.offset)} for name, box in boxes.items()}
    infos = {name: TensorInfo(tuple(box.local.shape), box.local.dtype) for name, box in boxes.items()}
    with HashedFile(path) as file:
        write_safetensors(file, infos, lambda name: boxes[name].local, metadata={SHARDING_INFO: json.dumps(offsets)})
    return file.entry


def read_boxes(folder: Path, boxes: Iterable[tuple[str, Box]]) -> None:
    """Read stored boxes into local tensors; every rank calls, each with its own.

    Raises:
        ValueError: a tensor is missing or has another shape; names it.
    """
    wanted: dict[str, Any] = {}
    for name, box in boxes:
        wanted.setdefault(name, _Wanted(box.whole)).local[box.offset] = box.local
    try:
        dcp.load(wanted, storage_reader=HuggingFaceStorageReader(str(folder)), planner=_ReadBoxes())
    except (dcp.api.CheckpointException, ValueError, RuntimeError) as error:
        raise ValueError(f"cannot read {folder}: {_first_reason(error)}") from error


def _first_reason(error: BaseException) -> str:
    if isinstance(error, dcp.api.CheckpointException) and error.failures:
        return str(next(iter(error.failures.values()))[0])
    return str(error)
