"""What the distributed tests run on each rank; module-level functions, so that fresh processes can import them."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def train_tiny(
    family: str,
    parallel: dict[str, int],
    modalities: list[str],
    options: dict[str, Any] | None = None,
    faults: dict[int, str] | None = None,
) -> dict[str, Any]:
    """Train a tiny model for a few steps.

    Args:
        faults: step -> `nan` (its losses) or `skip` (it is judged to be a spike); such a step may not update.

    Returns losses, gradient norms, weights before and after by logical name with the optimiser's state, and what text steps changed of
    vision and adaptor.
    """
    from dsvl_train.parallel import startup
    from tests.tiny import SOURCES, tiny_batch, tiny_run

    cfg = tiny_run(family, **parallel)
    for key, value in (options or {}).items():
        *path, leaf = key.split(".")
        setattr(functools.reduce(getattr, path, cfg), leaf, value)
    world = startup.start(cfg.engine, cfg.parallel, seed=0)
    from dsvl_train.models.build import build_model
    from dsvl_train.models.costs import choose_division
    from dsvl_train.training.setup import build_trainable
    from dsvl_train.training.step import TrainStep

    model = build_model(cfg.model, cfg.stage, cfg.parallel, world, seed=0, division=choose_division(cfg))
    chunks, optimiser = build_trainable(cfg, world, model)
    step = TrainStep(cfg, world, model, chunks, optimiser, SOURCES)
    spoil(step, faults or {})
    initial = whole_tensors(optimiser.boxes(model))
    records: list[dict[str, Any]] = []
    touched: set[str] = set()
    sent = watch_encoder_gradients(cfg.model.language.hidden_size)
    for number, modality in enumerate(modalities, start=1):
        batch = tiny_batch(cfg.model, number, modality, world.dp_rank, world.dp_size)  # type: ignore[arg-type]
        before = of_vision(optimiser.boxes(model)) if modality == "text" else {}
        metrics, _ = step(batch, cfg.optim.lr, stop_requested=False)
        after = of_vision(optimiser.boxes(model)) if modality == "text" else {}
        touched |= {name for name, tensor in after.items() if not tensor.equal(before[name])}
        records.append(metrics)
    result = {"records": records, "initial": initial, "weights": whole_tensors(optimiser.boxes(model)), "updates": optimiser.steps_taken()}
    startup.stop()
    return (result if world.is_main else {"records": records}) | {"encoder_gradients_sent": len(sent), "touched_by_text": touched}


def spoil(step: Any, faults: dict[int, str]) -> None:
    """Make steps fail as `faults` says."""
    from dsvl_train.training.guards import Verdict

    loss, judge = step._loss, step.guard.judge
    now = {"step": 0}

    def spoiled_loss(*inputs: Any) -> Any:
        return loss(*inputs[:-1], inputs[-1] * (float("nan") if faults.get(now["step"]) == "nan" else 1.0))

    def spoiled_judge(number: int, *rest: Any) -> Verdict:
        return Verdict(False, "as told") if faults.get(number) == "skip" else judge(number, *rest)

    def note_step(number: int, phase: str) -> None:
        now["step"] = number

    step._loss, step.guard.judge, step._pulse = spoiled_loss, spoiled_judge, note_step


def of_vision(boxes: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Copies of this rank's tensors of encoder and adaptor, the optimiser's among them."""
    return {name: box.local.clone() for name, box in boxes if ".vision." in name or ".adaptor." in name}


def watch_encoder_gradients(hidden_size: int) -> list[tuple[int, ...]]:
    """Shapes of the encoder states' gradients that go to the previous pipeline rank; grows as the model trains."""
    from dsvl_train.parallel import gloo_pipeline

    sent: list[tuple[int, ...]] = []
    send = gloo_pipeline.GlooCommunicator._send

    def watched(self: Any, tensor: Any, rank: Any, tag: int) -> None:
        if tensor is not None and tag == gloo_pipeline._BACKWARD and tensor.numel() and tensor.shape[-1] != hidden_size:
            sent.append(tuple(tensor.shape))
        send(self, tensor, rank, tag)

    gloo_pipeline.GlooCommunicator._send = watched  # type: ignore[method-assign]
    return sent


