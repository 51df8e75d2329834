"""What the data pipeline hands to a training step.

Shapes: t = tokens of a micro-batch, s = samples in it, i = images, n = tiles; tensors live on the CPU until the step moves them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from dsvl_train.data.bad_samples import BadSample

IGNORE_INDEX = -100
"""Label of a position that is not supervised."""

Modality = Literal["text", "multimodal"]


@dataclass
class MicroBatch:
    """Samples laid end to end, so that no sample is padded for another's length; none attends to or predicts into the next."""

    tokens_t: Tensor
    """int64 [t]. Image positions hold the image token's id."""
    labels_t: Tensor
    """int64 [t]: the target of each position, already shifted (labels_t[j] is token j + 1 of the same sample), or IGNORE_INDEX."""
    cu_seqlens: Tensor
    """int32 [s + 1]: where samples start; ends with t. A masked placeholder of a bad sample is a sample like any other."""
    image_mask_t: Tensor
    """bool [t]: positions that visual embeddings fill, in order."""
    padding_t: Tensor
    """bool [t]: True where there is no sample (a bad sample's place); experts do not count these."""
    source_s: Tensor
    """int64 [s]: index of each sample's source in the order of data.sources."""
    pixels_nchw: Tensor | None
    """uint8 [n, 3, H, W], tiles in order (VL2: per image the thumbnail, then local tiles row by row); None in a text step, and on ranks
    that need no pixels."""
    tiles_wh: Tensor | None
    """int64 [i, 2]: local tiles (wide, high) per image; VL has (0, 0): one tile and no grid."""

    @property
    def tiles(self) -> int:
        """Tiles to encode, known without the pixels: per image the local ones and the thumbnail; VL's (0, 0) is its one tile."""
        return 0 if self.tiles_wh is None else int((self.tiles_wh.prod(dim=1) + 1).sum())


@dataclass
class StepBatch:
    """One rank's share of a global batch, with the plan's facts about the whole of it."""

    step: int
    """From 1."""
    modality: Modality
    """multimodal: there are multimodal sequences in the global batch; without data.modality_grouping there may be text ones beside them."""
    micro_batches: list[MicroBatch]
    text_share: float
    """Realised share of text sequences, this step's included; with modality grouping that is the share of text steps."""
    text_share_target: float
    """The schedule's average up to and including this step: what the realised share tracks."""
    text_ratio: float
    """The schedule's value at this step."""
    pack_fill: float
    """Tokens over capacity of the global batch's sequences (1 when not packing)."""
    tiles_per_rank: list[int] = field(default_factory=list)
    """Tiles planned for each data-parallel rank."""
    bad: list[BadSample] = field(default_factory=list)
    """Samples of this rank's share that were replaced by masked padding in this step."""
    first_seen: int = 0
    """Samples of the global batch that no step before this one held."""
    sample_names: Callable[[], list[str]] = field(default=list, repr=False)
    """Source and place of every sample of the global batch; looked up when somebody asks."""

    @property
    def bad_samples(self) -> int:
        """How many of this rank's share were replaced."""
        return len(self.bad)
