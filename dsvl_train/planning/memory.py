"""The memory of every pipeline rank: what `dsvl plan` prints.

    weights      bf16 (fp32 on a CPU), trained and frozen
    gradients    fp32, one buffer for all that trains
    optimiser    two moments, and fp32 weights beside bf16 ones; with parallel.distributed_optimizer a share of the data-parallel ranks'
    activations  what forward passes leave for backward passes, of as many micro-batches as the schedule has in flight at its peak
    working      what one part needs while it runs, at its most

Experts are data-parallel over processes / (pp * ep), all else over processes / (tp * pp). Routed tokens are taken as evenly spread over
experts. What CUDA, NCCL and the allocator take for themselves is not in it: that is what the usable share of a device leaves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from dsvl_train.config.geometry import candidate_resolutions, vl2_tokens_side, vl2_visual_tokens
from dsvl_train.config.schema import DataConfig, ModelConfig, RunConfig, SiglipConfig
from dsvl_train.models.costs import choose_division, recompute_modules
from dsvl_train.parallel.division import Division, whole
from dsvl_train.parallel.pipeline_simulation import most_kept
from dsvl_train.planning import activations
from dsvl_train.planning.activations import Kept, Numerics, Recomputed
from dsvl_train.planning.parameters import Part, PartSize, Share, part_sizes, total
from dsvl_train.planning.times import StepTimes, modalities, step_times

GRADIENT_BYTES = 4
"""Megatron reduces in fp32 (`grad_reduce_in_fp32`)."""


@dataclass
class ChunkPlan:
    """A virtual pipeline chunk of a rank."""

    name: str
    """`vision`, `language`, or `language.0`, …"""
    siglip: range
    sam: range
    language: range
    others: tuple[str, ...]
    """Parts beside the layers: `embedding`, `head`, …"""
    parameters: int
    trained: int
    weights: float
    gradients: float
    optimiser: float
    kept: dict[str, float] = field(default_factory=dict)
    """Modality -> bytes that a micro-batch's forward pass leaves."""
    in_flight: dict[str, int] = field(default_factory=dict)
    """Modality -> micro-batches at the rank's peak; absent where a step does not run the chunk."""


@dataclass
class RankPlan:
    """A pipeline rank; its tensor-, expert- and data-parallel peers are alike."""

    chunks: list[ChunkPlan]
    activations: dict[str, float]
    """Modality -> bytes at the peak."""
    working: dict[str, float]
    """Modality -> bytes."""

    @property
    def fuller_step(self) -> str:
        """The modality that needs more."""
        return max(self.activations, key=lambda modality: self.activations[modality] + self.working[modality])

    @property
    def parts(self) -> dict[str, float]:
        """Name -> bytes, in a step of the modality that needs more."""
        modality = self.fuller_step
        return {
            "weights": sum(chunk.weights for chunk in self.chunks),
            "gradients": sum(chunk.gradients for chunk in self.chunks),
            "optimiser": sum(chunk.optimiser for chunk in self.chunks),
            "activations": self.activations[modality],
            "working": self.working[modality],
        }

    @property
    def peak(self) -> float:
        """Bytes."""
        return sum(self.parts.values())


@dataclass
class LayoutPlan:
    """A run on a layout."""

    cfg: RunConfig
    world_size: int
    dp: int
    expert_dp: int
    tiles: float
    """Of a micro-batch, as the memory is planned for; times are of `costs.usual_tiles`."""
    micro_batches: int
    """Of a step, per data-parallel rank."""
    numerics: Numerics
    division: Division
    ranks: list[RankPlan]

    @cached_property
    def times(self) -> StepTimes:
        """How long steps take."""
        return step_times(self.cfg, self.division, self.micro_batches)

    @property
    def peak(self) -> float:
        """Bytes of the fullest rank."""
        return max(rank.peak for rank in self.ranks)


def most_tiles(model: ModelConfig, data: DataConfig) -> float:
    """Tiles of a micro-batch whose sequences are full of images, each of the grid with the most tiles per token."""
    allowed = float("inf") if data.max_tiles_per_sequence is None else data.max_tiles_per_sequence * data.micro_batch_size
    return min(_most_tiles_of_tokens(model, data), allowed)


