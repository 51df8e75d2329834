"""SAM-B's ViTDet encoder with DeepSeek-VL's neck: the high-resolution half of the hybrid tower (VL §3.1; released sam_b_downsample).

Parameters carry the names and shapes of the released checkpoint.

Shapes: n = tiles, c = 3 channels, h/w = pixels, g = patches along a side, d = encoder width, m = neck width, b = attention windows of
all tiles, s = side of a window (g in a global layer), a = attention heads, k = width of a head, l = output tokens, e = output width.

The output adds, weighted by a learned scalar, a second branch that starts from the output of the *first global layer*. So what
travels from block to block, and between the ranks of a pipeline, is a `SamState`: the running feature map and, once that layer is
passed, its output.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsvl_train.config.schema import SamConfig
from dsvl_train.models.siglip import PatchEmbed, attend, check_pixels, normalise_pixels, run_block


class SamState(NamedTuple):
    """What one block hands to the next."""

    x_nggd: Tensor
    hd_nggd: Tensor | None = None
    """Output of the first global layer; None before it."""


def partition_windows(x_nggd: Tensor, window: int) -> Tensor:
    """Feature maps [n, g, g, d] -> windows [b, window, window, d]; zeros fill up the bottom and the right."""
    n, g, _, d = x_nggd.shape
    pad = -g % window
    per_side = (g + pad) // window
    padded = F.pad(x_nggd, (0, 0, 0, pad, 0, pad))
    return padded.view(n, per_side, window, per_side, window, d).transpose(2, 3).reshape(n * per_side**2, window, window, d)


def merge_windows(x_bssd: Tensor, grid: int) -> Tensor:
    """Undo `partition_windows`: windows -> feature maps [n, grid, grid, d] without the filling."""
    b, window, _, d = x_bssd.shape
    per_side = -(-grid // window)
    n = b // per_side**2
    padded = x_bssd.view(n, per_side, per_side, window, window, d).transpose(2, 3)
    return padded.reshape(n, per_side * window, per_side * window, d)[:, :grid, :grid]


def relative_table(rel_pos: Tensor, side: int) -> Tensor:
    """[2 * side - 1, k] embeddings of the distances -(side - 1) .. side - 1 -> [query, key, k]: row query - key of each pair."""
    at = torch.arange(side, device=rel_pos.device)
    return rel_pos[at[:, None] - at[None, :] + side - 1]


class Attention(nn.Module):
    """Self-attention on a side x side grid with decomposed relative positions (MViTv2).

    softmax(q k^T / sqrt(k) + q . R_h[row distance] + q . R_w[column distance]) v, where the position terms take the unscaled q.
    """

    def __init__(self, width: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, width // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, width // heads))

    def forward(self, x_bssd: Tensor) -> Tensor:
        side = x_bssd.shape[1]
        qkv = self.qkv(x_bssd.flatten(1, 2)).unflatten(-1, (3, self.heads, -1))
        q_batk, k_batk, v_batk = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # t = s * s positions
        q_bassk = q_batk.unflatten(2, (side, side))
        bias_h = torch.einsum("bahwk,hik->bahwi", q_bassk, relative_table(self.rel_pos_h, side))
        bias_w = torch.einsum("bahwk,wjk->bahwj", q_bassk, relative_table(self.rel_pos_w, side))
        bias_batt = (bias_h[..., :, None] + bias_w[..., None, :]).flatten(4, 5).flatten(2, 3)
        out_batk = attend(q_batk, k_batk, v_batk, bias_batt)
        return self.proj(out_batk.transpose(1, 2).flatten(2)).unflatten(1, (side, side))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.lin1 = nn.Linear(width, hidden)
        self.lin2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(F.gelu(self.lin1(x)))


class Block(nn.Module):
    """Pre-norm transformer block; attention within windows of `window` patches, or over the whole grid when `window` is 0.

    The zeros that fill up the last windows come after the norm and take part as keys, as they do in the released encoder.
    """

    def __init__(self, config: SamConfig, window: int) -> None:
        super().__init__()
        self.window = window
        self.norm1 = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.attn = Attention(config.width, config.heads, window or config.grid)
        self.norm2 = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.mlp = Mlp(config.width, int(config.width * config.mlp_ratio))

    def forward(self, x_nggd: Tensor) -> Tensor:
        normed = self.norm1(x_nggd)
        x_nggd = x_nggd + (self._attend_in_windows(normed) if self.window else self.attn(normed))
        return x_nggd + self.mlp(self.norm2(x_nggd))

    def _attend_in_windows(self, x_nggd: Tensor) -> Tensor:
        return merge_windows(self.attn(partition_windows(x_nggd, self.window)), x_nggd.shape[1])


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of [n, m, g, g]."""

    def forward(self, x_nmgg: Tensor) -> Tensor:
        return super().forward(x_nmgg.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def build_neck(config: SamConfig) -> nn.Sequential:
    """1x1 and 3x3 convolutions to the neck width, each with a norm."""
    return nn.Sequential(
        nn.Conv2d(config.width, config.neck_width, kernel_size=1, bias=False),
        LayerNorm2d(config.neck_width, eps=config.layer_norm_eps),
        nn.Conv2d(config.neck_width, config.neck_width, kernel_size=3, padding=1, bias=False),
        LayerNorm2d(config.neck_width, eps=config.layer_norm_eps),
    )


def check_sam(config: SamConfig) -> None:
    """Raise ValueError with the values and the setting to change when the encoder cannot be built."""
    if config.width % config.heads:
        raise ValueError(f"sam.heads {config.heads} does not divide sam.width {config.width}: change either")
    if config.image_size % config.patch_size:
        raise ValueError(f"sam.patch_size {config.patch_size} does not divide sam.image_size {config.image_size}: change either")
    if not config.global_layers or not all(0 <= layer < config.layers for layer in config.global_layers):
        raise ValueError(f"sam.global_layers {config.global_layers} must name at least one layer of 0 .. {config.layers - 1} (sam.layers)")
    if config.window < 1:
        raise ValueError(f"sam.window is {config.window}, a window has at least one patch: raise it")
    if len(config.downsample_widths) != 2:
        raise ValueError(f"sam.downsample_widths {config.downsample_widths} must name the widths of two convolutions")


class SamEncoder(nn.Module):
    """High-resolution features of the padded image, as many tokens as SigLIP gives (64x64 patches -> 96x96 -> 24x24 = 576).

    Raises ValueError for a configuration that does not fit together (see `check_sam`).
    """

    patch_embed: PatchEmbed | None
    pos_embed: nn.Parameter | None
    neck: nn.Sequential | None
    neck_hd: nn.Sequential | None
    downsamples: nn.Sequential | None
    hd_alpha_downsamples: nn.Parameter | None

    def __init__(self, config: SamConfig) -> None:
        super().__init__()
        check_sam(config)
        self.config = config
        self.hd_layer = min(config.global_layers)
        self.recompute = False
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.patch_embed = PatchEmbed(config.patch_size, config.width)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.grid, config.grid, config.width))
        windows = (0 if layer in config.global_layers else config.window for layer in range(config.layers))
        self.blocks = nn.ModuleList(Block(config, window) for window in windows)
        self.neck = build_neck(config)
        self.neck_hd = build_neck(config)
        widths = [config.neck_width, *config.downsample_widths]
        self.downsamples = nn.Sequential(*(nn.Conv2d(i, o, kernel_size=3, stride=2, padding=1, bias=False) for i, o in pairwise(widths)))
        self.hd_alpha_downsamples = nn.Parameter(torch.zeros(1))

    def forward(self, pixels_nchw: Tensor) -> Tensor:
        """uint8 (or float in [0, 1]) pixels [n, 3, image_size, image_size] -> features [n, output_grid ** 2, downsample_widths[-1]]."""
        return self.finish(self.run(self.embed(pixels_nchw), range(self.config.layers)))

    def embed(self, pixels_nchw: Tensor) -> SamState:
        """Pixels -> patch features with positions [n, g, g, d], in the dtype of the parameters."""
        check_pixels(pixels_nchw, self.config.image_size, "sam.image_size")
        assert self.patch_embed is not None and self.pos_embed is not None, "this part of the encoder was not kept"
        normalised_nchw = normalise_pixels(pixels_nchw, self.config.pixel_mean, self.config.pixel_std)
        return SamState(self.patch_embed(normalised_nchw).permute(0, 2, 3, 1).contiguous() + self.pos_embed)

    def run(self, state: SamState, layers: range) -> SamState:
        """The blocks of `layers`, in order; remembers the output of the first global layer."""
        x_nggd, hd_nggd = state
        for layer in layers:
            x_nggd = run_block(self.blocks[layer], x_nggd, self.recompute)
            if layer == self.hd_layer:
                hd_nggd = x_nggd
        return SamState(x_nggd, hd_nggd)

    def finish(self, state: SamState) -> Tensor:
        """Both necks, interpolation, the shared stride-2 convolutions, the weighted sum -> [n, l, e]."""
        assert self.neck is not None and self.neck_hd is not None, "this part of the encoder was not kept"
        assert self.downsamples is not None and self.hd_alpha_downsamples is not None
        assert state.hd_nggd is not None, "the first global layer has not run"
        main_negg = self._downsample(self.neck(state.x_nggd.permute(0, 3, 1, 2)))
        hd_negg = self._downsample(self.neck_hd(state.hd_nggd.permute(0, 3, 1, 2)))
        return (main_negg + hd_negg * self.hd_alpha_downsamples).flatten(2).transpose(1, 2)

    def _downsample(self, x_nmgg: Tensor) -> Tensor:
        """Neck output [n, m, g, g] -> [n, e, output_grid, output_grid]; interpolates in float32 as the released code does."""
        assert self.downsamples is not None
        size = (self.config.interpolate_to, self.config.interpolate_to)
        resized = F.interpolate(x_nmgg.float(), size=size, mode="bilinear", align_corners=False)
        return self.downsamples(resized.to(x_nmgg.dtype))

    def keep(self, layers: range, *, embed: bool, finish: bool) -> None:
        """Drop the parameters of all but these layers, and of `embed` or `finish` where they are not wanted; names stay."""
        for layer in range(self.config.layers):
            if layer not in layers:
                self.blocks[layer] = nn.Identity()
        if not embed:
            self.patch_embed = self.pos_embed = None
        if not finish:
            self.neck = self.neck_hd = self.downsamples = self.hd_alpha_downsamples = None