def count_encoded(parallel: dict[str, Any], tiles_mr: list[list[int]]) -> dict[str, Any]:
    """One image step of a tiny VL2 over images of `tiles_mr[micro-batch][data-parallel rank]` tiles. Returns what this rank encoded and the
    order in which it sent pixels and encoded."""
    from dsvl_train.parallel import startup
    from tests.tiny import SOURCES, image_batch, tiny_run

    cfg = tiny_run("vl2", **parallel)
    world = startup.start(cfg.engine, cfg.parallel, seed=0)
    import torch.distributed as dist

    from dsvl_train.models.build import build_model
    from dsvl_train.training.setup import build_trainable
    from dsvl_train.training.step import TrainStep

    model = build_model(cfg.model, cfg.stage, cfg.parallel, world, seed=0)
    chunks, optimiser = build_trainable(cfg, world, model)
    step = TrainStep(cfg, world, model, chunks, optimiser, SOURCES)
    encoded, order, exchange = [], [], dist.all_to_all_single

    def exchange_and_note(out: Any, rows: Any, *args: Any, **kwargs: Any) -> Any:
        order.append("pixels" if rows.ndim == 4 else "rows")
        return exchange(out, rows, *args, **kwargs)

    def note_encoding(block: Any, inputs: Any) -> None:
        order.append("encode")
        encoded.append(inputs[0].shape[0])

    dist.all_to_all_single = exchange_and_note
    model.vision.vision.siglip.blocks[0].register_forward_pre_hook(note_encoding)
    batch = image_batch(cfg.model, [micro[world.dp_rank] for micro in tiles_mr], seed=world.dp_rank)
    metrics, _ = step(batch, 1e-3, stop_requested=False)
    startup.stop()
    imbalance, order = metrics.get("tile_imbalance_encoded"), [what for what in order if what != "rows"]
    return {"encoded": sum(encoded), "loss": metrics["loss"], "tile_imbalance_encoded": imbalance, "order": order}


def whole_tensors(boxes: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Weights (by their logical name) and the optimiser's tensors, put together from all ranks, as numpy arrays."""
    import torch
    import torch.distributed as dist

    mine = [(name.removeprefix("model."), box.whole, box.offset, box.local.to(torch.float32, copy=True).numpy()) for name, box in boxes]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    whole: dict[str, Any] = {}
    for rank in everyone:
        for name, shape, offset, box in rank:
            target = whole.setdefault(name, torch.full(shape, float("nan")).numpy())
            target[tuple(slice(o, o + n) for o, n in zip(offset, box.shape, strict=True))] = box
    return whole


class TinyRun:
    """A tiny run on this rank, driven by hand."""

    def __init__(self, family: str, parallel: dict[str, Any], run_dir: str, change: Any = None, **checkpoint: Any) -> None:
        """`change`, a function, may change the configuration; `checkpoint` holds its settings of that section."""
        from dsvl_train.parallel import startup
        from tests.tiny import tiny_run

        self.cfg = tiny_run(family, run_dir, **parallel)
        if change is not None:
            change(self.cfg)
        self.cfg.data.processor = f"{run_dir}/processor"
        for key, value in checkpoint.items():
            setattr(self.cfg.checkpoint, key, value)
        self.world = startup.start(self.cfg.engine, self.cfg.parallel, seed=0)
        self.build(seed=0)

    def build(self, seed: int) -> None:
        from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

        from dsvl_train.models.build import build_model
        from dsvl_train.models.costs import choose_division
        from dsvl_train.training import checkpoint
        from dsvl_train.training.setup import build_trainable
        from dsvl_train.training.step import TrainStep
        from tests.tiny import SOURCES

        MoEAuxLossAutoScaler.main_loss_backward_scale = None
        cfg, world = self.cfg, self.world
        self.model = build_model(cfg.model, cfg.stage, cfg.parallel, world, seed, choose_division(cfg))
        chunks, self.optimiser = build_trainable(cfg, world, self.model)
        self.step = TrainStep(cfg, world, self.model, chunks, self.optimiser, SOURCES)
        self.saver = checkpoint.Saver(cfg, world, self.model, self.optimiser)
        self.done = 0

    def train(self, modalities: list[str]) -> list[float]:
        from tests.tiny import tiny_batch

        losses = []
        for modality in modalities:
            self.done += 1
            batch = tiny_batch(self.cfg.model, self.done, modality, self.world.dp_rank, self.world.dp_size)  # type: ignore[arg-type]
            losses.append(self.step(batch, self.cfg.optim.lr, stop_requested=False)[0]["loss"])
        return losses

    def save(self, *, last: bool = False) -> list[Path]:
        from dsvl_train.training.checkpoint import TrainState

        return self.saver.save(TrainState(self.done, {}, self.optimiser.steps_taken(), 0), last=last)
