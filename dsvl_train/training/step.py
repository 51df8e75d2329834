"""One optimiser step over one global batch: Megatron's schedule forward and backward, then the update.

The loss is the mean next-token cross-entropy over all supervised tokens of the global batch. With l_j the token losses and N the
supervised tokens on all ranks, each micro-batch back-propagates sum_j l_j / N and gradients are summed over micro-batches and ranks, so
the result depends neither on the micro-batching nor on the layout. The experts' balancing loss is normalised by the batch's tokens
likewise (`models.moe`).

Shapes: t = tokens of a micro-batch, c = data sources.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from torch import Tensor

from dsvl_train.config.schema import RunConfig
from dsvl_train.data.batch import IGNORE_INDEX, MicroBatch, Modality, StepBatch
from dsvl_train.models.vlm import VisionChunk, VisionLanguageModel
from dsvl_train.parallel.pipeline import run_pipeline
from dsvl_train.parallel.startup import World
from dsvl_train.parallel.tile_exchange import TileRoute
from dsvl_train.parallel.tile_plan import encoded_tiles, plan_exchanges
from dsvl_train.training.engine import Chunk, Optimiser
from dsvl_train.training.guards import UpdateGuard
from dsvl_train.training.rank_table import RankTable

MOST_TILES = 18
"""Images with more local tiles share the histogram's last place."""


@dataclass
class BatchCounts:
    """Sums over the global batch."""

    tokens: int
    supervised_tokens: int
    tiles: int
    bad_samples: int
    tiles_per_image: dict[str, int]
    """Local tiles of an image -> images."""
    stop_requested: bool
    """Some rank was asked to stop; all ranks learn it in the same step."""


@dataclass
class RoutedMicroBatch:
    """A micro-batch and what the encoder has to know of it."""

    micro: MicroBatch
    route: TileRoute | None
    """How its tiles travel; None = every rank encodes what it has."""
    following: RoutedMicroBatch | None = None
    """Whose tiles are sent while this one's are encoded."""
    pixels_nchw: Tensor | None = None
    """Its own tiles on the device, from when they are sent until they are encoded."""


