"""What recomputation saves at the released models' widths: bytes that one more language layer keeps for the backward pass, per token.

python benchmarks/activation_memory.py [--tokens 512]

Counted, not timed, in bf16 on the CPU. Models are cut to a few layers and eight routed experts, which changes nothing that a layer keeps
per token but the router's scores.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dsvl_train.config.compose import compose_run
from dsvl_train.config.schema import ModelConfig, ParallelConfig
from dsvl_train.parallel import startup
from tests.bench import SavedActivations
from tests.tiny import tiny_run

LEVELS = ("none", "selective", "full")


def kept_by_a_layer(model: ModelConfig, level: str, tokens: int, world: startup.World) -> float:
    """Bytes per token: what one layer more keeps."""
    few = model.language.moe.dense_layers + 1 if model.language.moe else 1
    sizes = [_kept(model, layers, level, tokens, world) for layers in (few, few + 1)]
    return (sizes[1] - sizes[0]) / tokens


def _kept(model: ModelConfig, layers: int, level: str, tokens: int, world: startup.World) -> int:
    from dsvl_train.models.language import transformer_config
    from dsvl_train.models.vlm import LanguageChunk

    language = replace(model.language, layers=layers, vocab_size=128)
    if language.moe is not None:
        language.moe = replace(language.moe, routed_experts=8)
    parallel = ParallelConfig(recompute=level)  # type: ignore[arg-type]
    config = transformer_config(language, tiny_run("vl2").stage, parallel, world.params_dtype, on_cpu=True)
    chunk = LanguageChunk(replace(model, language=language), config, range(layers), vp_stage=None)
    for parameter in chunk.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    ids_t, cu_seqlens = torch.randint(0, 128, (tokens,)), torch.tensor([0, tokens], dtype=torch.int32)
    with SavedActivations(without=chunk.parameters()) as saved:
        loss_t = chunk(ids_t, cu_seqlens, torch.zeros(tokens, dtype=torch.bool), labels_t=ids_t)
    assert loss_t.requires_grad
    return saved.nbytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512, help="of the micro-batch")
    tokens = parser.parse_args().tokens
    tiny = tiny_run("vl2")
    world = replace(startup.start(tiny.engine, tiny.parallel, seed=0), params_dtype=torch.bfloat16)
    print(f"{'KiB per token and layer':<28}" + "".join(f"{level:>12}" for level in LEVELS))
    for name in ("deepseek_vl_1b", "deepseek_vl_7b", "deepseek_vl2_tiny", "deepseek_vl2_small", "deepseek_vl2"):
        family = "vl2" if "vl2" in name else "vl"
        model = compose_run([f"recipe=demo_{family}/align", f"model={name}", "data.seq_len=2048"]).model
        kept = [kept_by_a_layer(model, level, tokens, world) / 1024 for level in LEVELS]
        print(f"{name:<28}" + "".join(f"{size:>12.1f}" for size in kept), flush=True)
    startup.stop()


if __name__ == "__main__":
    main()
