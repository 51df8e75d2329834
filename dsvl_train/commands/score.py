"""`dsvl score`: the loss of each conversation of a file."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from dsvl_train.commands.encode import add_mask_prompt, add_max_tiles


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser("score", help="teacher-forced loss of conversations, a JSON line each")
    parser.add_argument("--model", required=True, help="folder in a released format, checkpoint, or run folder (its latest checkpoint)")
    parser.add_argument("--samples", required=True, help="JSON list or JSON lines of messages and images")
    add_mask_prompt(parser)
    add_max_tiles(parser)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument(
        "--precision", choices=["fp32", "bf16"], default="fp32", help="of the model (default fp32); bf16 takes half the memory"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print tokens and loss_sum of each sample, in order."""
    import torch

    from dsvl_train.config.schema import EngineConfig, ParallelConfig
    from dsvl_train.evaluation.samples import encode_sample, load_processor, read_samples
    from dsvl_train.parallel.startup import start

    processor = load_processor(arguments.model, mask_prompt=arguments.mask_prompt == "true", max_tiles=arguments.max_tiles)
    samples = read_samples(arguments.samples)
    torch.backends.cudnn.allow_tf32 = False  # torch lets convolutions use TF32 on CUDA: three digits, where losses are compared to five
    engine = EngineConfig(device=arguments.device, precision=arguments.precision)
    world = start(engine, ParallelConfig(), seed=0)  # before anything that imports megatron-core
    from dsvl_train.evaluation.loading import load_model
    from dsvl_train.evaluation.scoring import score_sample

    loaded = load_model(arguments.model, world)
    for sample in samples:
        print(json.dumps(asdict(score_sample(loaded, encode_sample(processor, sample)))), flush=True)
    return 0
