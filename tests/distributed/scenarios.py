"""What the distributed tests run on each rank; module-level functions, so that fresh processes can import them."""

from __future__ import annotations

import functools
from typing import Any


def train_tiny(family: str, parallel: dict[str, int], modalities: list[str], options: dict[str, Any] | None = None) -> dict[str, Any]:
    """Train a tiny model for a few steps. Returns losses, gradient norms, and the whole final weights by logical name."""
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
    initial = whole_weights(model)
    records = []
    sent = watch_encoder_gradients(cfg.model.language.hidden_size)
    for number, modality in enumerate(modalities, start=1):
        batch = tiny_batch(cfg.model, number, modality, world.dp_rank, world.dp_size)  # type: ignore[arg-type]
        metrics, _ = step(batch, cfg.optim.lr, stop_requested=False)
        records.append(metrics)
    result = {"records": records, "initial": initial, "weights": whole_weights(model), "updates": optimiser.steps_taken()}
    startup.stop()
    return (result if world.is_main else {"records": records}) | {"encoder_gradients_sent": len(sent)}


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
    """One image step of a tiny VL2 over images of `tiles_mr[micro-batch][data-parallel rank]` tiles. Returns what this rank encoded."""
    from dsvl_train.parallel import startup
    from tests.tiny import SOURCES, image_batch, tiny_run

    cfg = tiny_run("vl2", **parallel)
    world = startup.start(cfg.engine, cfg.parallel, seed=0)
    from dsvl_train.models.build import build_model
    from dsvl_train.training.setup import build_trainable
    from dsvl_train.training.step import TrainStep

    model = build_model(cfg.model, cfg.stage, cfg.parallel, world, seed=0)
    chunks, optimiser = build_trainable(cfg, world, model)
    step = TrainStep(cfg, world, model, chunks, optimiser, SOURCES)
    encoded = []
    model.vision.vision.siglip.blocks[0].register_forward_pre_hook(lambda block, inputs: encoded.append(inputs[0].shape[0]))
    batch = image_batch(cfg.model, [micro[world.dp_rank] for micro in tiles_mr], seed=world.dp_rank)
    metrics, _ = step(batch, 1e-3, stop_requested=False)
    startup.stop()
    return {"encoded": sum(encoded), "loss": metrics["loss"], "tile_imbalance_encoded": metrics.get("tile_imbalance_encoded")}


def whole_weights(model: Any) -> dict[str, Any]:
    """Every logical tensor of the model, put together from all ranks, as numpy arrays."""
    import torch
    import torch.distributed as dist

    from dsvl_train.models.logical import logical_tensors

    mine = [(t.name, t.shape, t.offset, t.of(local.detach()).clone().numpy()) for t, local in logical_tensors(model)]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    whole: dict[str, Any] = {}
    for rank in everyone:
        for name, shape, offset, box in rank:
            target = whole.setdefault(name, torch.full(shape, float("nan")).numpy())
            target[tuple(slice(o, o + n) for o, n in zip(offset, box.shape, strict=True))] = box
    return whole
