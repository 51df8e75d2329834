"""`dsvl plan`: its arithmetic against what is really built, saved and scheduled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from dsvl_train.config.schema import AdaptorConfig, LanguageConfig, MlaConfig, MoeConfig, ParallelConfig
from dsvl_train.models.costs import recompute_modules
from dsvl_train.parallel import startup
from dsvl_train.planning import activations
from dsvl_train.planning.activations import Numerics
from tests.tiny import VOCAB, tiny_model, tiny_run

TOLERANCE = 0.05
"""Between the bytes that autograd saves and their formula; the worst case of these tests is 3.6 %."""
TOKENS = 512


@pytest.fixture
def world() -> Iterator[startup.World]:
    world = startup.start(tiny_run("vl").engine, tiny_run("vl").parallel, seed=0)
    yield world
    startup.stop()


def saved_bytes(forward: Callable[[], Any], known: list[torch.Tensor]) -> int:
    """Bytes of the storages that autograd saves during `forward`, those of `known` tensors left out."""
    ignored = {tensor.untyped_storage().data_ptr() for tensor in known}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in ignored:
            saved[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = forward()
    assert output is not None
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


MOE = MoeConfig(routed_experts=6, shared_experts=2, top_k=2, expert_width=40, router="sigmoid", normalise_top_k=True, expert_bias=True)
MLA = MlaConfig(kv_rank=32, qk_nope_dim=16, qk_rope_dim=8, v_dim=12)


RECOMPUTED = [("dense", "mlp"), *(("latent", module) for module in ("core_attn", "layernorm", "mla_up_proj", "moe", "shared_experts"))]


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "recompute", "modules"),
    [
        *((kind, level, None) for kind in ("dense", "grouped", "moe", "latent") for level in ("none", "selective", "full")),
        *((kind, "selective", [module]) for kind, module in RECOMPUTED),
    ],
)
def test_a_language_model_saves_what_the_formula_says(
    world: startup.World, kind: str, recompute: Any, modules: Any, dtype: torch.dtype, trains: bool
) -> None:
    from dsvl_train.models.build import build_model

    run = tiny_run("vl2")
    run.model.language = language = LanguageConfig(
        vocab_size=VOCAB,
        hidden_size=96,
        ffn_width=144,
        layers=3,
        heads=4,
        kv_heads=2 if kind == "grouped" else None,
        moe=MOE if kind in ("moe", "latent") else None,
        mla=MLA if kind == "latent" else None,
    )
    parallel = ParallelConfig(recompute=recompute, recompute_modules=modules)
    model = build_model(run.model, run.stage, parallel, replace(world, params_dtype=dtype), seed=0)
    chunk = model.language.train().requires_grad_(trains)
    visual_vh = torch.randn(8, 96, dtype=dtype, requires_grad=True)
    image_mask_t = torch.arange(TOKENS) < 8
    cu_seqlens = torch.tensor([0, 200, TOKENS], dtype=torch.int32)
    tokens_t, labels_t = torch.randint(0, VOCAB, (2, TOKENS))
    padding_t = torch.zeros(TOKENS, dtype=torch.bool)

    def forward() -> torch.Tensor:
        return chunk(tokens_t, cu_seqlens, padding_t, image_mask_t=image_mask_t, visual_vh=visual_vh, labels_t=labels_t)

    numerics = Numerics(dtype.itemsize, fused=False)
    again = {"none": (), "full": "full", "selective": recompute_modules(language, parallel)}[recompute]
    layers = [activations.language_layer(language, layer, TOKENS, 1, numerics, again) for layer in range(language.layers)]
    parts = [*layers, activations.embedding(TOKENS), activations.head(language, TOKENS, 1, numerics)]
    measured = saved_bytes(forward, [*chunk.parameters(), *chunk.buffers(), visual_vh])
    assert sum(part.when(True, trains) for part in parts) == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["vl", "vl2"])
def test_an_encoder_saves_what_the_formula_says(family: str, dtype: torch.dtype, trains: bool, recompute: bool) -> None:
    from dsvl_train.models.adaptors import build_adaptor
    from dsvl_train.models.vision import VisionTower

    model, tiles, numerics = tiny_model(family), 6, Numerics(dtype.itemsize, fused=False)
    vision, sam = model.vision, model.vision.sam
    tower = VisionTower(vision).to(dtype).requires_grad_(trains)
    adaptor = build_adaptor(model.adaptor, vision, model.language.hidden_size).to(dtype).requires_grad_(trains)
    tower.recompute = recompute
    for parameter in (tower.siglip.pos_embed, *([tower.sam.pos_embed] if tower.sam else [])):
        parameter.requires_grad_()
    pixels = torch.randint(0, 256, (tiles, 3, tower.image_size, tower.image_size), dtype=torch.uint8)
    tiles_wh = torch.tensor([[tiles - 1, 1]]) if family == "vl2" else torch.zeros(tiles, 2, dtype=torch.int64)
    parts = [activations.siglip_block(vision.siglip, tiles, numerics, recompute)] * vision.siglip.layers
    parts += [activations.sam_block(sam, layer, tiles, numerics, recompute) for layer in range(sam.layers)] if sam else []
    parts += [activations.siglip_finish(vision.siglip, tiles, numerics), activations.adaptor(model.adaptor, model, tiles, numerics)]
    parts += [activations.sam_finish(sam, tiles, numerics)] if sam else []
    embed = [activations.encoder_embed(encoder, tiles, numerics) for encoder in (vision.siglip, sam) if encoder]
    planned = sum(part.when(True, trains) for part in parts) + sum(part.when(False, trains) for part in embed)
    known = [*tower.parameters(), *adaptor.parameters()]
    measured = saved_bytes(lambda: adaptor(tower(pixels), tiles_wh), known)
    assert planned == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.parametrize("kind", ["hybrid", "shared", "separate"])
@pytest.mark.parametrize("concat", ["embedding", "sequence_width"])
def test_every_adaptor_saves_what_the_formula_says(kind: str, concat: str) -> None:
    from dsvl_train.models.adaptors import build_adaptor

    model = tiny_model("vl")
    model.adaptor = AdaptorConfig(kind, concat, depth=3)  # type: ignore[arg-type]
    adaptor = build_adaptor(model.adaptor, model.vision, 48)
    features = torch.randn(5, 16, 32, requires_grad=True), torch.randn(5, 16, 32, requires_grad=True)
    measured = saved_bytes(lambda: adaptor((features[0] * 1.0, features[1] * 1.0), torch.zeros(5, 2)), [*adaptor.parameters(), *features])
    planned = activations.adaptor(model.adaptor, model, 5, Numerics(4, fused=False))
    assert planned.when(True, True) == pytest.approx(measured, rel=TOLERANCE)