def _most_tiles_of_tokens(model: ModelConfig, data: DataConfig) -> float:
    tokens, siglip = data.seq_len * data.micro_batch_size, model.vision.siglip
    if model.family == "vl":
        return max(tokens // siglip.tokens, 1)
    side = vl2_tokens_side(siglip.image_size, siglip.patch_size, model.adaptor.downsample_ratio)
    grids = candidate_resolutions(1, data.max_tiles)
    fitting = [grid for grid in grids if vl2_visual_tokens(grid, side) <= data.seq_len] or grids[:1]
    per_token = max((1 + wide * high) / vl2_visual_tokens((wide, high), side) for wide, high in fitting)
    return max(tokens * per_token, 2.0)


def numerics_of(cfg: RunConfig) -> Numerics:
    """What engine.device and engine.precision mean; `auto` is planned as CUDA."""
    on_cpu = cfg.engine.device == "cpu"
    bf16 = cfg.engine.precision == "bf16" or (cfg.engine.precision == "auto" and not on_cpu)
    return Numerics(2 if bf16 else 4, fused=not on_cpu)


def plan_layout(cfg: RunConfig, world_size: int, tiles: float | None = None, sizes: dict[Part, PartSize] | None = None) -> LayoutPlan:
    """Plan a run that `config.validate` has accepted.

    Args:
        tiles: of a micro-batch; default `most_tiles`.
        sizes: `part_sizes` of the model and stage, if they are known already.

    Raises:
        ValueError: the stage's policy does not fit the model.
    """
    return _Planner(cfg, world_size, tiles, sizes or part_sizes(cfg.model, cfg.stage)).plan()


# ------------------------------------------------------------------------------------------------------------------- helpers


class _Planner:
    def __init__(self, cfg: RunConfig, world_size: int, tiles: float | None, sizes: dict[Part, PartSize]) -> None:
        parallel, data, model = cfg.parallel, cfg.data, cfg.model
        self.cfg, self.model, self.parallel, self.sizes, self.world_size = cfg, model, parallel, sizes, world_size
        self.numerics = numerics_of(cfg)
        self.dp = world_size // (parallel.tp * parallel.pp * parallel.cp)
        self.expert_dp = world_size // (parallel.ep * parallel.pp)
        self.tokens = data.seq_len * data.micro_batch_size
        self.micro_batches = data.batch_size // (self.dp * data.micro_batch_size)
        self.tiles = most_tiles(model, data) if tiles is None else tiles
        self.encoded = self.tiles / (parallel.tp if parallel.vision_tp == "shard" else 1)
        sam_layers = 0 if model.vision.sam is None else model.vision.sam.layers
        self.division = choose_division(cfg) or whole(model.vision.siglip.layers, sam_layers, model.language.layers)
        self.recomputed: Recomputed = ()
        if parallel.recompute != "none":
            self.recomputed = "full" if parallel.recompute == "full" else recompute_modules(model.language, parallel)

    def plan(self) -> LayoutPlan:
        ranks = [self._rank(rank) for rank in range(self.division.pp)]
        return LayoutPlan(
            self.cfg, self.world_size, self.dp, self.expert_dp, self.tiles, self.micro_batches, self.numerics, self.division, ranks
        )

    def _rank(self, rank: int) -> RankPlan:
        vision = self._chunk("vision", self._vision_parts(rank), rank)
        names = ["language"] if self.division.vpp == 1 else [f"language.{number}" for number in range(self.division.vpp)]
        language = [self._chunk(name, self._language_parts(rank, chunk), rank) for chunk, name in enumerate(names)]
        most, working = {}, {}
        for modality in modalities(self.cfg.data):
            images = modality == "multimodal"
            running = [vision, *language] if images and self.division.spread else language
            for chunk in language:
                chunk.kept[modality] = self._language_kept(rank, language.index(chunk), images)
            if images:
                vision.kept[modality] = self._vision_kept(rank)
            kept = [chunk.kept[modality] for chunk in running]
            with_encoder = images and not self.division.spread
            if with_encoder:
                kept[0] += vision.kept[modality]
            most[modality], in_flight = most_kept(kept, self.division.pp, rank, self.micro_batches, self.parallel.group)
            for chunk, number in zip(running, in_flight, strict=True):
                chunk.in_flight[modality] = number
            if with_encoder:
                vision.in_flight[modality] = in_flight[0]
            working[modality] = self._working(rank, images, alone=len(running) == 1)
        return RankPlan([vision, *language] if vision.parameters else language, most, working)

    # -------------------------------------------------------------------------------------------------------------- parts

    def _finishes(self, rank: int) -> bool:
        """The encoder ends on this rank, and the adaptor is here."""
        return rank == (self.division.pp - 1 if self.division.spread else 0)

    def _vision_parts(self, rank: int) -> list[Part]:
        parts = []
        for encoder, layers in (("siglip", self.division.siglip[rank]), ("sam", self.division.sam[rank])):
            if encoder == "siglip" or self.model.vision.sam is not None:
                parts += [f"{encoder}.embed"] if rank == 0 else []
                parts += [f"{encoder}.{layer}" for layer in layers]
                parts += [f"{encoder}.finish"] if self._finishes(rank) else []
        return parts + (["adaptor"] if self._finishes(rank) else [])

    def _language_parts(self, rank: int, chunk: int) -> list[Part]:
        first, last = rank == 0 and chunk == 0, self._is_last(rank, chunk)
        parts = ["embedding"] if first or (last and self.model.language.tie_embeddings) else []
        return parts + [f"language.{layer}" for layer in self.division.language[chunk][rank]] + (["head"] if last else [])

    def _is_last(self, rank: int, chunk: int) -> bool:
        return rank == self.division.pp - 1 and chunk == self.division.vpp - 1

    def _chunk(self, name: str, parts: list[Part], rank: int) -> ChunkPlan:
        share = total(self.sizes, parts, self.parallel.tp, self.parallel.ep)

        def layers(kind: str) -> range:
            numbers = [int(number) for part in parts if part.startswith(kind) and (number := part.removeprefix(kind)).isdigit()]
            return range(numbers[0], numbers[-1] + 1) if numbers else range(0)

        return ChunkPlan(
            name,
            layers("siglip."),
            layers("sam."),
            layers("language."),
            tuple(part for part in parts if not part.rpartition(".")[2].isdigit()),
            share.total,
            share.trained + share.trained_experts,
            share.total * self.numerics.bytes,
            (share.trained + share.trained_experts) * GRADIENT_BYTES,
            self._optimiser(share),
        )

    def _optimiser(self, share: Share) -> float:
        per_parameter = 2 * (2 if self.cfg.optim.moments_dtype == "bf16" else 4) + (4 if self.numerics.bytes == 2 else 0)
        if not self.parallel.distributed_optimizer:
            return per_parameter * (share.trained + share.trained_experts)
        return per_parameter * (share.trained / self.dp + share.trained_experts / self.expert_dp)

    # -------------------------------------------------------------------------------------------------------- activations

    def _trains(self, part: Part) -> bool:
        return self.sizes[part].trains

    def _tower_trains(self, rank: int) -> bool:
        """Something of the encoder trains on this rank or an earlier one; if not, it runs without autograd."""
        here = (part for before in range(rank + 1) for part in self._vision_parts(before))
        return any(self._trains(part) for part in here if part != "adaptor")

    def _vision_kept(self, rank: int) -> float:
        """Of the encoder's part here, the adaptor with it, and what is received and sent."""
        model, numerics, finishes = self.model, self.numerics, self._finishes(rank)
        tower_trains, received = self._tower_trains(rank), rank > 0
        kept = 0.0
        if self.division.spread:
            kept += activations.vision_state(model, self.encoded, numerics) * (received + (not finishes))
        for encoder in ("siglip", "sam") if tower_trains else ():
            flows = received
            for part in (part for part in self._vision_parts(rank) if part.startswith(encoder)):
                kept += self._encoder_kept(part).when(flows, self._trains(part))
                flows |= self._trains(part)
        if finishes:
            kept += activations.adaptor(model.adaptor, model, self.tiles, numerics).when(tower_trains, self._trains("adaptor"))
            kept += self._visual_bytes() if self.division.spread else 0.0
        return kept

    def _encoder_kept(self, part: Part) -> Kept:
        vision, tiles, numerics, again = self.model.vision, self.encoded, self.numerics, self.parallel.vision_recompute
        name, _, place = part.partition(".")
        encoder = vision.siglip if name == "siglip" else vision.sam
        assert encoder is not None
        if place == "embed":
            return activations.encoder_embed(encoder, tiles, numerics)
        if isinstance(encoder, SiglipConfig):
            finish = place == "finish"
            return (
                activations.siglip_finish(encoder, tiles, numerics) if finish else activations.siglip_block(encoder, tiles, numerics, again)
            )
        if place == "finish":
            return activations.sam_finish(encoder, tiles, numerics)
        return activations.sam_block(encoder, int(place), tiles, numerics, again)

    def _visual_bytes(self) -> float:
        """Visual embeddings between the encoder and the language model, at most as many as tokens."""
        return self.tokens * self.model.language.hidden_size * self.numerics.bytes

    def _language_kept(self, rank: int, chunk: int, images: bool) -> float:
        language, tokens, tp, numerics = self.model.language, self.tokens, self.parallel.tp, self.numerics
        hidden = tokens / tp * language.hidden_size * numerics.bytes
        kept, first, last = 0.0, rank == 0 and chunk == 0, self._is_last(rank, chunk)
        if first:
            kept += activations.embedding(tokens).when(False, self._trains("embedding"))
            kept += self._visual_bytes() if images and self.division.spread else 0.0
        for layer in self.division.language[chunk][rank]:  # what enters them asks for a gradient, whatever trains before
            layer_kept = activations.language_layer(language, layer, tokens, tp, numerics, self.recomputed)
            kept += layer_kept.when(True, self._trains(f"language.{layer}"))
        if last:
            return kept + activations.head(language, tokens, tp, numerics).when(True, self._trains("head"))
        return kept + hidden  # what is sent stays until its gradient has come back

    def _working(self, rank: int, images: bool, *, alone: bool) -> float:
        """What the widest place of a backward pass needs, beyond what is kept before it.

        Where a rank runs a single chunk, what later places kept of the micro-batch is free again when an earlier one works.
        """
        language, tokens, tp, numerics = self.model.language, self.tokens, self.parallel.tp, self.numerics
        last = rank == self.division.pp - 1
        of_head = activations.head(language, tokens, tp, numerics).when(True, self._trains("head")) if last and alone else 0.0
        of_language = self._language_kept(rank, 0, images) if alone else 0.0
        places = [activations.head_working(language, tokens, tp, numerics)] if last else []
        places += [self._layer_working(layer) - of_head for row in self.division.language for layer in row[rank]]
        if rank == 0 and self._trains("embedding"):
            places.append(language.padded_vocab_size / tp * language.hidden_size * numerics.bytes - of_language)
        if images and self._vision_parts(rank):
            block = max(self._vision_blocks(rank), default=0.0) if self.parallel.vision_recompute and self._tower_trains(rank) else 0.0
            places.append(block + activations.vision_working(self.model, self.encoded, numerics) - of_language)
        return max(0.0, *places)

    def _layer_working(self, layer: int) -> float:
        """With what is computed again, and the largest weight's gradient, which exists once more before it is added to the buffer."""
        language, tokens, tp, numerics = self.model.language, self.tokens, self.parallel.tp, self.numerics
        trains = self._trains(f"language.{layer}")
        again = activations.language_layer(language, layer, tokens, tp, numerics).when(True, trains) if self.recomputed else 0.0
        is_moe = language.moe is not None and layer >= language.moe.dense_layers
        width = language.moe.expert_width if is_moe and language.moe else language.ffn_width / tp
        gradient = 2 * width * language.hidden_size * numerics.bytes if trains else 0.0
        return again + gradient + activations.language_layer_working(language, layer, tokens, tp, numerics)

    def _vision_blocks(self, rank: int) -> Iterator[float]:
        for _ in self.division.siglip[rank]:
            yield activations.siglip_block(self.model.vision.siglip, self.encoded, self.numerics).when(True, True)
        for layer in self.division.sam[rank]:
            assert self.model.vision.sam is not None
            yield activations.sam_block(self.model.vision.sam, layer, self.encoded, self.numerics).when(True, True)
