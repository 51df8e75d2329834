"""A language model that remembers: keys and values per layer and head, or MLA's latent per layer (VL2 §2).

All weights are the modules of the built Megatron model; only attention over the cache is ours, since Megatron's static cache stores MLA's
keys and values head by head, and its dynamic one needs CUDA kernels. A prompt is computed as in training, samples laid end to end;
afterwards each sample takes one token at a time, all samples together.

Shapes: t = tokens at hand, s = samples, h = language width, n = query heads, g = key/value heads, d = head width, l = positions so far,
r = MLA's latent width, p = MLA's rotary width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor, nn

from dsvl_train.models.moe import SampleMoELayer
from dsvl_train.models.vlm import LanguageChunk, pack


class TokenStore:
    """Rows of one width per sample and position; grows by half when full."""

    def __init__(self) -> None:
        self.rows: Tensor | None = None
        """[s, capacity, ...]; None before the first write."""

    def write(self, rows: Tensor, sample_t: Tensor, position_t: Tensor, samples: int, length: int) -> None:
        """Put rows [t, ...] at their samples' positions; `length` is the longest sample's then."""
        if self.rows is None or self.rows.shape[1] < length:
            capacity = length if self.rows is None else max(length, self.rows.shape[1] * 3 // 2)
            grown = rows.new_zeros(samples, capacity, *rows.shape[1:])
            if self.rows is not None:
                grown[:, : self.rows.shape[1]] = self.rows
            self.rows = grown
        self.rows[sample_t, position_t] = rows

    def read(self, length: int) -> Tensor:
        """[s, l, ...]: the first `length` positions."""
        assert self.rows is not None
        return self.rows[:, :length]

    def keep(self, samples: Tensor) -> None:
        """Forget all other samples."""
        if self.rows is not None:
            self.rows = self.rows[samples]


@dataclass(frozen=True)
class _Tokens:
    """Which tokens a forward pass computes."""

    sample_t: Tensor
    position_t: Tensor
    samples: int
    length: int
    """Of the longest sample, these tokens included."""
    prompts: PackedSeqParams | None
    """Where prompts start, when these are whole prompts; None for one more token of each sample."""
    visible_sl: Tensor | None
    """One more token of each: which stored positions belong to its sample."""


class _CachedAttention(ABC):
    """One layer's attention."""

    def __init__(self, attention: nn.Module, rotary: nn.Module) -> None:
        self.attention: Any = attention
        self.rotary: Any = rotary
        self.core: Any = attention.core_attention
        self.stores: list[TokenStore] = []

    def __call__(self, hidden_t1h: Tensor, tokens: _Tokens) -> Tensor:
        """[t, 1, h] -> [t, 1, h]; the tokens are stored."""
        context_td = self._attend(hidden_t1h[:, 0], tokens)
        output_t1h, _ = self.attention.linear_proj(context_td[:, None])
        return output_t1h

    @abstractmethod
    def _attend(self, hidden_th: Tensor, tokens: _Tokens) -> Tensor:
        """The heads' outputs [t, n * d], of hidden states [t, h]."""

    def _rotate(self, x_tnd: Tensor, position_t: Tensor, interleaved: bool) -> Tensor:
        """Rotary positions; `interleaved`: pairs are stored side by side, as the released MLA weights have them."""
        angles_td = position_t.float()[:, None] * self.rotary.inv_freq.to(position_t.device)
        cos, sin = (f(torch.cat([angles_td, angles_td], -1)).to(x_tnd.dtype)[:, None] for f in (torch.cos, torch.sin))
        if interleaved:
            x_tnd = torch.cat([x_tnd[..., 0::2], x_tnd[..., 1::2]], -1)
        first, second = x_tnd.chunk(2, -1)
        return x_tnd * cos + torch.cat([-second, first], -1) * sin

    def _of_prompts(self, query_tnd: Tensor, key_tgd: Tensor, value_tgd: Tensor, tokens: _Tokens) -> Tensor:
        """Attention as in training, [t, n * d]."""
        return self.core(query_tnd, key_tgd, value_tgd, None, packed_seq_params=tokens.prompts)


