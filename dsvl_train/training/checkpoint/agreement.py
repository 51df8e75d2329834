"""Small questions that all ranks answer together, so that they do the same next. Every rank calls each of these."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def all_agree(mine: bool, device: torch.device) -> bool:
    """Whether every rank says yes."""
    votes = torch.tensor(int(mine), device=device)
    dist.all_reduce(votes, op=dist.ReduceOp.MIN)
    return bool(votes)


def gather(mine: T) -> list[T]:
    """What each rank says, by rank."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def from_main(act: Callable[[], T]) -> T:
    """Rank 0 acts, every rank gets the result.

    Raises:
        ValueError, OSError: what rank 0 met, in words, on every rank.
    """
    answer: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            answer = [(act(), None)]
        except OSError as error:
            answer = [(None, OSError(str(error)))]
        except ValueError as error:
            answer = [(None, ValueError(str(error)))]
    dist.broadcast_object_list(answer, src=0)
    result, problem = answer[0]
    if problem is not None:
        raise problem
    return result
