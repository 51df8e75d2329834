"""Seconds of each kind of layer on this device, for the pipeline's planner.

One layer of each kind is built, whole and with random weights, and run forward on made-up input; equal layers get equal costs.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from torch import nn

from dsvl_train.config.schema import ModelConfig, ParallelConfig, StageConfig
from dsvl_train.models.adaptors import build_adaptor
from dsvl_train.models.costs import MeasuredCosts
from dsvl_train.models.language import transformer_config
from dsvl_train.models.sam_vitdet import SamState
from dsvl_train.models.vision import VisionState, VisionTower
from dsvl_train.models.vlm import LanguageChunk
from dsvl_train.parallel.startup import World

REPEATS = 5
"""Timed runs, after one that is not; the median counts."""


@torch.no_grad()
def measure_layers(model: ModelConfig, stage: StageConfig, seq_len: int, tiles: int, world: World) -> MeasuredCosts:
    """Time every kind of layer on a sequence of `seq_len` tokens, and on `tiles` tiles at once.

    The process is alone: no tensor, pipeline or expert parallelism.
    """
    siglip, sam, vision_head = _vision(model, tiles, world)
    language, language_head = _language(model, stage, seq_len, world)
    return MeasuredCosts(seq_len, siglip, sam, vision_head, language, language_head)


def _vision(model: ModelConfig, tiles: int, world: World) -> tuple[list[float], list[float], float]:
    """Seconds of one tile: per layer of SigLIP, per layer of SAM, and of what follows them."""
    config = copy.deepcopy(model.vision)
    config.siglip.layers = 1
    if config.sam is not None:
        config.sam.layers, config.sam.global_layers = 2, [1]  # one layer of each kind
    tower = VisionTower(config).to(world.device, world.params_dtype)
    adaptor = build_adaptor(model.adaptor, config, model.language.hidden_size).to(world.device, world.params_dtype)
    pixels_nchw = torch.zeros(tiles, 3, tower.image_size, tower.image_size, dtype=torch.uint8, device=world.device)
    tiles_wh = torch.tensor([[tiles - 1, 1]]) if model.family == "vl2" else torch.zeros(tiles, 2, dtype=torch.int64)
    state = tower.embed(pixels_nchw)
    siglip_block = _seconds(lambda: tower.siglip.run(state.siglip_nld, range(1)), world) / tiles
    sam: list[float] = []
    if model.vision.sam is not None and tower.sam is not None and state.sam is not None:
        encoder, x_nggd = tower.sam, state.sam.x_nggd
        windowed, whole = (_seconds(partial(block, x_nggd), world) / tiles for block in encoder.blocks)
        sam = [whole if layer in model.vision.sam.global_layers else windowed for layer in range(model.vision.sam.layers)]
        state = VisionState(state.siglip_nld, SamState(x_nggd, x_nggd))
    head = _seconds(lambda: adaptor(tower.finish(state), tiles_wh), world) / tiles
    return [siglip_block] * model.vision.siglip.layers, sam, head


def _language(model: ModelConfig, stage: StageConfig, seq_len: int, world: World) -> tuple[list[float], float]:
    """Seconds of one sequence: per layer, and of final norm, output layer and loss."""
    config = copy.deepcopy(model)
    dense = config.language.layers if config.language.moe is None else config.language.moe.dense_layers
    config.language.layers = 2 if 0 < dense < model.language.layers else 1  # one layer of each kind
    if config.language.moe is not None:
        config.language.moe.dense_layers = min(dense, 1)
    on_cpu = world.device.type == "cpu"
    settings = transformer_config(config.language, stage, ParallelConfig(), world.params_dtype, on_cpu)
    chunk = LanguageChunk(config, settings, range(config.language.layers), vp_stage=None)
    for parameter in chunk.parameters():
        nn.init.normal_(parameter, std=config.language.init_std)
    chunk.to(world.device)
    timer = _LayerTimer([*chunk.language.decoder.layers], world)
    tokens_t = torch.zeros(seq_len, dtype=torch.int64, device=world.device)
    cu_seqlens = torch.tensor([0, seq_len], dtype=torch.int32, device=world.device)
    padding_t = torch.zeros(seq_len, dtype=torch.bool, device=world.device)
    for _ in range(1 + REPEATS):
        timer.run(lambda: chunk(tokens_t, cu_seqlens, padding_t, labels_t=tokens_t))
    *kinds, head = (statistics.median(times[1:]) for times in timer.seconds)
    return [kinds[0]] * dense + [kinds[-1]] * (model.language.layers - dense), head


class _LayerTimer:
    """When each layer of a forward pass is done: seconds of each, and of what follows the last."""

    def __init__(self, layers: list[MegatronModule], world: World) -> None:
        self.seconds: list[list[float]] = [[] for _ in range(len(layers) + 1)]
        self._world, self._last = world, 0.0
        layers[0].register_forward_pre_hook(lambda *_: self._mark(None))
        for number, layer in enumerate(layers):
            layer.register_forward_hook(lambda *_, number=number: self._mark(number))

    def run(self, forward: Callable[[], Any]) -> None:
        forward()
        self._mark(len(self.seconds) - 1)

    def _mark(self, done: int | None) -> None:
        now = _now(self._world)
        if done is not None:
            self.seconds[done].append(now - self._last)
        self._last = now


def _seconds(run: Callable[[], Any], world: World) -> float:
    times = []
    for _ in range(1 + REPEATS):
        started = _now(world)
        run()
        times.append(_now(world) - started)
    return statistics.median(times[1:])


def _now(world: World) -> float:
    """Seconds, when the device has done all that it was given."""
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    return time.perf_counter()
