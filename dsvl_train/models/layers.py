"""Layers that Megatron's local specs lack: a norm for sequence parallelism and attention over packed samples.

Shapes: t = tokens of a micro-batch (samples laid end to end), n = heads, d = head width.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor, nn

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:  # an optional extra; CUDA only
    flash_attn_varlen_func = None


class RMSNorm(nn.Module):
    """Root-mean-square norm; under sequence parallelism its gradient is summed over tensor-parallel ranks."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class ReplicatedLinear(nn.Module):
    """A linear layer that every tensor-parallel rank holds whole and applies to its share of the sequence; gradients are summed."""

    def __init__(self, config: Any, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Return the product and Megatron's place for a bias."""
        return F.linear(x, self.weight), None


class PackedAttention(nn.Module):
    """Causal attention inside each sample of a packed sequence: a block-causal mask that is never built.

    Takes Megatron's core-attention signature, MLA's different key and value widths included. flash-attn where it is installed and the
    tensors are half precision on CUDA; else torch's scaled-dot-product attention sample by sample, whose work is the sum of squared
    sample lengths, as flash-attn's is.
    """

    def __init__(self, config: Any, layer_number: int, *_: Any, softmax_scale: float | None = None, **__: Any) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query_tnd: Tensor,
        key_tnd: Tensor,
        value_tnd: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> Tensor:
        """Return [t, n * d_value]. `attention_mask` is unused: `packed_seq_params.cu_seqlens_q` says where samples start."""
        assert packed_seq_params is not None, "training and scoring always pack"
        cu_seqlens = packed_seq_params.cu_seqlens_q
        width = value_tnd.shape[-1]
        if width < query_tnd.shape[-1]:  # MLA: the kernels want one width; zero columns add nothing
            value_tnd = F.pad(value_tnd, (0, query_tnd.shape[-1] - width))
        if flash_attn_varlen_func is not None and query_tnd.is_cuda and query_tnd.dtype in (torch.float16, torch.bfloat16):
            out_tnd = self._flash(query_tnd, key_tnd, value_tnd, packed_seq_params)
        else:
            out_tnd = self._sample_by_sample(query_tnd, key_tnd, value_tnd, cu_seqlens.tolist())
        return out_tnd[..., :width].flatten(1)

    def _flash(self, q: Tensor, k: Tensor, v: Tensor, packed: PackedSeqParams) -> Tensor:
        return flash_attn_varlen_func(
            q,
            k,
            v,
            packed.cu_seqlens_q,
            packed.cu_seqlens_kv,
            packed.max_seqlen_q,
            packed.max_seqlen_kv,
            softmax_scale=self.softmax_scale,
            causal=True,
        )

    def _sample_by_sample(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: list[int]) -> Tensor:
        # [1, n, t, d]: without a batch dimension torch keeps all attention probabilities, whose memory grows with the square of the length
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        outs = [
            F.scaled_dot_product_attention(
                q[:, :, start:end], k[:, :, start:end], v[:, :, start:end], is_causal=True, scale=self.softmax_scale, enable_gqa=grouped
            )
            for start, end in itertools.pairwise(cu_seqlens)
        ]
        return torch.cat(outs, dim=2)[0].transpose(0, 1)
