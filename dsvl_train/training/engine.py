"""What the engines have in common: Megatron's (`training.optimiser`) and DeepSpeed's (`training.deepspeed_engine`).

An engine wraps the model's chunks, so that their gradients are summed over data-parallel ranks, and steps the parameters that a step's
modality reached. Everything else is the same for both: trainer, step, data, metrics, and the checkpoints, which know no engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import nn

from dsvl_train.data.batch import Modality
from dsvl_train.interop.native import Box
from dsvl_train.models.vlm import VisionLanguageModel

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state tensors, shaped like their parameter."""
MAIN = "main"
"""The fp32 weight that is updated where the model computes in bf16."""


class Chunk(Protocol):
    """A chunk of the model, called in its place. Megatron's schedules and `finalize_model_grads` take it as its own wrapper."""

    @property
    def module(self) -> nn.Module:
        """The chunk itself."""
        ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def zero_grad_buffer(self) -> None:
        """Forget the gradients of the step before."""
        ...

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Return when the gradients are summed over data-parallel ranks."""
        ...


class Optimiser(Protocol):
    """Steps the parameters that a step's modality reached."""

    def zero_grad(self, modality: Modality) -> None:
        """Drop the gradients of the parameters that this modality reaches."""
        ...

    def set_learning_rate(self, lr: float) -> dict[str, float]:
        """Set every group's rate to lr * multiplier. Returns multiplier (as text) -> rate, for the log."""
        ...

    def prepare(self, modality: Modality) -> float:
        """Take over the gradients. Returns their global norm; nothing is updated yet."""
        ...

    def update(self, modality: Modality, norm: float) -> None:
        """Clip the prepared gradients, whose global norm is `norm`, and update."""
        ...

    def steps_taken(self) -> dict[str, int]:
        """Updates of the `vision` and the `language` part so far; they differ by the text steps."""
        ...

    def whole_weights(self) -> AbstractContextManager[None]:
        """A context in which the model may be used outside of a step, and not by all ranks in step; every rank enters it."""
        ...

    def boxes(self, model: VisionLanguageModel) -> Iterator[tuple[str, Box]]:
        """Weights, buffers and the optimiser's state that this rank can write, by stored name; of a tensor there may be several boxes.

        A box is good until the next one is asked; every rank goes through all, since an engine may put tensors together on the way.
        """
        ...

    def restoring(self, model: VisionLanguageModel, updates: Mapping[str, int]) -> AbstractContextManager[list[tuple[str, Box]]]:
        """A context that gives the boxes to read a checkpoint into, and makes what they then hold the state of model and optimiser.

        Every rank enters and leaves it. `updates` is what `steps_taken` gave when the checkpoint was written.
        """
        ...
