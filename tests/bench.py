"""A tiny model with everything that a training step needs, trained and saved by hand in one process."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from dsvl_train.parallel import startup
from tests.tiny import SOURCES, tiny_batch, tiny_run


class SavedActivations:
    """A context that counts what autograd keeps for the backward pass, `without` some tensors (the parameters)."""

    def __init__(self, without: Iterable[torch.Tensor] = ()) -> None:
        self._known = {tensor.untyped_storage().data_ptr() for tensor in without}
        self._kept: list[torch.Tensor] = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        self._kept.append(tensor.detach())
        return tensor

    def __enter__(self) -> SavedActivations:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def nbytes(self) -> int:
        """Bytes that are held now; Megatron empties some storages after they were saved."""
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in self._kept}
        return sum(size for place, size in storages.items() if place not in self._known)


class Bench:
    """A tiny model with its step, ready to be driven by hand."""

    def __init__(self, world: startup.World, family: str, **changes: Any) -> None:
        from dsvl_train.models.build import build_model
        from dsvl_train.training.setup import build_trainable
        from dsvl_train.training.step import TrainStep

        self.cfg = tiny_run(family)
        for key, value in changes.items():
            section, _, name = key.partition("__")
            setattr(getattr(self.cfg, section), name, value)
        self.model = build_model(self.cfg.model, self.cfg.stage, self.cfg.parallel, world, self.cfg.run.seed)
        self.chunks, self.optimiser = build_trainable(self.cfg, world, self.model)
        self.step = TrainStep(self.cfg, world, self.model, self.chunks, self.optimiser, SOURCES)
        self.done = 0

    def run(self, *modalities: str) -> list[dict[str, Any]]:
        records = []
        for modality in modalities:
            self.done += 1
            batch = tiny_batch(self.cfg.model, self.done, modality)  # type: ignore[arg-type]
            records.append(self.step(batch, self.cfg.optim.lr, stop_requested=False)[0])
        return records

    def state(self) -> dict[str, torch.Tensor]:
        """Every weight, buffer and moment."""
        state = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            stored = self.optimiser.state_of(parameter)
            for key, value in stored.tensors.items() if stored else ():
                state[f"{key} {name}"] = value.detach().clone()
        for index, router in enumerate(self.model.routers().values()):
            if router.expert_bias is not None:
                state[f"expert_bias {index}"] = router.expert_bias.clone()
        return state


def save(world: startup.World, bench: Bench, run_dir: Path, state: Any = None) -> Path:
    """Save the bench as a run would. Returns the checkpoint."""
    from dsvl_train.training import checkpoint

    (run_dir / "processor").mkdir(parents=True, exist_ok=True)
    (run_dir / "processor" / "processor_config.json").write_text("{}")
    bench.cfg.run.dir, bench.cfg.data.processor = str(run_dir), str(run_dir / "processor")
    state = state or checkpoint.TrainState(bench.done, {}, bench.optimiser.steps_taken(), 0)
    (folder,) = checkpoint.Saver(bench.cfg, world, bench.model, bench.optimiser).save(state, last=True)
    return folder


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in after if name not in before or not torch.equal(before[name], after[name])}
