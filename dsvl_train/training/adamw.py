"""AdamW with moments in half the memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

_AT_ONCE = 1 << 24
"""Elements of a parameter that are updated together: the fp32 copies of its moments stay small."""


class Bf16MomentsAdamW(torch.optim.AdamW):
    """AdamW that keeps both moments in bf16 and computes in fp32: an update uses the moments before they are rounded.

    The "BF16 optimizer" of VL2 Table 2, in DeepSeek-V3's words (§3.3.3): moments in bf16, main weights and gradients in fp32. A decay
    must be larger than bf16's rounding to happen at all, so both betas must be at most 1 - 2^-8.
    """

    @classmethod
    def in_place_of(cls, adam: torch.optim.Optimizer) -> Bf16MomentsAdamW:
        """Over the very groups of another Adam, which has no state yet; their tensors may be views, as Megatron's shares are."""
        ours = cls([torch.zeros(0)])
        ours.param_groups = adam.param_groups
        for group in ours.param_groups:
            group.setdefault("fused", None)
        return ours

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; `closure` must be None."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state |= zero_state(parameter, group, torch.bfloat16)
        beta1, beta2 = group["betas"]
        flat = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        for weight, gradient, *moments in zip(*(tensor.view(-1).split(_AT_ONCE) for tensor in flat), strict=True):
            exp_avg, exp_avg_sq = (moment.float() for moment in moments)
            adamw(
                [weight],
                [gradient],
                [exp_avg],
                [exp_avg_sq],
                [],
                [state["step"].clone()],
                fused=group["fused"],
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            for moment, updated in zip(moments, (exp_avg, exp_avg_sq), strict=True):
                moment.copy_(updated)
        state["step"] += 1


def zero_state(parameter: Tensor, group: dict[str, Any], moments: torch.dtype, steps: int = 0) -> dict[str, Tensor]:
    """The state of torch's AdamW after `steps` updates that left no moment."""
    return {
        "step": torch.tensor(float(steps), device=parameter.device if group.get("fused") else "cpu"),
        "exp_avg": torch.zeros_like(parameter, dtype=moments),
        "exp_avg_sq": torch.zeros_like(parameter, dtype=moments),
    }