class HeadAttention(_CachedAttention):
    """Multi-head or grouped-query attention; stores rotated keys, and values, of each key/value head."""

    def __init__(self, attention: nn.Module, rotary: nn.Module) -> None:
        super().__init__(attention, rotary)
        self.keys, self.values = TokenStore(), TokenStore()
        self.stores = [self.keys, self.values]

    def _attend(self, hidden_th: Tensor, tokens: _Tokens) -> Tensor:
        query, key, value = (x[:, 0] for x in self.attention.get_query_key_value_tensors(hidden_th[:, None], None))
        query_tnd = self._rotate(query, tokens.position_t, interleaved=False)
        key_tgd = self._rotate(key, tokens.position_t, interleaved=False)
        for store, rows in ((self.keys, key_tgd), (self.values, value)):
            store.write(rows, tokens.sample_t, tokens.position_t, tokens.samples, tokens.length)
        if tokens.visible_sl is None:
            return self._of_prompts(query_tnd, key_tgd, value, tokens)
        out_sn1d = F.scaled_dot_product_attention(
            query_tnd[:, :, None],
            self.keys.read(tokens.length).transpose(1, 2),
            self.values.read(tokens.length).transpose(1, 2),
            attn_mask=tokens.visible_sl[:, None, None],
            scale=self.core.softmax_scale,
            enable_gqa=query_tnd.shape[1] != key_tgd.shape[1],
        )
        return out_sn1d.flatten(1)


class LatentAttention(_CachedAttention):
    """MLA; stores the normalised latent and the rotated shared key of each token, one row for all heads.

    One more token never sees keys or values: their up-projection moves to the query and to the output,
    q · (U c) = (Uᵀ q) · c and sum_l a_l (V c_l) = V sum_l a_l c_l.
    """

    def __init__(self, attention: nn.Module, rotary: nn.Module) -> None:
        super().__init__(attention, rotary)
        self.latents = TokenStore()
        self.stores = [self.latents]

    def _attend(self, hidden_th: Tensor, tokens: _Tokens) -> Tensor:
        attention, config = self.attention, self.attention.config
        query_tnd = attention.linear_q_proj(hidden_th)[0].unflatten(-1, (-1, config.qk_head_dim + config.qk_pos_emb_head_dim))
        plain_tnd, rotary_tnp = query_tnd.split([config.qk_head_dim, config.qk_pos_emb_head_dim], -1)
        rotary_tnp = self._rotate(rotary_tnp, tokens.position_t, interleaved=True)
        latent_tr, shared_tp = attention.linear_kv_down_proj(hidden_th)[0].split([config.kv_lora_rank, config.qk_pos_emb_head_dim], -1)
        latent_tr = attention.kv_layernorm(latent_tr)
        shared_tp = self._rotate(shared_tp[:, None], tokens.position_t, interleaved=True)[:, 0]
        rows = torch.cat([latent_tr, shared_tp], -1)
        self.latents.write(rows, tokens.sample_t, tokens.position_t, tokens.samples, tokens.length)
        if tokens.visible_sl is not None:
            return self._absorbed(plain_tnd, rotary_tnp, tokens.visible_sl)
        up_tnd = attention.linear_kv_up_proj(latent_tr)[0].unflatten(-1, (-1, config.qk_head_dim + config.v_head_dim))
        key_tnd, value_tnd = up_tnd.split([config.qk_head_dim, config.v_head_dim], -1)
        key_tnd = torch.cat([key_tnd, shared_tp[:, None].expand(-1, key_tnd.shape[1], -1)], -1)
        return self._of_prompts(torch.cat([plain_tnd, rotary_tnp], -1), key_tnd, value_tnd, tokens)

    def _absorbed(self, plain_snd: Tensor, rotary_snp: Tensor, visible_sl: Tensor) -> Tensor:
        config = self.attention.config
        up_ndr = self.attention.linear_kv_up_proj.weight.unflatten(0, (-1, config.qk_head_dim + config.v_head_dim))
        key_up_ndr, value_up_ndr = up_ndr.split([config.qk_head_dim, config.v_head_dim], 1)
        query_snw = torch.cat([torch.einsum("snd,ndr->snr", plain_snd, key_up_ndr), rotary_snp], -1)
        stored_slw = self.latents.read(visible_sl.shape[1])
        scores_snl = (query_snw @ stored_slw.transpose(1, 2)).float() * self.core.softmax_scale
        weights_snl = scores_snl.masked_fill(~visible_sl[:, None], float("-inf")).softmax(-1).to(stored_slw.dtype)
        context_snr = weights_snl @ stored_slw[..., : config.kv_lora_rank]
        return torch.einsum("snr,ndr->snd", context_snr, value_up_ndr).flatten(1)


