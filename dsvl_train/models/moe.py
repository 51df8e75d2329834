"""DeepSeekMoE routing over packed samples: Megatron's MoE layer with a load-balancing loss per sample.

The released gate balances each sequence on its own (`seq_aux`); Megatron's takes a whole micro-batch for one sequence, so its loss would
change with packing. Here the sequence is the sample, so the loss is the same however samples are packed, split into micro-batches or
spread over ranks.

Shapes: t = tokens on this rank (a shard of the micro-batch under sequence parallelism), e = experts, s = samples of the micro-batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

PADDING = -1
"""Sample number of a padding token."""


class SampleRouter(TopKRouter):
    """Megatron's top-k router; balances per sample, and leaves padding out of every count."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sample_ids_t: Tensor | None = None
        """Which sample each token belongs to, PADDING for none; set by `SampleMoELayer` for the forward pass at hand."""
        self.tokens_of_global_batch = 1.0
        """Tokens that the load-balancing loss is averaged over; set once per step."""
        self.register_buffer("load_e", torch.zeros_like(self.weight[:, 0], dtype=torch.float64).detach(), persistent=False)
        self.register_buffer("aux_loss", torch.zeros((), dtype=torch.float64, device=self.weight.device), persistent=False)

    def reset_statistics(self) -> None:
        """Start counting anew: tokens per expert and the load-balancing loss of the coming step."""
        self.load_e.zero_()
        self.aux_loss.zero_()

    def _apply_seq_aux_loss(
        self, probs: Tensor, scores_te: Tensor, routing_map_te: Tensor, seq_length: int, bsz: int, with_padding_mask: bool = False
    ) -> Tensor:
        """Attach weight * sum_s n_s * aux_s / N, the token-weighted mean over the samples of the global batch of

            aux_s = e * sum_e f_se * P_se,  f_se = tokens of s with e in the top k of their scores / (n_s * top_k),  P_se = mean score for e

        with scores free of the selection bias (the sigmoid router's divided by their sum). It is the released `seq_aux` where all samples
        are equally long. N counts the global batch's tokens, so that adding the micro-batches' and ranks' terms gives the mean; the
        cross-entropy is normalised the same way.
        """
        weight = self.get_aux_loss_coeff("seq_aux_loss")
        if weight == 0:
            return probs
        assert self.sample_ids_t is not None
        ids_t = self.sample_ids_t
        samples = ids_t.max().clamp(min=0)
        if self.tp_cp_group.size() > 1:
            dist.all_reduce(samples, op=dist.ReduceOp.MAX, group=self.tp_cp_group)
        size = int(samples) + 2  # the last row collects padding
        row_t = torch.where(ids_t == PADDING, size - 1, ids_t)
        counts_se = scores_te.new_zeros(size, scores_te.shape[1]).index_add_(0, row_t, routing_map_te.to(scores_te.dtype))[:-1]
        tokens_s = scores_te.new_zeros(size).index_add_(0, row_t, torch.ones_like(row_t, dtype=scores_te.dtype))[:-1]
        if self.tp_cp_group.size() > 1:
            dist.all_reduce(counts_se, group=self.tp_cp_group)
            dist.all_reduce(tokens_s, group=self.tp_cp_group)
        score_sum_se = scores_te.new_zeros(size, scores_te.shape[1]).index_add(0, row_t, scores_te)[:-1]
        per_sample_s = (counts_se * score_sum_se).sum(1) / tokens_s.clamp(min=1)
        aux = per_sample_s.sum() * (self.config.num_moe_experts / self.topk / self.tokens_of_global_batch)
        self.aux_loss += aux.detach().double()
        return MoEAuxLossAutoScaler.apply(probs, aux * weight)

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """Count tokens per expert for the statistics and the bias correction, once per training pass."""
        if not torch.is_grad_enabled():  # evaluation, or the first pass of activation recomputation
            return
        with torch.no_grad():
            counted = routing_map if padding_mask is None else routing_map & ~padding_mask.reshape(-1, 1)
            tokens_e = counted.sum(dim=0)
            self.load_e += tokens_e
            if self.enable_expert_bias:
                self.local_tokens_per_expert += tokens_e


class SampleMoELayer(MoELayer):
    """A MoE layer whose padding mask carries each token's sample number, so that it survives pipelines and recomputation."""

    moe_layer_recompute: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Megatron would recompute what comes after the sample numbers are set, with those of a later micro-batch
        self._recompute = self.moe_layer_recompute
        self.moe_layer_recompute = False

    def forward(self, hidden_states: Tensor, intermediate_tensors: Any = None, padding_mask: Tensor | None = None) -> Any:
        """`padding_mask` is int64 [1, t]: the token's sample number, PADDING where there is none."""
        assert padding_mask is not None
        if self._recompute and self.training:
            return tensor_parallel.checkpoint(self._route_and_compute, False, hidden_states, intermediate_tensors, padding_mask)
        return self._route_and_compute(hidden_states, intermediate_tensors, padding_mask)

    def _route_and_compute(self, hidden_states: Tensor, intermediate_tensors: Any, sample_ids: Tensor) -> Any:
        self.router.sample_ids_t = sample_ids.reshape(-1)
        return super().forward(hidden_states, intermediate_tensors, sample_ids == PADDING)
