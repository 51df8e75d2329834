"""The assembled vision-language model: a vision chunk that turns tiles into visual embeddings, a language chunk that reads them.

A step has one modality. A multimodal step runs both chunks; a text step runs the language chunk alone, so the vision encoder and the
adaptor then have no gradient at all. The cut is also where a pipeline cuts the model (VL2 §4.2).

Shapes: t = tokens of a micro-batch, v = visual tokens, h = language width, n = tiles, i = images, s = samples.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from dsvl_train.config.schema import ModelConfig
from dsvl_train.models.adaptors import build_adaptor
from dsvl_train.models.language import build_language_model
from dsvl_train.models.moe import PADDING, SampleMoELayer, SampleRouter
from dsvl_train.models.vision import Features, VisionState, VisionTower
from dsvl_train.parallel.division import Division, whole
from dsvl_train.parallel.pipeline import no_gradient
from dsvl_train.parallel.tile_exchange import TileRoute

_LAYER = re.compile(r"^(language\.decoder\.layers\.)(\d+)\.")


class VisionChunk(MegatronModule):
    """This rank's part of vision tower and adaptor.

    Its weights are whole on every tensor-parallel rank (VL §3.3). What a rank encodes is decided by the route of the tiles; with
    `shard_tiles` the tensor-parallel ranks see different ones, and Megatron sums the tower's gradients over them.
    """

    model_type = ModelType.encoder_or_decoder

    def __init__(self, model: ModelConfig, config: TransformerConfig, division: Division, pp_rank: int, shard_tiles: bool) -> None:
        super().__init__(config)
        self.layers = division.siglip[pp_rank], division.sam[pp_rank]
        """Of SigLIP and of SAM."""
        last = division.pp - 1 if division.spread else 0
        self.embeds, self.finishes = pp_rank == 0, pp_rank == last
        self.vision = VisionTower(model.vision)
        self.adaptor = build_adaptor(model.adaptor, model.vision, model.language.hidden_size) if self.finishes else None
        self.vision.keep(*self.layers, embed=self.embeds, finish=self.finishes)
        self.to(config.params_dtype)
        if shard_tiles:
            for parameter in self.vision.parameters():
                parameter.sequence_parallel = True  # type: ignore[attr-defined]  # Megatron's word for: every tensor-parallel rank has a part of the gradient
        self.tower_trains = True
        """Something of the encoder trains here or on an earlier pipeline rank. If not, no activation is kept and no gradient sent back."""
        self._received: Tensor | None = None

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """Megatron's schedules hand over the previous pipeline rank's output here."""
        self._received = input_tensor[0]

    def forward(self, pixels_nchw: Tensor, tiles_wh: Tensor, route: TileRoute | None = None) -> Tensor:
        """uint8 tiles [n, 3, H, W] and grids [i, 2] -> visual embeddings [v, h], newline and separator embeddings included.

        On a rank that holds a part of the encoder: the previous rank's state, not the pixels, is what it starts from, and where it does not
        finish, a packed state [n, r] (`VisionTower.pack`) is what it ends with.
        """
        with torch.set_grad_enabled(self.tower_trains and torch.is_grad_enabled()):
            state = self.vision.run(self._start(pixels_nchw, route), *self.layers)
            if self.adaptor is None:
                return self.vision.pack(state)
            features = self.vision.finish(state)
            if route is not None:
                features = _collect(features, route, own_tiles=int((tiles_wh.prod(dim=1) + 1).sum()))
        return self.adaptor(features, tiles_wh)

    def _start(self, pixels_nchw: Tensor, route: TileRoute | None) -> VisionState:
        if self.embeds:
            return self.vision.embed(pixels_nchw if route is None else route.distribute(pixels_nchw))
        assert self._received is not None
        if not self.tower_trains:
            no_gradient(self._received)
        return self.vision.unpack(self._received.squeeze(1))


def _collect(features: Features, route: TileRoute, own_tiles: int) -> Features:
    """Features of the tiles that this rank encoded -> of its own."""
    parts = (features,) if isinstance(features, Tensor) else features
    rows_nf = route.collect(torch.cat([part.flatten(1) for part in parts], dim=1), own_tiles)
    shapes = [part.shape[1:] for part in parts]
    pieces = rows_nf.split([shape.numel() for shape in shapes], dim=1)
    own = [rows.unflatten(1, tuple(shape)) for rows, shape in zip(pieces, shapes, strict=True)]
    return own[0] if len(own) == 1 else (own[0], own[1])


class LanguageChunk(MegatronModule):
    """The language model over text and visual embeddings, treated alike (VL §3.3)."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, model: ModelConfig, config: TransformerConfig, layers: range, vp_stage: int | None) -> None:
        super().__init__(config)
        self.language = build_language_model(model.language, config, layers, vp_stage)
        self.first_layer = layers.start
        """Number of the chunk's first layer in the whole model."""
        self.vp_stage = None  # Megatron compares it with the place in a step's pipeline, where the encoder may come first
        self.vocab_size = model.language.vocab_size
        self.tp_size = config.tensor_model_parallel_size
        self._visual_vh: Tensor | None = None
        if self.language.post_process:
            self.language.output_layer.register_forward_hook(self._never_predict_vocabulary_padding)

    @property
    def pre_process(self) -> bool:
        """This is the first chunk: it starts from tokens and visual embeddings."""
        return self.language.pre_process

    @property
    def share_embeddings_and_output_weights(self) -> bool:
        """Tied embeddings; Megatron sums the gradients of the first and the last rank's copy."""
        return self.language.share_embeddings_and_output_weights

    def shared_embedding_or_output_weight(self) -> Tensor:
        """The tied weight, for Megatron."""
        return self.language.shared_embedding_or_output_weight()

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """Megatron's schedules hand over the previous chunk's output here: hidden states, or for the first chunk visual embeddings."""
        if self.pre_process:
            self._visual_vh = None if input_tensor[0] is None else input_tensor[0].squeeze(1)
        else:
            self.language.set_input_tensor(input_tensor)

    def forward(
        self,
        tokens_t: Tensor,
        cu_seqlens: Tensor,
        padding_t: Tensor,
        *,
        image_mask_t: Tensor | None = None,
        visual_vh: Tensor | None = None,
        labels_t: Tensor | None = None,
    ) -> Tensor:
        """Next-token losses [t] in fp32 where `labels_t` is given (garbage where it is negative), else logits [t, vocabulary].

        A chunk that is not the last gives hidden states [t, 1, h] instead (sharded over t under sequence parallelism).

        Raises:
            ValueError: the image positions and the visual embeddings disagree in number.
        """
        tokens = tokens_t.numel()
        extra = -tokens % self.tp_size  # sequence parallelism shards tokens evenly
        sample_ids_t = _sample_ids(cu_seqlens, padding_t)
        if extra:
            tokens_t = torch.cat([tokens_t, tokens_t.new_zeros(extra)])
            sample_ids_t = torch.cat([sample_ids_t, sample_ids_t.new_full((extra,), PADDING)])
            cu_seqlens = torch.cat([cu_seqlens, cu_seqlens.new_tensor([tokens + extra])])
            labels_t = None if labels_t is None else torch.cat([labels_t, labels_t.new_zeros(extra)])
        out = self.language(
            input_ids=None,
            position_ids=None,
            attention_mask=None,
            decoder_input=self.embed(tokens_t, image_mask_t, self._visual_vh if visual_vh is None else visual_vh)
            if self.pre_process
            else None,
            labels=None if labels_t is None else labels_t.clamp(min=0)[None],
            packed_seq_params=pack(cu_seqlens),
            padding_mask=self._shard(sample_ids_t)[None],
            runtime_gather_output=labels_t is None or None,
        )
        return out[0, :tokens] if self.language.post_process else out

    def embed(self, tokens_t: Tensor, image_mask_t: Tensor | None, visual_vh: Tensor | None) -> Tensor:
        """Token embeddings with visual embeddings at the image positions, [t, 1, h]; sharded over t under sequence parallelism."""
        embeddings_t1h = self.language.embedding(input_ids=tokens_t[None], position_ids=None)
        if visual_vh is not None:
            assert image_mask_t is not None
            positions = image_mask_t.nonzero().squeeze(1)
            if positions.numel() != visual_vh.shape[0]:
                raise ValueError(
                    f"{positions.numel()} image positions in the micro-batch, but {visual_vh.shape[0]} visual embeddings; "
                    "the processor and the model's vision settings disagree"
                )
            embeddings_t1h = embeddings_t1h.index_copy(0, positions, visual_vh.to(embeddings_t1h.dtype)[:, None])
        if self.config.sequence_parallel:
            embeddings_t1h = tensor_parallel.scatter_to_sequence_parallel_region(embeddings_t1h)
        if torch.is_grad_enabled() and not embeddings_t1h.requires_grad:
            # The embedding is frozen and the micro-batch has no image. Ranks that share experts exchange gradients in every micro-batch, so
            # each has to; and Megatron's recomputation gives a layer's weights a gradient only if the layer's input wants one.
            embeddings_t1h = embeddings_t1h.detach().requires_grad_()
        return embeddings_t1h

    def _shard(self, x_t: Tensor) -> Tensor:
        if not self.config.sequence_parallel:
            return x_t
        return x_t.chunk(self.tp_size)[tensor_parallel.mappings.get_tensor_model_parallel_group_if_none(None).rank()]

    def _never_predict_vocabulary_padding(self, layer: nn.Module, inputs: object, output: tuple[Tensor, Tensor | None]) -> object:
        """Rows beyond the vocabulary get probability 0, so that the loss does not depend on how far the vocabulary is padded."""
        logits, bias = output
        width = logits.shape[-1]
        first = 0 if width >= self.language.vocab_size else width * dist.get_rank(self.language.pg_collection.tp)
        keep = self.vocab_size - first
        if keep >= width:
            return None
        columns = torch.arange(width, device=logits.device)
        return logits.masked_fill(columns >= keep, float("-inf")), bias


