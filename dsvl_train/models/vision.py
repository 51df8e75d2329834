"""The vision tower: SigLIP alone (VL 1.3B, VL2), or SAM and SigLIP over one padded image (VL 7B, VL §3.1).

Shapes: n = tiles, c = 3 channels, h/w = pixels, l = visual tokens of a tile, d = feature width; r = columns of a packed state.

The released VL 7B also stores `high_layer_norm` and `low_layer_norm` (LayerNorm 1024), built and never applied. With
`stored_layer_norms` they are parameters here too, so that an imported checkpoint can be exported whole; see `STORED_ONLY`.

Cutting it for a pipeline: both encoders are cut side by side, each rank running its layers of both, and a `VisionState` travels. It
is packed into one matrix with a row per tile, so that a rank sends one tensor whose shape says everything.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsvl_train.config.schema import VisionConfig
from dsvl_train.models.sam_vitdet import SamEncoder, SamState, sam_flops
from dsvl_train.models.siglip import SiglipEncoder, check_pixels, siglip_flops, unit_pixels

Features = Tensor | tuple[Tensor, Tensor]
"""SigLIP's features [n, l, d], or (high, low): SAM's and SigLIP's, in the released order."""


STORED_ONLY = ("*.attn_pool.*", "*.high_layer_norm.*", "*.low_layer_norm.*")
"""Globs over the names of parameters that released checkpoints store and no model uses: never trained, whatever a stage says."""


class VisionState(NamedTuple):
    """What the blocks of both encoders hand on."""

    siglip_nld: Tensor
    sam: SamState | None = None


class VisionTower(nn.Module):
    """Pixels -> features of each tile.

    Raises ValueError when SAM and SigLIP would give different numbers of tokens.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.siglip = SiglipEncoder(config.siglip)
        self.sam: SamEncoder | None = None
        if config.sam is not None:
            if config.sam.output_grid**2 != config.siglip.tokens:
                raise ValueError(
                    f"SAM gives {config.sam.output_grid}^2 = {config.sam.output_grid**2} tokens and SigLIP {config.siglip.grid}^2 = "
                    f"{config.siglip.tokens}; both must give as many: set model.vision.sam.interpolate_to to {4 * config.siglip.grid}"
                )
            self.sam = SamEncoder(config.sam)
        self.high_layer_norm: nn.LayerNorm | None = None
        self.low_layer_norm: nn.LayerNorm | None = None
        if config.stored_layer_norms:
            if config.sam is None:
                raise ValueError("vision.stored_layer_norms belong to two encoders, and vision.sam is null: set it to false")
            self.high_layer_norm = nn.LayerNorm(config.sam.downsample_widths[-1])
            self.low_layer_norm = nn.LayerNorm(config.siglip.width)

    @property
    def image_size(self) -> int:
        """Side of the input image, pixels."""
        return self.config.siglip.image_size if self.config.sam is None else self.config.sam.image_size

    @property
    def recompute(self) -> bool:
        """Recompute the encoders' blocks in the backward pass instead of keeping their activations."""
        return self.siglip.recompute

    @recompute.setter
    def recompute(self, value: bool) -> None:
        self.siglip.recompute = value
        if self.sam is not None:
            self.sam.recompute = value

    def forward(self, pixels_nchw: Tensor) -> Features:
        """uint8 (or float in [0, 1]) pixels [n, 3, image_size, image_size] -> features; SigLIP's input is resized from SAM's."""
        sam_layers = range(0 if self.config.sam is None else self.config.sam.layers)
        state = self.run(self.embed(pixels_nchw), range(self.config.siglip.layers), sam_layers)
        return self.finish(state)

    def embed(self, pixels_nchw: Tensor) -> VisionState:
        """Patch embeddings of both encoders."""
        if self.sam is None:
            return VisionState(self.siglip.embed(pixels_nchw))
        check_pixels(pixels_nchw, self.image_size, "sam.image_size")
        return VisionState(self.siglip.embed(resize(pixels_nchw, self.config.siglip.image_size)), self.sam.embed(pixels_nchw))

    def run(self, state: VisionState, siglip_layers: range, sam_layers: range = range(0)) -> VisionState:
        """Some layers of each encoder."""
        siglip_nld = self.siglip.run(state.siglip_nld, siglip_layers)
        if self.sam is None or state.sam is None:
            return VisionState(siglip_nld)
        return VisionState(siglip_nld, self.sam.run(state.sam, sam_layers))

    def finish(self, state: VisionState) -> Features:
        """SigLIP's last norm, SAM's neck and convolutions."""
        low_nld = self.siglip.finish(state.siglip_nld)
        if self.sam is None or state.sam is None:
            return low_nld
        return self.sam.finish(state.sam), low_nld

    def keep(self, siglip_layers: range, sam_layers: range = range(0), *, embed: bool, finish: bool) -> None:
        """Drop the parameters of all other layers, and of `embed` or `finish` where they are not wanted; names stay."""
        self.siglip.keep(siglip_layers, embed=embed, finish=finish)
        if self.sam is not None:
            self.sam.keep(sam_layers, embed=embed, finish=finish)
        if not finish:
            self.high_layer_norm = self.low_layer_norm = None

    def pack(self, state: VisionState) -> Tensor:
        """A state as one matrix [n, r], a row per tile: SigLIP's features, SAM's, and its first global layer's once there is one."""
        parts = [state.siglip_nld]
        if state.sam is not None:
            parts += [part for part in state.sam if part is not None]
        return torch.cat([part.flatten(1) for part in parts], dim=1)

    def unpack(self, rows_nr: Tensor) -> VisionState:
        """Undo `pack`; the number of columns tells what the state holds.

        Parts are made contiguous: convolutions pick their algorithm by memory layout, and a cut should not change a bit.
        """
        siglip, sam = self.config.siglip, self.config.sam
        siglip_width = siglip.tokens * siglip.width
        siglip_nld = rows_nr[:, :siglip_width].unflatten(1, (siglip.tokens, siglip.width)).contiguous()
        if sam is None:
            return VisionState(siglip_nld)
        maps = rows_nr[:, siglip_width:].split(sam.grid**2 * sam.width, dim=1)
        return VisionState(siglip_nld, SamState(*(part.unflatten(1, (sam.grid, sam.grid, sam.width)).contiguous() for part in maps)))


def resize(pixels_nchw: Tensor, image_size: int) -> Tensor:
    """Pixels -> float32 in [0, 1] of another size, bilinear with antialiasing, as the released tower resizes SigLIP's input."""
    size = (image_size, image_size)
    return F.interpolate(unit_pixels(pixels_nchw), size=size, mode="bilinear", antialias=True, align_corners=False)


def vision_flops(config: VisionConfig) -> int:
    """Forward FLOPs of the tower on one tile; a multiply-add is two."""
    return siglip_flops(config.siglip) + (0 if config.sam is None else sam_flops(config.sam))
