"""SigLIP vision transformer: the only encoder of VL 1.3B and VL2, the low-resolution one of VL 7B (VL §3.1, VL2 §2).

Parameters carry the names and shapes of the released checkpoints (timm's), so import and export are a change of prefix.

Shapes: n = tiles, c = 3 channels, h/w = pixels, l = patch tokens of a tile (row by row), d = encoder width, a = attention heads,
k = width of a head.

Cutting it for a pipeline: `forward` is `finish(blocks(embed(pixels)))`. A rank that owns a part calls `keep`, which drops the other
parameters and leaves the names, global layer numbers included, as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dsvl_train.config.schema import SiglipConfig


def unit_pixels(pixels_nchw: Tensor) -> Tensor:
    """Pixels as float32 in [0, 1]: uint8 is divided by 255, floating point is taken to be in [0, 1] already."""
    return pixels_nchw.float() if pixels_nchw.is_floating_point() else pixels_nchw.float() / 255.0


def normalise_pixels(pixels_nchw: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(x - mean) / std per channel, in float32 (released code: ToTensor, then Normalize).

    Mean and standard deviation stay Python numbers: as buffers they would be rounded when the model is cast to bfloat16.
    """
    unit_nchw = unit_pixels(pixels_nchw)
    return torch.stack([(unit_nchw[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)


def check_pixels(pixels_nchw: Tensor, image_size: int, setting: str) -> None:
    """Raise ValueError unless the pixels are [n, 3, image_size, image_size]."""
    if pixels_nchw.ndim != 4 or tuple(pixels_nchw.shape[1:]) != (3, image_size, image_size):
        raise ValueError(
            f"pixels have shape {list(pixels_nchw.shape)}, the encoder takes [n, 3, {image_size}, {image_size}]: "
            f"make the processor's image size and {setting} agree"
        )


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(width) + bias) v over [tiles, heads, positions, width].

    A rank may have no tile. PyTorch's attention then forgets the gradient of the bias, so anything of the right shape that depends on
    all inputs takes its place, and every parameter has a (zero) gradient on every rank.
    """
    if q.shape[0]:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return q + k + v if bias is None else q + k + v + bias.sum(-1, keepdim=True)


def run_block(block: nn.Module, x: Tensor, recompute: bool) -> Tensor:
    """One transformer block; with `recompute` only its input is kept, and the block runs again in the backward pass."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)  # there is no dropout to replay
    return block(x)


class PatchEmbed(nn.Module):
    """Non-overlapping patches by a strided convolution, [n, c, h, w] -> [n, d, grid, grid]; an incomplete last patch is dropped."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, pixels_nchw: Tensor) -> Tensor:
        return self.proj(pixels_nchw.to(self.proj.weight.dtype))


class Attention(nn.Module):
    """Full self-attention among the patches of one tile."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_nld: Tensor) -> Tensor:
        qkv_nl3ak = self.qkv(x_nld).unflatten(-1, (3, self.heads, -1))
        q_nalk, k_nalk, v_nalk = qkv_nl3ak.permute(2, 0, 3, 1, 4).unbind(0)
        out_nalk = attend(q_nalk, k_nalk, v_nalk)
        return self.proj(out_nalk.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int, gelu: str) -> None:
        super().__init__()
        self.gelu_approximation = "tanh" if gelu == "tanh" else "none"
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x_nld: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_nld), approximate=self.gelu_approximation))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.attn = Attention(config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.mlp = Mlp(config.width, config.mlp_width, config.gelu)

    def forward(self, x_nld: Tensor) -> Tensor:
        x_nld = x_nld + self.attn(self.norm1(x_nld))
        return x_nld + self.mlp(self.norm2(x_nld))


class AttentionPool(nn.Module):
    """Storage of the attention-pooling head: released checkpoints hold its weights, no released model uses them.

    Its parameters never get a gradient. They exist so that an imported checkpoint can be exported whole.
    """

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.latent = nn.Parameter(torch.zeros(1, 1, config.width))
        self.q = nn.Linear(config.width, config.width)
        self.kv = nn.Linear(config.width, 2 * config.width)
        self.proj = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.mlp = Mlp(config.width, config.mlp_width, config.gelu)


class SiglipEncoder(nn.Module):
    """Patch features of the last layer after the final norm, all patches, no class token (released: select_layer -1, ignore_head).

    Raises ValueError when heads do not divide the width, or an image is smaller than a patch.
    """

    pos_embed: nn.Parameter | None
    patch_embed: PatchEmbed | None
    norm: nn.LayerNorm | None

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        if config.width % config.heads:
            raise ValueError(f"siglip.heads {config.heads} does not divide siglip.width {config.width}: change either")
        if config.grid < 1:
            raise ValueError(f"siglip.image_size {config.image_size} is smaller than siglip.patch_size {config.patch_size}: change either")
        self.config = config
        self.recompute = False
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.patch_embed = PatchEmbed(config.patch_size, config.width)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.tokens, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        if config.attention_pool:
            self.attn_pool: AttentionPool | None = AttentionPool(config)

    def forward(self, pixels_nchw: Tensor) -> Tensor:
        """uint8 (or float in [0, 1]) pixels [n, 3, image_size, image_size] -> features [n, tokens, width]."""
        return self.finish(self.run(self.embed(pixels_nchw), range(self.config.layers)))

    def embed(self, pixels_nchw: Tensor) -> Tensor:
        """Pixels -> patch tokens with positions [n, l, d], in the dtype of the parameters."""
        check_pixels(pixels_nchw, self.config.image_size, "siglip.image_size")
        assert self.patch_embed is not None and self.pos_embed is not None, "this part of the encoder was not kept"
        normalised_nchw = normalise_pixels(pixels_nchw, self.config.pixel_mean, self.config.pixel_std)
        return self.patch_embed(normalised_nchw).flatten(2).transpose(1, 2) + self.pos_embed

    def run(self, x_nld: Tensor, layers: range) -> Tensor:
        """The blocks of `layers`, in order."""
        for layer in layers:
            x_nld = run_block(self.blocks[layer], x_nld, self.recompute)
        return x_nld

    def finish(self, x_nld: Tensor) -> Tensor:
        """The final norm."""
        assert self.norm is not None, "this part of the encoder was not kept"
        return self.norm(x_nld)

    def keep(self, layers: range, *, embed: bool, finish: bool) -> None:
        """Drop the parameters of all but these layers, and of `embed` or `finish` where they are not wanted; names stay."""
        for layer in range(self.config.layers):
            if layer not in layers:
                self.blocks[layer] = nn.Identity()
        if not embed:
            self.patch_embed = self.pos_embed = None
        if not finish:
            self.norm = None
            if self.config.attention_pool:
                self.attn_pool = None


def siglip_block_flops(config: SiglipConfig) -> int:
    """Forward FLOPs of one block on one tile; a multiply-add is two, norms and activations are not counted."""
    dense = 2 * config.tokens * (4 * config.width**2 + 2 * config.width * config.mlp_width)
    attention = 4 * config.tokens**2 * config.width
    return dense + attention


def siglip_flops(config: SiglipConfig) -> int:
    """Forward FLOPs of the encoder on one tile; a multiply-add is two, norms and activations are not counted."""
    patches = 2 * config.tokens * 3 * config.patch_size**2 * config.width
    return patches + config.layers * siglip_block_flops(config)
