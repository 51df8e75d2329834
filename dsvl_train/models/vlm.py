"""The assembled vision-language model: a vision chunk that turns tiles into visual embeddings, a language chunk that reads them.

A step has one modality. A multimodal step runs both chunks; a text step runs the language chunk alone, so the vision encoder and the
adaptor then have no gradient at all. The cut is also where a pipeline cuts the model (VL2 §4.2).

Shapes: t = tokens of a micro-batch, v = visual tokens, h = language width, n = tiles, i = images, s = samples.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from dsvl_train.config.schema import ModelConfig
from dsvl_train.models.adaptors import build_adaptor
from dsvl_train.models.language import build_language_model
from dsvl_train.models.moe import PADDING, SampleRouter
from dsvl_train.models.vision import VisionTower


class VisionChunk(MegatronModule):
    """Vision tower and adaptor. Every tensor-parallel rank computes all of it (VL §3.3)."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, model: ModelConfig, config: TransformerConfig) -> None:
        super().__init__(config)
        self.vision = VisionTower(model.vision)
        self.adaptor = build_adaptor(model.adaptor, model.vision, model.language.hidden_size)
        self.to(config.params_dtype)

    def forward(self, pixels_nchw: Tensor, tiles_wh: Tensor) -> Tensor:
        """uint8 tiles [n, 3, H, W] and grids [i, 2] -> visual embeddings [v, h], newline and separator embeddings included."""
        return self.adaptor(self.vision(pixels_nchw), tiles_wh)


class LanguageChunk(MegatronModule):
    """The language model over text and visual embeddings, treated alike (VL §3.3)."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, model: ModelConfig, config: TransformerConfig) -> None:
        super().__init__(config)
        self.language = build_language_model(model.language, config)
        self.vocab_size = model.language.vocab_size
        self.tp_size = config.tensor_model_parallel_size
        self.language.output_layer.register_forward_hook(self._never_predict_vocabulary_padding)

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """Megatron's schedules hand over the previous pipeline rank's output here."""
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
            decoder_input=self.embed(tokens_t, image_mask_t, visual_vh),
            labels=None if labels_t is None else labels_t.clamp(min=0)[None],
            packed_seq_params=pack(cu_seqlens),
            padding_mask=self._shard(sample_ids_t)[None],
            runtime_gather_output=labels_t is None or None,
        )
        return out[0, :tokens]

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
    """The chunks that live on this rank."""

    def __init__(self, model: ModelConfig, config: TransformerConfig) -> None:
        self.config = config
        self.vision = VisionChunk(model, config)
        self.language = LanguageChunk(model, config)

    @property
    def chunks(self) -> dict[str, MegatronModule]:
        """Name -> chunk, in the order of computation."""
        return {"vision": self.vision, "language": self.language}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters with their global names: `vision.…`, `adaptor.…`, `language.…`."""
        for chunk in self.chunks.values():
            yield from chunk.named_parameters()

    def routers(self) -> list[SampleRouter]:
        """The routers of the MoE layers, in order."""
        return [module for module in self.language.modules() if isinstance(module, SampleRouter)]
