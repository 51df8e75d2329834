"""`dsvl plan`: its arithmetic against what is really built, saved and scheduled."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dsvl_train.cli import main
from dsvl_train.config.schema import AdaptorConfig, LanguageConfig, MlaConfig, MoeConfig, ParallelConfig
from dsvl_train.models.costs import recompute_modules
from dsvl_train.parallel import startup
from dsvl_train.parallel.pipeline_simulation import most_kept
from dsvl_train.planning import activations
from dsvl_train.planning.activations import Numerics
from dsvl_train.planning.memory import plan_layout
from dsvl_train.planning.times import step_times
from tests.tiny import VOCAB, tiny_model, tiny_run

TOLERANCE = 0.05
"""Between the bytes that autograd saves and their formula; the worst of these tests is 4.6 % off."""
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


def most_allocated(run: Callable[[], None]) -> int:
    """The most bytes that torch had allocated at a time while `run` ran, beyond those before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["dense", "latent"])
@pytest.mark.parametrize("vocabulary", [VOCAB, 2048])
def test_a_step_needs_what_the_formulas_say(world: startup.World, kind: str, dtype: torch.dtype, vocabulary: int, recompute: Any) -> None:
    """Activations and working memory together, against the allocator; 5.3 % off at worst."""
    torch.manual_seed(0)
    from dsvl_train.models.build import build_model

    cfg = tiny_run("vl2", recompute=recompute)
    cfg.data.seq_len, cfg.data.text_ratio, cfg.engine.precision = TOKENS, 1.0, "bf16" if dtype == torch.bfloat16 else "fp32"
    cfg.model.language = LanguageConfig(
        vocab_size=vocabulary,
        hidden_size=96,
        ffn_width=256,
        layers=3,
        heads=4,
        moe=MOE if kind == "latent" else None,
        mla=MLA if kind == "latent" else None,
    )
    model = build_model(cfg.model, cfg.stage, cfg.parallel, replace(world, params_dtype=dtype), seed=0)
    chunk = model.language.train()
    for parameter in chunk.parameters():
        parameter.grad = torch.zeros_like(parameter)
    cu_seqlens = torch.tensor([0, 200, TOKENS], dtype=torch.int32)
    tokens_t, labels_t = torch.randint(0, vocabulary, (2, TOKENS))
    padding_t = torch.zeros(TOKENS, dtype=torch.bool)
    measured = most_allocated(lambda: chunk(tokens_t, cu_seqlens, padding_t, labels_t=labels_t).sum().backward())
    rank = plan_layout(cfg, 1).ranks[0]
    assert rank.activations["text"] + rank.working["text"] == pytest.approx(measured, rel=0.1)


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


# --------------------------------------------------------------------------------------------------------------- the command

VL2 = ["recipe=demo_vl2/pretrain", "model=deepseek_vl2", "data.seq_len=4096", "data.micro_batch_size=1", "data.batch_size=64"]


