"""Tokens per second of generation with and without the cache, on the demo's models with random weights.

python benchmarks/generation.py [--prompt-tokens 256] [--new-tokens 64]
"""

from __future__ import annotations

import argparse
import time
from types import SimpleNamespace
from typing import Any

import torch
import yaml

from dsvl_train.config.compose import CONF_DIR, from_plain_model
from dsvl_train.data.batch import IGNORE_INDEX
from dsvl_train.data.processor import Encoded
from dsvl_train.parallel.startup import World, start_alone


def build(name: str, world: World) -> Any:
    """A model of conf/model with random weights; it never ends an answer."""
    from dsvl_train.evaluation.loading import LoadedModel
    from dsvl_train.interop.neutral import neutral_run
    from dsvl_train.models.build import build_model

    config = from_plain_model(yaml.safe_load((CONF_DIR / "model" / f"{name}.yaml").read_text(encoding="utf-8")))
    cfg = neutral_run(config, "unused")
    model = build_model(config, cfg.stage, cfg.parallel, world, seed=0)
    for chunk in model.chunks.values():
        chunk.eval()
    return LoadedModel(cfg, world, model, SimpleNamespace(stop_ids=[]))  # type: ignore[arg-type]


def text_prompt(tokens: int, vocabulary: int, seed: int) -> Encoded:
    """Random ids, no image."""
    ids = torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(seed))
    nothing = torch.zeros(tokens, dtype=torch.bool)
    return Encoded(ids, torch.full_like(ids, IGNORE_INDEX), nothing, torch.zeros(0, 2, dtype=torch.int64), torch.empty(0), 0)


def main() -> None:
    """Print a line per model and number of prompts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--models", nargs="+", default=["demo_vl", "demo_vl2"])
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    arguments = parser.parse_args()
    world = start_alone(arguments.device)
    from dsvl_train.evaluation.generation import generate

    print(f"{arguments.prompt_tokens} tokens of prompt, {arguments.new_tokens} new; {torch.get_num_threads()} threads, {world.device}")
    for name in arguments.models:
        loaded = build(name, world)
        for count in (1, 8):
            prompts = [text_prompt(arguments.prompt_tokens, loaded.cfg.model.language.vocab_size, seed) for seed in range(count)]
            generate(loaded, prompts, 2)  # first calls are slow
            rates, answers = [], []
            for use_cache in (True, False):
                started = time.perf_counter()
                answers.append(generate(loaded, prompts, arguments.new_tokens, use_cache=use_cache))
                rates.append(count * arguments.new_tokens / (time.perf_counter() - started))
            same = "same tokens" if answers[0] == answers[1] else "tokens differ (rounding decides between near ties)"
            cached, anew = rates
            print(f"{name:10} x{count}: {cached:7.1f} tokens/s cached, {anew:7.1f} without, ratio {cached / anew:5.1f}, {same}", flush=True)


if __name__ == "__main__":
    main()
