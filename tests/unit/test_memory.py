"""What saves memory: recomputation, which changes no number, and moments in bf16; and the routers' statistics, which it must not touch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dsvl_train.parallel import startup
from tests.bench import Bench, SavedActivations, save
from tests.tiny import tiny_batch, tiny_run


@pytest.fixture(autouse=True)
def world() -> Iterator[startup.World]:
    world = startup.start(tiny_run("vl").engine, tiny_run("vl").parallel, seed=0)
    yield world
    startup.stop()


def saved_bytes(bench: Bench, modality: str) -> int:
    """The most that autograd keeps between forward and backward pass of a micro-batch of one step, parameters apart."""
    parameters = [parameter for _, parameter in bench.model.named_parameters()]
    sizes = []
    inner = bench.step._forward_step

    def watched(*args: Any, **kwargs: Any) -> Any:
        with SavedActivations(without=parameters) as saved:
            result = inner(*args, **kwargs)
        sizes.append(saved.nbytes())
        return result

    bench.step._forward_step = watched  # type: ignore[method-assign]
    bench.run(modality)
    return max(sizes)


@pytest.mark.parametrize("family", ["vl", "vl2"])
def test_the_more_is_recomputed_the_less_is_kept(world: startup.World, family: str) -> None:
    sizes = {level: saved_bytes(Bench(world, family, parallel__recompute=level), "text") for level in ("none", "selective", "full")}
    assert sizes["full"] < 0.35 * sizes["none"]
    assert sizes["full"] < sizes["selective"] < 0.7 * sizes["none"]


MODULES = [("vl", module) for module in ("core_attn", "layernorm", "mlp")]
MODULES += [("vl2", module) for module in ("core_attn", "layernorm", "mlp", "moe", "shared_experts", "mla_up_proj")]


@pytest.mark.parametrize(("family", "module"), MODULES)
def test_each_module_saves_memory_and_changes_no_number(world: startup.World, family: str, module: str) -> None:
    reference = Bench(world, family)
    bench = Bench(world, family, parallel__recompute="selective", parallel__recompute_modules=[module])
    got, want = (b.run("multimodal", "text") for b in (bench, reference))
    for key in ("loss", "grad_norm", "aux_loss"):
        assert [record.get(key, 0.0) for record in got] == pytest.approx([record.get(key, 0.0) for record in want], rel=1e-6)
    assert [record.get("expert_load") for record in got] == [record.get("expert_load") for record in want]
    assert saved_bytes(bench, "text") < saved_bytes(reference, "text")


@pytest.mark.parametrize("family", ["vl", "vl2"])
def test_recomputing_the_encoders_keeps_their_blocks_inputs_alone(world: startup.World, family: str) -> None:
    kept, recomputed = (saved_bytes(Bench(world, family, parallel__vision_recompute=on), "multimodal") for on in (False, True))
    assert recomputed < 0.8 * kept


def moments_of(bench: Bench) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in bench.state().items() if name.startswith("exp_avg")}


def test_moments_in_bf16_take_half_the_memory_and_stay_close(world: startup.World) -> None:
    full, half = Bench(world, "vl2"), Bench(world, "vl2", optim__moments_dtype="bf16")
    want, got = full.run("multimodal"), half.run("multimodal")
    # Computed in fp32 from nothing, so the first update is the same to the last bit; what is kept of it is rounded
    for name, tensor in full.state().items():
        torch.testing.assert_close(half.state()[name], tensor.bfloat16() if name.startswith("exp_avg") else tensor, rtol=0, atol=0)
    sizes = [sum(tensor.nbytes for tensor in moments_of(bench).values()) for bench in (half, full)]
    assert sizes[0] * 2 == sizes[1] > 0
    steps = ("text", "multimodal") * 5
    want, got = full.run(*steps), half.run(*steps)
    assert [record["loss"] for record in got] == pytest.approx([record["loss"] for record in want], rel=2e-3)
    assert [record["loss"] for record in got] != [record["loss"] for record in want]


def test_a_large_parameter_is_updated_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from dsvl_train.training import adamw

    def train() -> torch.Tensor:
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 10).view(2, 5).clone())
        adam = adamw.Bf16MomentsAdamW([weight], lr=0.1, weight_decay=0.1, fused=True)
        for step in range(3):
            weight.grad = torch.sin(torch.arange(10.0) + step).view(2, 5)
            adam.step()
        return weight.detach()

    whole = train()
    monkeypatch.setattr(adamw, "_AT_ONCE", 3)
    torch.testing.assert_close(train(), whole, rtol=0, atol=0)


@pytest.mark.parametrize(("saved", "loaded"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_a_checkpoint_is_read_into_moments_of_another_precision(world: startup.World, saved: str, loaded: str, tmp_path: Path) -> None:
    from dsvl_train.training import checkpoint

    first = Bench(world, "vl2", optim__moments_dtype=saved)
    first.run("multimodal", "text")
    folder = save(world, first, tmp_path)
    then = Bench(world, "vl2", run__seed=5, optim__moments_dtype=loaded)
    checkpoint.load(folder, then.model, then.optimiser)
    before, after = moments_of(first), moments_of(then)
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert tensor.dtype == (torch.bfloat16 if loaded == "bf16" else torch.float32)
        torch.testing.assert_close(tensor, before[name].to(tensor.dtype), rtol=0, atol=0)
    then.run("text")


def test_routers_are_logged_layer_by_layer_and_drop_no_token(world: startup.World) -> None:
    """The bias is the one that the step routed with: nothing at first, then one correction up or down for every expert."""
    bench = Bench(world, "vl2")
    first, second = bench.run("multimodal", "text")
    moe, rate = bench.cfg.model.language.moe, bench.cfg.stage.expert_bias_rate
    assert moe is not None
    layers = bench.cfg.model.language.layers - moe.dense_layers
    for key in ("expert_load", "expert_max_violation", "expert_bias"):
        assert len(second[key]) == layers, key
    assert first["expert_bias"] == [[0.0] * moe.routed_experts] * layers
    for bias_e, load_e in zip(second["expert_bias"], first["expert_load"], strict=True):
        even = 1 / moe.routed_experts
        assert bias_e == pytest.approx([rate * ((even > load) - (even < load)) for load in load_e])
    tokens = sum(int((~micro.padding_t).sum()) for micro in tiny_batch(bench.cfg.model, 2, "text").micro_batches)
    assert [int(router.load_e.sum()) for router in bench.model.routers().values()] == [tokens * moe.top_k] * layers