class TrainStep:
    """Runs steps on this rank's chunks."""

    def __init__(
        self,
        cfg: RunConfig,
        world: World,
        model: VisionLanguageModel,
        chunks: Mapping[str, Chunk],
        optimiser: Optimiser,
        sources: list[str],
        pulse: Callable[[int, str], None] = lambda step, phase: None,
    ) -> None:
        """
        Args:
            pulse: is told of every phase that begins.
        """
        self.guard, self.ranks, self._pulse = UpdateGuard(cfg.guard), RankTable(world.size, world.rank, world.device), pulse
        self.cfg, self.world, self.model, self.chunks, self.optimiser, self.sources = cfg, world, model, chunks, optimiser, sources
        self.routers = model.routers()
        # tensor- and pipeline-parallel ranks hold the same batch; of them, the last pipeline rank has the losses
        first_of_tp = parallel_state.get_tensor_model_parallel_rank() == 0
        self._speaks_for_batch = first_of_tp and parallel_state.is_pipeline_first_stage()
        self._speaks_for_loss = first_of_tp and parallel_state.is_pipeline_last_stage()
        self._speaks_for_bias = first_of_tp and world.dp_rank == 0
        self._loss_sum_c = torch.zeros(len(sources), dtype=torch.float64, device=world.device)
        self._supervised_c = torch.zeros(len(sources), dtype=torch.float64, device=world.device)
        for chunk in model.chunks.values():
            chunk.config.finalize_model_grads_func = self._finalise_gradients
        self._modality: Modality = "text"
        self._imbalance_encoded: float | None = None
        moe = cfg.model.language.moe
        self._moe_layers = range(0) if moe is None else range(moe.dense_layers, cfg.model.language.layers)
        self._no_load_e = torch.zeros(0 if moe is None else moe.routed_experts, dtype=torch.float64, device=world.device)

    def __call__(self, batch: StepBatch, learning_rate: float, stop_requested: bool) -> tuple[dict[str, Any], BatchCounts]:
        """Run the step. Returns its metrics (the same on every rank) and the batch's counts.

        Raises:
            TrainingDiverged: see `UpdateGuard.judge`.
        """
        started = time.perf_counter()
        self._modality = batch.modality
        self._pulse(batch.step, "counting the global batch")
        counts = self._count(batch, stop_requested)
        rates = self.optimiser.set_learning_rate(learning_rate)
        self._pulse(batch.step, "forward and backward")
        biases_before = self._selection_biases()
        self.ranks.start()
        self._forward_backward(batch, counts)
        self._pulse(batch.step, "reducing metrics")
        metrics = self._reduce_metrics(counts, biases_before)
        self._pulse(batch.step, "updating")
        grad_norm = self.optimiser.prepare(batch.modality)
        verdict = self.guard.judge(batch.step, batch.modality, metrics["loss"], grad_norm)
        if verdict.update:
            self.optimiser.update(batch.modality, grad_norm)
        else:  # finalising the gradients has moved the biases already
            for layer, before_e in biases_before.items():
                self.routers[layer].expert_bias.copy_(before_e)
        seconds = time.perf_counter() - started
        return metrics | {
            "grad_norm": grad_norm,
            "trouble": verdict.trouble,
            "updated": verdict.update,
            "skipped_steps": self.guard.skipped,
            "lr": rates,
            **({} if self._imbalance_encoded is None else {"tile_imbalance_encoded": self._imbalance_encoded}),
            "step_s": seconds,
            "tokens_per_s": counts.tokens / seconds,
            "tiles_per_s": counts.tiles / seconds,
        }, counts

    # ------------------------------------------------------------------------------------------------------------ phases

    def _count(self, batch: StepBatch, stop_requested: bool) -> BatchCounts:
        """Add up what the global batch holds; one small all-reduce, which also carries the wish to stop."""
        histogram = [0] * (MOST_TILES + 1)
        tokens = supervised = tiles = 0
        for micro in batch.micro_batches:
            tokens += int((~micro.padding_t).sum())
            supervised += int((micro.labels_t != IGNORE_INDEX).sum())
            tiles += micro.tiles
            for wide, high in [] if micro.tiles_wh is None else micro.tiles_wh.tolist():
                histogram[min(wide * high, MOST_TILES)] += 1
        mine = [tokens, supervised, tiles, batch.bad_samples, *histogram]
        vector = torch.tensor([*(mine if self._speaks_for_batch else [0] * len(mine)), int(stop_requested)], device=self.world.device)
        dist.all_reduce(vector)
        tokens, supervised, tiles, bad, *histogram, stop = vector.tolist()
        per_image = {str(local): images for local, images in enumerate(histogram) if images}
        return BatchCounts(tokens, supervised, tiles, bad, per_image, bool(stop))

    def _forward_backward(self, batch: StepBatch, counts: BatchCounts) -> None:
        self._loss_sum_c.zero_()
        self._supervised_c.zero_()
        for router in self.routers.values():
            router.reset_statistics()
            router.tokens_of_global_batch = max(counts.tokens, 1)
        for chunk in self._active_chunks():
            chunk.zero_grad_buffer()
        self.optimiser.zero_grad(batch.modality)
        forward_step = partial(self._forward_step, supervised_tokens=max(counts.supervised_tokens, 1))
        run_pipeline(forward_step, self._pipeline_chunks(), self._routed(batch), group=self.cfg.parallel.group)

    def _routed(self, batch: StepBatch) -> list[RoutedMicroBatch]:
        """The micro-batches with the ways of their tiles, each knowing the one after it if tiles are sent ahead."""
        routed = [RoutedMicroBatch(micro, route) for micro, route in zip(batch.micro_batches, self._tile_routes(batch), strict=True)]
        if self.cfg.parallel.overlap_tile_exchange:
            for one, following in itertools.pairwise(routed):
                one.following = following
        return routed

    def _tile_routes(self, batch: StepBatch) -> list[TileRoute | None]:
        """How each micro-batch's tiles travel; None = every rank encodes what it has."""
        self._imbalance_encoded = None
        parallel = self.cfg.parallel
        balance = parallel.tile_balance and self.world.dp_size > 1
        shard = parallel.vision_tp == "shard" and parallel.tp > 1
        if batch.modality == "text" or not (balance or shard):
            return [None] * len(batch.micro_batches)
        if not balance:
            return [TileRoute(shard=shard)] * len(batch.micro_batches)
        mine = torch.tensor([micro.tiles for micro in batch.micro_batches], device=self.world.device)
        tiles_rm = [torch.empty_like(mine) for _ in range(self.world.dp_size)]
        dist.all_gather(tiles_rm, mine, group=parallel_state.get_data_parallel_group())
        exchanges = plan_exchanges(torch.stack(tiles_rm, dim=1).tolist())
        encoded = encoded_tiles(exchanges)
        self._imbalance_encoded = max(encoded) * len(encoded) / max(sum(encoded), 1)
        return [TileRoute(exchange, shard) for exchange in exchanges]

    def _forward_step(self, micro_batches: Iterator[RoutedMicroBatch], chunk: Chunk, supervised_tokens: int) -> tuple[Tensor, Any]:
        """Megatron's schedule calls this once per micro-batch and chunk of the pipeline."""
        routed = next(micro_batches)
        micro = routed.micro
        if isinstance(chunk.module, VisionChunk):
            return self._encode(routed)[:, None], None
        visual_vh = None
        encodes_here = self.model.vision.finishes and not self.model.division.spread and chunk.module.pre_process
        if encodes_here and self._modality == "multimodal":  # without tiles too: the ranks' encoders keep in step
            visual_vh = self._encode(routed)
        labels_t = self._to_device(micro.labels_t)
        out = chunk(
            self._to_device(micro.tokens_t),
            self._to_device(micro.cu_seqlens),
            self._to_device(micro.padding_t),
            image_mask_t=self._to_device(micro.image_mask_t),
            visual_vh=visual_vh,
            labels_t=labels_t,
        )
        return out, partial(self._loss, micro, labels_t, supervised_tokens)

    def _encode(self, routed: RoutedMicroBatch) -> Tensor:
        """This rank's part of the encoder over the micro-batch's tiles, which may be none; later pipeline ranks have no pixels."""
        if self.model.vision.embeds:
            for one in (routed, routed.following):  # this one's are under way already, unless it is the first
                if one is not None and one.route is not None:
                    one.route.send(self._pixels(one))
        pixels_nchw, tiles_wh = self._pixels(routed), routed.micro.tiles_wh
        routed.pixels_nchw = None
        if tiles_wh is None:
            tiles_wh = torch.empty(0, 2, dtype=torch.int64)
        return self.chunks["vision"](pixels_nchw, tiles_wh, routed.route)

    def _pixels(self, routed: RoutedMicroBatch) -> Tensor:
        """The micro-batch's own tiles [n, 3, H, W] on the device."""
        if routed.pixels_nchw is None:
            side = self.model.vision.vision.image_size
            pixels_nchw = routed.micro.pixels_nchw
            none_nchw = torch.empty(0, 3, side, side, dtype=torch.uint8)
            routed.pixels_nchw = self._to_device(none_nchw if pixels_nchw is None else pixels_nchw)
        return routed.pixels_nchw

    def _loss(
        self, micro: MicroBatch, labels_t: Tensor, supervised_tokens: int, loss_t: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """This micro-batch's part of the mean loss; its sums per source go to the metrics."""
        supervised_t = labels_t != IGNORE_INDEX
        loss_t = torch.where(supervised_t, loss_t.float(), 0.0)
        lengths_s = (micro.cu_seqlens[1:] - micro.cu_seqlens[:-1]).long()
        source_t = self._to_device(torch.repeat_interleave(micro.source_s, lengths_s))
        self._loss_sum_c.index_add_(0, source_t, loss_t.detach().double())
        self._supervised_c.index_add_(0, source_t, supervised_t.double())
        # Megatron counts these tokens to divide by later; we have divided already, and `_finalise_gradients` does not use the count.
        return loss_t.sum() / supervised_tokens, torch.ones((), dtype=torch.int, device=self.world.device), {}

    def _finalise_gradients(self, chunks: Any, num_tokens: Any = None, **kwargs: Any) -> None:
        """Sum gradients over data-parallel ranks for the chunks that this step ran, and update the experts' selection bias."""
        self.ranks.stop()
        active = self._active_chunks()
        if parallel_state.is_pipeline_first_stage() and self._modality == "multimodal":
            active.append(active.pop(0))  # Megatron looks for the embedding in the first chunk of the first rank, so the encoder goes last
        finalize_model_grads(active, None, **kwargs)

    def _reduce_metrics(self, counts: BatchCounts, biases: dict[int, Tensor]) -> dict[str, Any]:
        """Losses per source and the routers' statistics, summed over ranks; `biases` are those that the step routed with."""
        speaks = float(self._speaks_for_loss)
        parts = [self._loss_sum_c * speaks, self._supervised_c * speaks]
        for layer in self._moe_layers:
            router = self.routers.get(layer)  # None: another pipeline rank has it
            bias_e = biases.get(layer, self._no_load_e) * float(self._speaks_for_bias)
            parts += [self._no_load_e, self._no_load_e[:1]] if router is None else [router.load_e, router.aux_loss.reshape(1)]
            parts.append(bias_e)
        parts.append(self.ranks.own_row())
        vector = torch.cat([part.double() for part in parts])
        dist.all_reduce(vector)
        loss_sum_c, supervised_c, *rest, rank_table = vector.split([part.numel() for part in parts])
        loss = float(loss_sum_c.sum() / max(counts.supervised_tokens, 1))
        by_source = {
            name: float(total / number)
            for name, total, number in zip(self.sources, loss_sum_c.tolist(), supervised_c.tolist(), strict=True)
            if number
        }
        return {"loss": loss, "loss_by_source": by_source} | self._expert_metrics(rest) | self.ranks.metrics(rank_table)

    def _expert_metrics(self, statistics: Sequence[Tensor]) -> dict[str, Any]:
        """From load, balancing loss and bias of each MoE layer: share of the routed tokens and selection bias per layer and expert, how far
        the fullest expert is above an even load, and the layers' mean balancing loss."""
        loads, aux_losses, biases = (statistics[part::3] for part in range(3))
        if not loads:
            return {}
        shares = [(load / load.sum().clamp(min=1)) for load in loads]
        metrics = {
            "expert_load": [share.tolist() for share in shares],
            "expert_max_violation": [float(share.max() * share.numel() - 1) for share in shares],
            "aux_loss": float(torch.stack(list(aux_losses)).mean()),
        }
        has_bias = self.cfg.model.language.moe is not None and self.cfg.model.language.moe.expert_bias
        return metrics | ({"expert_bias": [bias.tolist() for bias in biases]} if has_bias else {})

    # ----------------------------------------------------------------------------------------------------------- helpers

    def _selection_biases(self) -> dict[int, Tensor]:
        """Layer -> copy of the bias of the experts' selection, for the layers of this rank that have one."""
        return {layer: router.expert_bias.clone() for layer, router in self.routers.items() if router.expert_bias is not None}

    def _active_chunks(self) -> list[Chunk]:
        """The chunks that this step trains."""
        return [chunk for name, chunk in self.chunks.items() if self._modality == "multimodal" or name != "vision"]

    def _pipeline_chunks(self) -> list[Chunk]:
        """The chunks that the schedule calls; where the encoder is not a chunk of its own, the first language chunk calls it."""
        spread = self.model.division.spread
        return [chunk for name, chunk in self.chunks.items() if name != "vision" or (spread and self._modality == "multimodal")]

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.world.device, non_blocking=True)