def sam_block_flops(config: SamConfig, layer: int) -> int:
    """Forward FLOPs of block `layer` on one tile; a multiply-add is two, norms and activations are not counted.

    In a windowed layer attention runs on the filled-up grid (64 -> 70 patches a side), whose filling takes part as keys.
    """
    side = config.grid if layer in config.global_layers else config.window
    windows = 1 if layer in config.global_layers else (-(-config.grid // config.window)) ** 2
    positions = windows * side**2
    projections = 2 * positions * 4 * config.width**2
    attention = 4 * positions * side**2 * config.width
    relative = 2 * 2 * positions * side * config.width
    mlp = 2 * config.grid**2 * 2 * config.width * int(config.width * config.mlp_ratio)
    return projections + attention + relative + mlp


def sam_flops(config: SamConfig) -> int:
    """Forward FLOPs of the encoder on one tile, necks and convolutions of both branches included; a multiply-add is two."""
    patches = 2 * config.grid**2 * 3 * config.patch_size**2 * config.width
    blocks = sum(sam_block_flops(config, layer) for layer in range(config.layers))
    neck = 2 * config.grid**2 * (config.width * config.neck_width + 9 * config.neck_width**2)
    half, quarter = (config.interpolate_to + 1) // 2, config.output_grid
    first, second = config.downsample_widths
    convolutions = 2 * 9 * (half**2 * config.neck_width * first + quarter**2 * first * second)
    return patches + blocks + 2 * (neck + convolutions)