def plan_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = main(["plan", *arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_layout_that_cannot_fit_is_refused_with_one_that_does(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [*VL2, "parallel.tp=2", "parallel.pp=2"]
    code, refused = plan_json(capsys, *overrides, "--world", "64")
    assert code == 1 and not refused["fits"] and refused["peak"] > refused["limit"]
    changes = refused["nearest"]["overrides"]
    code, fits = plan_json(capsys, *overrides, *changes, "--world", "64")
    assert code == 0 and fits["peak"] == refused["nearest"]["peak"] <= refused["limit"]
    for change in changes:  # nothing of it is superfluous
        others = [one for one in changes if one != change]
        assert main(["plan", *overrides, *others, "--world", "64"]) != 0
    capsys.readouterr()
    assert main(["plan", *overrides, "--nodes", "8", "--gpus", "8"]) == 1
    said = capsys.readouterr().out
    assert "does not fit: rank 0 needs" in said and all(change in said for change in changes)


def test_what_no_layout_can_hold_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *VL2, "--device-memory", "8"]) == 1
    assert "start more" in capsys.readouterr().out


def test_every_parameter_is_planned_once(capsys: pytest.CaptureFixture[str]) -> None:
    """The published size of VL2, on a pipeline of four ranks; 72 selection biases in each of 29 layers are no parameters here."""
    _, plan = plan_json(capsys, *VL2, "parallel.pp=4", "--world", "4")
    assert sum(chunk["parameters"] for rank in plan["ranks"] for chunk in rank["chunks"]) == 27_480_134_248 - 29 * 72
    assert sum(len(chunk["language"]) for rank in plan["ranks"] for chunk in rank["chunks"]) == 30
    assert 0 < plan["bubble"]["text"] < plan["bubble"]["multimodal"] < 0.5


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["parallel.tp=3", "--world", "3"], "parallel.tp"),
        (["--world", "2", "--nodes", "2", "--gpus", "1"], "not both"),
        (["--gpus", "2"], "belongs to --nodes"),
        (["--world", "0"], "at least 1"),
        (["--usable", "1.5"], "--usable"),
        (["--tiles", "-1"], "--tiles"),
    ],
)
def test_wrong_arguments_are_told(capsys: pytest.CaptureFixture[str], arguments: list[str], says: str) -> None:
    assert main(["plan", "recipe=demo_vl2/pretrain", *arguments]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("family", ["vl", "vl2"])
def test_measured_costs_divide_the_pipeline(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = [f"recipe=demo_{family}/pretrain", "data.seq_len=128", "parallel.pp=2", "--world", "2"]
    assert main(["plan", *run, "--measure", str(tmp_path / "costs.json")]) == 0
    assert f"by the times in {tmp_path}" in capsys.readouterr().out
    costs = json.loads((tmp_path / "costs.json").read_text())
    assert min(*costs["siglip"], *costs["language"], costs["vision_head"], costs["language_head"]) > 0
    costs["language"][0] *= 1000  # one layer is now worth all the others
    (tmp_path / "costs.json").write_text(json.dumps(costs))
    _, plan = plan_json(capsys, *run, f"parallel.layer_costs={tmp_path / 'costs.json'}")
    assert [chunk["language"] for rank in plan["ranks"] for chunk in rank["chunks"] if chunk["language"]] == [[0], [1, 2, 3]]
    assert main(["plan", *run, "data.seq_len=256", f"parallel.layer_costs={tmp_path / 'costs.json'}"]) == 2
    assert "data.seq_len are" in capsys.readouterr().err


def test_in_flight_micro_batches_are_those_of_the_schedules() -> None:
    assert [most_kept([1.0], 4, rank, 8) for rank in range(4)] == [(4 - rank, [4 - rank]) for rank in range(4)]
    most, in_flight = most_kept([2.0, 1.0], 2, 0, 8, wanted_group=2)
    assert most == 2 * in_flight[0] + in_flight[1] and in_flight[0] >= in_flight[1]


def test_planning_needs_no_megatron() -> None:
    program = "import sys; from dsvl_train.cli import main; main(sys.argv[1:]); assert not any('megatron' in name for name in sys.modules)"
    subprocess.run([sys.executable, "-c", program, "plan", *VL2], check=True, capture_output=True, timeout=120)


@pytest.mark.parametrize("family", ["vl", "vl2"])
def test_a_limit_on_the_tiles_of_a_sequence_bounds_what_is_planned_for(family: str) -> None:
    cfg = tiny_run(family)
    cfg.data.seq_len, cfg.data.micro_batch_size = 2048, 2
    unlimited = plan_layout(cfg, 1)
    cfg.data.max_tiles_per_sequence = 3
    limited = plan_layout(cfg, 1)
    assert limited.tiles == 6 < unlimited.tiles
    assert limited.peak < unlimited.peak


def test_a_run_that_mixes_modalities_is_planned_as_image_steps_of_fewer_tiles() -> None:
    cfg = tiny_run("vl2", pp=2)
    cfg.data.text_ratio, cfg.data.batch_size = 0.5, 8
    times = {}
    for grouped, ratio in ((True, 0.5), (False, 0.5), (False, 0.0)):
        cfg.data.modality_grouping, cfg.data.text_ratio = grouped, ratio
        plan = plan_layout(cfg, 2)
        times[grouped, ratio] = step_times(cfg, plan.division, plan.micro_batches).average
    assert times[False, 0.5] == pytest.approx(times[True, 0.5], rel=0.2), "half the sequences have tiles either way"
    assert times[False, 0.5] < times[False, 0.0]
