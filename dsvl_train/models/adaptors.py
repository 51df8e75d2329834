"""Vision-language adaptors: features of the tiles -> visual embeddings of the language model, in the order they are spliced in.

Shapes: n = tiles, l = visual tokens of a tile (row by row), g = side of a tile's grid, d = feature width, q = pixel-shuffled tokens
along a side, i = images, v = visual embeddings, e = hidden size of the language model.

VL (§3.1, Table 10) takes two encoders' features (high = SAM, low = SigLIP), one tile per image:

| kind | embedding | sequence_width, sequence_height |
|---|---|---|
| hybrid | a linear layer to e/2 each, concatenate, GELU, a linear layer (released 7B) | to e each, the rest alike |
| shared | one two-layer MLP to e/2 for both encoders, concatenate | one to e for both |
| separate | a two-layer MLP to e/2 each, concatenate | to e each |

What the paper leaves open, as decided here. Halves come in the released order, high before low, along the embedding or the sequence.
"Token pooling" along W (or H) makes one token of two neighbours in a row (or column) by *stacking their features* before the first
layer: §4.4 speaks of "stacking visual features along the image's width or height dimensions", and DeepSeek's own code calls a 2x2
stack "token pooling" too. Nothing is averaged away, and two encoders of l tokens give l tokens. Table 10 ran that with the hybrid MLP;
the other kinds combine with it in the same manner.

VL2 (§2) takes one encoder's features, 1 + tiles per image: pixel shuffle, an MLP, then the rows of the thumbnail and of the stitched
local tiles with a newline after each row and a separator between both.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsvl_train.config.schema import AdaptorConfig, VisionConfig
from dsvl_train.models.vision import Features


def build_adaptor(adaptor: AdaptorConfig, vision: VisionConfig, hidden_size: int) -> nn.Module:
    """The adaptor for these encoders; `forward(features, tiles_wh_i2)` gives visual embeddings [v, hidden_size] in image order.

    Raises ValueError when the kind does not fit the encoders, a pooled grid is odd, or widths do not divide.
    """
    check_adaptor(adaptor, vision, hidden_size)
    if vision.sam is None:
        if adaptor.kind == "pixel_shuffle":
            return PixelShuffleAdaptor(adaptor, vision.siglip.grid, vision.siglip.width, hidden_size)
        return MlpAdaptor(adaptor, vision.siglip.width, hidden_size)
    high, low = vision.sam.downsample_widths[-1], vision.siglip.width
    return TwoEncoderAdaptor(adaptor, vision.siglip.grid, high, low, hidden_size)


def check_adaptor(adaptor: AdaptorConfig, vision: VisionConfig, hidden_size: int) -> None:
    """Raise ValueError with the values, the rule and the setting to change."""
    two_encoders = adaptor.kind in ("hybrid", "shared", "separate")
    if two_encoders != (vision.sam is not None):
        raise ValueError(
            f"model.adaptor.kind {adaptor.kind} takes the features of {'two encoders' if two_encoders else 'one encoder'}, "
            f"but model.vision.sam is {'set' if vision.sam is not None else 'null'}: change either"
        )
    if adaptor.depth < 1:
        raise ValueError(f"model.adaptor.depth is {adaptor.depth}; an adaptor has at least one layer")
    if adaptor.downsample_ratio < 1:
        raise ValueError(f"model.adaptor.downsample_ratio is {adaptor.downsample_ratio}; it must be at least 1")
    if vision.sam is None:
        if adaptor.concat != "embedding":
            raise ValueError(f"model.adaptor.concat {adaptor.concat} joins two encoders, but model.vision.sam is null: set it to embedding")
        return
    if adaptor.concat == "embedding" and hidden_size % 2:
        raise ValueError(f"model.language.hidden_size {hidden_size} is odd, but model.adaptor.concat embedding gives each encoder half")
    if adaptor.concat != "embedding" and vision.siglip.grid % 2:
        raise ValueError(
            f"model.adaptor.concat {adaptor.concat} pools the {vision.siglip.grid} x {vision.siglip.grid} grid in pairs, so its side "
            "must be even: change model.vision.siglip.image_size, or set model.adaptor.concat to embedding"
        )
    if adaptor.kind == "shared" and vision.sam.downsample_widths[-1] != vision.siglip.width:
        raise ValueError(
            f"model.adaptor.kind shared takes both encoders' features through one MLP, but their widths are "
            f"{vision.sam.downsample_widths[-1]} (sam.downsample_widths) and {vision.siglip.width} (siglip.width): make them equal"
        )


def mlp(width_in: int, width_out: int, depth: int) -> nn.Sequential:
    """`depth` linear layers with the exact (erf) GELU between them: `0`, `2`, ..."""
    layers: list[nn.Module] = [nn.Linear(width_in, width_out)]
    return nn.Sequential(*layers, *gelu_linear(width_out, depth - 1))


def gelu_linear(width: int, times: int) -> nn.Sequential:
    """GELU and a linear layer, `times` over: what follows a first linear layer (linear layers are `1`, `3`, ...)."""
    return nn.Sequential(*(layer for _ in range(times) for layer in (nn.GELU(), nn.Linear(width, width))))


class MlpAdaptor(nn.Module):
    """An MLP on one encoder's features (released VL 1.3B, `mlp_gelu`)."""

    def __init__(self, adaptor: AdaptorConfig, width: int, hidden_size: int) -> None:
        super().__init__()
        self.layers = mlp(width, hidden_size, adaptor.depth)

    def forward(self, features: Features, tiles_wh_i2: Tensor) -> Tensor:
        """Features [n, l, d] of one tile per image -> [n * l, e]."""
        assert isinstance(features, Tensor)
        check_one_tile_per_image(features, tiles_wh_i2)
        return self.layers(features).flatten(0, 1)


