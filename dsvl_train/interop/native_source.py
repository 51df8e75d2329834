"""The weights of our own checkpoints, whatever layout wrote them, as whole logical tensors that are read region by region."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from dsvl_train.interop.blocks import MappedSource, Placement, Shape, TensorInfo
from dsvl_train.interop.sources import SafetensorsFile

SHARDING_INFO = "DCP_SHARDING_INFO"
"""Where torch's distributed checkpointing notes, in a file's metadata, at which offset each stored box begins."""


class _Boxes:
    """Every stored box under `file/name`, a source of its own."""

    def __init__(self, folder: Path) -> None:
        self.where = str(folder)
        files = [SafetensorsFile(path) for path in sorted(folder.glob("*.safetensors"))]
        self._file = {f"{file.path.name}/{name}": (file, name) for file in files for name in file.infos}
        self._infos = {key: file.infos[name] for key, (file, name) in self._file.items()}
        self.offsets: dict[str, Shape] = {}
        self._last: SafetensorsFile | None = None
        for file in files:
            noted = json.loads(file.metadata[SHARDING_INFO]) if SHARDING_INFO in file.metadata else None
            for name, info in file.infos.items():
                offset = (0,) * len(info.shape) if noted is None else tuple(noted[name]["saved_offsets"])
                self.offsets[f"{file.path.name}/{name}"] = offset

    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def read(self, name: str, start: Sequence[int], size: Sequence[int]) -> Tensor:
        file, tensor = self._file[name]
        if self._last is not None and self._last is not file:
            self._last.close()
        self._last = file
        return file.read(tensor, start, size)

    def of(self, prefix: str) -> dict[str, list[Placement]]:
        """Tensor (without the prefix) -> its stored boxes."""
        placements: dict[str, list[Placement]] = {}
        for key, (file, name) in self._file.items():
            if name.startswith(prefix):
                shape = file.infos[name].shape
                box = Placement(key, (0,) * len(shape), self.offsets[key], shape)
                placements.setdefault(name.removeprefix(prefix), []).append(box)
        return placements


def open_native(folder: Path, *, main_weights: bool = False) -> MappedSource:
    """The weights of a checkpoint; with `main_weights` the optimiser's fp32 copies where a bf16 run has them.

    Raises:
        ValueError: a file is broken, or the boxes of a tensor do not make a whole; names it.
    """
    boxes = _Boxes(folder)
    placements = boxes.of("model.")
    if main_weights:
        placements |= {name: boxes_of for name, boxes_of in boxes.of("optim.main.").items() if name in placements}
    if not placements:
        raise ValueError(f"{folder} has no weights: no .safetensors file there holds a tensor named model.…")
    shapes = {name: _whole(folder, name, parts) for name, parts in placements.items()}
    return MappedSource(boxes, placements, shapes)


def open_everything(folder: Path) -> MappedSource:
    """Every tensor of a checkpoint, the optimiser's too, under its stored name.

    Raises:
        ValueError: a file is broken, or the boxes of a tensor do not make a whole; names it.
    """
    boxes = _Boxes(folder)
    placements = boxes.of("")
    return MappedSource(boxes, placements, {name: _whole(folder, name, parts) for name, parts in placements.items()})


def _whole(folder: Path, name: str, parts: list[Placement]) -> Shape:
    rank = len(parts[0].start)
    shape = tuple(max(part.start[dim] + part.size[dim] for part in parts) for dim in range(rank))
    if sum(math.prod(part.size) for part in parts) != math.prod(shape):
        raise ValueError(f"{folder}: the stored parts of {name} do not make a whole tensor of shape {list(shape)}; a file is missing")
    return shape
