"""What recomputation saves, and that it changes no number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dsvl_train.parallel import startup
from tests.bench import Bench
from tests.tiny import tiny_run


@pytest.fixture(autouse=True)
def world() -> Iterator[startup.World]:
    world = startup.start(tiny_run("vl").engine, tiny_run("vl").parallel, seed=0)
    yield world
    startup.stop()


def saved_bytes(bench: Bench, modality: str) -> int:
    """The most that autograd keeps between forward and backward pass of a micro-batch of one step, parameters apart."""
    parameters = {parameter.untyped_storage().data_ptr() for _, parameter in bench.model.named_parameters()}
    kept: list[torch.Tensor] = []
    most = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.detach())
        return tensor

    inner = bench.step._forward_step

    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal most
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = inner(*args, **kwargs)
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
        most = max(most, sum(size for place, size in storages.items() if place not in parameters))
        return result

    bench.step._forward_step = watched  # type: ignore[method-assign]
    bench.run(modality)
    return most


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