class CachedLanguageModel:
    """Continues samples token by token. Takes all of their prompts first, then one token of each at a time.

    Attributes:
        lengths_s: tokens of each sample so far.
    """

    def __init__(self, chunk: LanguageChunk) -> None:
        self.chunk = chunk
        model: Any = chunk.language
        self.layers: list[Any] = list(model.decoder.layers)
        self.attentions: list[_CachedAttention] = []
        for layer in self.layers:
            attention = layer.self_attention
            if isinstance(attention, MLASelfAttention):
                self.attentions.append(LatentAttention(attention, attention.rotary_pos_emb))
            else:
                self.attentions.append(HeadAttention(attention, model.rotary_pos_emb))
        self.lengths_s: list[int] = []

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Around all calls: tensor-parallel ranks take all tokens each, since a step of one token per sample is not worth dividing (and not
        divisible); weights stay divided."""
        parts = [self.chunk, *self.chunk.modules()]
        configs = {id(config): config for part in parts if (config := getattr(part, "config", None)) is not None}.values()
        divided = [part for part in (*parts, *configs) if getattr(part, "sequence_parallel", False) is True]
        for part in divided:
            part.sequence_parallel = False
        try:
            yield
        finally:
            for part in divided:
                part.sequence_parallel = True

    @property
    def stored_values(self) -> int:
        """Numbers that the cache has room for, all layers together."""
        return sum(store.rows.numel() for attention in self.attentions for store in attention.stores if store.rows is not None)

    @torch.no_grad()
    def prefill(self, ids: Sequence[Tensor], image_masks: Sequence[Tensor], visual: Sequence[Tensor | None]) -> Tensor:
        """Take whole prompts: ids [t], image positions [t] and visual embeddings [v, h] (or None) of each. Returns what follows each:
        logits [s, vocabulary]."""
        assert not self.lengths_s, "prompts come first"
        device = next(self.chunk.parameters()).device
        self.lengths_s = [len(sample) for sample in ids]
        lengths = torch.tensor(self.lengths_s, device=device)
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        present = [part for part in visual if part is not None]
        hidden_t1h = self.chunk.embed(
            torch.cat(list(ids)).to(device),
            torch.cat(list(image_masks)).to(device) if present else None,
            torch.cat(present) if present else None,
        )
        tokens = _Tokens(
            sample_t=torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths),
            position_t=torch.cat([torch.arange(length, device=device) for length in self.lengths_s]),
            samples=len(lengths),
            length=max(self.lengths_s),
            prompts=pack(cu_seqlens),
            visible_sl=None,
        )
        return self._forward(hidden_t1h, tokens, last_s=cu_seqlens[1:].long() - 1)

    @torch.no_grad()
    def append(self, tokens_s: Sequence[int]) -> Tensor:
        """Take one more token of each sample. Returns what follows: logits [s, vocabulary]."""
        device = next(self.chunk.parameters()).device
        position_s = torch.tensor(self.lengths_s, device=device)
        self.lengths_s = [length + 1 for length in self.lengths_s]
        sample_s = torch.arange(len(tokens_s), device=device)
        longest = max(self.lengths_s)
        tokens = _Tokens(
            sample_t=sample_s,
            position_t=position_s,
            samples=len(tokens_s),
            length=longest,
            prompts=None,
            visible_sl=torch.arange(longest, device=device) <= position_s[:, None],
        )
        return self._forward(self.chunk.embed(torch.tensor(tokens_s, device=device), None, None), tokens, last_s=sample_s)

    def keep(self, samples: Sequence[int]) -> None:
        """Forget all samples but these, which are numbered anew in this order."""
        self.lengths_s = [self.lengths_s[sample] for sample in samples]
        chosen = torch.tensor(list(samples), device=next(self.chunk.parameters()).device)
        for attention in self.attentions:
            for store in attention.stores:
                store.keep(chosen)

    def _forward(self, hidden_t1h: Tensor, tokens: _Tokens, last_s: Tensor) -> Tensor:
        for layer, attention in zip(self.layers, self.attentions, strict=True):
            hidden_t1h = hidden_t1h + attention(layer.input_layernorm(hidden_t1h), tokens)
            normed_t1h = layer.pre_mlp_layernorm(hidden_t1h)
            if isinstance(layer.mlp, SampleMoELayer):
                out_t1h, _ = layer.mlp(normed_t1h, padding_mask=tokens.sample_t[None])
            else:
                out_t1h, _ = layer.mlp(normed_t1h)
            hidden_t1h = hidden_t1h + out_t1h
        model: Any = self.chunk.language
        hidden_s1h = model.decoder.final_layernorm(hidden_t1h[last_s])
        weight = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
        logits_s1v, _ = model.output_layer(hidden_s1h, weight=weight, runtime_gather_output=True)
        return logits_s1v[:, 0]