class TwoEncoderAdaptor(nn.Module):
    """SAM's and SigLIP's features together (VL Table 10; `hybrid` with `embedding` is the released VL 7B)."""

    def __init__(self, adaptor: AdaptorConfig, grid: int, high_width: int, low_width: int, hidden_size: int) -> None:
        super().__init__()
        self.kind, self.concat, self.grid = adaptor.kind, adaptor.concat, grid
        stacked = 1 if adaptor.concat == "embedding" else 2
        high_width, low_width = stacked * high_width, stacked * low_width
        width_out = hidden_size // 2 if adaptor.concat == "embedding" else hidden_size
        if adaptor.kind == "hybrid":
            self.high_up_proj = nn.Linear(high_width, width_out)
            self.low_up_proj = nn.Linear(low_width, width_out)
            self.layers = gelu_linear(hidden_size, adaptor.depth - 1)
        elif adaptor.kind == "separate":
            self.high_layers = mlp(high_width, width_out, adaptor.depth)
            self.low_layers = mlp(low_width, width_out, adaptor.depth)
        else:
            self.layers = mlp(high_width, width_out, adaptor.depth)

    def forward(self, features: Features, tiles_wh_i2: Tensor) -> Tensor:
        """(high, low), each [n, l, d] of one tile per image -> [n * l, e]."""
        high_nld, low_nld = features
        check_one_tile_per_image(high_nld, tiles_wh_i2)
        high_nld, low_nld = self._pool(high_nld), self._pool(low_nld)
        if self.kind == "hybrid":
            return self.layers(self._join(self.high_up_proj(high_nld), self.low_up_proj(low_nld))).flatten(0, 1)
        if self.kind == "separate":
            return self._join(self.high_layers(high_nld), self.low_layers(low_nld)).flatten(0, 1)
        return self._join(self.layers(high_nld), self.layers(low_nld)).flatten(0, 1)

    def _join(self, high_nld: Tensor, low_nld: Tensor) -> Tensor:
        return torch.cat([high_nld, low_nld], dim=-1 if self.concat == "embedding" else 1)

    def _pool(self, x_nld: Tensor) -> Tensor:
        """Token pooling: stack the features of each pair of neighbours, [n, l, d] -> [n, l / 2, 2 d]; no change for `embedding`."""
        if self.concat == "embedding":
            return x_nld
        if self.concat == "sequence_width":  # neighbours in a row follow one another
            return x_nld.unflatten(1, (-1, 2)).flatten(2)
        rows = x_nld.unflatten(1, (self.grid // 2, 2, self.grid))
        return rows.transpose(2, 3).flatten(3).flatten(1, 2)


class PixelShuffleAdaptor(nn.Module):
    """VL2's adaptor (VL2 §2; released `downsample_mlp_gelu`, tile tag 2D, global view first)."""

    def __init__(self, adaptor: AdaptorConfig, grid: int, width: int, hidden_size: int) -> None:
        super().__init__()
        self.grid, self.ratio = grid, adaptor.downsample_ratio
        self.side = -(-grid // self.ratio)
        """Tokens along one side of a tile after the shuffle (27 -> 14)."""
        self.layers = mlp(width * self.ratio**2, hidden_size, adaptor.depth)
        self.image_newline = nn.Parameter(torch.randn(hidden_size) / hidden_size**0.5)
        self.view_seperator = nn.Parameter(torch.randn(hidden_size) / hidden_size**0.5)  # the released spelling

    def forward(self, features: Features, tiles_wh_i2: Tensor) -> Tensor:
        """Features [n, l, d] of all tiles, per image the thumbnail, then local tiles row by row -> [v, e].

        An image of q tokens a side and (w, h) local tiles becomes q (q + 1) + 1 + q h (q w + 1) embeddings: the thumbnail's rows, each
        with a newline; a separator; the rows of the stitched local tiles, each with a newline. A (0, 0) image is the blank tile that
        the released processor gives a sample without image: it becomes nothing. Keep `tiles_wh_i2` on the CPU to avoid a device sync.

        Raises ValueError when the images' tiles are not n.
        """
        assert isinstance(features, Tensor)
        tiles_wh = tiles_wh_i2.tolist()
        planned = sum(1 + wide * high for wide, high in tiles_wh)
        if planned != features.shape[0]:
            raise ValueError(f"images of {tiles_wh} local tiles (wide, high) have {planned} tiles with thumbnails; got {features.shape[0]}")
        grids_nqqe = self.layers(self._shuffle(features))
        parts = [self.image_newline.expand(0, -1)]  # so that each parameter has a gradient, zero, where there is no image
        parts.append(self.view_seperator.expand(0, -1))
        first = 0
        for wide, high in tiles_wh:
            tiles = 1 + wide * high
            if wide and high:
                parts += self._layout(grids_nqqe[first : first + tiles], wide, high)
            first += tiles
        parts.append(grids_nqqe[first:].flatten(0, 2))
        return torch.cat(parts)

    def _shuffle(self, x_nld: Tensor) -> Tensor:
        """[n, grid * grid, d] -> [n, q, q, d * ratio ** 2], features ordered (d, row in square, column in square); zeros fill up."""
        pad = self.side * self.ratio - self.grid
        padded_nggd = F.pad(x_nld.unflatten(1, (self.grid, self.grid)), (0, 0, 0, pad, 0, pad))
        squares = padded_nggd.unflatten(2, (self.side, self.ratio)).unflatten(1, (self.side, self.ratio))  # [n, q, r, q, r, d]
        return squares.permute(0, 1, 3, 5, 2, 4).flatten(3)

    def _layout(self, grids_nqqe: Tensor, wide: int, high: int) -> list[Tensor]:
        """One image's 1 + wide * high tiles -> its embeddings, in pieces."""
        thumbnail_qqe, local_nqqe = grids_nqqe[0], grids_nqqe[1:]
        stitched = local_nqqe.unflatten(0, (high, wide)).transpose(1, 2).flatten(2, 3).flatten(0, 1)  # [high * q, wide * q, e]
        return [self._with_newlines(thumbnail_qqe), self.view_seperator[None], self._with_newlines(stitched)]

    def _with_newlines(self, rows: Tensor) -> Tensor:
        """[rows, columns, e] -> [rows * (columns + 1), e]."""
        newlines = self.image_newline.expand(rows.shape[0], 1, -1)
        return torch.cat([rows, newlines], dim=1).flatten(0, 1)


def check_one_tile_per_image(features_nld: Tensor, tiles_wh_i2: Tensor) -> None:
    """VL has one tile per image and no local tiles; raise ValueError otherwise."""
    if tiles_wh_i2.shape[0] != features_nld.shape[0]:
        raise ValueError(
            f"{features_nld.shape[0]} tiles for {tiles_wh_i2.shape[0]} images: this adaptor takes one tile per image; "
            "images in local tiles need model.adaptor.kind pixel_shuffle"
        )


def adaptor_flops(adaptor: AdaptorConfig, vision: VisionConfig, hidden_size: int) -> int:
    """Forward FLOPs on one tile; a multiply-add is two."""
    tokens, width, later = vision.siglip.tokens, vision.siglip.width, adaptor.depth - 1
    if vision.sam is None:
        if adaptor.kind == "pixel_shuffle":
            tokens, width = (-(-vision.siglip.grid // adaptor.downsample_ratio)) ** 2, width * adaptor.downsample_ratio**2
        return 2 * tokens * (width * hidden_size + later * hidden_size**2)
    both = width + vision.sam.downsample_widths[-1]
    if adaptor.concat != "embedding":
        return 2 * tokens * (both * hidden_size + later * hidden_size**2)
    half = hidden_size // 2
    return 2 * tokens * (both * half + later * (hidden_size**2 if adaptor.kind == "hybrid" else 2 * half**2))
