"""How an evaluation is divided over the ranks of a run, and how its numbers come together.

Data-parallel ranks take every so-manieth item. What ranks must do in step differs. Scoring goes in rounds: all ranks make the same number
of forward passes, those that have run out of items with one that does not count, since experts and pipelines want all their ranks.
Generation takes as many passes as answers are long, so ranks that share experts answer the same items, and agree on every token.

Results travel as sums of tables of zeros in which each rank has filled in its own items, so that every rank knows all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from dsvl_train.config.schema import ParallelConfig
from dsvl_train.parallel.startup import World


class EvaluationStopped(Exception):
    """A rank wished to stop; raised on all ranks in the same round."""


class Ranks:
    """This rank's part.

    Args:
        pulse: told what begins, for a watchdog.
        wants_stop: asked in every round; True on any rank ends the evaluation on all of them.
    """

    def __init__(
        self,
        world: World,
        parallel: ParallelConfig,
        pulse: Callable[[str], None] = lambda phase: None,
        wants_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.device, self.pulse, self._wants_stop = world.device, pulse, wants_stop
        self.is_main = world.is_main
        self.pp = parallel.pp
        self.dp_rank, self.dp_size = world.dp_rank, world.dp_size
        self.dp_in_step = math.lcm(parallel.tp, parallel.ep) // parallel.tp
        """Data-parallel ranks that share experts: they generate together."""
        first_of_tp = parallel_state.get_tensor_model_parallel_rank() == 0
        self.speaks = first_of_tp and parallel_state.is_pipeline_last_stage()
        """Of the ranks that hold the same items, this one's numbers count."""
        self._together: dist.ProcessGroup | None = None
        if self.dp_in_step > 1:
            self._together = parallel_state.get_expert_model_parallel_group()
        elif parallel.tp > 1:
            self._together = parallel_state.get_tensor_model_parallel_group()
        self._together_fits = self._together is None or self._together.size() == self.dp_in_step * parallel.tp

    def scored_here(self, items: int) -> range:
        """The items that this rank scores."""
        return range(self.dp_rank, items, self.dp_size)

    def answered_here(self, items: int) -> range:
        """The items that this rank answers.

        Raises:
            ValueError: this layout has no group of ranks that could generate together.
        """
        if not self._together_fits:
            raise ValueError(
                "generation wants parallel.ep to divide parallel.tp or to be a multiple of it; choose another, or score options"
            )
        return range(self.dp_rank // self.dp_in_step, items, self.dp_size // self.dp_in_step)

    @property
    def speaks_for_answers(self) -> bool:
        """As `speaks`, for generation."""
        return self.speaks and self.dp_rank % self.dp_in_step == 0

    def most(self, own: int) -> int:
        """The largest of all ranks' numbers.

        Raises:
            EvaluationStopped: a rank wishes to stop.
        """
        vector = torch.tensor([own, int(self._wants_stop())], device=self.device)
        dist.all_reduce(vector, op=dist.ReduceOp.MAX)
        most, stop = vector.tolist()
        if stop:
            raise EvaluationStopped
        return most

    def total(self, table: Tensor, speaks: bool) -> Tensor:
        """The sum of the speaking ranks' tables."""
        table = table.to(self.device) if speaks else torch.zeros_like(table, device=self.device)
        dist.all_reduce(table)
        return table.cpu()

    def agree(self, tokens: Sequence[int]) -> list[int]:
        """The first rank's choice of those that generate together: the last bit of a logit may differ between them."""
        if self._together is None or self._together.size() == 1:
            return list(tokens)
        vector = torch.tensor(tokens, device=self.device)
        dist.broadcast(vector, group_src=0, group=self._together)
        return vector.tolist()