def _sample_ids(cu_seqlens: Tensor, padding_t: Tensor) -> Tensor:
    lengths_s = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    ids_t = torch.repeat_interleave(torch.arange(lengths_s.numel(), device=cu_seqlens.device), lengths_s)
    return ids_t.masked_fill(padding_t, PADDING)


def pack(cu_seqlens: Tensor) -> PackedSeqParams:
    """Megatron's description of samples laid end to end, each starting at a value of `cu_seqlens` (int32, [s + 1])."""
    longest = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_seqlen_q=longest, max_seqlen_kv=longest)


class VisionLanguageModel:
    """The chunks that live on this rank: its part of the encoder (which may hold nothing) and its language chunks."""

    def __init__(
        self, model: ModelConfig, config: TransformerConfig, division: Division | None = None, *, shard_tiles: bool = False
    ) -> None:
        """
        Args:
            division: which layers this pipeline rank holds; None = all, there is no pipeline.
            shard_tiles: tensor-parallel ranks encode different tiles.
        """
        sam_layers = 0 if model.vision.sam is None else model.vision.sam.layers
        division = division or whole(model.vision.siglip.layers, sam_layers, model.language.layers)
        self.config, self.division = config, division
        self.tied_embeddings = model.language.tie_embeddings
        pp_rank = parallel_state.get_pipeline_model_parallel_rank()
        vision_config = config
        if division.spread:  # in the pipeline of image steps the encoder is one more virtual chunk
            vision_config = copy.copy(config)
            vision_config.virtual_pipeline_model_parallel_size = division.vpp + 1
        self.vision = VisionChunk(model, vision_config, division, pp_rank, shard_tiles)
        self.language_chunks = [
            LanguageChunk(model, config, layers[pp_rank], vp_stage=chunk if division.vpp > 1 else None)
            for chunk, layers in enumerate(division.language)
        ]

    @property
    def language(self) -> LanguageChunk:
        """The language model where it is whole, on one rank."""
        assert len(self.language_chunks) == 1
        return self.language_chunks[0]

    @property
    def chunks(self) -> dict[str, MegatronModule]:
        """Name -> chunk, in the order of computation: `vision`, then `language` or `language.0`, `language.1`, …"""
        if len(self.language_chunks) == 1:
            return {"vision": self.vision, "language": self.language}
        return {"vision": self.vision} | {f"language.{number}": chunk for number, chunk in enumerate(self.language_chunks)}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's parameters with their names in the whole model: `vision.…`, `adaptor.…`, `language.…`."""
        for chunk in self.chunks.values():
            for name, parameter in chunk.named_parameters():
                yield whole_model_name(chunk, name), parameter

    def routers(self) -> dict[int, SampleRouter]:
        """Layer -> router of each MoE layer here, by the whole model's layer numbers."""
        return {
            chunk.first_layer + number: layer.mlp.router
            for chunk in self.language_chunks
            for number, layer in enumerate(chunk.language.decoder.layers)
            if isinstance(layer.mlp, SampleMoELayer)
        }


def whole_model_name(chunk: MegatronModule, name: str) -> str:
    """A parameter's name with its layer counted over the whole model instead of the chunk."""
    if not isinstance(chunk, LanguageChunk):
        return name
    return _LAYER.sub(lambda match: f"{match[1]}{int(match[2]) + chunk.first_layer}.", name)
